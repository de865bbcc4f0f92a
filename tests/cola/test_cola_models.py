"""Gradient learning on transformers: the paper's loop, ten steps against PEFT's LoRA, many customers in one pass."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.nn import functional as F
from torch.optim import Optimizer
from transformers import PreTrainedModel

from ot_ray.cola import (
    Alone,
    Auxiliary,
    AuxiliaryConfig,
    Collaboration,
    Fitter,
    FittingConfig,
    Joint,
    Merging,
    Taps,
    customers_loss,
    find_sites,
    gradients,
)
from tests.fixtures.models import tiny_model, tokens

SITES = {
    "gpt2": ("*.c_attn", "*.mlp.c_proj", "*.wte"),
    "llama": ("*.q_proj", "*.v_proj", "*.down_proj"),
    "opt": ("*.k_proj", "*.fc1", "*.fc2"),
}
OPTIMIZERS: dict[str, Callable[[list[Tensor]], Optimizer]] = {
    "sgd": lambda tensors: torch.optim.SGD(tensors, lr=3.0, momentum=0.9),
    "adamw": lambda tensors: torch.optim.AdamW(tensors, lr=3e-3, weight_decay=0.1),
}
EXACT = {"rtol": 1e-9, "atol": 1e-11}
RANK, ALPHA, STEPS = 2, 6, 10


def model_of(model_type: str) -> PreTrainedModel:
    """In float64, with weights that leave gradients of a useful size."""
    model = tiny_model(model_type, depth=2).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    return model


def low_rank(model: PreTrainedModel, model_type: str, seed: int = 0, rank: int = RANK) -> Auxiliary:
    sites = find_sites(model, SITES[model_type])
    return Auxiliary(sites, AuxiliaryConfig(rank=rank, alpha=ALPHA, seed=seed), dtype=torch.float64)


def stirred(auxiliary: Auxiliary, seed: int) -> Auxiliary:
    """With noise everywhere, as after some fits."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in auxiliary.tensors.values():
        tensor.add_(torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype), alpha=0.05)
    return auxiliary


def lora_of(model: PreTrainedModel, auxiliary: Auxiliary) -> PeftModel:
    """PEFT's LoRA on a copy, with the auxiliary's factors."""
    config = LoraConfig(
        r=auxiliary.config.rank,
        lora_alpha=ALPHA,
        target_modules=list(auxiliary.sites),
        fan_in_fan_out=model.config.model_type == "gpt2",
    )
    peft = get_peft_model(copy.deepcopy(model), config)
    factors = dict(peft.named_parameters())
    with torch.no_grad():
        for name, tensor in auxiliary.tensors.items():
            head, dot, tail = name.partition(".weight")
            factors[f"base_model.model.{head}.default{dot}{tail}"].copy_(tensor)
    return peft  # type: ignore[return-value]


def language_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """As Transformers has it, but in float64: its own is taken in float32."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def factors_of(peft: PeftModel, name: str) -> Tensor:
    head, dot, tail = name.partition(".weight")
    return dict(peft.named_parameters())[f"base_model.model.{head}.default{dot}{tail}"]


def test_the_papers_loop() -> None:
    model = tiny_model("llama", depth=2)
    batches = [{"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)} for ids in [tokens(4)] * 30]
    losses = []
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    sites = find_sites(model, "*_proj")
    auxiliary = Auxiliary(sites, AuxiliaryConfig(rank=8))
    fitter = Fitter(auxiliary, lambda tensors: torch.optim.AdamW(tensors, lr=1e-2), FittingConfig(interval=2))
    with Taps(model, sites, Joint(auxiliary), device="cpu") as taps:
        for inputs in batches:
            with taps.batch(mask=inputs["attention_mask"]) as batch:
                loss = model(**inputs).loss
                loss.backward()
            fitter.collect(batch.pairs()["joint"])
            losses.append(loss.item())
    fitter.flush()

    assert losses[-1] < 0.8 * losses[0]
    assert losses[0] == losses[1] > losses[2]
    assert fitter.steps == 15
    # The base is what it was, and may be trained again.
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


# GPT-2's table is the head's, too, so that it cannot be merged.
@pytest.mark.parametrize(
    ("model_type", "merged"), [("gpt2", False), ("llama", False), ("llama", True), ("opt", False), ("opt", True)]
)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_ten_steps_are_ten_steps_of_lora(model_type: str, optimizer: str, merged: bool) -> None:
    model = model_of(model_type)
    auxiliary = low_rank(model, model_type)
    lora = lora_of(model, auxiliary)
    batches = [tokens(3, seed=seed) for seed in range(STEPS)]
    theirs = OPTIMIZERS[optimizer]([parameter for parameter in lora.parameters() if parameter.requires_grad])
    for ids in batches:
        language_loss(lora(input_ids=ids).logits, ids).backward()
        theirs.step()
        theirs.zero_grad()
    fitter, mode = Fitter(auxiliary, OPTIMIZERS[optimizer]), Joint(auxiliary)
    merging = Merging(model, auxiliary.sites) if merged else None
    with Taps(model, auxiliary.sites, mode, merged=merged) as taps:
        for ids in batches:
            with taps.batch() as batch:
                language_loss(model(input_ids=ids).logits, ids).backward()
            fitter.collect(batch.pairs()["joint"])
            if merging is not None:
                merging.merge(mode.summands())
    start, moved = low_rank(model, model_type), []
    for name, tensor in auxiliary.tensors.items():
        torch.testing.assert_close(tensor.detach(), factors_of(lora, name).detach(), **EXACT)
        moved.append(float((tensor - start.tensors[name]).detach().abs().max()))
    # Every factor has gone a way beside which the tolerance is nothing.
    assert min(moved) > 1e-8
    assert max(moved) > 1e-2


@pytest.mark.parametrize("model_type", SITES)
def test_customers_in_one_batch_are_customers_alone(model_type: str) -> None:
    model = model_of(model_type)
    kinds = {"ada": ("low_rank", 2), "bob": ("mlp", 4), "cyd": ("low_rank", 3), "dan": ("linear", 1)}
    sites = find_sites(model, SITES[model_type])
    auxiliaries = {
        name: stirred(Auxiliary(sites, AuxiliaryConfig(kind=kind, rank=rank), dtype=torch.float64), seed)
        for seed, (name, (kind, rank)) in enumerate(kinds.items())
    }
    rows: list[str | None] = ["cyd", "ada", None, "bob", "ada", "dan", "cyd"]
    ids = tokens(len(rows))
    labels = ids.clone()
    labels[0, 5:] = -100
    with Taps(model, sites, Alone(auxiliaries)) as taps, taps.batch(rows) as batch:
        logits = model(input_ids=ids).logits
        customers_loss(logits, labels, rows).backward()
    together = batch.pairs()
    assert sorted(together) == sorted(kinds)
    for name, auxiliary in auxiliaries.items():
        own = [row for row, customer in enumerate(rows) if customer == name]
        with Taps(model, sites, Joint(auxiliary)) as taps, taps.batch() as batch:
            own_logits = model(input_ids=ids[own]).logits
            language_loss(own_logits, labels[own]).backward()
        torch.testing.assert_close(logits[own], own_logits, **EXACT)
        for site, pair in batch.pairs()["joint"].items():
            torch.testing.assert_close(together[name][site].x, pair.x, **EXACT)
            torch.testing.assert_close(together[name][site].g, pair.g, **EXACT)
            assert pair.g.abs().max() > 1e-6
    with torch.no_grad():
        torch.testing.assert_close(logits[2], model(input_ids=ids[2:3]).logits[0], **EXACT)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("model_type", ["llama", "opt"])
def test_padding_is_left_out(model_type: str, side: str) -> None:
    model = model_of(model_type)
    auxiliary = stirred(low_rank(model, model_type), 1)
    ids, length = tokens(3), 12
    real = torch.zeros(3, length, dtype=torch.int64)
    for row, count in enumerate((12, 5, 1)):
        real[row, slice(length - count, None) if side == "left" else slice(count)] = 1
    labels = ids.masked_fill(real == 0, -100)

    def pairs(mask: Tensor | None) -> dict:
        with Taps(model, auxiliary.sites, Joint(auxiliary)) as taps, taps.batch(mask=mask) as batch:
            logits = model(input_ids=ids, attention_mask=real).logits
            customers_loss(logits, labels, ["all"] * 3, real).backward()
        return batch.pairs()["joint"]

    with_padding, without = pairs(None), pairs(real)
    for site, pair in without.items():
        assert pair.x.shape == (18, auxiliary.sites[site].inputs)
        assert torch.equal(pair.g, with_padding[site].g[real.flatten().bool()])
    # Nothing is lost, since no gradient comes to padding.
    for name, gradient in gradients(auxiliary, without).items():
        torch.testing.assert_close(gradient, gradients(auxiliary, with_padding)[name], **EXACT)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant: bool) -> None:
    model = model_of("llama")
    auxiliaries = {name: stirred(low_rank(model, "llama", rank=rank), rank) for rank, name in ((1, "ada"), (2, "bob"))}
    sites = find_sites(model, SITES["llama"])

    def pairs() -> dict:
        rows = ["bob", "ada", "bob"]
        with Taps(model, sites, Alone(auxiliaries)) as taps, taps.batch(rows) as batch:
            embedded = model.get_input_embeddings()(tokens(3)).requires_grad_(True)
            customers_loss(model(inputs_embeds=embedded, use_cache=False).logits, tokens(3), rows).backward()
        return batch.pairs()

    model.train()
    plain = pairs()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert model.is_gradient_checkpointing
    for name, found in pairs().items():
        for site, pair in found.items():
            assert pair.x.shape == plain[name][site].x.shape
            torch.testing.assert_close(pair.x, plain[name][site].x, **EXACT)
            torch.testing.assert_close(pair.g, plain[name][site].g, **EXACT)


@pytest.mark.parametrize("mode", ["joint", "collaboration"])
@pytest.mark.parametrize("model_type", ["llama", "opt"])
def test_merged_says_what_unmerged_says(model_type: str, mode: str) -> None:
    model, ids = model_of(model_type), tokens(2)
    first = stirred(low_rank(model, model_type), 1)
    second = Auxiliary(first.sites, AuxiliaryConfig(kind="linear"), dtype=torch.float64)
    both = {"ada": first, "bob": stirred(second, 2)}
    chosen = Joint(first) if mode == "joint" else Collaboration(both, {"ada": 0.4, "bob": 0.8})
    with torch.no_grad():
        base = model(input_ids=ids).logits
        with Taps(model, first.sites, chosen) as taps, taps.batch(["ada", "bob"]):
            unmerged = model(input_ids=ids).logits
        with Merging(model, first.sites) as merging:
            merging.merge(chosen.summands())
            merged = model(input_ids=ids).logits
            with Taps(model, first.sites, chosen, merged=True):
                assert torch.equal(model(input_ids=ids).logits, merged)
        assert torch.equal(model(input_ids=ids).logits, base)
    torch.testing.assert_close(merged, unmerged, **EXACT)
    assert (merged - base).abs().max() > 1e-3
