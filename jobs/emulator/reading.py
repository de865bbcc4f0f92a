"""What a distillation is to read, looked at before anything runs: text and its tokenizer, or images and a processor."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import BaseImageProcessor, PreTrainedTokenizerBase

from jobs.emulator.config import MakeEmulatorConfig
from jobs.limits import require_kind, require_length
from ot_ray.artifacts import ModelSource
from ot_ray.data import DataConfig, read_documents, resolved_revision, source_digest
from ot_ray.data.images import ImageConfig, image_digest, load_images, resolved_image_revision
from ot_ray.data.streaming import StreamConfig
from ot_ray.model import classes_in
from ot_ray.training.text_source import bucket_files, files_of


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
    return Reading(
        tokenizer=tokenizer,
        processor=None,
        data=data,
        images=None,
        digest=config.data_digest or _text_digest(data, config),
        held_out=f"{_text_digest(config.validation, config)}-{config.sequence_length}" if config.validation else "",
    )


def _text_digest(data: DataConfig, config: MakeEmulatorConfig) -> str:
    files = files_of(data, config.training.store_patience_s)
    # The first document shows that the text can be read; the workers meet the others.
    next(iter(read_documents(data, files)), None)
    return source_digest(data, files)


def _images(config: MakeEmulatorConfig, chosen: ImageConfig, source: ModelSource) -> Reading:
    patience, held_out = config.training.store_patience_s, ""
    processor = source.processor()
    images = chosen.model_copy(update={"revision": resolved_image_revision(chosen)})
    files = bucket_files(images.source, patience)
    load_images(images, files)
    if config.validation_images is not None:
        place = bucket_files(config.validation_images.source, patience)
        load_images(config.validation_images, place).with_classes(classes_in(source.config), "the full model's head")
        held_out = image_digest(config.validation_images, place)
    return Reading(
        tokenizer=None,
        processor=processor,
        data=None,
        images=images,
        digest=config.data_digest or image_digest(images, files),
        held_out=held_out,
    )
