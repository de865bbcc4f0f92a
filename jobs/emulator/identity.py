"""What is to be made, looked up before anything is: the model, what is read, and the names that follow from them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from jobs.emulator.config import MakeEmulatorConfig
from jobs.emulator.reading import Reading, look_at
from ot_ray.artifacts import key_id, open_model_source
from ot_ray.errors import ConfigError
from ot_ray.model import ModelConfig, empty_model, family_of, layer_config
from ot_ray.model.families import check_maps_are_called, layers_of, linear_names
from ot_ray.model.loading import DTYPES
from ot_ray.model.packed import with_smaller_maps
from ot_ray.model.packed.rounding import pruned_count
from ot_ray.training import DistillConfig
from ot_ray.training.identity import identity_digest, run_identity

_DIGITS = 12


@dataclass(frozen=True)
class Inputs:
    """The inputs of one night, found to be there and to fit each other."""

    model: ModelConfig
    """The full model; on a hub, the commit that was found."""
    reading: Reading
    """The text or the images, and what the model reads them with."""
    depth: int
    """Layers of the full model."""
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
    depth = layer_config(source.config).num_hidden_layers
    if config.emulator.compressed:
        check_maps_are_called(source.config)
    _require_smaller(config, source.config, depth)
    if config.training.batch_size < config.workers.most:
        raise ConfigError(
            f"training.batch_size is {config.training.batch_size}, but there are up to {config.workers.most} workers, "
            "and each needs a sequence; raise it, or lower workers.count"
        )
    reading = look_at(config, source)
    weights = run_identity(config, source.version, reading.digest)
    identity = {"run": weights, "bundle": offer}
    # Everybody who reads the model later reads this commit, wherever a branch points by then.
    commit = source.files.commit
    return Inputs(
        model=config.model if commit is None else config.model.model_copy(update={"revision": commit}),
        reading=reading,
        depth=depth,
        identity=identity,
        run=config.run or f"r-{identity_digest(weights)[:_DIGITS]}",
        version=config.version or f"e-{identity_digest(identity)[:_DIGITS]}",
    )


def _require_smaller(config: MakeEmulatorConfig, model: PreTrainedConfig, depth: int) -> None:
    """Refuse an emulator that is larger than the middle, or starts as the middle itself."""
    middle = config.split.middle(depth)
    if config.split.keep == len(middle) and not _compresses(config, model):
        raise ConfigError(
            f"split.keep is {config.split.keep}, every layer of the middle, and emulator compresses none of them: the "
            f"bundle would hold the full model; keep at most {len(middle) - 1} layers, or set emulator.bits, a larger "
            "emulator.sparsity or a smaller emulator.attention_rank or mlp_channels"
        )


def _compresses(config: MakeEmulatorConfig, model: PreTrainedConfig) -> bool:
    """Whether a layer of the middle loses anything; small shares may round to nothing."""
    if config.emulator.bits is not None:
        return True
    full = empty_model(model, DTYPES[config.model.dtype])
    layer = layers_of(full)[config.split.bottom]
    before = sum(parameter.numel() for parameter in layer.parameters())
    with_smaller_maps(layer, family_of(full), config.emulator)
    left = sum(parameter.numel() for parameter in layer.parameters())
    sizes = (layer.get_submodule(name).get_parameter("weight").numel() for name in linear_names(layer))
    return left < before or any(pruned_count(size, config.emulator.sparsity) for size in sizes)


def for_workers(config: MakeEmulatorConfig, inputs: Inputs, kept: tuple[int, ...] | None = None) -> dict[str, Any]:
    """What each worker is handed, as plain values; `kept` once the layers are chosen."""
    values = config.model_dump(mode="json", include=set(DistillConfig.model_fields))
    reading = inputs.reading
    found = {
        "run": inputs.run,
        "kept": kept,
        "model": inputs.model.model_dump(mode="json"),
        **{
            name: value.model_dump(mode="json") if (value := getattr(reading, name)) is not None else None
            for name in ("data", "images", "validation", "validation_images")
        },
        "data_digest": reading.digest,
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
