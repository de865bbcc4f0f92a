"""Three customers of one tiny base model, whose auxiliaries differ in every way that a fit depends on, and what the
loop of gradient learning makes of them in one process."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ot_ray.cola import (
    Alone,
    Auxiliary,
    AuxiliaryConfig,
    BasePass,
    CustomerRows,
    FitConfig,
    Fits,
    Mode,
    find_sites,
    make_fitter,
)
from ot_ray.training import FittingHere, GradientRun, TrainingResult, learn
from ot_ray.training.gradient_fitting import Fitting
from tests.fixtures.models import VOCAB, tiny_model

STEPS = 8
KINDS = {
    "ann": AuxiliaryConfig(kind="low_rank", rank=2),
    "bob": AuxiliaryConfig(kind="linear"),
    "cid": AuxiliaryConfig(kind="mlp", rank=3, seed=5),
}
FITTINGS = {
    "ann": FitConfig(interval=2, lr=1e-2, schedule="cosine", warmup_fits=1, fits=STEPS),
    "bob": FitConfig(optimizer="sgd", lr=1e-2, momentum=0.9),
    "cid": FitConfig(interval=3, lr=1e-2, reduction="mean"),
}
FITS = {"ann": 4, "bob": 8, "cid": 3}
"""Fits after all steps, each interval once; of an interval that is not full at the end, too."""


def base_pass() -> BasePass:
    model = tiny_model("llama", depth=2)
    return BasePass(model, find_sites(model, ["*.q_proj", "*.k_proj", "*.down_proj"]))


def auxiliaries(base: BasePass) -> dict[str, Auxiliary]:
    dtypes = {"ann": torch.float32, "bob": torch.float64, "cid": torch.bfloat16}
    return {name: Auxiliary(base.sites, config, dtype=dtypes[name]) for name, config in KINDS.items()}


def fitting_here(base: BasePass) -> FittingHere:
    return FittingHere(Fits({name: make_fitter(one, FITTINGS[name]) for name, one in auxiliaries(base).items()}))


class Rows:
    """A row of 12 tokens a customer; cid has none in batch 4."""

    def __getitem__(self, number: int) -> CustomerRows:
        names = tuple(name for name in KINDS if (name, number) != ("cid", 4))
        parts = [
            torch.randint(2, VOCAB, (1, 12), generator=torch.Generator().manual_seed(100 * number + ord(name[0])))
            for name in names
        ]
        ids = torch.cat(parts)
        return CustomerRows(ids, names, ids.clone())


def run(base: BasePass, fitting: Fitting, staleness: int, steps: int = STEPS) -> tuple[TrainingResult, Mode]:
    """The loop, from a new start of everybody's."""
    mode = Alone(auxiliaries(base))
    return learn(base, mode, Rows(), fitting, GradientRun(steps=steps, staleness=staleness)), mode


def outcome(result: TrainingResult, mode: Mode, fitting: Fitting) -> dict[str, Any]:
    """All that two runs can differ in but times: figures, the server's auxiliaries, and where the fitters are."""
    counted = [{n: v for n, v in step.items() if n == "fits" or n.startswith("loss")} for step in result.history]
    tensors = {name: dict(one.tensors) for name, one in mode.auxiliaries.items()}
    return {"figures": counted, "tensors": tensors, "states": fitting.states()}


def assert_same(one: Any, other: Any) -> None:
    """Bit for bit; tuples and lists are one."""
    if isinstance(one, Tensor):
        assert isinstance(other, Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    elif isinstance(one, Mapping):
        assert list(one) == list(other)
        for name in one:
            assert_same(one[name], other[name])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for ours, theirs in zip(one, other, strict=True):
            assert_same(ours, theirs)
    else:
        assert one == other
