"""How far an emulated model is behind the full one, measured where it is trained: by all ranks together, on a model
that no rank holds whole. A model on one machine is evaluation's part."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor
from transformers import BaseImageProcessor

from ot_ray.data import PackedDataset, collate, rows_of, without_padding
from ot_ray.data.images import LabelledImages, images_at
from ot_ray.errors import DataError, NotFoundError
from ot_ray.store import Store
from ot_ray.training.engine import Engine

Setting = Literal["full", "emulated"]
_ROWS = 4


@dataclass(frozen=True)
class HeldOut:
    """Rows to measure perplexity on: packed text, or images with classes of the model's own head."""

    count: int
    """How many rows there are."""
    batch: Callable[[Sequence[int]], dict[str, Tensor]]
    """The rows of these numbers as the engine's module takes them."""
    digest: str
    """What identifies them."""


def held_out_text(data: PackedDataset, compiled: bool = False) -> HeldOut:
    """Rows of packed text, each pass without the columns that are padding in all of its rows; compiled layers get
    whole rows, because they are compiled for one shape."""

    def batch(rows: Sequence[int]) -> dict[str, Tensor]:
        whole = collate([data.sequences[i] for i in rows])
        return whole if compiled else without_padding(whole)

    return HeldOut(len(data.sequences), batch, data.digest)


def held_out_images(images: LabelledImages, processor: BaseImageProcessor, digest: str) -> HeldOut:
    """Images, whose labels count in the classes of the model's head: the perplexity is that of the right class."""
    return HeldOut(len(images), lambda rows: images_at(images, rows, processor), digest)


class EmulatorGap:
    """Perplexities of one run on held-out data. Those before its first step are kept in the store, under the digest of
    that data, because a run that goes on can no longer measure them.

    Args:
        load: reads the data; called when it is first needed. None where there is none.
        prefix: the run's folder in the store.
        rows: rows a pass.
    """

    def __init__(
        self, engine: Engine, store: Store, prefix: str, load: Callable[[], HeldOut] | None, rows: int | None
    ) -> None:
        self._engine, self._store, self._prefix = engine, store, prefix
        self._load, self._rows = load, rows or _ROWS

    def measure_start(self) -> None:
        """Before the first step; every rank together."""
        if self._load is None:
            return
        before = {"full": self._of("full"), "dropped": self._of("emulated")}
        if self._engine.rank == 0:
            self._store.write(self._key, json.dumps(before).encode())

    def measure_end(self, steps: int) -> dict[str, float]:
        """After the last step; every rank together.

        Args:
            steps: of the whole run; after none the emulated model is what it was before.

        Returns:
            `full`, `dropped` (the emulated model before distilling; left out where the run began with other held-out
            data) and `emulated`. Empty where there is no data.
        """
        if self._load is None:
            return {}
        before = self._engine.gather(self._kept() if self._engine.rank == 0 else None)[0]
        if before and not steps:
            return {**before, "emulated": before["dropped"]}
        return {**(before or {"full": self._of("full")}), "emulated": self._of("emulated")}

    def _kept(self) -> dict[str, float] | None:
        try:
            return json.loads(self._store.read(self._key))
        except NotFoundError:
            return None

    @cached_property
    def _held_out(self) -> HeldOut:
        assert self._load is not None
        return self._load()

    @property
    def _key(self) -> str:
        return f"{self._prefix}/start-{self._held_out.digest[:16]}.json"

    def _of(self, setting: Setting) -> float:
        return perplexity_over_ranks(self._engine, self._held_out, setting, self._rows)


def perplexity_over_ranks(engine: Engine, held_out: HeldOut, setting: Setting, rows: int) -> float:
    """Perplexity under one setting of the engine's distillation model, every token (or image) that counts once.

    Every rank calls this together with the same data; each runs its share of it.

    Args:
        rows: rows a pass.

    Raises:
        DataError: no token counts.
    """
    training = engine.module.training
    engine.module.eval()
    try:
        with torch.no_grad():
            parts = [_counted(engine, held_out, chosen, setting) for chosen in _passes(engine, held_out.count, rows)]
    finally:
        engine.module.train(training)
    # A mean over the ranks, on both sides of the fraction.
    summed = engine.mean({"nll": sum(nll for nll, _ in parts), "tokens": sum(tokens for _, tokens in parts)})
    if not summed["tokens"]:
        raise DataError("no token of the validation data counts; check its labels and length")
    return math.exp(summed["nll"] / summed["tokens"])


def _passes(engine: Engine, count: int, rows: int) -> list[range]:
    """This rank's rows, pass by pass; as many passes on every rank, because sharded weights are gathered by
    all ranks together. An empty range is a pass that counts nothing."""
    shares = [_share(count, rank, engine.world_size) for rank in range(engine.world_size)]
    longest = max(len(share) for share in shares)
    own = shares[engine.rank]
    return [own[start : start + rows] for start in range(0, longest, rows)]


def _share(count: int, rank: int, world_size: int) -> range:
    return rows_of(count, rank, world_size) if count >= world_size else range(count)[rank : rank + 1]


def _counted(engine: Engine, held_out: HeldOut, chosen: range, setting: Setting) -> tuple[float, float]:
    batch = held_out.batch(chosen or range(1))
    output = engine.module(**{name: tensor.to(engine.device) for name, tensor in batch.items()}, setting=setting)
    return (float(output["nll"]), float(output["tokens"])) if len(chosen) else (0.0, 0.0)
