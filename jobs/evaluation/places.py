"""Local paths of a configuration made absolute, because a worker's folder is not the command's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jobs.evaluation.config import EvaluateConfig
from ot_ray.data import DataConfig
from ot_ray.model import ModelConfig
from ot_ray.store import open_store


def reachable(config: EvaluateConfig) -> EvaluateConfig:
    """The same configuration, with absolute paths where it names folders and files of this machine."""
    tasks, bundle = config.harness, config.bundle
    assert tasks is not None
    changes: dict[str, Any] = {
        "model": reachable_model(config.model),
        "adapter": _address(config.adapter),
        "train": _data(config.train),
        "harness": tasks.model_copy(
            update={
                "cache": _address(tasks.cache),
                "tasks_folder": _path(tasks.tasks_folder),
                "adapters": {task: _address(address) for task, address in tasks.adapters.items()},
            }
        ),
    }
    if bundle is not None:
        folder, store, key = _path(bundle.folder), _address(bundle.store), _path(bundle.public_key)
        changes["bundle"] = bundle.model_copy(update={"folder": folder, "store": store, "public_key": key})
    return config.model_copy(update=changes)


def reachable_model(model: ModelConfig) -> ModelConfig:
    """The same model, by its absolute path where it is a folder of this machine."""
    # What is no folder here is an address, or a name on the hub.
    return model.model_copy(update={"source": _path(model.source)}) if Path(model.source).is_dir() else model


def _data(data: DataConfig | None) -> DataConfig | None:
    if data is None or data.task or data.dataset or "://" in data.source:
        return data
    return data.model_copy(update={"source": _path(data.source)})


def _address(address: str | None) -> str | None:
    return None if address is None else open_store(address).url


def _path(path: str | None) -> str | None:
    return None if path is None else str(Path(path).expanduser().absolute())
