"""Distilling an emulator, as each worker of a group runs it. Publishing the bundle is the job's part."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ot_ray.artifacts import ModelSource, open_model_source
from ot_ray.errors import ConfigError
from ot_ray.model import (
    DistillModel,
    DistillOptions,
    ImageDistillModel,
    SplitPlan,
    empty_model,
    emulated_layers,
    layer_config,
    uniform_layers,
)
from ot_ray.model.distill import LaneModel
from ot_ray.model.loading import DTYPES
from ot_ray.store import PatientStore, Store, open_store
from ot_ray.training.checkpoints import Checkpoints
from ot_ray.training.deepspeed_engine import DeepSpeedEngine
from ot_ray.training.distill_config import DistillConfig
from ot_ray.training.distill_data import distill_data_digest, open_distill_data
from ot_ray.training.emulator_gap import EmulatorGap
from ot_ray.training.emulator_weights import start_state, write_weights
from ot_ray.training.history import RunHistory
from ot_ray.training.identity import run_identity
from ot_ray.training.loop import Report, train
from ot_ray.training.utilisation import peak_flops, step_flops


def distill(config: DistillConfig, report: Report | None = None) -> dict[str, Any]:
    """Distil on this rank; rank 0 leaves the emulator's weights and the history under ``runs/<run>/`` of the store.

    Every rank of the group calls this with the same configuration. It goes on from the run's last committed
    checkpoint, whatever number of ranks wrote that.

    Args:
        report: called on every rank after each step with that step's figures, `mfu` among them where the
            device's peak is known.

    Returns:
        `steps`; `first` and `last`, figures of those steps (on rank 0 of the whole run, elsewhere of this process);
        `data_digest`; `perplexity`, of the `full` model and of the emulated one before (`dropped`) and after
        (`emulated`) distilling, where there is validation data.
    """
    # The ranks' places are known before there is a group: what reads text starts while weights are loaded.
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    training, patience = config.training, config.training.store_patience_s
    source = open_model_source(config.model, patience_s=patience)
    data = open_distill_data(config, source, rank, world_size)
    batches = data.batches
    with contextlib.closing(batches), contextlib.closing(source):
        engine, module = open_engine(config, source)
        identity = _identity(config, source, engine)
        plain, store = open_store(config.store), _store(config)
        checkpoints = Checkpoints(
            plain, f"runs/{config.run}/checkpoints", identity, keep=training.keep_checkpoints, patience_s=patience
        )
        gap = EmulatorGap(engine, store, f"runs/{config.run}", data.held_out, training.micro_batch_size)
        if not checkpoints.started(engine):
            gap.measure_start()
        history = RunHistory(store, config.run, training.checkpoint_every if rank == 0 else 0)
        with contextlib.closing(checkpoints):
            train(
                engine,
                batches,
                training,
                checkpoints=checkpoints,
                report=_reporting(config, source, history, engine, report),
            )
        perplexity = gap.measure_end(training.steps)
        _leave_weights(engine, module, store, config)
        steps = history.close() if rank == 0 else history.steps
        engine.barrier()
    return {
        "steps": training.steps,
        "first": steps[0] if steps else None,
        "last": steps[-1] if steps else None,
        "data_digest": identity["data"]["digest"],
        "perplexity": perplexity,
    }


def open_engine(config: DistillConfig, source: ModelSource) -> tuple[DeepSpeedEngine, LaneModel]:
    """The distillation under DeepSpeed, its weights read as they are sharded: under ZeRO-3 no rank holds more than
    its own partitions and one whole tensor."""
    # Equal everywhere, so that replicas start equal; the loop then gives each rank its own.
    torch.manual_seed(config.training.seed)
    full = empty_model(source.config, DTYPES[config.model.dtype])
    places = source.stored_names(full)
    options = DistillOptions(checkpointing=config.training.activation_checkpointing, compile=config.training.compile)
    depth = layer_config(source.config).num_hidden_layers
    kept = kept_layers(depth, config.split, config.emulator.layers, config.kept)
    if config.images is not None:
        module = ImageDistillModel(full, config.split, kept, options, config.emulator)
    else:
        module = DistillModel(full, config.split, kept, config.loss, options, config.emulator)
    origins, names = module.origins(), module.emulator_names()
    # Smaller maps have no weights in the full model; every rank holds what they start from, which is small.
    smaller = start_state(_store(config), config.run) if config.emulator.factored else {}

    def fill(name: str, start: int, end: int) -> Tensor:
        if smaller and name in names:
            return module.start_of(name, smaller[names[name]]).flatten()[start:end]
        if name in module.pruned:
            # Which entries stay is seen in the whole weight only.
            return module.start_of(name, source.weights.read(places[origins[name]]))[start:end]
        return source.weights.read(places[origins[name]], start, end)

    return DeepSpeedEngine(module, config.training, fill), module


def kept_layers(
    depth: int, plan: SplitPlan, layers: str = "uniform", chosen: tuple[int, ...] | None = None
) -> list[int]:
    """The layers of the middle that the emulator starts from.

    Args:
        depth: layers of the full model.
        layers: `emulator.layers`.
        chosen: `DistillConfig.kept`; a choice that looks at the whole model is made before a run, as no rank holds it.

    Raises:
        SplitError: `chosen` does not fit the split.
        ConfigError: nobody has chosen yet.
    """
    if chosen is not None:
        emulated_layers(depth, plan, chosen)
        return list(chosen)
    if layers != "uniform":
        raise ConfigError(
            f"emulator.layers is {layers!r}, but kept is not set; choose the layers first with "
            "ot_ray.model.choice.choose_layers and hand them over as kept"
        )
    return uniform_layers(len(plan.middle(depth)), plan.keep)


def _store(config: DistillConfig) -> PatientStore:
    return PatientStore(open_store(config.store), config.training.store_patience_s)


def _identity(config: DistillConfig, source: ModelSource, engine: DeepSpeedEngine) -> dict[str, Any]:
    """The run's identity; where whoever started it left the digests out, rank 0 computes them for all."""
    model, data = config.model_version, config.data_digest
    if engine.rank == 0:
        model = model or source.version
        data = data or distill_data_digest(config)
    model, data = engine.gather([model, data])[0]
    return run_identity(config, model, data)


def _reporting(
    config: DistillConfig, source: ModelSource, history: RunHistory, engine: DeepSpeedEngine, report: Report | None
) -> Report:
    """Adds the share of the device's peak to each step's figures, keeps them, and passes them on."""
    # What a step of an image model computes is not counted.
    peak = peak_flops(engine.device, config.training.precision) if config.images is None else None
    flops = step_flops(source.config, config.split, config.training.batch_size, config.sequence_length) if peak else 0.0

    def keep(figures: Mapping[str, float]) -> None:
        figures = {**figures, "workers": engine.world_size}
        if peak is not None:
            figures = {**figures, "mfu": flops / (figures["seconds"] * peak * engine.world_size)}
        history.add(figures)
        if report is not None:
            report(figures)

    return keep


def _leave_weights(engine: DeepSpeedEngine, module: LaneModel, store: Store, config: DistillConfig) -> None:
    names = module.emulator_names()
    if engine.rank != 0:
        # Sharded weights are gathered by all ranks together.
        for _ in engine.masters():
            pass
        return
    shapes = {names[name]: tuple(shape) for name, shape in engine.shapes().items()}
    # Codes are the nearest to the weights that passes were computed with, not to their masters.
    seen = torch.bfloat16 if config.emulator.bits and config.training.precision == "bfloat16" else torch.float32
    named = ((names[name], tensor.to(seen)) for name, tensor in engine.masters())
    write_weights(store, config.run, shapes, DTYPES[config.model.dtype], named)
