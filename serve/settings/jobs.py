"""How tuning jobs are run: what each gets, how many run at once, and how often they are looked after."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ot_ray.config import Config
from ot_ray.model import Method


class JobsConfig(Config):
    """Tuning jobs; limits of single tenants are the tenants' own."""

    launcher: Literal["ray-jobs", "processes"] = "ray-jobs"
    """Where jobs run: as Ray jobs of the cluster that the service runs on, or as processes of this machine."""
    folder: str | None = None
    """Folder in which the launcher `processes` keeps its jobs; null for a folder `ot_ray_jobs` beside the database
    of a service on one machine."""
    max_running: int = Field(default=4, ge=1)
    """Jobs of all tenants that run at once."""
    cpus: float = Field(default=1.0, gt=0)
    """CPU cores that are set aside for a job."""
    gpus: float = Field(default=0.0, ge=0)
    """GPUs for a job; 0 tunes on the CPU."""
    memory_bytes: int | None = Field(default=None, gt=0)
    """Memory that Ray sets aside for a job; null asks for none."""
    time_limit_s: float = Field(default=24 * 3600.0, gt=0)
    """Wall-clock seconds of one run of a job, from its launch; a run that takes longer is stopped, the job fails."""
    launch_s: float = Field(default=600.0, gt=0)
    """Seconds within which a launcher must take a job; after that the run counts as lost."""
    attempts: int = Field(default=3, ge=1)
    """Runs that a job gets when the cluster loses it, and runs in a row that may end by themselves, without a word and
    without a step further; a job that says why it fails gets no second one."""
    tuning_method: Method = "lora"
    """What is tuned where a customer does not say."""
    learning_rate: float | None = Field(default=None, gt=0)
    """Learning rate of `learning_rate_multiplier` 1; null for the tuning method's own."""
    sequence_length: int = Field(default=512, ge=2)
    """Tokens of a training sequence."""
    warmup_share: float = Field(default=0.05, ge=0, le=1)
    """Share of a job's steps over which the learning rate rises."""
    micro_batch_size: int = Field(default=8, ge=1)
    """Sequences that pass through the model at a time; a larger batch takes several passes a step."""
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    """Of a job's matrix products."""
    checkpoint_every: int = Field(default=50, ge=1)
    """Steps between the checkpoints from which a job that was stopped goes on; an epoch's end is one too."""
    checkpoint_models: bool = True
    """Whether the adapter of each epoch is inspected and served as a model of its own."""
    public_key: str | None = None
    """File with the public key that bundles are signed with; jobs verify bundles by it."""
    role_arn: str | None = None
    """AWS role from which a job's credentials are made, for a quarter of an hour each time; needed where the store is
    on S3."""
    sts_endpoint: str | None = None
    """Address of the token service that makes them; null for the store's own server, or Amazon's."""
    tick_s: float = Field(default=1.0, gt=0)
    """Seconds between two rounds of the controller."""
    lease_s: float = Field(default=30.0, gt=0)
    """Seconds without a round after which another replica of the controller takes over."""
    background: int = Field(default=2, ge=1)
    """Validations, acceptances and stops that run beside the rounds at the same time."""
    events_per_tick: int = Field(default=500, ge=1)
    """Progress files of one job that are read in a round."""
    event_bytes: int = Field(default=16 * 1024, ge=1024)
    """Largest progress file that is read; a larger one is noted and skipped."""
    max_events: int = Field(default=20_000, ge=100)
    """Progress files of one job that are read at all."""
    sweep_s: float = Field(default=60.0, gt=0)
    """Seconds between two searches for what has expired."""
    keep_retired_days: float = Field(default=30.0, ge=0, le=36_500)
    """Days for which the store keeps a model that was deleted or rolled back, so that it can be promoted again."""
