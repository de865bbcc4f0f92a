"""The settings of `jobs.cola`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from ot_ray.artifacts import BundleSource
from ot_ray.artifacts.manifest import MANIFEST
from ot_ray.cola import JOINT, AuxiliaryConfig, FitConfig
from ot_ray.config import Config
from ot_ray.data import DataConfig
from ot_ray.launch import AuxiliaryWorkers, WorkerGroup
from ot_ray.model import ModelConfig
from ot_ray.training import GradientRun

COLLABORATION = "collaboration"
"""Under which name the model is written that everybody's rows went through in that mode."""
_OURS = (JOINT, COLLABORATION, MANIFEST)
BASE = str(Path(__file__).parents[1] / "base")


class CustomerConfig(Config):
    """A customer: its text, and what is its own of the settings."""

    name: str = Field(default="customer", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    """Its name, under which its results are written."""
    data: DataConfig
    """Its training text."""
    validation: DataConfig | None = None
    """Text on which its perplexity is measured; unset, `validation_share` of the sequences of `data`."""
    sites: tuple[str, ...] | None = None
    """Where its auxiliary stands; unset, `sites`."""
    auxiliary: AuxiliaryConfig | None = None
    """Its auxiliary; unset, `auxiliary`."""
    fitting: FitConfig | None = None
    """How that is fitted; unset, `fitting`."""


class ColaConfig(Config):
    """A base model, customers with their text, and how their auxiliaries are learnt."""

    model: ModelConfig = ModelConfig(name="docs", source=BASE)
    """The base model, which is not changed; unset, the small one of the quickstart."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where it is; `auto` is the first GPU if there is one."""
    customers: tuple[CustomerConfig, ...] = ()
    """Who learns, all in the same passes of the base model."""
    data: DataConfig | None = None
    """In place of `customers`: the training text of one, called `customer`."""
    validation: DataConfig | None = None
    """That one's validation text."""
    validation_share: float = Field(default=0.1, ge=0, lt=1)
    """Share of a customer's sequences, the last ones, that are kept for validation where it names no text for it; 0
    measures no perplexity there."""
    sequence_length: int = Field(default=128, ge=2)
    """Tokens of a sequence."""
    mode: Literal["joint", "alone", "collaboration"] = "alone"
    """`joint`: one auxiliary for all. `alone`: each customer's rows through its own. `collaboration`: all rows through
    the weighted sum of all auxiliaries, each fitted to its own customer's rows."""
    weights: dict[str, float] | None = None
    """Of each customer in mode collaboration; unset, their mean."""
    sites: tuple[str, ...] = Field(default=("*.q_proj", "*.v_proj"), min_length=1)
    """Where auxiliaries stand: shell patterns for the names of linear maps."""
    auxiliary: AuxiliaryConfig = AuxiliaryConfig()
    """The auxiliary of whoever has none of its own."""
    fitting: FitConfig = FitConfig()
    """How those are fitted. Where the rate falls and `fits` is left out, it falls over the whole run."""
    run: GradientRun
    """How far the run goes."""
    fit_on: Literal["cpu", "base"] = "cpu"
    """Where in this process auxiliaries are fitted: on the CPU, or on the base model's device."""
    workers: AuxiliaryWorkers | None = None
    """Fit on actors of a Ray cluster, while the base model is at its next pass if `run.staleness` lets it; unset, in
    this process."""
    base_workers: WorkerGroup | None = None
    """Share the base model, in parts, over a group of workers of a Ray cluster with a GPU each (DeepSpeed's ZeRO-3),
    where it is too large for one; unset, it is in this process. `checkpoints` must be a place that all reach."""
    address: str | None = None
    """That cluster; unset, the one this process belongs to, or a new one on this machine."""
    bundle: BundleSource | None = None
    """A bundle of the base model; with sites in its adapter layers alone, results are adapters of it, too, which
    `jobs.plug_in` takes."""
    output: str
    """Folder or `s3://` address of the results; must be empty."""
    checkpoints: str | None = None
    """Folder or address for checkpoints, from which a run that was stopped goes on."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """How many of the latest stay."""
    report: str | None = None
    """Folder for a page with figures and curves, and the figures of every pass as JSON lines."""

    @property
    def everybody(self) -> tuple[CustomerConfig, ...]:
        """All customers."""
        if self.data is None:
            return self.customers
        return (CustomerConfig(data=self.data, validation=self.validation),)

    @model_validator(mode="after")
    def _has_customers(self) -> ColaConfig:
        if bool(self.customers) == (self.data is not None):
            both = "both are set" if self.customers else "neither is set"
            raise ValueError(f"customers are several and data is of one, and {both}; set one of them")
        if self.validation is not None and self.data is None:
            raise ValueError("validation is set beside customers; set it for each of them")
        names = [customer.name for customer in self.everybody]
        if twice := sorted({name for name in names if names.count(name) > 1 or name in _OURS}):
            raise ValueError(
                f"customers has {twice[0]!r}, which stands there twice or is a name of our own; give each another name"
            )
        return self

    @model_validator(mode="after")
    def _mode_has_what_it_needs(self) -> ColaConfig:
        own = [customer.name for customer in self.everybody if customer.auxiliary or customer.fitting or customer.sites]
        if self.mode == "joint" and own:
            raise ValueError(
                f"mode is 'joint', whose one auxiliary is everybody's, but {own[0]} has auxiliary, fitting or sites of "
                "its own; leave these out, or use mode alone or collaboration"
            )
        if self.weights is not None and self.mode != "collaboration":
            raise ValueError(f"weights are for mode collaboration, but mode is {self.mode!r}; leave them out")
        names = {customer.name for customer in self.everybody}
        if self.weights is not None and self.weights.keys() != names:
            raise ValueError(
                f"weights are for {sorted(self.weights)}, customers are {sorted(names)}; give one for each"
            )
        return self

    @model_validator(mode="after")
    def _merges(self) -> ColaConfig:
        if not self.run.merged:
            return self
        if self.mode == "alone" and len(self.everybody) > 1:
            raise ValueError(
                "run.merged is true in mode alone, where each customer's rows need weights of their own; use mode "
                "joint or collaboration, or run.merged=false"
            )
        mlp = [one.name for one in self.everybody if (one.auxiliary or self.auxiliary).kind == "mlp"]
        if mlp:
            raise ValueError(f"run.merged is true, but the auxiliary of {mlp[0]} is an mlp, which no weight can hold")
        return self

    @model_validator(mode="after")
    def _settings_have_a_use(self) -> ColaConfig:
        if self.address is not None and self.workers is None and self.base_workers is None:
            raise ValueError("address names a cluster, but workers is not set, which fit there; set workers={}")
        if self.fit_on == "base" and (self.workers is not None or self.base_workers is not None):
            raise ValueError("fit_on is 'base', but workers or base_workers is set; leave one out")
        if self.base_workers is not None and (self.run.merged or self.checkpoints is None):
            raise ValueError(
                "base_workers is set, which needs checkpoints, from which their result is read, and run.merged=false, "
                "as none of them has a whole weight; set both"
            )
        if self.run.checkpoint_every and self.checkpoints is None:
            raise ValueError("run.checkpoint_every is set, but checkpoints is not, which says where; set checkpoints")
        if self.run.evaluate_every and not self.validation_share and not all(c.validation for c in self.everybody):
            raise ValueError("run.evaluate_every is set, but validation_share is 0 and a customer has no validation")
        return self
