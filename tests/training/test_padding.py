"""Columns that are padding in every row are not computed, and nothing that is learnt changes by that."""

from __future__ import annotations

import copy
import itertools
import json

import pytest
import torch

from ot_ray.data import Counts, PackedDataset, TokenSpan, collate, pack, rows_of
from ot_ray.model import LanguageModel
from ot_ray.training import DeepSpeedEngine, fit
from ot_ray.training.emulator_gap import held_out_text
from ot_ray.training.engine import TorchEngine
from tests.fixtures.models import tiny_model, tokens
from tests.training.samples import PATIENCE, run_group, training

SIZES = [[5, 4], [7], [3, 3, 4], [13]]
LENGTH = 24


def rows():
    """Four sequences of one to three documents; the longest fills 13 of 24 columns."""
    ids = iter(tokens(len(SIZES) * 3, LENGTH, seed=2).tolist())
    found = []
    for sizes in SIZES:
        spans = [TokenSpan(next(ids)[:size], [True] * size, splittable=False) for size in sizes]
        (row,) = pack(spans, LENGTH, pad_id=0)
        found.append(row)
    return found


def batch():
    return collate(rows())


def engine(model, **settings):
    config = training(batch_size=len(SIZES), grad_clip=0, warmup_steps=0, **settings)
    return TorchEngine(LanguageModel(model), config, "cpu")


@pytest.mark.parametrize("model_type", ["bloom", "gemma2", "gpt2", "llama", "mistral", "opt", "qwen3"])
@pytest.mark.parametrize("micro", [None, 1])
def test_loss_gradients_and_step_are_those_of_the_whole_columns(model_type, micro):
    model = tiny_model(model_type, depth=3).requires_grad_(True)
    whole = copy.deepcopy(model)
    # Compiled code has one shape, so that its engine cuts nothing; nothing here is compiled.
    expected = engine(whole, compile=True).step(batch(), 1e-3)
    found = engine(model, micro_batch_size=micro).step(batch(), 1e-3)
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "lengths"),
    [
        ({}, [13]),
        ({"micro_batch_size": 1}, [9, 7, 10, 13]),
        ({"micro_batch_size": 2}, [9, 13]),
        ({"compile": True}, [24]),
    ],
)
def test_each_pass_is_as_long_as_its_longest_row(settings, lengths):
    model = tiny_model("opt", depth=2).requires_grad_(True)
    seen = []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    engine(model, **settings).step(batch(), 1e-3)
    assert seen == lengths


@pytest.mark.parametrize(("compiled", "lengths"), [(False, {7, 9, 10, 13}), (True, {24})])
def test_tuning_gives_compiled_layers_one_shape(compiled, lengths, monkeypatch):
    # Compiling takes a minute, and what would be compiled is seen without.
    asked = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda layer, **options: asked.append(layer))
    model = tiny_model("opt", depth=2).requires_grad_(True)
    seen = set()
    model.model.decoder.layers[0].register_forward_pre_hook(lambda layer, inputs: seen.add(inputs[0].shape))
    fit(model, rows(), training(steps=8, batch_size=1, warmup_steps=0, compile=compiled))
    assert seen == {(1, length, model.config.hidden_size) for length in lengths}
    assert len(asked) == (2 if compiled else 0)


def test_held_out_text_is_cut_pass_by_pass_unless_it_meets_compiled_layers():
    data = PackedDataset(rows(), Counts(7, 39, 32, 0, {}), "digest")
    for compiled, lengths in ((False, [9, 7, 10, 13, 13]), (True, [24] * 5)):
        held_out = held_out_text(data, compiled)
        passes = [held_out.batch(chosen) for chosen in ([0], [1], [2], [3], [1, 3])]
        assert [each["labels"].shape[1] for each in passes] == lengths
        assert [int(each["real"].sum()) for each in passes] == [9, 7, 10, 13, 20]


def deepspeed_steps(folder):
    """On one rank of two: two steps at two micro-batch sizes, and the lengths of the passes."""
    seen = {}
    for micro in (None, 1):
        lengths = []
        config = training(batch_size=len(SIZES), grad_clip=0, warmup_steps=0, micro_batch_size=micro, zero_stage=3)
        sharded = DeepSpeedEngine(LanguageModel(tiny_model("opt", depth=2).requires_grad_(True)), config)
        sharded.module.register_forward_pre_hook(
            lambda module, args, kwargs, lengths=lengths: lengths.append(kwargs["input_ids"].shape[1]),
            with_kwargs=True,
        )
        share = rows_of(len(SIZES), sharded.rank, sharded.world_size)
        own = {name: tensor[share.start : share.stop] for name, tensor in batch().items()}
        seen[str(micro)] = {"figures": [sharded.step(own, 1e-3) for _ in range(2)], "lengths": lengths}
    (folder / f"{sharded.rank}.json").write_text(json.dumps(seen))


@pytest.mark.slow
@pytest.mark.timeout(2 * PATIENCE)
def test_sharded_ranks_compute_passes_of_their_own_lengths_and_the_same_losses(tmp_path):
    run_group(deepspeed_steps, 2, tmp_path)
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert [rank["None"]["lengths"] for rank in ranks] == [[9, 9], [13, 13]]
    assert [rank["1"]["lengths"] for rank in ranks] == [[9, 7, 9, 7], [10, 13, 10, 13]]
    whole = engine(tiny_model("opt", depth=2).requires_grad_(True), compile=True)
    for expected in [whole.step(batch(), 1e-3) for _ in range(2)]:
        for rank in ranks:
            for seen in rank.values():
                found = seen["figures"].pop(0)
                assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
                assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)


def test_documents_stay_apart_where_the_padding_is_cut():
    model = tiny_model("opt", depth=2).requires_grad_(True)
    whole = batch()
    with torch.no_grad():
        losses = []
        for ids, positions, real in zip(whole["input_ids"], whole["position_ids"], whole["real"], strict=True):
            starts = [*((positions == 0) & real).nonzero().flatten().tolist(), int(real.sum())]
            parts = [
                torch.nn.functional.cross_entropy(
                    model(ids[None, a:b], use_cache=False).logits[0, :-1], ids[a + 1 : b], reduction="none"
                )
                for a, b in itertools.pairwise(starts)
            ]
            losses.append(torch.cat(parts).mean())
    assert engine(model).step(whole, 1e-3)["loss"] == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)
