"""What a study varies: a centre, changes of it along named axes, and seeds.

What one row computes is work.py's; what the report shows of it is evaluation's."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from ot_ray.config import Config
from ot_ray.data import DataConfig
from ot_ray.errors import ConfigError, SplitError
from ot_ray.model import (
    BottleneckSettings,
    DistillLoss,
    EmulatorConfig,
    LoraSettings,
    Method,
    ModelConfig,
    SplitPlan,
)
from ot_ray.training import TrainingConfig

Style = Literal["plain", "wikitext"]


class Row(Config):
    """One configuration of offsite tuning; a study measures its five settings with each seed."""

    bottom: int = Field(default=2, ge=0)
    """Adapter layers next to the input."""
    keep: int | Literal["all"] = 2
    """Layers of the emulator; `all` keeps the whole middle, to be pruned or quantized."""
    top: int = Field(default=2, ge=0)
    """Adapter layers next to the output."""
    emulator: EmulatorConfig = EmulatorConfig()
    """How the middle is compressed."""
    distilled: bool = True
    """Whether the compressed middle is distilled."""
    distil_steps: int | None = Field(default=None, ge=1)
    """Optimiser steps of distilling it; unset, those of `distil`."""
    method: Method = "full"
    """The tuning method."""
    lora: LoraSettings = LoraSettings()
    """For method `lora`."""
    bottleneck: BottleneckSettings = BottleneckSettings()
    """For method `bottleneck`."""
    lr: float = Field(default=5e-4, gt=0)
    """Highest learning rate of tuning the adapter."""
    steps: int = Field(default=150, ge=1)
    """Optimiser steps of tuning the adapter, and of full fine-tuning."""
    reference_lr: float | None = Field(default=None, gt=0)
    """Highest learning rate of the full fine-tuning that the row is held against; unset, the row's own."""

    def plan(self, depth: int) -> SplitPlan:
        """The split of a model of `depth` layers. Raises SplitError where it does not fit."""
        middle = depth - self.bottom - self.top
        keep = max(1, middle) if self.keep == "all" else self.keep
        plan = SplitPlan(bottom=self.bottom, keep=keep, top=self.top)
        plan.middle(depth)
        return plan


_MAY_BE_UNSET = frozenset({"distil_steps", "reference_lr"})


class Change(Config):
    """What a row changes of the centre; a field that is left out stays as it is there, and `null` unsets
    `distil_steps` and `reference_lr`."""

    label: str | None = None
    """What the report calls the row; unset, what tells it from the others."""
    bottom: int | None = Field(default=None, ge=0)
    """Adapter layers next to the input."""
    keep: int | Literal["all"] | None = None
    """Layers of the emulator, or `all` of the middle."""
    top: int | None = Field(default=None, ge=0)
    """Adapter layers next to the output."""
    emulator: EmulatorConfig | None = None
    """How the middle is compressed, in the place of all that the centre says of it."""
    distilled: bool | None = None
    """Whether the compressed middle is distilled."""
    distil_steps: int | None = Field(default=None, ge=1)
    """Optimiser steps of distilling it."""
    method: Method | None = None
    """The tuning method."""
    lora: LoraSettings | None = None
    """For method `lora`."""
    bottleneck: BottleneckSettings | None = None
    """For method `bottleneck`."""
    lr: float | None = Field(default=None, gt=0)
    """Highest learning rate of tuning the adapter."""
    steps: int | None = Field(default=None, ge=1)
    """Optimiser steps of tuning the adapter, and of full fine-tuning."""
    reference_lr: float | None = Field(default=None, gt=0)
    """Highest learning rate of full fine-tuning."""

    @model_validator(mode="after")
    def _none_where_a_row_takes_it(self) -> Change:
        for name in sorted(self.model_fields_set & Row.model_fields.keys() - _MAY_BE_UNSET):
            if getattr(self, name) is None:
                raise ValueError(f"{name} is null, which is no value of it; leave it out to keep the centre's")
        return self

    def of(self, centre: Row) -> Row:
        """The centre with these changes."""
        return centre.model_copy(
            update={name: getattr(self, name) for name in self.model_fields_set & Row.model_fields.keys()}
        )


class Axes(Config):
    """What is varied one at a time; rows that change nothing are the centre itself."""

    methods: tuple[Change, ...] = ()
    """Tuning methods (Table 5)."""
    positions: tuple[Change, ...] = ()
    """Where the adapter is, and how large (Figure 3)."""
    compressions: tuple[Change, ...] = ()
    """What becomes of the middle (Figure 4)."""
    layers: tuple[Change, ...] = ()
    """Which layers of the middle stay."""
    distilled: tuple[Change, ...] = ()
    """Distilled or not (Table 4)."""


class StudyData(Config):
    """The three texts of a study."""

    public: DataConfig
    """The owner's text, on which emulators are distilled."""
    train: DataConfig
    """The customer's text, on which adapters are tuned."""
    test: DataConfig
    """The customer's held-out text, on which everything is measured."""


class Aim(Config):
    """What an owner wants of a configuration; drawn into the frontier."""

    closed: float = Field(default=0.75, gt=0)
    """Share of the gap from zero-shot to full fine-tuning that the plug-in at least closes."""
    worse: float = Field(default=0.05, ge=0)
    """How much higher the tuned emulator's perplexity at least is than the plug-in's (0.05 is 5 %)."""


class PartWorkers(Config):
    """What the Ray task of each part gets."""

    cpus: float = Field(default=1.0, gt=0)
    """CPUs."""
    gpus: float = Field(default=0.0, ge=0)
    """GPUs; a share below 1 where several parts fit on one."""

    @property
    def resources(self) -> dict[str, float]:
        """As Ray counts it."""
        return {"CPU": self.cpus, **({"GPU": self.gpus} if self.gpus else {})}


class Other(Config):
    """Files that other verbs left, for the tables that a study does not measure itself."""

    efficiency: str | None = None
    """Result of `jobs.benchmark efficiency` (Table 6)."""
    evaluations: tuple[str, ...] = ()
    """Results of `jobs.evaluate` on tasks (Tables 1 and 2) or images (Table 3)."""


class StudyConfig(Config):
    """A base model, texts, and the rows to measure on them."""

    model: ModelConfig | None = None
    """The full model; unset, the base that ships in `jobs/base`."""
    data: StudyData | None = None
    """The texts; unset, the quickstart's, from the running Python's documentation."""
    style: Style = "plain"
    """How the customer of the quickstart's texts writes: as they are, or `wikitext`, with words, numbers and
    punctuation set apart as in WikiText, a style that the base has not seen."""
    sequence_length: int = Field(default=256, ge=2)
    """Tokens of a sequence."""
    limit: int | None = Field(default=None, ge=1)
    """Sequences of each text that are used at most; unset, all."""
    centre: Row = Row()
    """What the axes change one thing of."""
    axes: Axes = Axes()
    """Rows that change one thing of it."""
    extra: tuple[Change, ...] = ()
    """Rows outside the axes, for the frontier."""
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1)
    """Each row is distilled and tuned once with each of these."""
    distil: TrainingConfig
    """The distillation of every emulator; its seed is the row's."""
    tune: TrainingConfig
    """Tuning and full fine-tuning; steps, rate and seed are the row's."""
    loss: DistillLoss = DistillLoss()
    """Weights of the distillation objective."""
    aim: Aim = Aim()
    """The region of the frontier that an owner is after."""
    other: Other = Other()
    """Files of other verbs that the report takes in."""
    output: str = "runs/study"
    """Folder for rows, emulators and the report; a study that is started again there goes on. On a cluster of several
    machines, one that all of them see, or an `s3://` address."""
    workers: PartWorkers = PartWorkers()
    """What each part of a row is computed with."""
    address: str | None = None
    """A Ray cluster; unset, one on this machine for the time."""
    num_cpus: int | None = Field(default=None, ge=1)
    """Logical CPUs of a local Ray; unset, all. So many parts run at once as have room in them."""
    report_only: bool = False
    """Compute nothing; write the report of what is there."""

    @model_validator(mode="after")
    def _consistent(self) -> StudyConfig:
        if self.data is not None and self.style != "plain":
            raise ValueError(f"style is {self.style!r}, but data names texts of its own; leave one of them out")
        if len(set(self.seeds)) != len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(f"seeds is {list(self.seeds)}; give different numbers of 0 or more")
        return self

    def changes(self) -> dict[str, tuple[Change, ...]]:
        """Every change by axis, the centre first of all (as the axis `centre`) and `extra` last."""
        return {
            "centre": (Change(),),
            **{name: getattr(self.axes, name) for name in Axes.model_fields},
            "extra": self.extra,
        }

    def check(self, depth: int) -> None:
        """Refuse rows that do not fit a model of `depth` layers.

        Raises:
            ConfigError: names the axis, the row's number in it and what is wrong.
        """
        for axis, changes in self.changes().items():
            for number, change in enumerate(changes):
                try:
                    change.of(self.centre).plan(depth)
                except (SplitError, ValueError) as error:
                    where = axis if axis in ("centre", "extra") else f"axes.{axis}"
                    raise ConfigError(f"{where}[{number}]: {_said(error)}") from None

    def tuning(self, row: Row, seed: int) -> TrainingConfig:
        """The optimiser run that tunes a row's adapter."""
        return _changed(self.tune, row.lr, row.steps, seed)

    def reference(self, row: Row, seed: int) -> TrainingConfig:
        """The run of full fine-tuning that a row is held against."""
        return _changed(self.tune, row.reference_lr or row.lr, row.steps, seed)

    def distillation(self, row: Row, seed: int) -> TrainingConfig:
        """The optimiser run that distils a row's emulator."""
        return _changed(self.distil, self.distil.lr, row.distil_steps or self.distil.steps, seed)


def _changed(training: TrainingConfig, lr: float, steps: int, seed: int) -> TrainingConfig:
    # A short run warms up over no more steps than it has.
    warmup = min(training.warmup_steps, steps)
    return training.model_copy(update={"lr": lr, "steps": steps, "seed": seed, "warmup_steps": warmup})


def _said(error: Exception) -> str:
    errors = getattr(error, "errors", None)
    return errors()[0]["msg"].removeprefix("Value error, ") if errors is not None else str(error)
