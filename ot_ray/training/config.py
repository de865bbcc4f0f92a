"""How a training run steps: sizes, rates, precision, sharding, and when it saves and looks."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from ot_ray.config import Config

_HOW_COMPUTED = {
    "micro_batch_size",
    "zero_stage",
    "offload_optimizer",
    "offload_parameters",
    "activation_checkpointing",
    "compile",
    "checkpoint_every",
    "keep_checkpoints",
    "evaluate_every",
    "store_patience_s",
}
"""Settings that change what a run costs, and where it is looked at, but not its losses."""


class TrainingConfig(Config):
    """One optimiser run; used for distilling, tuning and pre-training alike."""

    steps: int = Field(ge=1)
    """Optimiser steps."""
    batch_size: int = Field(default=16, ge=1)
    """Sequences an optimiser step, over all workers together."""
    micro_batch_size: int | None = Field(default=None, ge=1)
    """Sequences one worker passes through the model at a time; unset, its whole share of the batch."""
    lr: float = Field(default=1e-4, gt=0)
    """Highest learning rate, reached at the end of the warm-up."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the decay after the warm-up."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps over which the rate rises linearly from 0."""
    final_lr_share: float = Field(default=0.0, ge=0, le=1)
    """Where the decay ends, one step after the last, as a share of `lr`."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's decay, on matrices only."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's averaging factors."""
    grad_clip: float = Field(default=1.0, ge=0)
    """Largest global norm of the gradients; 0 leaves them as they are."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of matrix products. Weights that learn keep a float32 master copy in either case."""
    zero_stage: int = Field(default=0, ge=0, le=3)
    """DeepSpeed ZeRO: 0 replicates, 1 shards optimiser state, 2 gradients too, 3 weights too."""
    offload_optimizer: bool = False
    """Keep optimiser state in the machine's memory and step there; needs `zero_stage` 1 or more."""
    offload_parameters: bool = False
    """Keep the shards of the weights in the machine's memory between uses; needs `zero_stage` 3."""
    activation_checkpointing: bool = False
    """Compute activations again on the way back instead of keeping them."""
    compile: bool = False
    """Run the layers through `torch.compile`."""
    seed: int = Field(default=0, ge=0)
    """Decides data order and dropout."""
    checkpoint_every: int = Field(default=0, ge=0)
    """Steps between checkpoints; 0 takes none."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """How many of the latest checkpoints are kept."""
    store_patience_s: float = Field(default=600.0, ge=0)
    """Seconds that a run waits for a store that does not answer."""
    evaluate_every: int = Field(default=0, ge=0)
    """Steps between looks at the validation split; 0 looks at the end only."""

    @model_validator(mode="after")
    def _consistent(self) -> TrainingConfig:
        # A run that is left out warms nothing up.
        if self.warmup_steps > self.steps > 0:
            raise ValueError(
                f"warmup_steps is {self.warmup_steps}, but there are {self.steps} steps; use at most that many"
            )
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas is {self.betas}; each must be at least 0 and below 1")
        for name, needed in (("offload_optimizer", 1), ("offload_parameters", 3)):
            if getattr(self, name) and self.zero_stage < needed:
                raise ValueError(f"{name} is on, but zero_stage is {self.zero_stage}; it needs {needed} or more")
        return self

    def decisive(self) -> dict[str, Any]:
        """The settings that decide the losses, as JSON values; how they are computed is left out."""
        return self.model_dump(mode="json", exclude=_HOW_COMPUTED)
