"""What a distillation is to read, looked at before anything runs: text and its tokenizer, or images and a processor."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import BaseImageProcessor, PreTrainedTokenizerBase

from jobs.emulator.config import MakeEmulatorConfig
from jobs.limits import require_kind
from ot_ray.artifacts import ModelSource
from ot_ray.data import DataConfig, read_documents, resolved_revision, source_digest
from ot_ray.data.images import ImageConfig, image_digest, load_images, resolved_image_revision
from ot_ray.data.streaming import StreamConfig
from ot_ray.errors import ConfigError
from ot_ray.model import classes_in
from ot_ray.model.loading import require_length
from ot_ray.training.text_source import files_of, image_files


@dataclass(frozen=True)
class Reading:
    """Text or images, found to be there and to fit the model."""

    tokenizer: PreTrainedTokenizerBase | None
    """The model's, where it takes text."""
    processor: BaseImageProcessor | None
    """The model's, where it takes images."""
    data: StreamConfig | None
    """The training text; a hub's data set at the commit that it has now."""
    images: ImageConfig | None
    """The training images; a hub's data set at the commit that it has now."""
    validation: DataConfig | None
    """The held-out text; a hub's data set at the commit that it has now."""
    validation_images: ImageConfig | None
    """The held-out images; a hub's data set at the commit that it has now."""
    digest: str
    """Of the training data."""
    held_out: str
    """What identifies the held-out data and how it is cut; empty where there is none."""


def look_at(config: MakeEmulatorConfig, source: ModelSource) -> Reading:
    """Find what is to be read, and whether it can be.

    Raises:
        OTRayError: a source, the tokenizer or the processor cannot be used, or does not fit the model; names it.
    """
    require_kind(source.config.model_type, "data", images=config.images is not None)
    return _images(config, config.images, source) if config.images is not None else _text(config, source)


def _text(config: MakeEmulatorConfig, source: ModelSource) -> Reading:
    require_length(config.sequence_length, source.config)
    tokenizer = source.tokenizer()
    data = config.text.model_copy(update={"revision": resolved_revision(config.text)})
    held_out = config.validation
    if held_out is not None:
        held_out = held_out.model_copy(update={"revision": resolved_revision(held_out)})
    return Reading(
        tokenizer=tokenizer,
        processor=None,
        data=data,
        images=None,
        validation=held_out,
        validation_images=None,
        digest=config.data_digest or _text_digest(data, config),
        held_out=f"{_text_digest(held_out, config)}-{config.sequence_length}" if held_out is not None else "",
    )


def _text_digest(data: DataConfig, config: MakeEmulatorConfig) -> str:
    files = files_of(data, config.training.store_patience_s)
    # The first document shows that the text can be read; the workers meet the others.
    next(iter(read_documents(data, files)), None)
    return source_digest(data, files)


def _images(config: MakeEmulatorConfig, chosen: ImageConfig, source: ModelSource) -> Reading:
    patience, digest = config.training.store_patience_s, ""
    _require_head(config, source)
    processor = source.processor()
    images = chosen.model_copy(update={"revision": resolved_image_revision(chosen)})
    files = image_files(images.source, patience)
    load_images(images, files)
    held_out = config.validation_images
    if held_out is not None:
        held_out = held_out.model_copy(update={"revision": resolved_image_revision(held_out)})
        place = image_files(held_out.source, patience)
        load_images(held_out, place).with_classes(classes_in(source.config), "the full model's head")
        digest = image_digest(held_out, place)
    return Reading(
        tokenizer=None,
        processor=processor,
        data=None,
        images=images,
        validation=None,
        validation_images=held_out,
        digest=config.data_digest or image_digest(images, files),
        held_out=digest,
    )


def _require_head(config: MakeEmulatorConfig, source: ModelSource) -> None:
    """Refuse to measure a model without a head; what gate asks for is measured on validation_images."""
    if config.validation_images is not None and source.head_is_stand_in:
        raise ConfigError(
            f"validation_images is set, but {config.model.source} is a tower without a classification head, so that "
            "neither it nor its emulator can be measured; leave out validation_images and what gate asks for, or name "
            "a model with a head"
        )
