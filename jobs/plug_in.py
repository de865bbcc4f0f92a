"""Take a tuned adapter back: inspect it, plug it into the full model, evaluate, promote."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from jobs.command import config_file, run_command
from jobs.images.evaluation import image_report
from jobs.limits import require_kind
from ot_ray.artifacts import (
    BundleSource,
    InspectionLimits,
    ModelSource,
    Registry,
    inspect_adapter,
    load_full,
    open_model_source,
    plain_state,
    require_sane_changes,
)
from ot_ray.config import Config
from ot_ray.data import DataConfig, PackedSequence, load_sequences
from ot_ray.data.images import ImageConfig
from ot_ray.errors import AdapterRejectedError
from ot_ray.evaluation import perplexity
from ot_ray.model import ModelConfig, adapter_state, plug_in
from ot_ray.model.loading import require_length
from ot_ray.store import download_folder, open_store
from ot_ray.training.text_source import files_of

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"


class PlugInConfig(Config):
    """An adapter that came back, the model it belongs to, and what it must show to be promoted."""

    model: ModelConfig
    """The full model."""
    bundle: BundleSource
    """The bundle that was tuned."""
    adapter: str
    """Folder or `s3://` address of the adapter."""
    tenant: str = Field(pattern=NAME)
    """Whose plug-in it becomes."""
    suffix: str = Field(default="default", pattern=NAME)
    """The tenant's name for it; the last one promoted under a suffix is current, and answers to the name without id."""
    store: str
    """Folder or address of the registry of plug-ins."""
    data: DataConfig | None = None
    """Text on which the plug-in model is compared with the full one before it is promoted."""
    images: ImageConfig | None = None
    """For an image model, images of the adapter's classes on which the plug-in model is compared with the tuned
    emulated one before it is promoted: the full model's own head has other classes."""
    sequence_length: int = Field(default=512, ge=2)
    """Tokens of a sequence of the evaluation."""
    max_perplexity_ratio: float | None = Field(default=None, gt=0)
    """The plug-in's perplexity over the full model's must not exceed this; unset, it is only reported."""
    min_accuracy: float | None = Field(default=None, ge=0, le=1)
    """The plug-in's accuracy on `images` must be at least this; unset, it is only reported."""
    limits: InspectionLimits = InspectionLimits()
    """How large an adapter may be, and how far its tensors may move."""

    @model_validator(mode="after")
    def _ratio_has_data(self) -> PlugInConfig:
        if self.max_perplexity_ratio is not None and self.data is None:
            raise ValueError(
                f"max_perplexity_ratio is {self.max_perplexity_ratio}, but data is not set, so that no perplexity is "
                "known; set data.source"
            )
        if self.min_accuracy is not None and self.images is None:
            raise ValueError(
                f"min_accuracy is {self.min_accuracy}, but images is not set, so that no accuracy is known; set "
                "images.source"
            )
        if self.data is not None and self.images is not None:
            raise ValueError("data is for language models and images for image models, and both are set; keep one")
        return self


def run(config: PlugInConfig) -> dict[str, Any]:
    """Inspect a returned adapter, plug it in, evaluate, and promote it."""
    with tempfile.TemporaryDirectory() as temporary:
        bundle = config.bundle.open(Path(temporary) / "bundle")
        folder = Path(temporary) / "adapter"
        download_folder(open_store(config.adapter), "", folder)
        inspected = inspect_adapter(folder, bundle.manifest, config.limits)
        emulated = bundle.load_model() if config.images is not None else None
    source = open_model_source(config.model)
    if config.data is not None or config.images is not None:
        require_kind(source.config.model_type, "data", images=config.images is not None)
    if config.data is not None:
        require_length(config.sequence_length, source.config)
    model = load_full(config.model, source=source)
    plan = bundle.manifest.plan
    original = adapter_state(model, plan)
    state = plain_state(inspected, original)
    changes = require_sane_changes(bundle.manifest, state, original, config.limits.changes)
    report: dict[str, float] = {}
    if config.data is not None:
        sequences = _sequences(config.data, source, config.sequence_length)
        report["full_perplexity"] = perplexity(model, sequences)
        report["plug_in_perplexity"] = perplexity(plug_in(model, plan, state), sequences)
        _check_quality(report, config.max_perplexity_ratio)
    if config.images is not None and emulated is not None:
        classes = inspected.manifest.classes or ()
        report = image_report(config.images, source.processor(), emulated, model, plan, state, classes)
        _check_accuracy(report, config.min_accuracy)
    registry = Registry(open_store(config.store))
    record = registry.add(
        config.model.name,
        config.tenant,
        config.suffix,
        state,
        bundle_id=bundle.manifest.bundle_id,
        plan=plan,
        report={**report, **changes},
        classes=inspected.manifest.classes,
    )
    registry.promote(record.model_id)
    return {"model_id": record.model_id, "bundle_id": record.bundle_id, "report": report}


def _sequences(data: DataConfig, source: ModelSource, length: int) -> list[PackedSequence]:
    return load_sequences(data, source.tokenizer(), length, files_of(data)).sequences


def _check_quality(report: dict[str, float], limit: float | None) -> None:
    ratio = report["plug_in_perplexity"] / report["full_perplexity"]
    if limit is not None and not ratio <= limit:
        raise AdapterRejectedError(
            f"the plug-in model's perplexity is {report['plug_in_perplexity']:.2f}, {ratio:.2f} times the full model's "
            f"{report['full_perplexity']:.2f}, and max_perplexity_ratio is {limit}; it is not promoted"
        )


def _check_accuracy(report: dict[str, float], least: float | None) -> None:
    if least is not None and not report["plug_in_accuracy"] >= least:
        raise AdapterRejectedError(
            f"the plug-in model's accuracy is {report['plug_in_accuracy']:.1%}, and min_accuracy is {least:.1%}; it is "
            "not promoted"
        )


if __name__ == "__main__":
    run_command("plug_in", PlugInConfig, run, default_config=config_file("plug_in.yaml"))
