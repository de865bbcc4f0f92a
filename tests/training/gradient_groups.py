"""What groups of ranks do for test_sharded_base_pass.py; each rank leaves what it saw in a file."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ot_ray.cola import (
    Alone,
    Auxiliary,
    AuxiliaryConfig,
    BasePass,
    CustomerRows,
    FitConfig,
    Fits,
    Joint,
    Merging,
    Mode,
    Passed,
    find_sites,
    make_fitter,
)
from ot_ray.errors import OTRayError
from ot_ray.store import open_store
from ot_ray.training import FittingHere, GradientCheckpoints, GradientRun, learn
from ot_ray.training.deepspeed_base import ShardedBasePass
from ot_ray.training.rank_learning import RankCheckpoints, RankFitting
from ot_ray.training.rank_messages import Message, RankMessages
from tests.fixtures.models import VOCAB, tiny_model

PATTERNS = {
    # A tied head, maps with their inputs first, and a table as a site.
    "gpt2": ["transformer.wte", "*.c_attn", "*.mlp.c_proj"],
    "llama": ["*.q_proj", "*.k_proj", "*.v_proj", "*.down_proj"],
}
KINDS = {
    "ann": AuxiliaryConfig(kind="low_rank", rank=2),
    "bob": AuxiliaryConfig(kind="linear"),
    "cid": AuxiliaryConfig(kind="mlp", rank=3),
}
STEPS, SAVED_AT = 4, 2


def rows(number: int, names: tuple[str | None, ...] = ("ann", "ann", "bob", "cid", None)) -> CustomerRows:
    """Rows of uneven length; nobody's among them."""
    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(2, VOCAB, (len(names), 9), generator=generator)
    mask = torch.arange(9) < torch.tensor([9, 6, 8, 7, 9])[: len(names), None]
    labels = ids.clone()
    labels[0, :3] = -100
    return CustomerRows(ids, names, labels, mask)


class Numbered:
    def __getitem__(self, number: int) -> CustomerRows:
        return rows(number)


def parts(family: str) -> tuple[Any, dict[str, Any], dict[str, Auxiliary]]:
    """A model, its sites, and auxiliaries that are nowhere zero."""
    model = tiny_model(family, depth=2)
    sites = find_sites(model, PATTERNS[family])
    generator = torch.Generator().manual_seed(5)
    auxiliaries = {name: Auxiliary(sites, config, dtype=torch.float64) for name, config in KINDS.items()}
    for auxiliary in auxiliaries.values():
        for tensor in auxiliary.tensors.values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.1)
    return model, sites, auxiliaries


def hollow(family: str) -> tuple[Any, Callable[[str, int, int], torch.Tensor], list[tuple[str, int, int]]]:
    """The same model without weights, what fills it, and what that was asked for."""
    full = tiny_model(family, depth=2)
    values, asked = full.state_dict(), []

    def fill(name: str, start: int, end: int) -> torch.Tensor:
        asked.append((name, start, end))
        return values[name].flatten()[start:end]

    with torch.device("meta"):
        empty = type(full)(full.config)
    for (name, buffer), (_, values_of) in zip(empty.named_buffers(), full.named_buffers(), strict=True):
        owner, _, key = name.rpartition(".")
        empty.get_submodule(owner)._buffers[key] = values_of.clone()
        del buffer
    empty.tie_weights()
    return empty.eval(), fill, asked


def seen(passed: Passed) -> dict[str, Any]:
    """As plain values and tensors."""
    pairs = {owner: {site: (pair.x, pair.g) for site, pair in own.items()} for owner, own in passed.pairs.items()}
    return {"pairs": pairs, "losses": passed.losses, "tokens": passed.tokens}


def modes(auxiliaries: dict[str, Auxiliary]) -> dict[str, Mode]:
    return {"alone": Alone(auxiliaries), "joint": Joint(auxiliaries["ann"])}


def run_pair(folder: Path) -> None:
    found: dict[str, Any] = {}
    for family in PATTERNS:
        model, sites, auxiliaries = parts(family)
        base = ShardedBasePass(model, sites, whole_below=0)
        held = [sum(p.numel() for p in base.parameters())]
        for name, mode in modes(auxiliaries).items():
            # Passes with gradients and without take turns, as training and evaluation do.
            found[family, name, "losses"] = base.losses(rows(1), mode)
            found[family, name] = [seen(base(rows(number), mode)) for number in (0, 1)]
            found[family, name, "losses again"] = base.losses(rows(1), mode)
        found[family, "few"] = seen(base(rows(0, ("bob",)), Alone(auxiliaries)))
        held.append(sum(p.numel() for p in base.parameters()))
        found[family, "own"] = sum(p.ds_tensor.numel() for p in base.parameters())
        found[family, "held"] = held
        found[family, "refused"] = _message(lambda b=base, a=auxiliaries: b(rows(0), Joint(a["ann"]), merged=True))
        found[family, "unmergeable"] = _message(lambda b=base, s=sites: Merging(b.model, s))
        found[family, "unknown"] = _message(lambda b=base, a=auxiliaries: b(rows(0, ("dan", None)), Alone(a)))
    found["filled"] = _filled()
    found["runs"] = _runs(folder)
    found["messages"] = _messages()
    torch.save(found, folder / f"pair-{os.environ['RANK']}.pt")


def _filled() -> dict[str, Any]:
    """The weights read as they are sharded, in bfloat16."""
    model, fill, asked = hollow("gpt2")
    sites = find_sites(model, PATTERNS["gpt2"])
    base = ShardedBasePass(model, sites, torch.bfloat16, fill, whole_below=200)
    return {"asked": asked, **seen(base(rows(0), Alone(parts("gpt2")[2])))}


def fitting_of(auxiliaries: dict[str, Auxiliary]) -> FittingHere:
    config = FitConfig(lr=1e-2, interval=2)
    return FittingHere(Fits({name: make_fitter(one.copy(), config) for name, one in auxiliaries.items()}))


def learnt(base: BasePass, auxiliaries: dict[str, Auxiliary], fitting: Any, steps: int, checkpoints: Any) -> Any:
    """Figures without times, and the server's auxiliaries."""
    mode = Alone({name: one.copy() for name, one in auxiliaries.items()})
    run = GradientRun(steps=steps, staleness=1, checkpoint_every=SAVED_AT)
    result = learn(base, mode, Numbered(), fitting, run, checkpoints=checkpoints)
    told = [{n: v for n, v in step.items() if n == "fits" or n.startswith("loss")} for step in result.history]
    return told, {name: one.tensors for name, one in mode.auxiliaries.items()}


def _runs(folder: Path) -> dict[str, Any]:
    """A run in one go, and one that stops half way and goes on."""
    model, sites, auxiliaries = parts("llama")
    base = ShardedBasePass(model, sites)
    messages, first = base.messages, base.messages.rank == 0

    def go(name: str, steps: int) -> Any:
        store = open_store(str(folder / "store"))
        own = GradientCheckpoints(store, name, {"of": "this test"}) if first else None
        fitting = RankFitting(fitting_of(auxiliaries) if first else None, messages)
        return learnt(base, auxiliaries, fitting, steps, RankCheckpoints(own, messages))

    whole, half = go("whole", STEPS), go("torn", SAVED_AT)
    return {"whole": whole, "half": half, "torn": go("torn", STEPS)}


def _messages() -> list[Any]:
    messages = RankMessages()
    tensors = [torch.tensor(1.5, dtype=torch.bfloat16), torch.empty(0, 3), torch.arange(6).view(2, 3).mT]
    own = Message({"rank": messages.rank, "text": "ü" * messages.rank}, [t + messages.rank for t in tensors])
    gathered = messages.gather(own)
    told = messages.broadcast(None if messages.rank else own)
    return [gathered and [tuple(part) for part in gathered], tuple(told), messages.total([1.0, messages.rank])]


def _message(call: Callable[[], Any]) -> str:
    try:
        call()
    except OTRayError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"
