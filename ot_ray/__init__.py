"""Offsite tuning on Ray. What stands here is the public API; the rest may change between versions.

Names are looked up when first used, so that importing this package loads neither torch nor Ray."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ot_ray.artifacts import BundleSource, inspect_adapter, open_bundle, plain_state, write_adapter, write_bundle
    from ot_ray.data import DataConfig, load_sequences
    from ot_ray.errors import OTRayError
    from ot_ray.evaluation import FiveSettings, perplexity
    from ot_ray.model import (
        DistillLoss,
        DistillModel,
        SplitPlan,
        adapter_state,
        emulate,
        plug_in,
        prepare_tuning,
        uniform_layers,
    )
    from ot_ray.store import open_store
    from ot_ray.training import TrainingConfig, fit

__version__ = "0.1.0"

__all__ = [
    "BundleSource",
    "DataConfig",
    "DistillLoss",
    "DistillModel",
    "FiveSettings",
    "OTRayError",
    "SplitPlan",
    "TrainingConfig",
    "__version__",
    "adapter_state",
    "emulate",
    "fit",
    "inspect_adapter",
    "load_sequences",
    "open_bundle",
    "open_store",
    "perplexity",
    "plain_state",
    "plug_in",
    "prepare_tuning",
    "uniform_layers",
    "write_adapter",
    "write_bundle",
]

_ROOMS = {
    "BundleSource": "artifacts",
    "DataConfig": "data",
    "DistillLoss": "model",
    "DistillModel": "model",
    "FiveSettings": "evaluation",
    "OTRayError": "errors",
    "SplitPlan": "model",
    "TrainingConfig": "training",
    "adapter_state": "model",
    "emulate": "model",
    "fit": "training",
    "inspect_adapter": "artifacts",
    "load_sequences": "data",
    "open_bundle": "artifacts",
    "open_store": "store",
    "perplexity": "evaluation",
    "plain_state": "artifacts",
    "plug_in": "model",
    "prepare_tuning": "model",
    "uniform_layers": "model",
    "write_adapter": "artifacts",
    "write_bundle": "artifacts",
}


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_ROOMS[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
