"""What is to be made, looked up before anything is: the model, the texts, and the names that follow from them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from jobs.emulator.config import MakeEmulatorConfig
from jobs.limits import require_length
from ot_ray.artifacts import key_id, open_model_source
from ot_ray.data import DataConfig, read_documents, resolved_revision, source_digest
from ot_ray.data.streaming import StreamConfig
from ot_ray.errors import ConfigError
from ot_ray.model import ModelConfig
from ot_ray.training import DistillConfig
from ot_ray.training.identity import identity_digest, run_identity
from ot_ray.training.text_source import files_of

_DIGITS = 12


@dataclass(frozen=True)
class Inputs:
    """The inputs of one night, found to be there and to fit each other."""

    model: ModelConfig
    """The full model; on a hub, the commit that was found."""
    tokenizer: PreTrainedTokenizerBase
    """The model's."""
    depth: int
    """Layers of the full model."""
    data: StreamConfig
    """The training text; a hub's data set at the commit that it has now."""
    data_digest: str
    """Of the training text."""
    text: str
    """What identifies the held-out text and how it is cut; empty where there is none."""
    identity: dict[str, Any]
    """What decides the bundle: `run`, which decides the weights, and `bundle`, what else goes into it."""
    run: str
    """Name of the run."""
    version: str
    """Version of the bundle."""


def look_up(config: MakeEmulatorConfig) -> Inputs:
    """Find the inputs, and meet now whatever would stop the job after hours of distilling.

    Raises:
        OTRayError: the model, the split, a text, the tokenizer or the key cannot be used; names it.
    """
    offer = _offer(config)
    source = open_model_source(config.model, patience_s=config.training.store_patience_s)
    depth = source.config.num_hidden_layers
    config.split.middle(depth)
    require_length(config.sequence_length, source.config)
    if config.training.batch_size < config.workers.most:
        raise ConfigError(
            f"training.batch_size is {config.training.batch_size}, but there are up to {config.workers.most} workers, "
            "and each needs a sequence; raise it, or lower workers.count"
        )
    tokenizer = source.tokenizer()
    data = config.data.model_copy(update={"revision": resolved_revision(config.data)})
    data_digest = config.data_digest or _digest(data, config)
    held_out = f"{_digest(config.validation, config)}-{config.sequence_length}" if config.validation else ""
    weights = run_identity(config, source.version, data_digest)
    identity = {"run": weights, "bundle": offer}
    # Everybody who reads the model or the text later reads this commit, wherever a branch points by then.
    commit = source.files.commit
    return Inputs(
        model=config.model if commit is None else config.model.model_copy(update={"revision": commit}),
        tokenizer=tokenizer,
        depth=depth,
        data=data,
        data_digest=data_digest,
        text=held_out,
        identity=identity,
        run=config.run or f"r-{identity_digest(weights)[:_DIGITS]}",
        version=config.version or f"e-{identity_digest(identity)[:_DIGITS]}",
    )


def for_workers(config: MakeEmulatorConfig, inputs: Inputs) -> dict[str, Any]:
    """What each worker is handed, as plain values."""
    values = config.model_dump(mode="json", include=set(DistillConfig.model_fields))
    found = {
        "run": inputs.run,
        "model": inputs.model.model_dump(mode="json"),
        "data": inputs.data.model_dump(mode="json"),
        "data_digest": inputs.data_digest,
        "model_version": inputs.identity["run"]["model"]["version"],
    }
    return {"distill": {**values, **found}, "log": config.log}


def _offer(config: MakeEmulatorConfig) -> dict[str, Any]:
    """What goes into a bundle besides the weights."""
    return {
        "methods": list(config.methods),
        "recommended": dict(config.recommended),
        "expires_days": config.expires_days,
        "signing_key_id": key_id(Path(config.private_key)) if config.private_key else None,
    }


def _digest(data: DataConfig, config: MakeEmulatorConfig) -> str:
    files = files_of(data, config.training.store_patience_s)
    # The first document shows that the text can be read; the workers meet the others.
    next(iter(read_documents(data, files)), None)
    return source_digest(data, files)
