"""`jobs.evaluate` on tasks of the lm-evaluation-harness: five settings side by side on Ray, kept by content."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing

pytest.importorskip("lm_eval", reason="the lm-eval extra is not installed")

from jobs import evaluate, make_emulator
from jobs.evaluation import scores
from jobs.evaluation.config import ALL, TaskEvaluation
from jobs.evaluation.models import Models, training_data
from jobs.evaluation.places import reachable
from ot_ray.artifacts import (
    Bundle,
    BundleSource,
    load_full,
    open_bundle,
    open_model_source,
    write_adapter,
    write_bundle,
)
from ot_ray.config import parse
from ot_ray.data import DataConfig, load_sequences
from ot_ray.data.tasks import load_task
from ot_ray.errors import ConfigError, DataError, LaunchError, OTRayError
from ot_ray.evaluation.harness import score
from ot_ray.launch.cluster import ClusterAddress
from ot_ray.model import ModelConfig, SplitPlan, adapter_state, emulate, plug_in, prepare_tuning
from ot_ray.training import TrainingConfig, fit
from tests.fixtures.local_tasks import write_tasks
from tests.jobs.conftest import Command

BASE = Path(make_emulator.__file__).parent / "base"
PLAN, KEPT = SplitPlan(bottom=2, keep=2, top=2), [0, 5]
MODEL = ModelConfig(name="base", source=str(BASE))
TASKS = ("local_arc", "local_wikitext")
NOWHERE = "127.0.0.1:9"


@dataclass(frozen=True)
class Owner:
    """A bundle of the base, two adapters of it, and tasks."""

    place: Path

    @property
    def bundle(self) -> Bundle:
        return open_bundle(self.place / "bundle")

    def config(self, cache: Path, training: dict[str, Any] | None = None, **harness: Any) -> evaluate.EvaluateConfig:
        values = {"tasks": TASKS, "tasks_folder": str(self.place / "tasks"), "cache": str(cache / "cache"), **harness}
        return evaluate.EvaluateConfig(
            model=MODEL,
            bundle=BundleSource(folder=str(self.place / "bundle")),
            adapter=str(self.place / "one"),
            harness=TaskEvaluation(**values),
            sequence_length=128,
            training=TrainingConfig(**{"steps": 3, "batch_size": 4, "lr": 1e-3, **(training or {})}),
            output=str(cache / "report"),
        )

    def plugged(self, adapter: str, model: Any) -> Any:
        """A tuned adapter in a model, put together here."""
        return plug_in(model, PLAN, torch.load(self.place / f"{adapter}.pt", weights_only=True))


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def owner(tmp_path_factory: pytest.TempPathFactory) -> Owner:
    place = tmp_path_factory.mktemp("owner")
    write_tasks(place)
    source = open_model_source(MODEL)
    emulated = emulate(load_full(MODEL, source=source), PLAN, KEPT)
    write_bundle(
        place / "bundle", emulated, source.tokenizer(), PLAN, name="base", version="1", card="# Base\n", recommended={}
    )
    bundle = open_bundle(place / "bundle")
    for seed, name in enumerate(("one", "other")):
        tuned = prepare_tuning(bundle.load_model(), PLAN, "full")
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in (one for one in tuned.parameters() if one.requires_grad):
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
        torch.save(adapter_state(tuned, PLAN), place / f"{name}.pt")
        write_adapter(place / name, tuned, bundle.manifest, method="full", steps=1, learning_rate=1e-4)
    return Owner(place)


def expected(owner: Owner, model: Any, task: str) -> dict[str, Any]:
    """A score that was computed in this process."""
    tokenizer = open_model_source(MODEL).tokenizer()
    return score(model, tokenizer, load_task(task, owner.place / "tasks")).model_dump(mode="json", exclude={"task"})


@pytest.fixture(scope="module")
def first(owner: Owner, local_ray: ClusterAddress, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """The place and result of a run of all five settings, each score a Ray task of its own."""
    place = tmp_path_factory.mktemp("first")
    return place, evaluate.run(owner.config(place, adapters={"local_wikitext": str(owner.place / "other")}))


@pytest.mark.slow
@pytest.mark.timeout(900)
class TestOnRay:
    def test_every_setting_is_the_model_it_says(self, owner: Owner, first: tuple[Path, Any]) -> None:
        found = first[1]["tasks"]
        assert tuple(found) == ALL
        full, emulated = load_full(MODEL), owner.bundle.load_model()
        for task, adapter in zip(TASKS, ("one", "other"), strict=True):
            models = {
                "full_zero_shot": full,
                "emulator_zero_shot": emulated,
                "ot_emulator": owner.plugged(adapter, emulated),
                "ot_plug_in": owner.plugged(adapter, full),
            }
            alone = {setting: expected(owner, model, task) for setting, model in models.items()}
            assert {setting: found[setting]["tasks"][task] for setting in models} == alone
        perplexities = [found[setting]["tasks"]["local_wikitext"]["metrics"]["word_perplexity"] for setting in ALL]
        assert len(set(perplexities)) == 5

    def test_the_reference_is_tuned_on_the_task_s_own_examples(self, owner: Owner, first: tuple[Path, Any]) -> None:
        config = owner.config(first[0])
        found = first[1]["tasks"]["full_fine_tuned"]["tasks"]
        for task in TASKS:
            model = load_full(MODEL).requires_grad_(True)
            data = DataConfig(source=f"task:{task}", tasks_folder=str(owner.place / "tasks"))
            torch.manual_seed(config.training.seed)
            fit(model, load_sequences(data, open_model_source(MODEL).tokenizer(), 128).sequences, config.training)
            assert found[task] == expected(owner, model, task)
        zero_shot = first[1]["tasks"]["full_zero_shot"]["tasks"]["local_wikitext"]["metrics"]
        assert found["local_wikitext"]["metrics"]["word_perplexity"] < zero_shot["word_perplexity"]

    def test_the_second_run_computes_nothing(
        self, owner: Owner, first: tuple[Path, Any], capsys: pytest.CaptureFixture[str]
    ) -> None:
        place, found = first
        assert found["scores_computed"] == 10
        capsys.readouterr()
        # Whatever ran would look for this cluster.
        again = owner.config(place, adapters={"local_wikitext": str(owner.place / "other")}, address=NOWHERE)
        repeated = evaluate.run(again)
        assert repeated == {**found, "scores_computed": 0}
        table = capsys.readouterr().out
        assert (place / "report/task_scores.txt").read_text() == table
        assert len(table.splitlines()) == 2 + len(ALL)
        assert json.loads((place / "report/task_scores.json").read_text()) == {"model": "base", **found["tasks"]}

    def test_only_what_changed_is_computed(self, owner: Owner, first: tuple[Path, Any]) -> None:
        place, found = first
        weights = {path.name: path.stat().st_mtime_ns for path in (place / "cache/weights").iterdir()}
        assert len(weights) == 2
        # The other adapter for arc too: two settings of one task change. And a task more, on one loaded model.
        changed = owner.config(
            place,
            tasks=(*TASKS, "local_webqs"),
            settings=("full_zero_shot", "ot_plug_in", "ot_emulator"),
            adapters=dict.fromkeys((*TASKS, "local_webqs"), str(owner.place / "other")),
            workers={"tasks_each": 3},
        )
        result = evaluate.run(changed)
        assert result["scores_computed"] == 2 + 3
        found_plugged = result["tasks"]["ot_plug_in"]["tasks"]
        model = owner.plugged("other", load_full(MODEL))
        assert found_plugged == {task: expected(owner, model, task) for task in (*TASKS, "local_webqs")}
        assert (
            result["tasks"]["full_zero_shot"]["tasks"]["local_arc"]
            == (found["tasks"]["full_zero_shot"]["tasks"]["local_arc"])
        )
        # A task whose reference is trained already is not trained again.
        assert {path.name: path.stat().st_mtime_ns for path in (place / "cache/weights").iterdir()} == weights

    def test_one_that_fails_names_itself_and_takes_no_other_with_it(
        self, owner: Owner, local_ray: ClusterAddress, tmp_path: Path
    ) -> None:
        folder = write_tasks(tmp_path)
        broken = (folder / "local_arc.yaml").read_text().replace("task: local_arc", "task: local_broken")
        (folder / "local_broken.yaml").write_text(broken + "process_results: !function failing.judge\n")
        (folder / "failing.py").write_text('def judge(doc, results):\n    raise KeyError("no such answer")\n')
        settings: dict[str, Any] = {
            "tasks": ("local_broken", "local_arc"),
            "tasks_folder": str(folder),
            "settings": ("full_zero_shot",),
            "workers": {"tasks_each": 2},
        }
        with pytest.raises(LaunchError, match=r"1 of 2 scores .*full_zero_shot on local_broken: KeyError") as raised:
            evaluate.run(owner.config(tmp_path, **settings))
        assert "on local_arc" not in str(raised.value)
        assert len(list((tmp_path / "cache/scores").iterdir())) == 1
        (folder / "failing.py").write_text('def judge(doc, results):\n    return {"acc": 1.0}\n')
        result = evaluate.run(owner.config(tmp_path, **settings))
        assert result["scores_computed"] == 1
        assert result["tasks"]["full_zero_shot"]["tasks"]["local_broken"]["metrics"] == {"acc": 1.0}

    def test_a_reference_that_cannot_be_trained_is_named(
        self, owner: Owner, local_ray: ClusterAddress, tmp_path: Path
    ) -> None:
        config = owner.config(tmp_path, {"lr": 1e30}, settings=("full_zero_shot", "full_fine_tuned"))
        with pytest.raises(LaunchError, match="2 of 4 scores") as raised:
            evaluate.run(config)
        for task in TASKS:
            assert f"full_fine_tuned on {task}: the loss" in str(raised.value)
        assert not (tmp_path / "cache/weights").exists()
        assert len(list((tmp_path / "cache/scores").iterdir())) == 2


def test_the_reference_may_be_trained_on_a_text(owner: Owner, tmp_path: Path) -> None:
    """One reference then serves all tasks, and another text makes another."""
    config = owner.config(tmp_path)
    own = Models(config, tmp_path)
    assert training_data(config, "local_arc").task == "local_arc"
    assert own.identity("full_fine_tuned", "local_arc") != own.identity("full_fine_tuned", "local_wikitext")
    seen = []
    for number, text in enumerate(("one", "two")):
        file = tmp_path / f"{number}.jsonl"
        file.write_text(json.dumps({"text": text}) + "\n")
        models = Models(config.model_copy(update={"train": DataConfig(source=str(file))}), tmp_path)
        seen += [models.identity("full_fine_tuned", task) for task in TASKS]
    assert seen[0] == seen[1] != seen[2] == seen[3]


def test_workers_find_what_the_command_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    values: dict[str, Any] = {
        "model": {"name": "base", "source": "model"},
        "bundle": {"store": "bundles", "model": "base", "public_key": "owner.pem"},
        "train": {"source": "text/*.jsonl"},
        "adapter": "s3://bucket/adapter?region=x",
        "harness": {"tasks_folder": "tasks", "cache": "cache", "tasks": ["piqa"], "adapters": {"piqa": "adapter"}},
        "training": {"steps": 1},
        "output": "report",
    }
    found = reachable(evaluate.EvaluateConfig.model_validate(values))
    assert found.bundle is not None and found.train is not None and found.harness is not None
    places = [found.model.source, found.bundle.public_key, found.train.source, found.harness.tasks_folder]
    assert places == [str(tmp_path / name) for name in ("model", "owner.pem", "text/*.jsonl", "tasks")]
    stores = [found.bundle.store, found.harness.cache, found.harness.adapters["piqa"]]
    assert stores == [(tmp_path / name).as_uri() for name in ("bundles", "cache", "adapter")]
    assert found.adapter is not None and found.adapter.startswith("s3://bucket/adapter?")
    # Names on the hub, and sources that are no files.
    values |= {"model": {"name": "base", "source": "facebook/opt-1.3b"}, "train": {"source": "task:piqa"}}
    elsewhere = reachable(evaluate.EvaluateConfig.model_validate(values))
    assert elsewhere.model.source == "facebook/opt-1.3b"
    assert elsewhere.train == DataConfig(source="task:piqa")


@pytest.mark.parametrize(
    ("harness", "error", "said"),
    [
        ({"tasks": ("local_ark",)}, ConfigError, "did you mean local_arc"),
        ({"tasks": ("openbookqa",)}, DataError, "allenai/openbookqa cannot be loaded"),
        ({"tasks_folder": "nowhere"}, ConfigError, "tasks_folder is .*nowhere"),
        ({"adapters": {"local_arc": "nowhere"}}, OTRayError, "nowhere"),
        ({"tasks": ("small_race",)}, ConfigError, r"small_race has no training .* train\.source=.* harness\.settings="),
    ],
)
def test_what_is_wrong_is_said_before_a_model_is_loaded(
    owner: Owner, tmp_path: Path, harness: dict[str, Any], error: type[Exception], said: str
) -> None:
    config = owner.config(tmp_path, address=NOWHERE, **harness)
    with pytest.raises(error, match=said):
        evaluate.run(config)
    assert not (tmp_path / "cache").exists()


def test_a_task_without_training_examples_is_scored_where_nothing_is_trained_on_it(
    owner: Owner, tmp_path: Path
) -> None:
    config = owner.config(tmp_path, tasks=("small_race",), settings=("full_zero_shot",))
    assert config.harness is not None
    assert [cell.name for cell in scores._cells(config, config.harness)] == ["full_zero_shot on small_race"]
    (tmp_path / "text.jsonl").write_text('{"text": "one"}\n')
    train = DataConfig(source=str(tmp_path / "text.jsonl"))
    config = owner.config(tmp_path, tasks=("small_race",)).model_copy(update={"train": train})
    assert config.harness is not None
    assert len(scores._cells(config, config.harness)) == len(ALL)


def test_the_text_is_checked_before_any_task_is_scored(owner: Owner, tmp_path: Path) -> None:
    text = {"test": DataConfig(source=str(tmp_path / "gone.jsonl")), "train": DataConfig(source="task:local_arc")}
    with pytest.raises(DataError, match=r"gone\.jsonl"):
        evaluate.run(owner.config(tmp_path, address=NOWHERE).model_copy(update=text))
    assert not (tmp_path / "cache").exists()


def test_a_bundle_of_another_model_is_refused(owner: Owner, tmp_path: Path) -> None:
    other = {"model": MODEL.model_copy(update={"name": "another"})}
    text = DataConfig(source=str(tmp_path / "text.jsonl"))
    for part in ({}, {"harness": None, "test": text, "train": text}):
        config = owner.config(tmp_path, address=NOWHERE).model_copy(update={**other, **part})
        with pytest.raises(ConfigError, match=r"bundle is of model 'base', but model\.name is 'another'"):
            evaluate.run(config)


def test_an_emulator_reads_text_with_the_tokenizer_of_its_bundle(owner: Owner, tmp_path: Path) -> None:
    """A bundle's identity covers its tokenizer, and not that of the source it once came from."""
    source = open_model_source(MODEL)
    emulated, tokenizer = owner.bundle.load_model(), source.tokenizer()
    first = TemplateProcessing(single="</s> $A", special_tokens=[("</s>", tokenizer.eos_token_id)])
    tokenizer.backend_tokenizer.post_processor = first  # type: ignore[attr-defined]
    write_bundle(tmp_path / "own", emulated, tokenizer, PLAN, name="base", version="2", card="# Base\n", recommended={})
    config = owner.config(tmp_path, tasks=("local_wikitext",), settings=("emulator_zero_shot",))
    config = config.model_copy(update={"bundle": BundleSource(folder=str(tmp_path / "own"))})
    assert config.harness is not None
    (cell,) = scores._cells(config, config.harness)
    wanted = {"setting": cell.setting, "task": cell.task, "identity": cell.identity}
    payload = {"config": config.model_dump(mode="json"), "cells": [wanted], "names": [cell.name]}
    kept, reason = scores.score_share(payload)[cell.name]
    assert kept is not None and not reason
    task = load_task("local_wikitext", owner.place / "tasks")
    alone = score(emulated, tokenizer, task).model_dump(mode="json")
    assert kept == alone and {**kept, "task": ""} != {**expected(owner, emulated, "local_wikitext"), "task": ""}


SOUND = {"model": {"name": "base", "source": "base"}, "training": {"steps": 1}, "output": "report"}
WITH_BUNDLE = {**SOUND, "bundle": {"folder": "bundle"}}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (SOUND, "test is required, or harness"),
        ({**SOUND, "harness": {}}, "bundle is required for these settings"),
        ({**WITH_BUNDLE, "harness": {}}, "adapter is required .* by harness.settings"),
        ({**WITH_BUNDLE, "test": {"source": "a"}, "adapter": "a"}, "train is required"),
        ({**SOUND, "harness": {"settings": ["plug_in"]}}, "harness.settings.0 is 'plug_in'"),
        ({**SOUND, "harness": {"settings": []}}, "harness.settings"),
        ({**WITH_BUNDLE, "adapter": "a", "harness": {"adapters": {"arc": "b"}}}, "adapters names arc"),
    ],
)
def test_settings_that_are_not_complete(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse(evaluate.EvaluateConfig, values, "evaluate.yaml")


@pytest.mark.parametrize(
    "values",
    [
        {**SOUND, "harness": {"settings": ["full_zero_shot", "full_fine_tuned"]}},
        {**WITH_BUNDLE, "harness": {"settings": ["emulator_zero_shot"]}},
        {**WITH_BUNDLE, "harness": {"tasks": ["piqa"], "settings": ["ot_plug_in"], "adapters": {"piqa": "b"}}},
    ],
)
def test_nothing_is_asked_for_that_no_setting_needs(values: dict[str, Any]) -> None:
    assert parse(evaluate.EvaluateConfig, values, "evaluate.yaml").harness is not None


def test_the_command_takes_tasks(owner: Owner, command: Command, tmp_path: Path) -> None:
    ended = command(
        "evaluate",
        "model.name=base",
        f"model.source={BASE}",
        "harness.tasks=[local_ark]",
        "harness.settings=[full_zero_shot]",
        f"harness.tasks_folder={owner.place / 'tasks'}",
        f"output={tmp_path / 'report'}",
    )
    assert ended.code == 2
    assert "did you mean local_arc" in ended.err
