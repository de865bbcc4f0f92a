"""A source as endless-looking batches: opened for one rank, resumed from the states of any number of ranks.

Reading, tokenising and packing happen in `lanes`; processes are `processes`' part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from pydantic import ValidationError
from torch import Tensor

from ot_ray.data.batches import rows_of
from ot_ray.data.documents import Source
from ot_ray.data.files import Files
from ot_ray.data.load import check_length
from ot_ray.data.packing import Packer
from ot_ray.data.streaming.config import StreamConfig
from ot_ray.data.streaming.dealing import Deal
from ot_ray.data.streaming.lanes import Cursor, Setup, Task
from ot_ray.data.streaming.processes import InProcess, Maker, WorkerProcess
from ot_ray.errors import ConfigError, TrainingError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHORTEST_CUT, LONGEST_CUT = 1 << 11, 1 << 16
"""Characters at which a text is cut to make documents of it."""

_CUTS_A_LANE = 4


def open_stream(
    config: StreamConfig,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    batch_size: int,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    files: Files | None = None,
) -> TextStream:
    """Stream a source as global batches of `batch_size` sequences of `length` tokens.

    The batches depend on the source, the tokenizer, `length`, `batch_size`, `seed`, `shuffle_window` and
    `passes`, never on the number of ranks or processes. Processes start at once and load their libraries
    while the caller goes on; reading begins with the first batch.

    Args:
        files: opens the files of `s3://` sources; travels to worker processes.

    Raises:
        ConfigError: `length` is below 2 or more than the tokenizer's model takes, there are more ranks than
            rows, or an `s3://` source comes without `files`.
        DataError: nothing is found there.
    """
    check_length(length, tokenizer)
    Packer(length, 0)
    rows = rows_of(batch_size, rank, world_size)
    source = Source(config, files)
    deal = Deal(source, seed, batch_size, config.shuffle_window, config.passes, _cut(source, batch_size))
    return TextStream(config, Setup(deal, tokenizer, length), rows, (rank, world_size))


class TextStream:
    """Batches that are made while training runs (see `Batches`). Made by `open_stream`.

    Row j of every batch is a lane of its own: it has every `batch_size`th document of the source, and packs
    them by itself. So each document is seen once in a pass, and the position is one cursor a row, which any
    other number of ranks can share out anew.
    """

    def __init__(self, config: StreamConfig, setup: Setup, rows: range, seat: tuple[int, int]) -> None:
        self._config, self._setup, self._rows, self._seat = config, setup, rows, seat
        self._batches = 0
        self._cursors: dict[str, Any] = {}
        self._failure: Exception | None = None
        self._started = False
        self._makers: list[Maker] = self._open()

    def next_batch(self, rank: int = 0, world_size: int = 1) -> dict[str, Tensor]:
        """This rank's rows of the next global batch; waits until they are made.

        Raises:
            ConfigError: the stream was opened for another rank or number of ranks.
            DataError: the passes are over, or a document is not valid; the message names file and line.
            TrainingError: a worker process died, the stream is closed, or the source has changed since the
                checkpoint that was restored.
        """
        if (rank, world_size) != self._seat:
            raise ConfigError(
                f"the stream was opened for rank {self._seat[0]} of {self._seat[1]} and is asked for rank {rank} of "
                f"{world_size}; open one for it"
            )
        if self._failure is not None:
            raise self._failure
        try:
            self._start()
            made = [maker.next() for maker in self._makers]
        except Exception as error:
            self._failure = error
            raise
        self._batches += 1
        self._cursors = {lane: cursor for _, cursors in made for lane, cursor in cursors.items()}
        return self._joined([batch for batch, _ in made])

    def state(self) -> dict[str, Any]:
        """How many batches were given, and where this rank's lanes are after the last of them."""
        return {"batches": self._batches, "lanes": dict(self._cursors)}

    def restore(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Go on where a run of any number of ranks was; `states` are those of all its ranks.

        Raises:
            TrainingError: they are no such states, of different batches, or of another batch size.
        """
        batches, cursors = self._merged(states)
        if self._started:
            self.close()
            self._makers, self._started, self._failure = self._open(), False, None
        self._batches = batches
        self._cursors = {str(row): cursors[row].model_dump(mode="json") for row in self._rows if row in cursors}

    def close(self) -> None:
        """End the worker processes; a second call does nothing."""
        for maker in self._makers:
            maker.close()
        self._failure = self._failure or TrainingError("the stream of batches is closed; open another")

    def _open(self) -> list[Maker]:
        workers = min(self._config.workers, len(self._rows))
        if not workers:
            return [InProcess(self._rows)]
        return [WorkerProcess(self._rows[first::workers], self._config.prefetch) for first in range(workers)]

    def _start(self) -> None:
        if self._started:
            return
        self._started = True
        for maker in self._makers:
            cursors = {lane: Cursor.model_validate(self._cursors.get(str(lane), {})) for lane in maker.lanes}
            maker.start(Task(self._setup, cursors))

    def _joined(self, batches: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """The makers' rows, which are every `workers`th, in their order."""
        if len(batches) == 1:
            return batches[0]
        lanes = torch.tensor([lane for maker in self._makers for lane in maker.lanes])
        order = lanes.argsort()
        return {name: torch.cat([batch[name] for batch in batches])[order] for name in batches[0]}

    def _merged(self, states: Sequence[Mapping[str, Any]]) -> tuple[int, dict[int, Cursor]]:
        try:
            counts = {state["batches"] for state in states}
            cursors = {
                int(lane): Cursor.model_validate(cursor) for state in states for lane, cursor in state["lanes"].items()
            }
        except (KeyError, TypeError, ValueError, AttributeError, ValidationError) as error:
            reason = " ".join(str(error).split())
            raise _misfit(f"is no position in a stream ({type(error).__name__}: {reason})") from None
        if len(counts) != 1 or not all(isinstance(count, int) and count >= 0 for count in counts):
            raise _misfit(f"is of batches {sorted(map(str, counts))}, not of one")
        (batches,) = counts
        rows = self._setup.deal.lanes
        if batches and sorted(cursors) != list(range(rows)):
            raise _misfit(f"has rows {sorted(cursors)}, but training.batch_size is {rows}")
        if any(cursor.samples != batches for cursor in cursors.values()):
            raise _misfit(f"has rows that are not at batch {batches}")
        return batches, cursors


def _misfit(problem: str) -> TrainingError:
    return TrainingError(f"the checkpoint's data position {problem}; resume from another checkpoint")


def _cut(source: Source, lanes: int) -> int:
    """Where texts are cut, so that even one small file has something for every lane."""
    size = sum(file.info.size for file in source.files if file.kind == "text")
    return min(max(size // (_CUTS_A_LANE * lanes), SHORTEST_CUT), LONGEST_CUT)
