"""Distilling emulators that will be pruned and quantized, on real ranks: against one process of plain PyTorch, and
against what is packed in the end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ot_ray.artifacts import load_emulated, load_full, open_model_source
from ot_ray.data import DataConfig, load_sequences
from ot_ray.data.streaming import open_stream
from ot_ray.evaluation import perplexity
from ot_ray.model import DistillLoss, DistillModel, EmulatorConfig, ModelConfig, SplitPlan, compress, load_emulator
from ot_ray.store import open_store
from ot_ray.training import Checkpoints, DistillConfig, TorchEngine, distilled_state, kept_layers, train
from tests.artifacts.samples import tiny_tokenizer
from tests.fixtures.models import VOCAB, tiny_model
from tests.training.distilling import distil, distil_until
from tests.training.samples import PATIENCE, run_group

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2 * PATIENCE)]

STEPS, SAVED, STOPPED = 6, 2, 3
PRUNED = {"sparsity": 0.5}
BOTH = {**PRUNED, "bits": 4, "group_size": 16}
DEPTH = 6


@pytest.fixture(scope="module")
def values(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The plain values of a `DistillConfig` over a saved model, JSONL files and a store folder."""
    folder = tmp_path_factory.mktemp("packing")
    tiny_model("llama", DEPTH).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    for name, count, start in (("text", 80, 0), ("held-out", 4, 50_000)):
        rows = [
            {"text": " ".join(f"w{2 + (start + 31 * i + j * j) % (VOCAB - 2)}" for j in range(30))}
            for i in range(count)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {
        "model": {"name": "tiny", "source": str(folder / "model")},
        "split": {"bottom": 2, "keep": 2, "top": 1},
        "emulator": BOTH,
        "data": {"source": str(folder / "text.jsonl"), "workers": 0, "shuffle_window": 8, "passes": 2},
        "validation": {"source": str(folder / "held-out.jsonl")},
        "sequence_length": 16,
        "training": {
            "steps": STEPS,
            "batch_size": 4,
            "lr": 3e-3,
            "weight_decay": 0.1,
            "zero_stage": 3,
            "checkpoint_every": SAVED,
        },
        "store": str(folder / "store"),
        "run": "undisturbed",
    }


def _words(start: int) -> list[str]:
    return [f"w{2 + (start + i * i) % (VOCAB - 2)}" for i in range(30)]


def _distilled(values: dict[str, Any], ranks: int, folder: Path) -> dict[str, Any]:
    run_group(distil, ranks, values, folder)
    return json.loads((folder / "0.json").read_text(encoding="utf-8"))


def _with(values: dict[str, Any], run: str, **training: Any) -> dict[str, Any]:
    return {**values, "run": run, "training": {**values["training"], **training}}


@pytest.fixture(scope="module")
def undisturbed(values, tmp_path_factory) -> dict[str, Any]:
    """What two ranks under ZeRO-3 returned."""
    return _distilled(values, 2, tmp_path_factory.mktemp("undisturbed"))


def _alone(values: dict[str, Any]) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """History and weights of the same distillation in this process: the whole model, plain PyTorch."""
    config = DistillConfig.model_validate(values)
    source = open_model_source(config.model)
    training = config.training.model_copy(update={"zero_stage": 0, "checkpoint_every": 0})
    batches = open_stream(config.data, source.tokenizer(), 16, training.batch_size, training.seed)
    kept = kept_layers(DEPTH, config.split)
    model = DistillModel(load_full(config.model), config.split, kept, DistillLoss(), emulator=config.emulator)
    engine = TorchEngine(model, training, device="cpu")
    history = train(engine, batches, training).history
    batches.close()
    return history, model.emulator_state(engine.trainable_state())


def _half_pruned(state: dict[str, torch.Tensor]) -> bool:
    return {float((tensor == 0).float().mean()) for tensor in state.values() if tensor.dim() == 2} == {0.5}


def _state(values: dict[str, Any], run: str) -> dict[str, torch.Tensor]:
    return distilled_state(open_store(values["store"]), run)


def _models(values: dict[str, Any]) -> tuple[ModelConfig, SplitPlan, Any, Any]:
    model, plan = ModelConfig(**values["model"]), SplitPlan(**values["split"])
    text = DataConfig(**values["validation"])
    held_out = load_sequences(text, open_model_source(model).tokenizer(), 16).sequences
    return model, plan, load_emulated(model, plan, kept_layers(DEPTH, plan)), held_out


@pytest.mark.parametrize(("stage", "ranks"), [(0, 2), (1, 1), (2, 1), (3, 2)])
def test_every_stage_computes_and_learns_through_codes(values, undisturbed, tmp_path, stage, ranks):
    # Beyond the first step, weights that differ by rounding alone may round to different codes.
    expected = _alone(values)[0][0]
    run = "undisturbed" if stage == 3 else f"stage-{stage}"
    summary = undisturbed if stage == 3 else _distilled(_with(values, run, zero_stage=stage), ranks, tmp_path)
    for name in ("loss", "lm_loss", "kd_loss", "grad_norm"):
        assert summary["first"][name] == pytest.approx(expected[name], rel=1e-4), name
    assert summary["last"]["loss"] < summary["first"]["loss"] and _half_pruned(_state(values, run))


def test_a_sharded_run_goes_on_with_the_weights_that_it_pruned_first(values, tmp_path):
    moved = {**_with(values, "moved"), "emulator": PRUNED}
    run_group(distil_until, 2, moved, STOPPED)
    assert Checkpoints(open_store(values["store"]), "runs/moved/checkpoints", {}).committed() == [SAVED]
    _distilled(moved, 1, tmp_path)
    state, expected = _state(values, "moved"), _alone(moved)[1]
    assert state.keys() == expected.keys() and _half_pruned(state)
    for name, tensor in state.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-5)
        assert torch.equal(tensor == 0, expected[name] == 0), name


def test_the_gap_is_that_of_what_is_published(values, undisturbed):
    model, plan, emulated, held_out = _models(values)
    way = EmulatorConfig(**values["emulator"])
    expected = {"full": perplexity(load_full(model), held_out)}
    expected["dropped"] = perplexity(compress(emulated, plan, way), held_out)
    emulated = load_emulated(model, plan, kept_layers(DEPTH, plan))
    load_emulator(emulated, plan, _state(values, "undisturbed"))
    uncompressed = perplexity(emulated, held_out)
    expected["emulated"] = perplexity(compress(emulated, plan, way), held_out)
    assert undisturbed["perplexity"] == pytest.approx(expected, rel=1e-5)
    # What the run left, and what it started from, would have given other figures.
    assert all(other != pytest.approx(expected["emulated"], rel=1e-4) for other in (uncompressed, expected["dropped"]))


def test_without_steps_it_is_compressed_and_measured(values, tmp_path):
    summary = _distilled(_with(values, "undistilled", steps=0), 1, tmp_path)
    model, plan, emulated, held_out = _models(values)
    way = EmulatorConfig(**values["emulator"])
    load_emulator(emulated, plan, _state(values, "undistilled"))
    found = perplexity(compress(emulated, plan, way), held_out)
    untouched = compress(load_emulated(model, plan, kept_layers(DEPTH, plan)), plan, way)
    assert found == perplexity(untouched, held_out)
    assert summary["steps"] == 0 and summary["first"] is summary["last"] is None
    expected = {"full": perplexity(load_full(model), held_out), "dropped": found, "emulated": found}
    assert summary["perplexity"] == pytest.approx(expected, rel=1e-5)


def test_in_bfloat16_what_is_packed_is_what_passes_saw(values, tmp_path):
    """Weights are left rounded as the passes saw them, so that they round to the same codes."""
    _distilled(_with(values, "bfloat16", precision="bfloat16", zero_stage=1), 1, tmp_path)
    state = _state(values, "bfloat16")
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    assert all(torch.equal(tensor, tensor.bfloat16().float()) for tensor in state.values())
    assert _half_pruned(state)
