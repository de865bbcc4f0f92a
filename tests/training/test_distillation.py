"""A distillation on two workers, from a saved model and a JSONL file to weights in the store."""

from __future__ import annotations

import json

import pytest
import torch

from ot_ray.data import DataConfig, load_sequences
from ot_ray.errors import NotFoundError
from ot_ray.evaluation import mean_loss
from ot_ray.model import ModelConfig, SplitPlan, emulate, load_emulator, load_model, load_tokenizer
from ot_ray.model.families import layers_of
from ot_ray.store import open_store
from ot_ray.training import Checkpoints, distilled_state, kept_layers

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def emulated(distilling):
    """The full model and its emulated models, before and after distilling."""
    plan, full = SplitPlan(**distilling["split"]), load_model(ModelConfig(**distilling["model"]))
    kept = kept_layers(6, plan)
    dropped, distilled = (emulate(full, plan, kept) for _ in range(2))
    load_emulator(distilled, plan, distilled_state(open_store(distilling["store"]), "nightly"))
    return full, dropped, distilled


def test_the_summary_says_what_was_done(group, distilling):
    assert group[0]["distilled"].keys() == group[1]["distilled"].keys()
    summary = group[0]["distilled"]
    config = ModelConfig(**distilling["model"])
    data = load_sequences(DataConfig(**distilling["data"]), load_tokenizer(config), 16)
    assert summary["steps"] == 12 and summary["documents"] == 52
    assert summary["tokens"] == data.counts.tokens and summary["data_digest"] == data.digest
    assert summary["last"]["loss"] < summary["first"]["loss"]
    assert summary["last"]["kd_loss"] < summary["first"]["kd_loss"]


def test_weights_history_and_checkpoints_are_in_the_store(group, distilling):
    store = open_store(distilling["store"])
    lines = store.read("runs/nightly/history.jsonl").decode().splitlines()
    history = [json.loads(line) for line in lines]
    assert [figures["step"] for figures in history] == list(range(1, 13))
    assert {"loss", "lm_loss", "kd_loss", "lr", "grad_norm"} <= history[0].keys()
    assert history[-1] == group[0]["distilled"]["last"]
    assert Checkpoints(store, "runs/nightly/checkpoints", {}).committed() == [5, 10]


def test_the_emulator_loads_and_only_it_has_changed(group, emulated):
    _, dropped, distilled = emulated
    pairs = list(zip(dropped.named_parameters(), distilled.named_parameters(), strict=True))
    changed = {name for (name, before), (_, after) in pairs if not torch.equal(before, after)}
    emulator = (".layers.2.", ".layers.3.")
    assert changed == {name for name, _ in dropped.named_parameters() if any(layer in name for layer in emulator)}


def test_the_distilled_emulator_is_nearer_to_the_middle(group, emulated, distilling):
    full, dropped, distilled = emulated
    tokenizer = load_tokenizer(ModelConfig(**distilling["model"]))
    sequences = load_sequences(DataConfig(**distilling["data"]), tokenizer, 16).sequences
    assert mean_loss(distilled, sequences) < mean_loss(dropped, sequences)
    ids = torch.stack([sequence.input_ids for sequence in sequences])
    with torch.no_grad():
        teacher = _after(full, 4, ids)
        distances = [(_after(model, 3, ids) - teacher).pow(2).mean() for model in (dropped, distilled)]
    assert distances[1] < distances[0]


def _after(model, layer, ids):
    seen = []
    handle = layers_of(model)[layer].register_forward_hook(
        lambda module, args, output: seen.append(output[0] if isinstance(output, tuple) else output)
    )
    model(ids, use_cache=False)
    handle.remove()
    return seen[0]


def test_a_run_that_has_not_finished_has_no_weights(distilling):
    with pytest.raises(NotFoundError, match=r"runs/other/emulator\.safetensors"):
        distilled_state(open_store(distilling["store"]), "other")
