"""Offsite tuning from end to end on the base model that ships: the paper's inequalities, the same numbers
from the same seed, and nothing of the owner's where the customer looks."""

from __future__ import annotations

import json
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from matplotlib import image

from jobs import evaluate, make_emulator, plug_in, tune
from ot_ray.artifacts import BundleSource, generate_key
from ot_ray.data import DataConfig, StreamConfig, docstrings, language_reference
from ot_ray.evaluation import FiveSettings, GateConfig
from ot_ray.launch import JobSpec, RayJobLauncher, WorkerGroup, wait_for_job
from ot_ray.launch.cluster import ClusterAddress
from ot_ray.model import DistillLoss, Method, ModelConfig, SplitPlan
from ot_ray.training import TrainingConfig
from ot_ray.training.distill_config import DistillTraining

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

BASE = Path(make_emulator.__file__).parent / "base"
DEPTH, PLAN, KEPT, LENGTH = 10, SplitPlan(bottom=2, keep=2, top=2), [0, 5], 128
DISTILLING = DistillTraining(steps=24, batch_size=8, lr=1e-3, warmup_steps=2, zero_stage=3, seed=1)
TUNING = TrainingConfig(steps=40, batch_size=8, lr=1e-3, warmup_steps=2)
# Full fine-tuning learns faster, and is here for its place in the order alone.
FINE_TUNING = TrainingConfig(steps=12, batch_size=8, lr=1e-3, warmup_steps=2)
LORA = TrainingConfig(steps=40, batch_size=8, lr=4e-3, warmup_steps=2)
BOTTLENECK = LORA.model_copy(update={"lr": 8e-3})


@dataclass(frozen=True)
class Story:
    """The owner's and the customer's folders, and each verb on them."""

    place: Path
    keys: tuple[Path, Path]

    @property
    def model(self) -> ModelConfig:
        return ModelConfig(name="tiny", source=str(BASE))

    def data(self, name: str) -> DataConfig:
        return DataConfig(source=str(self.place / f"{name}.jsonl"))

    def bundle(self, public_key: str | None = None) -> BundleSource:
        return BundleSource(
            store=str(self.place / "bundles"), model="tiny", version="1", public_key=public_key or str(self.keys[1])
        )

    def emulator(self, version: str, **changes: Any) -> make_emulator.MakeEmulatorConfig:
        values: dict[str, Any] = {
            "model": self.model,
            "split": PLAN,
            "data": StreamConfig(source=str(self.place / "public.jsonl"), workers=1),
            "sequence_length": LENGTH,
            "loss": DistillLoss(),
            "training": DISTILLING,
            "store": str(self.place / "owner"),
            "bundles": str(self.place / "bundles"),
            "run": f"run-{version}",
            "version": version,
            "workers": WorkerGroup(count=2, ray_storage=str(self.place / "ray")),
            "private_key": str(self.keys[0]),
        }
        return make_emulator.MakeEmulatorConfig(**{**values, **changes})

    def tuning(self, output: str, **changes: Any) -> tune.TuneConfig:
        values: dict[str, Any] = {
            "bundle": self.bundle(),
            "data": self.data("train"),
            "sequence_length": LENGTH,
            "training": TUNING,
            "output": str(self.place / output),
        }
        return tune.TuneConfig(**{**values, **changes})

    def plug_in(self, adapter: str) -> dict[str, Any]:
        return plug_in.run(
            plug_in.PlugInConfig(
                model=self.model,
                bundle=self.bundle(),
                adapter=str(self.place / adapter),
                tenant="acme",
                suffix=adapter,
                store=str(self.place / "registry"),
                data=self.data("test"),
                sequence_length=LENGTH,
                max_perplexity_ratio=1.0,
            )
        )

    def evaluate(self, adapter: str) -> dict[str, Any]:
        return evaluate.run(
            evaluate.EvaluateConfig(
                model=self.model,
                bundle=self.bundle(),
                adapter=str(self.place / adapter),
                train=self.data("train"),
                test=self.data("test"),
                sequence_length=LENGTH,
                training=FINE_TUNING,
                output=str(self.place / "report"),
            )
        )

    def job_folder(self) -> Path:
        """What a tuning job is handed, as the quickstart and the service do it: data, settings, the public key."""
        folder = self.place / "job"
        folder.mkdir()
        shutil.copy(self.place / "train.jsonl", folder)
        shutil.copy(self.keys[1], folder / "owner.pem")
        settings = self.tuning("adapter", bundle=self.bundle("owner.pem"), data=DataConfig(source="train.jsonl"))
        (folder / "tune.yaml").write_text(yaml.safe_dump(settings.model_dump(mode="json")))
        return folder

    @cached_property
    def made(self) -> dict[str, Any]:
        """What the owner's job returned."""
        made = make_emulator.run(self.emulator("1", validation=self.data("test"), gate=GateConfig(min_gap=0.05)))
        assert made is not None
        return made


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As the workers and jobs have it: sums are then added in one order everywhere."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def story(local_ray: ClusterAddress, one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Story:
    """A bundle of the base, distilled by two workers and published."""
    place = tmp_path_factory.mktemp("pipeline")
    _write_texts(place)
    story = Story(place, generate_key(place / "keys"))
    assert story.made["published"] == "bundles/tiny/1"
    return story


@pytest.fixture(scope="module")
def tuned(story: Story, job_launcher: RayJobLauncher) -> list[str]:
    """The adapter `adapter`, tuned by a Ray job; the job's output."""
    shown: list[str] = []
    command = [sys.executable, "-m", "jobs.tune", "--config", "tune.yaml"]
    spec = JobSpec(f"tune-{story.place.name}", command, str(story.job_folder()), {"OMP_NUM_THREADS": "1"})
    wait_for_job(job_launcher, job_launcher.submit(spec), shown.append)
    return shown


@pytest.fixture(scope="module")
def report(story: Story, tuned: list[str]) -> dict[str, Any]:
    """The five settings of the adapter that the job tuned."""
    return story.evaluate("adapter")


def test_distilling_narrows_the_emulator_gap(story: Story) -> None:
    gap = story.made["emulator_gap"]
    assert gap["full"] < gap["emulated"] < gap["dropped"]


def test_the_owner_s_record_says_what_the_bundle_does_not(story: Story) -> None:
    record = json.loads((story.place / "owner/records/tiny/1.json").read_text())
    assert (record["depth"], record["kept"], record["bundle_id"]) == (DEPTH, KEPT, story.made["bundle_id"])

    folder = story.place / "bundles/bundles/tiny/1"
    assert json.loads((folder / "config.json").read_text())["num_hidden_layers"] == PLAN.depth
    for path in (path for path in folder.rglob("*.json") if not path.name.startswith("tokenizer")):
        keys, leaves = _contents(json.loads(path.read_text()))
        assert not {"depth", "kept"} & keys, path.name
        assert DEPTH not in leaves, path.name
        assert not any(str(story.place) in str(leaf) for leaf in leaves), path.name


def test_the_same_inputs_do_nothing_the_second_time(story: Story) -> None:
    # Anything that ran would look for this cluster.
    again = story.emulator("1", validation=story.data("test"), address="127.0.0.1:9")
    assert make_emulator.run(again) == {
        "published": "bundles/tiny/1",
        "version": "1",
        "run": "run-1",
        "bundle_id": story.made["bundle_id"],
        "emulator_gap": story.made["emulator_gap"],
        "already": True,
    }


def test_a_bundle_without_a_version_is_the_current_one(story: Story, tmp_path: Path) -> None:
    source = BundleSource(store=str(story.place / "bundles"), model="tiny", public_key=str(story.keys[1]))
    assert source.open(tmp_path / "bundle").manifest.bundle_id == story.made["bundle_id"]


def test_the_run_leaves_a_report(story: Story) -> None:
    run = story.place / "owner/runs/run-1"
    page = (run / "report-1.html").read_text()
    assert "Passed the gate" in page
    assert f"{story.made['emulator_gap']['emulated']:.4g}" in page
    assert image.imread(run / "report-1.png").std() > 0.01


def test_the_same_seed_distils_the_same_emulator(story: Story) -> None:
    make_emulator.run(story.emulator("again"))
    first, second = (story.place / f"owner/runs/run-{version}" for version in ("1", "again"))
    assert (first / "emulator.safetensors").read_bytes() == (second / "emulator.safetensors").read_bytes()
    assert _losses(first) == _losses(second)


def test_the_tuning_job_sees_what_it_may(story: Story, tuned: list[str], job_launcher: RayJobLauncher) -> None:
    code = (
        "import json, os, pathlib;"
        "files = sorted(str(path) for path in pathlib.Path().rglob('*') if path.is_file());"
        "print('SEEN', json.dumps([files, dict(os.environ)]))"
    )
    shown: list[str] = []
    command = [sys.executable, "-c", code]
    spec = JobSpec(f"look-{story.place.name}", command, str(story.place / "job"), {"OMP_NUM_THREADS": "1"})
    wait_for_job(job_launcher, job_launcher.submit(spec), shown.append)
    (line,) = (line for line in "".join(shown).splitlines() if line.startswith("SEEN"))
    files, environment = json.loads(line.removeprefix("SEEN"))

    assert files == ["owner.pem", "train.jsonl", "tune.yaml"]
    handed = b"".join((story.place / "job" / name).read_bytes() for name in files)
    for secret in (story.keys[0].read_bytes(), b"PRIVATE", str(BASE).encode(), str(story.keys[0]).encode()):
        assert secret not in handed
    owner_s = (str(BASE), str(story.keys[0]), str(story.place / "owner"))
    # Ray tells every job how it was started; the job's own folder is part of it.
    assert not [name for name, value in environment.items() if any(place in value for place in owner_s)]


def test_the_five_settings_are_in_the_paper_s_order(report: dict[str, Any]) -> None:
    settings = FiveSettings.of(report)
    assert settings.broken_promises() == []
    assert settings.ot_plug_in < 0.97 * settings.full_zero_shot
    assert settings.ot_plug_in < 0.97 * settings.ot_emulator
    assert settings.full_fine_tuned < 0.97 * settings.full_zero_shot


def test_the_same_seed_gives_the_same_numbers(story: Story, report: dict[str, Any]) -> None:
    tune.run(story.tuning("again"))
    first, second = (story.place / name / "adapter.safetensors" for name in ("adapter", "again"))
    # One was tuned by a job, the other here.
    assert first.read_bytes() == second.read_bytes()
    promoted, again = story.plug_in("adapter"), story.plug_in("again")
    assert promoted["report"] == again["report"]
    assert promoted["report"]["plug_in_perplexity"] == report["ot_plug_in"]
    assert promoted["report"]["full_perplexity"] == report["full_zero_shot"]
    assert promoted["model_id"].rpartition(":")[2] == again["model_id"].rpartition(":")[2]
    assert story.evaluate("again") == report


@pytest.mark.parametrize(
    ("method", "training", "file"),
    [("lora", LORA, "adapter_config.json"), ("bottleneck", BOTTLENECK, "adapter.safetensors")],
)
def test_other_methods_come_back_as_well(story: Story, method: Method, training: TrainingConfig, file: str) -> None:
    tune.run(story.tuning(method, method=method, training=training))
    assert (story.place / method / file).exists()
    report = story.plug_in(method)["report"]
    assert report["plug_in_perplexity"] < 0.99 * report["full_perplexity"]


def _write_texts(place: Path) -> None:
    """Public text that the base has seen, and a customer's topics that it has not."""
    library = Path(sysconfig.get_paths()["stdlib"])
    public = [text for package in ("asyncio", "email", "logging") for text in docstrings(library / package)]
    topics = [text for _, text in language_reference()]
    # Every tenth topic is about what 48 sequences hold.
    parts = {"public": public, "train": [text for i, text in enumerate(topics) if i % 10], "test": topics[::10]}
    for name, texts in parts.items():
        (place / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def _losses(run: Path) -> list[dict[str, float]]:
    steps = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    return [{name: step[name] for name in ("step", "lr", "loss", "lm_loss", "kd_loss", "grad_norm")} for step in steps]


def _contents(value: Any) -> tuple[set[str], set[Any]]:
    """All keys and all leaves of a JSON value."""
    if not isinstance(value, dict | list):
        return set(), {value}
    parts = [_contents(part) for part in (value.values() if isinstance(value, dict) else value)]
    keys = set(value) if isinstance(value, dict) else set()
    return keys.union(*(part[0] for part in parts)), set().union(*(part[1] for part in parts))
