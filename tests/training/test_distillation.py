"""Distillations of a saved model on real ranks, from text in files to weights in the store: against one process of
plain PyTorch, and against themselves when they are interrupted and go on with another number of ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ot_ray.artifacts import load_emulated, load_full, open_model_source
from ot_ray.data import DataConfig, load_sequences, source_digest
from ot_ray.data.streaming import open_stream
from ot_ray.errors import NotFoundError
from ot_ray.evaluation import perplexity
from ot_ray.model import DistillLoss, DistillModel, ModelConfig, SplitPlan, load_emulator
from ot_ray.store import open_store
from ot_ray.training import (
    Checkpoints,
    DistillConfig,
    TorchEngine,
    distilled_state,
    kept_layers,
    train,
)
from tests.artifacts.samples import tiny_tokenizer
from tests.fixtures.models import VOCAB, tiny_model
from tests.training.distilling import distil, distil_until
from tests.training.samples import PATIENCE, run_group

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2 * PATIENCE)]

STEPS, SAVED, STOPPED = 8, 3, 5
COMPARED = ("loss", "lm_loss", "kd_loss", "grad_norm", "lr")


@pytest.fixture(scope="module")
def values(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The plain values of a `DistillConfig` over a saved model, JSONL files and a store folder."""
    folder = tmp_path_factory.mktemp("distilling")
    tiny_model("llama").save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    for name, count, start in (("text", 120, 0), ("held-out", 4, 50_000)):
        rows = [{"text": " ".join(_words(start + 31 * i, 20 + i % 30))} for i in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {
        "model": {"name": "tiny", "source": str(folder / "model")},
        "split": {"bottom": 2, "keep": 2, "top": 1},
        "data": {"source": str(folder / "text.jsonl"), "workers": 1, "shuffle_window": 8, "passes": 2},
        "validation": {"source": str(folder / "held-out.jsonl")},
        "sequence_length": 16,
        "training": {
            "steps": STEPS,
            "batch_size": 4,
            "micro_batch_size": 2,
            "lr": 3e-3,
            "zero_stage": 3,
            "checkpoint_every": SAVED,
        },
        "store": str(folder / "store"),
        "run": "undisturbed",
    }


def _words(start: int, count: int) -> list[str]:
    return [f"w{2 + (start + i * i) % (VOCAB - 2)}" for i in range(count)]


@pytest.fixture(scope="module")
def undisturbed(values, tmp_path_factory) -> list[dict[str, Any]]:
    """What each of two ranks under ZeRO-3 returned."""
    return _distilled(values, 2, tmp_path_factory.mktemp("undisturbed"))


@pytest.fixture(scope="module")
def alone(values) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """History and weights of the same distillation in this process: the whole model, plain PyTorch."""
    config = DistillConfig.model_validate(values)
    source = open_model_source(config.model)
    training = config.training.model_copy(update={"zero_stage": 0, "checkpoint_every": 0, "micro_batch_size": 4})
    data = config.data.model_copy(update={"workers": 0})
    batches = open_stream(data, source.tokenizer(), 16, training.batch_size, training.seed)
    model = DistillModel(load_full(config.model), config.split, kept_layers(6, config.split), DistillLoss())
    engine = TorchEngine(model, training, device="cpu")
    history = train(engine, batches, training).history
    batches.close()
    return history, model.emulator_state(engine.trainable_state())


def _distilled(values: dict[str, Any], ranks: int, folder: Path) -> list[dict[str, Any]]:
    run_group(distil, ranks, values, folder)
    return [json.loads((folder / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(ranks)]


def _history(values: dict[str, Any]) -> list[dict[str, float]]:
    lines = open_store(values["store"]).read(f"runs/{values['run']}/history.jsonl").decode().splitlines()
    return [json.loads(line) for line in lines]


def _assert_same(history: list[dict[str, float]], expected: list[dict[str, float]], rel: float) -> None:
    assert [entry["step"] for entry in history] == [entry["step"] for entry in expected]
    for ours, theirs in zip(history, expected, strict=True):
        assert {name: ours[name] for name in COMPARED} == pytest.approx(
            {name: theirs[name] for name in COMPARED}, rel=rel
        )


def test_sharded_streaming_and_split_gives_what_one_plain_process_gives(values, undisturbed, alone):
    history, state = alone
    _assert_same(_history(values), history, rel=1e-4)
    distilled = distilled_state(open_store(values["store"]), values["run"])
    assert distilled.keys() == state.keys()
    for name, tensor in distilled.items():
        torch.testing.assert_close(tensor, state[name], rtol=1e-4, atol=1e-5)


def test_every_rank_returns_the_same_summary(values, undisturbed):
    measured = ("steps", "data_digest", "perplexity")
    assert {name: undisturbed[0][name] for name in measured} == {name: undisturbed[1][name] for name in measured}
    summary, history = undisturbed[0], _history(values)
    assert summary["steps"] == STEPS and summary["data_digest"] == source_digest(DataConfig(**_plain(values["data"])))
    assert summary["first"] == history[0] and summary["last"] == history[-1]
    assert history[-1]["workers"] == 2 and history[-1]["tokens_per_s"] > 0
    assert Checkpoints(open_store(values["store"]), "runs/undisturbed/checkpoints", {}).committed() == [6, STEPS]


def _plain(data: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in data.items() if name in DataConfig.model_fields}


def test_perplexities_are_those_of_the_models_themselves(values, undisturbed):
    model, plan = ModelConfig(**values["model"]), SplitPlan(**values["split"])
    held_out = load_sequences(DataConfig(**values["validation"]), open_model_source(model).tokenizer(), 16).sequences
    # As many as do not divide over the ranks and passes.
    assert len(held_out) % 4
    emulated = load_emulated(model, plan, kept_layers(6, plan))
    expected = {"full": perplexity(load_full(model), held_out), "dropped": perplexity(emulated, held_out)}
    load_emulator(emulated, plan, distilled_state(open_store(values["store"]), values["run"]))
    expected["emulated"] = perplexity(emulated, held_out)
    assert undisturbed[0]["perplexity"] == pytest.approx(expected, rel=1e-4)
    assert expected["emulated"] < expected["dropped"]


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 3)])
def test_a_run_goes_on_with_another_number_of_ranks(values, undisturbed, tmp_path, before, after):
    moved = {**values, "run": f"from-{before}-to-{after}"}
    run_group(distil_until, before, moved, STOPPED)
    assert Checkpoints(open_store(values["store"]), f"runs/{moved['run']}/checkpoints", {}).committed() == [SAVED]
    summaries = _distilled(moved, after, tmp_path)
    history = _history(moved)
    _assert_same(history, _history(values), rel=1e-4)
    assert [entry["step"] for entry in history if entry.get("resumed")] == [SAVED + 1]
    assert [entry["workers"] for entry in history] == [before] * SAVED + [after] * (STEPS - SAVED)
    assert summaries[0]["perplexity"] == pytest.approx(undisturbed[0]["perplexity"], rel=1e-4)


def test_held_out_text_that_is_changed_later_is_measured_anew(values, undisturbed, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"text": " ".join(_words(900, 60))}) + "\n", encoding="utf-8")
    again = _distilled({**values, "validation": {"source": str(other)}}, 1, tmp_path)[0]["perplexity"]
    model, plan = ModelConfig(**values["model"]), SplitPlan(**values["split"])
    held_out = load_sequences(DataConfig(source=str(other)), open_model_source(model).tokenizer(), 16).sequences
    emulated = load_emulated(model, plan, kept_layers(6, plan))
    load_emulator(emulated, plan, distilled_state(open_store(values["store"]), values["run"]))
    # How far the layers alone were behind on this text, a run that is done can no longer tell.
    assert again == pytest.approx(
        {"full": perplexity(load_full(model), held_out), "emulated": perplexity(emulated, held_out)}, rel=1e-4
    )


def test_a_run_that_has_not_finished_has_no_weights(values):
    with pytest.raises(NotFoundError, match=r"runs/other/emulator\.safetensors"):
        distilled_state(open_store(values["store"]), "other")
