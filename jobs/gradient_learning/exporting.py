"""What was learnt, as files: each owner's auxiliary, as LoRA where it is one, and as an adapter of a bundle.

A manifest of the whole is written last; its presence says that all is there."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jobs.gradient_learning.config import COLLABORATION, ColaConfig
from jobs.gradient_learning.work import Work, identity
from ot_ray.artifacts import inspect_adapter
from ot_ray.artifacts.folder import describe_files, list_files
from ot_ray.artifacts.lora_files import write_lora_adapter, write_peft_lora
from ot_ray.artifacts.manifest import MANIFEST, now
from ot_ray.cola import Auxiliary, Collaboration
from ot_ray.errors import TrainingError
from ot_ray.training.auxiliary_files import low_rank_sum, write_auxiliary

LORA, ADAPTER = "lora", "adapter"
"""Folders inside an owner's: LoRA of the base model, and the adapter of the bundle."""


def write_results(
    folder: Path, work: Work, config: ColaConfig, states: Mapping[str, Any], told: Mapping[str, Any]
) -> dict[str, Any]:
    """Write every owner's folder, and the manifest of all.

    Args:
        states: `Fits.state_dict` by owner, at the end.
        told: what else goes into the manifest.

    Returns:
        By owner: `fits`, `parameters`, and which folders there are.

    Raises:
        TrainingError: an auxiliary was never fitted, since every batch was refused.
        AdapterRejectedError: the bundle's inspection takes no such adapter.
    """
    learnt = {name: _fitted(work.start[name], states[name]) for name in work.owners}
    fits = {name: int(states[name]["fitter"]["steps"]) for name in work.owners}
    if never := [name for name, steps in fits.items() if not steps]:
        raise TrainingError(
            f"the auxiliary of {never[0]} was never fitted: all its batches were refused, for inputs or gradients that "
            "are not finite; look at its text, or load the model as float32"
        )
    owners = {}
    for name, auxiliary in learnt.items():
        write_auxiliary(
            folder / name,
            auxiliary,
            model=config.model.name,
            model_version=work.source.version,
            customer=name,
            fits=fits[name],
        )
        rate = work.owners[name].fitting.lr
        owners[name] = {
            "fits": fits[name],
            "parameters": sum(tensor.numel() for tensor in auxiliary.tensors.values()),
            "folders": [name, *_as_lora(folder / name, [(1.0, auxiliary)], work, config, fits[name], rate)],
        }
    if config.mode == "collaboration":
        mode = Collaboration(learnt, config.weights)
        rate = max(owner.fitting.lr for owner in work.owners.values())
        written = _as_lora(folder / COLLABORATION, mode.summands(), work, config, max(fits.values()), rate)
        owners |= {COLLABORATION: {"folders": written}} if written else {}
    manifest = {
        "schema_version": 1,
        "created": now().isoformat(),
        "identity": identity(config, work),
        **told,
        "owners": owners,
        "files": {name: entry.model_dump() for name, entry in describe_files(folder, list_files(folder)[0]).items()},
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    return owners


def _fitted(start: Auxiliary, state: Mapping[str, Any]) -> Auxiliary:
    auxiliary = start.copy()
    auxiliary.load(state["fitter"]["auxiliary"])
    return auxiliary


def _as_lora(
    folder: Path, summands: Sequence[tuple[float, Auxiliary]], work: Work, config: ColaConfig, steps: int, rate: float
) -> list[str]:
    """Names of the folders that could be written."""
    lora = low_rank_sum(summands)
    if lora is None:
        return []
    write_peft_lora(folder / LORA, lora, config.model.name)
    written = [f"{folder.name}/{LORA}"]
    if work.bundle is not None:
        write_lora_adapter(folder / ADAPTER, lora, work.depth, work.bundle, steps=steps, learning_rate=rate)
        inspect_adapter(folder / ADAPTER, work.bundle)
        written.append(f"{folder.name}/{ADAPTER}")
    return written
