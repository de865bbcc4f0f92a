"""Which layers a night's emulator starts from, and with what: found once, by one worker, kept in the owner's store.

How they are chosen is the model room's affair; running the worker is the caller's."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from jobs.command import quiet_libraries
from jobs.emulator.config import MakeEmulatorConfig
from jobs.emulator.identity import Inputs, for_workers
from ot_ray.artifacts import Lease, ModelSource, load_full, open_model_source
from ot_ray.artifacts.manifest import to_text
from ot_ray.artifacts.strict_json import parse_json
from ot_ray.config import Config
from ot_ray.data import first_sequences
from ot_ray.data.images import load_images
from ot_ray.errors import ConfigError, NotFoundError
from ot_ray.model import uniform_layers
from ot_ray.model.choice import choose_layers, smaller_layers
from ot_ray.model.loading import DTYPES
from ot_ray.store import PatientStore, Store, open_store
from ot_ray.training import DistillConfig
from ot_ray.training.calibration import calibration_images, calibration_text
from ot_ray.training.emulator_weights import START, write_weights
from ot_ray.training.identity import identity_digest
from ot_ray.training.text_source import files_of, image_files

Choose = Callable[[dict[str, Any], str], dict[str, Any]]
"""Chooses as `choose_on_worker` does, given what workers are handed and the run's name."""


class ChosenLayers(Config):
    """`runs/<run>/layers.json` in the owner's store; what was chosen is the owner's secret."""

    schema_version: Literal[1] = 1
    """Format of this document."""
    identity: str
    """sha256 of the run's identity."""
    kept: tuple[int, ...]
    """Places in the middle, ascending."""


def layers_of_run(
    config: MakeEmulatorConfig, inputs: Inputs, store: Store, lease: Lease, choose: Choose
) -> tuple[int, ...]:
    """The layers that the run's emulator starts from, chosen now if that was not done before.

    Raises:
        ConfigError: the run's layers were chosen for other inputs.
        LeaseLostError: another run took over meanwhile; nothing was kept.
    """
    middle = len(config.split.middle(inputs.depth))
    if not looks_at_the_model(config, middle):
        return tuple(uniform_layers(middle, config.split.keep))
    key, identity = f"runs/{inputs.run}/layers.json", identity_digest(inputs.identity["run"])
    try:
        before = parse_json(ChosenLayers, store.read(key), key)
    except NotFoundError:
        pass
    else:
        return _of_these(before, identity, inputs.run)
    with lease.ending_with_it():
        found = choose(for_workers(config, inputs), inputs.run)
    chosen = ChosenLayers(identity=identity, kept=tuple(found["kept"]))
    lease.require()
    store.create(key, to_text(chosen))
    return chosen.kept


def looks_at_the_model(config: MakeEmulatorConfig, middle: int) -> bool:
    """Whether one worker holds the full model to find what the emulator starts from; `middle` counts its layers."""
    return config.emulator.factored or (config.emulator.layers != "uniform" and config.split.keep < middle)


def choose_on_worker(payload: dict[str, Any]) -> dict[str, Any]:
    """Choose as `emulator.layers` says, on the first `emulator.calibration` sequences of the owner's public text;
    where layers get smaller maps, leave what those start from in the store.

    This one worker holds the full model; `gradient` holds gradients of the adapter and activations of four
    sequences beside it. The first GPU that it has is used.

    Args:
        payload: `distill`, the values of a `DistillConfig`.

    Returns:
        `kept`, places in the middle.

    Raises:
        OTRayError: the model or the text cannot be used, or `choose_layers` finds nothing to compare.
    """
    quiet_libraries()
    config = DistillConfig.model_validate(payload["distill"])
    patience = config.training.store_patience_s
    with contextlib.closing(open_model_source(config.model, patience_s=patience)) as source:
        batches = list(_calibration(config, source))
        model = load_full(config.model, source=source)
    model.to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))  # type: ignore[arg-type] - a wrapper's stub
    kept = choose_layers(model, config.split, config.emulator, batches)
    if config.emulator.factored:
        state = smaller_layers(model, config.split, kept, config.emulator, batches)
        shapes, dtype = {name: tuple(tensor.shape) for name, tensor in state.items()}, DTYPES[config.model.dtype]
        named = ((name, tensor.cpu()) for name, tensor in state.items())
        write_weights(PatientStore(open_store(config.store), patience), config.run, shapes, dtype, named, START)
    return {"kept": kept}


def _calibration(config: DistillConfig, source: ModelSource) -> Iterator[dict[str, Tensor]]:
    patience, count = config.training.store_patience_s, config.emulator.calibration
    if config.images is not None:
        images = load_images(config.images, image_files(config.images.source, patience), checked=True)
        return calibration_images(images, source.processor(), count)
    files = files_of(config.text, patience)
    sequences = first_sequences(config.text, source.tokenizer(), config.sequence_length, count, files)
    return calibration_text(sequences)


def _of_these(chosen: ChosenLayers, identity: str, run: str) -> tuple[int, ...]:
    if chosen.identity != identity:
        raise ConfigError(
            f"run is {run!r}, but the layers of that run were chosen for another model, text or setting; choose "
            "another run, or leave it unset"
        )
    return chosen.kept
