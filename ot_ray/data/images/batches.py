"""Batches of images by rank: decoded when they are due, by threads that work while a step runs.

The loop that asks for batches, and the checkpoint that keeps the position, belong to training."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from transformers import BaseImageProcessor

from ot_ray.data.batches import position_in, rows_of
from ot_ray.data.images.labelled import LabelledImages
from ot_ray.data.order import EpochOrder
from ot_ray.errors import ConfigError, DataError

_Key = tuple[int, int, int]


class ImageBatches:
    """Batches without end; each epoch shows every image once, in an order of its own. Implements `Batches`.

    The position is the number of images consumed by all processes together, so the global batches are the same
    whatever the number of processes. One batch is decoded ahead.

    Args:
        images: all processes hold the same.
        processor: the model's own.
        batch_size: images in a global batch.
        seed: with the epoch's number, decides the order.
        workers: threads that decode; 0 decodes when a batch is asked for.

    Raises:
        DataError: there are no images.
        ConfigError: `batch_size` is below 1.
    """

    def __init__(
        self, images: LabelledImages, processor: BaseImageProcessor, batch_size: int, seed: int, workers: int = 0
    ) -> None:
        if not len(images):
            raise DataError("there are no images to make batches of; check the image source")
        if batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size}; use 1 or more")
        self._images, self._processor, self._batch_size = images, processor, batch_size
        self._order = EpochOrder(len(images), seed)
        self._position = 0
        self._pool = ThreadPoolExecutor(workers, "images") if workers else None
        self._ahead: tuple[_Key, list[Future[Tensor]]] | None = None

    def next_batch(self, rank: int = 0, world_size: int = 1) -> dict[str, Tensor]:
        """This rank's rows of the next global batch, which crosses an epoch's border where it must.

        Returns:
            Float32 `pixel_values` of shape [rows, channels, height, width], and int64 `labels` [rows], NO_LABEL where
            an image has no class.

        Raises:
            ConfigError: `batch_size` is below `world_size`, or there is no such rank.
            DataError: an image does not open; names it.
        """
        key = (self._position, rank, world_size)
        chosen = self._chosen(key)
        pixels = self._decoded(key, chosen)
        self._position += self._batch_size
        if self._pool is not None:
            following = (self._position, rank, world_size)
            self._ahead = following, self._submit(self._pool, self._chosen(following))
        return _batch(self._images, chosen, pixels)

    def state(self) -> dict[str, int]:
        """What a checkpoint keeps: the number of images consumed, the same on every rank."""
        return {"position": self._position}

    def restore(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Go on where the states were taken. Raises TrainingError."""
        self._position = position_in(states)

    def close(self) -> None:
        """End the threads."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None
        self._ahead = None

    def _chosen(self, key: _Key) -> list[int]:
        position, rank, world_size = key
        return [self._order.at(position + row) for row in rows_of(self._batch_size, rank, world_size)]

    def _decoded(self, key: _Key, chosen: Sequence[int]) -> list[Tensor]:
        if self._pool is None:
            return [pixels_of(self._images, index, self._processor) for index in chosen]
        ahead, self._ahead = self._ahead, None
        futures = ahead[1] if ahead is not None and ahead[0] == key else self._submit(self._pool, chosen)
        return [future.result() for future in futures]

    def _submit(self, pool: ThreadPoolExecutor, chosen: Sequence[int]) -> list[Future[Tensor]]:
        return [pool.submit(pixels_of, self._images, index, self._processor) for index in chosen]


def ordered_batches(
    images: LabelledImages, processor: BaseImageProcessor, batch_size: int, workers: int = 0
) -> Iterator[dict[str, Tensor]]:
    """Every image once, in order; the last batch may be smaller. Raises DataError as `next_batch` does.

    Args:
        workers: threads that decode one batch ahead; 0 decodes when a batch is asked for.
    """
    parts = [range(start, min(start + batch_size, len(images))) for start in range(0, len(images), batch_size)]
    if not workers:
        yield from (images_at(images, part, processor) for part in parts)
        return
    pool, ahead = ThreadPoolExecutor(workers, "images"), deque[list[Future[Tensor]]]()
    try:
        for number, part in enumerate(parts):
            for following in parts[number + len(ahead) : number + 2]:
                ahead.append([pool.submit(pixels_of, images, index, processor) for index in following])
            yield _batch(images, part, [future.result() for future in ahead.popleft()])
    finally:
        pool.shutdown(cancel_futures=True)


def images_at(images: LabelledImages, chosen: Sequence[int], processor: BaseImageProcessor) -> dict[str, Tensor]:
    """The images of these numbers as a batch. Raises DataError as `next_batch` does."""
    return _batch(images, chosen, [pixels_of(images, index, processor) for index in chosen])


def pixels_of(images: LabelledImages, index: int, processor: BaseImageProcessor) -> Tensor:
    """One image as its model takes it, float32 [channels, height, width]. Raises DataError."""
    image = images.load(index)
    try:
        found = processor(images=[image], return_tensors="pt")["pixel_values"][0]
    except (ValueError, TypeError, ZeroDivisionError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise DataError(
            f"{images.name(index)}: the model's image processor cannot take it ({image.width} x {image.height} "
            f"pixels): {reason}; replace or remove it"
        ) from None
    return found.float()


def _batch(images: LabelledImages, chosen: Sequence[int], pixels: Sequence[Tensor]) -> dict[str, Tensor]:
    labels = torch.tensor([images.labels[index] for index in chosen], dtype=torch.int64)
    return {"pixel_values": torch.stack(list(pixels)), "labels": labels}
