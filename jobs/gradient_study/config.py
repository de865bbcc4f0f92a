"""What the study of gradient learning varies, on what, and how far each run goes.

What a run computes is work.py's; which runs there are and at which rates is choosing.py's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field, model_validator

from ot_ray.cola import JOINT
from ot_ray.config import Config
from ot_ray.model import ModelConfig

Method = Literal["gradient", "lora", "full"]
ModeName = Literal["joint", "alone", "collaboration"]
Kind = Literal["low_rank", "linear", "mlp"]


class Customer(Config):
    """One customer, and where its text is from."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    """What the report calls it."""
    packages: tuple[str, ...] = ()
    """Installed packages or parts of them (`ray.serve`) whose docstrings are its text; none: Python's own language
    reference, as `help()` shows it."""

    @model_validator(mode="after")
    def _readable(self) -> Customer:
        odd = [name for name in self.packages if not all(part.isidentifier() for part in name.split("."))]
        if odd:
            raise ValueError(f"packages names {odd[0]!r}; write it as in an import, such as ray.serve")
        if self.name == JOINT:
            raise ValueError(f"name is {JOINT!r}, which is what they all together are called; choose another")
        return self


class Row(Config):
    """One way to adapt the base to the customers; a study measures it with every seed."""

    method: Method
    """Gradient learning, or back-propagation through LoRA (PEFT's) or through every weight."""
    mode: ModeName
    """`joint`: one for all customers. `alone`: each its own. `collaboration`: the mean of all, each fitted to its own
    customer."""
    kind: Kind = "low_rank"
    """Of the auxiliaries; `low_rank` for LoRA."""
    interval: int = Field(default=1, ge=1)
    """Batches of a fit."""
    merged: bool = False
    """Whether passes run on weights that hold the auxiliaries."""

    @property
    def label(self) -> str:
        """What the report calls it."""
        if self.method != "gradient":
            name = "LoRA by back-propagation" if self.method == "lora" else "full fine-tuning"
            return f"{name}, {self.mode}"
        merged = ", merged" if self.merged else ""
        return f"{self.mode}, {self.kind}, interval {self.interval}{merged}"

    @property
    def unmerged(self) -> Row:
        """The same on clean weights."""
        return self.model_copy(update={"merged": False})


class Training(Config):
    """How far every run goes: the same batches, and as many of them, whatever adapts the base."""

    steps: int = Field(default=96, ge=1)
    """Batches; an interval of I makes a fit of every I of them, the rest at the end in one more."""
    rows: int = Field(default=2, ge=1)
    """Sequences of each customer in a batch."""
    rank: int = Field(default=8, ge=1)
    """Of LoRA, and inner width of the auxiliaries of kind `low_rank` and `mlp`."""
    alpha: float = Field(default=16.0, gt=0)
    """LoRA's and theirs are multiplied by alpha / rank."""
    sites: tuple[str, ...] = Field(default=("*.q_proj", "*.v_proj"), min_length=1)
    """Patterns of the maps that LoRA and auxiliaries stand beside."""


class Rates(Config):
    """Learning rates to choose from, rising. The search begins in the middle and goes on while the best is the last
    that was tried in its direction."""

    low_rank: tuple[float, ...] = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
    """Of auxiliaries of low rank, and of LoRA by back-propagation."""
    linear: tuple[float, ...] = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
    """Of linear auxiliaries."""
    mlp: tuple[float, ...] = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
    """Of MLP auxiliaries."""
    full: tuple[float, ...] = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3)
    """Of full fine-tuning."""

    @model_validator(mode="after")
    def _rising(self) -> Rates:
        for name in type(self).model_fields:
            rates = getattr(self, name)
            if not rates or min(rates) <= 0 or list(rates) != sorted(set(rates)):
                raise ValueError(f"{name} is {list(rates)}; give rates above 0, each larger than the one before")
        return self

    def of(self, row: Row) -> tuple[float, ...]:
        """Those of a row."""
        return self.full if row.method == "full" else getattr(self, row.kind)


class GradientStudyConfig(Config):
    """A base model, customers with texts of their own, and the ways to adapt the one to the others."""

    model: ModelConfig | None = None
    """The base model; unset, the one that ships in `jobs/base`."""
    customers: tuple[Customer, ...] = Field(min_length=2)
    """Whose texts they are."""
    characters: int = Field(default=200_000, ge=1000)
    """Characters of text of each customer at most."""
    sequence_length: int = Field(default=64, ge=2)
    """Tokens of a sequence."""
    limit: int = Field(default=48, ge=1)
    """Sequences of each customer's validation and test text that are measured at most, spread over the whole."""
    training: Training = Training()
    """What is the same in every run."""
    rates: Rates = Rates()
    """Learning rates to choose from, by the perplexity on validation text, for every row and with the first seed;
    merged rows have their unmerged ones'."""
    modes: tuple[ModeName, ...] = Field(default=("joint", "alone", "collaboration"), min_length=1)
    """Modes of gradient learning."""
    kinds: tuple[Kind, ...] = Field(default=("low_rank", "linear", "mlp"), min_length=1)
    """Kinds of auxiliaries."""
    intervals: tuple[int, ...] = Field(default=(1, 2, 4, 8), min_length=1)
    """Batches of a fit."""
    merged: bool = True
    """Measure with merged weights, too, where weights can hold the auxiliaries: not of kind `mlp`, not in mode
    `alone`."""
    seeds: tuple[int, ...] = Field(default=(0, 1, 2), min_length=1)
    """Each row is measured once with each: they decide the order of the rows and how auxiliaries start."""
    output: str = "runs/cola_study"
    """Folder for runs and the report, or an `s3://` address; a study that is started again there goes on."""
    processes: int = Field(default=2, ge=1)
    """Runs side by side."""
    threads: int = Field(default=1, ge=1)
    """Of each."""
    report_only: bool = False
    """Compute nothing; write the report of what is there."""

    @model_validator(mode="after")
    def _consistent(self) -> GradientStudyConfig:
        named = {"customers": [c.name for c in self.customers]}
        named |= {name: [str(v) for v in getattr(self, name)] for name in ("modes", "kinds", "intervals", "seeds")}
        for name, values in named.items():
            if len(set(values)) != len(values):
                raise ValueError(f"{name} has {', '.join(values)}; give each once")
        if min(self.seeds) < 0:
            raise ValueError(f"seeds is {list(self.seeds)}; give numbers of 0 or more")
        if not 1 <= min(self.intervals) <= max(self.intervals) <= self.training.steps:
            raise ValueError(f"intervals is {list(self.intervals)}; give 1 to training.steps {self.training.steps}")
        return self

    def rows(self) -> list[Row]:
        """Every row, those of back-propagation first, unmerged before merged."""
        return [*self._baselines(), *self._gradient(False), *(self._gradient(True) if self.merged else ())]

    def _baselines(self) -> Iterator[Row]:
        for method in ("lora", "full"):
            for mode in ("joint", "alone"):
                yield Row(method=method, mode=mode)

    def _gradient(self, merged: bool) -> Iterator[Row]:
        for mode in self.modes:
            for kind in self.kinds:
                if merged and (mode == "alone" or kind == "mlp"):
                    continue
                for interval in self.intervals:
                    yield Row(method="gradient", mode=mode, kind=kind, interval=interval, merged=merged)
