"""The settings of auxiliary workers, which are read where nothing of torch is loaded.

What they mean for a worker's life is auxiliary_seat.py's."""

from __future__ import annotations

from pydantic import Field

from ot_ray.config import Config


class AuxiliaryWorkers(Config):
    """How many workers fit auxiliaries, what each gets, and how a lost one is replaced."""

    count: int = Field(default=1, ge=1)
    """Workers, among whom owners of auxiliaries are dealt out; never more than there are owners."""
    cpus: float = Field(default=1.0, gt=0)
    """CPUs of a worker, and threads of its fits."""
    resources: dict[str, float] = Field(default_factory=dict)
    """More that a machine must have, as Ray counts it: a label of its own, such as `{"auxiliary": 0.001}`, keeps fits
    on the machines that were started with it."""
    snapshot_every: int = Field(default=4, ge=1)
    """Batches between two copies of a worker's state, which is small beside a batch's inputs and gradients. Up to twice
    as many batches are kept in Ray's object store, for another worker to fit again should this one be lost, and thrice
    as many once that has happened."""
    max_failures: int = Field(default=3, ge=0)
    """Times that a worker is replaced without coming to its next snapshot, before the run is given up."""
    start_timeout_s: float = Field(default=600.0, gt=0)
    """Seconds that a worker may take to be placed and to start: how long an autoscaler may take to bring a machine."""

    @property
    def needs(self) -> dict[str, float]:
        """What one worker needs, as Ray counts it."""
        return {"CPU": self.cpus, **self.resources}
