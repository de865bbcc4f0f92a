"""What a distillation reads, text or images: its batches, what the emulator gap is measured on, and what identifies it.

Reading itself is data's; which of the two a run has, its configuration says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ot_ray.artifacts import ModelSource
from ot_ray.data import Batches, DataConfig, load_sequences, source_digest
from ot_ray.data.images import ImageBatches, ImageConfig, image_digest, load_images
from ot_ray.data.streaming import open_stream
from ot_ray.model import classes_in
from ot_ray.training.distill_config import DistillConfig
from ot_ray.training.emulator_gap import HeldOut, held_out_images, held_out_text
from ot_ray.training.text_source import files_of, image_files


@dataclass(frozen=True)
class DistillData:
    """What one rank reads."""

    batches: Batches
    """Training batches."""
    held_out: Callable[[], HeldOut] | None
    """Loads what the emulator gap is measured on; None where there is nothing."""


def open_distill_data(config: DistillConfig, source: ModelSource, rank: int, world_size: int) -> DistillData:
    """Open what a run learns from, for one rank.

    Raises:
        DataError: it cannot be read; names files or images.
        ConfigError: the model's tokenizer or image processor cannot be used.
    """
    if config.images is not None:
        return _images(config, config.images, source)
    return _text(config, source, rank, world_size)


def distill_data_digest(config: DistillConfig) -> str:
    """What identifies the training data, without making batches of it. Raises DataError."""
    patience = config.training.store_patience_s
    if config.images is not None:
        return image_digest(config.images, image_files(config.images.source, patience))
    return source_digest(config.text, files_of(config.text, patience))


def _text(config: DistillConfig, source: ModelSource, rank: int, world_size: int) -> DistillData:
    training, patience, validation = config.training, config.training.store_patience_s, config.validation
    tokenizer = source.tokenizer()

    def held_out(chosen: DataConfig) -> HeldOut:
        return held_out_text(
            load_sequences(chosen, tokenizer, config.sequence_length, files=files_of(chosen, patience)),
            compiled=training.compile,
        )

    batches = open_stream(
        config.text,
        tokenizer,
        config.sequence_length,
        training.batch_size,
        training.seed,
        rank,
        world_size,
        files=files_of(config.text, patience),
    )
    return DistillData(batches, (lambda: held_out(validation)) if validation is not None else None)


def _images(config: DistillConfig, chosen: ImageConfig, source: ModelSource) -> DistillData:
    training, patience, validation = config.training, config.training.store_patience_s, config.validation_images
    processor = source.processor()

    def held_out(chosen: ImageConfig) -> HeldOut:
        files = image_files(chosen.source, patience)
        images = load_images(chosen, files, checked=True).with_classes(
            classes_in(source.config), "the full model's head"
        )
        return held_out_images(images, processor, image_digest(chosen, files))

    # Whoever started the ranks has looked at the headers; each of them again would ask a bucket for all of them.
    images = load_images(chosen, image_files(chosen.source, patience), checked=True)
    batches = ImageBatches(images, processor, training.batch_size, training.seed, chosen.workers)
    return DistillData(batches, (lambda: held_out(validation)) if validation is not None else None)
