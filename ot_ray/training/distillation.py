"""Distilling an emulator, as each worker of a group runs it. Publishing the bundle is the job's part."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from safetensors.torch import load, save_file

from ot_ray.config import Config
from ot_ray.data import BatchStream, DataConfig, PackedDataset, load_sequences
from ot_ray.model import (
    DistillLoss,
    DistillModel,
    ModelConfig,
    SplitPlan,
    depth_of,
    load_model,
    load_tokenizer,
    uniform_layers,
)
from ot_ray.store import Store, open_store
from ot_ray.training.checkpoints import Checkpoints
from ot_ray.training.config import TrainingConfig
from ot_ray.training.deepspeed_engine import DeepSpeedEngine
from ot_ray.training.loop import Report, train


class DistillConfig(Config):
    """What an emulator is distilled from, on what, and how. Travels to every worker as plain values."""

    model: ModelConfig
    """The full model."""
    split: SplitPlan
    """Adapter and emulator sizes."""
    data: DataConfig
    """The owner's public text; never a customer's."""
    sequence_length: int = Field(default=512, ge=2)
    """Tokens of a training sequence."""
    loss: DistillLoss = DistillLoss()
    """Weights of the objective."""
    training: TrainingConfig
    """The optimiser run; ZeRO stage and precision among it."""
    store: str
    """Folder or `s3://` address where checkpoints and bundles go."""
    run: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,95}$")
    """Name of the run; the same name resumes from its last checkpoint."""


def distill(config: DistillConfig, report: Report | None = None) -> dict[str, Any]:
    """Distil on this rank; rank 0 leaves the emulator's weights under ``runs/<run>/`` of the store.

    Every rank of the group calls this with the same configuration.

    Returns:
        Counts, the data's digest, and the first and last losses.
    """
    data = load_sequences(config.data, load_tokenizer(config.model), config.sequence_length)
    # Equal everywhere, so that replicas start equal; the loop then gives each rank its own.
    torch.manual_seed(config.training.seed)
    model = load_model(config.model)
    kept = kept_layers(depth_of(model), config.split)
    distilled = DistillModel(model, config.split, kept, config.loss)
    engine = DeepSpeedEngine(distilled, config.training)
    store = open_store(config.store)
    result = train(
        engine,
        BatchStream(data.sequences, config.training.batch_size, config.training.seed),
        config.training,
        checkpoints=Checkpoints(store, f"runs/{config.run}/checkpoints", _fingerprint(config, data)),
        report=report,
    )
    trained = engine.trainable_state()
    if engine.rank == 0:
        _leave(store, config.run, distilled.emulator_state(trained), result.history)
    engine.barrier()
    return {
        "steps": config.training.steps,
        "documents": data.counts.documents,
        "tokens": data.counts.tokens,
        "data_digest": data.digest,
        "first": result.history[0] if result.history else None,
        "last": result.history[-1] if result.history else None,
    }


def kept_layers(depth: int, plan: SplitPlan) -> list[int]:
    """The layers of the middle that the emulator starts from."""
    return uniform_layers(len(plan.middle(depth)), plan.keep)


def distilled_state(store: Store, run: str) -> dict[str, torch.Tensor]:
    """The weights that `distill` left in the store, named ``<layer of E>.<name>``.

    Raises:
        NotFoundError: the run has not finished.
    """
    return load(store.read(f"runs/{run}/emulator.safetensors"))


def _leave(store: Store, run: str, state: Mapping[str, torch.Tensor], history: list[dict[str, float]]) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "emulator.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
        store.upload(path, f"runs/{run}/emulator.safetensors")
    lines = "".join(json.dumps(entry) + "\n" for entry in history)
    store.write(f"runs/{run}/history.jsonl", lines.encode())


def _fingerprint(config: DistillConfig, data: PackedDataset) -> dict[str, Any]:
    values = config.model_dump(mode="json")
    # Where things lie may change between a run and its resume; what they are may not.
    for name in ("store", "run"):
        del values[name]
    return {**values, "data_digest": data.digest}
