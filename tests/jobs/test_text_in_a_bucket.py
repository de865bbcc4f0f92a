"""Every verb that reads text reads it from a bucket as it does from a file, over a real S3 server."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from jobs import evaluate, plug_in
from jobs.studies.config import StudyConfig
from jobs.studies.texts import read_texts
from jobs.tuning.config import TuneConfig
from jobs.tuning.work import Work, open_work
from ot_ray.artifacts import open_model_source
from ot_ray.config import parse
from ot_ray.store import open_store
from tests.jobs.scene import write_data

Place = Callable[[str], str]


@pytest.fixture
def places(scene: Path, s3_url: str) -> tuple[Place, Place]:
    """Where two texts lie, by name: here, and in a bucket."""
    parts = urlsplit(s3_url)
    write_data(scene / "test.jsonl", rows=6)
    store = open_store(f"s3://{parts.netloc}/text?{parts.query}")
    for name in ("train", "test"):
        store.write(f"{name}.jsonl", (scene / f"{name}.jsonl").read_bytes())
    return (
        lambda name: str(scene / f"{name}.jsonl"),
        lambda name: f"s3://{parts.netloc}/text/{name}.jsonl?{parts.query}",
    )


def test_tuning(scene: Path, places: tuple[Place, Place]) -> None:
    works = []
    for place in places:
        values: dict[str, Any] = {
            "bundle": {"folder": str(scene / "bundle")},
            "data": {"source": place("train")},
            "validation": {"source": place("test")},
            "sequence_length": 16,
            "training": {"steps": 1},
            "output": str(scene / "tuned"),
        }
        work = open_work(parse(TuneConfig, values, "the test"), scene / "cache")
        assert isinstance(work, Work) and work.held_out
        works.append((work.digest, [one.input_ids.tolist() for one in work.held_out]))
    assert works[0] == works[1]


def test_a_study(scene: Path, places: tuple[Place, Place]) -> None:
    contents = []
    for place in places:
        text = {"source": place("train")}
        values = {
            "model": {"name": "tiny", "source": str(scene / "full")},
            "data": {"public": text, "train": text, "test": {"source": place("test")}},
            "sequence_length": 16,
            "distil": {"steps": 1},
            "tune": {"steps": 1},
        }
        config = parse(StudyConfig, values, "the test")
        assert config.model is not None
        contents.append(read_texts(config, open_model_source(config.model))[1])
    assert contents[0] == contents[1]


def test_perplexities_and_plugging_in(scene: Path, places: tuple[Place, Place]) -> None:
    common: dict[str, Any] = {
        "model": {"name": "tiny", "source": str(scene / "full")},
        "bundle": {"folder": str(scene / "bundle")},
        "adapter": str(scene / "adapter"),
        "sequence_length": 16,
    }
    measured, reports = [], []
    for number, place in enumerate(places):
        values = {**common, "train": {"source": place("train")}, "test": {"source": place("test")}}
        values |= {"training": {"steps": 1, "batch_size": 2}, "output": str(scene / "report")}
        measured.append(evaluate.measure(parse(evaluate.EvaluateConfig, values, "the test")))
        values = {**common, "tenant": "t", "store": str(scene / f"plugs{number}"), "data": {"source": place("test")}}
        reports.append(plug_in.run(parse(plug_in.PlugInConfig, values, "the test"))["report"])
    assert measured[0] == measured[1] and measured[0].method == "full"
    assert reports[0] == reports[1] and reports[0]["plug_in_perplexity"] == measured[0].ot_plug_in
