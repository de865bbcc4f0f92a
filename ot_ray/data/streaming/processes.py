"""Where a share of a stream's rows is made: in a process of its own, or in this one."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Protocol

from torch import Tensor

from ot_ray import errors
from ot_ray.data.packing import collate
from ot_ray.data.streaming.lanes import Share, Task
from ot_ray.data.streaming.wire import read_frame, to_batch
from ot_ray.errors import ConfigError, OTRayError, TrainingError

_ENDING_SECONDS = 10.0
"""How long a process that was told to end may take."""

Made = tuple[dict[str, Tensor], dict[str, Any]]  # some rows of a batch, and their lanes' cursors by lane


class Maker(Protocol):
    """Makes some rows of every batch."""

    lanes: Sequence[int]

    def start(self, task: Task) -> None:
        """Begin, once."""
        ...

    def next(self) -> Made:
        """The rows of the next batch. Raises the error that stops the stream."""
        ...

    def close(self) -> None:
        """End whatever runs; a second call does nothing."""
        ...


class InProcess:
    """Makes rows here, when they are asked for."""

    def __init__(self, lanes: Sequence[int]) -> None:
        self.lanes = lanes
        self._share: Share | None = None

    def start(self, task: Task) -> None:
        self._share = Share(task)

    def next(self) -> Made:
        assert self._share is not None
        samples, cursors = self._share.batch()
        return collate(samples), cursors

    def close(self) -> None:
        self._share = None


class WorkerProcess:
    """Makes rows ahead of time in a child, which starts, and loads its libraries, at once.

    It ends with `close` and with this process, however this one ends, because it watches a pipe from here.
    """

    def __init__(self, lanes: Sequence[int], prefetch: int) -> None:
        self.lanes = lanes
        self._prefetch = prefetch
        self._length = 0
        paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
        threads = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "ot_ray.data.streaming.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **threads, "PYTHONPATH": paths},
            # A Ctrl-C is this process's to handle.
            start_new_session=True,
        )

    @property
    def pid(self) -> int:
        """Of the child."""
        return self._process.pid

    def start(self, task: Task) -> None:
        try:
            data = pickle.dumps(task)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise ConfigError(
                f"data.workers: the tokenizer or the store cannot travel to another process ({error}); use 0"
            ) from None
        self._length = task.setup.length
        self._send(data + b"." * self._prefetch)

    def next(self) -> Made:
        assert self._process.stdout is not None
        frame = read_frame(self._process.stdout)
        if frame is None:
            raise self._died()
        header, payload = frame
        if "error" in header:
            raise _typed(header["error"], header["message"])
        self._send(b".")
        return to_batch(payload, len(self.lanes), self._length), header["cursors"]

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        if not self._length:
            # It has no task yet and is only loading libraries.
            self._process.kill()
        try:
            self._process.wait(_ENDING_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def _send(self, data: bytes) -> None:
        assert self._process.stdin is not None
        # A child that has ended says why, or says nothing, on its other pipe.
        with suppress(BrokenPipeError):
            self._process.stdin.write(data)
            self._process.stdin.flush()

    def _died(self) -> TrainingError:
        try:
            code = self._process.wait(_ENDING_SECONDS)
        except subprocess.TimeoutExpired:
            code = None
        how = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
        return TrainingError(
            f"the process {self.pid} that makes rows {_listed(self.lanes)} of the batches ended ({how}); "
            "resume the run, with less data.prefetch or data.workers if memory ran out"
        )


def _typed(name: str | None, message: str) -> OTRayError:
    kind = vars(errors).get(name or "")
    if isinstance(kind, type) and issubclass(kind, OTRayError):
        return kind(message)
    return TrainingError(f"a process that makes batches failed: {message}")


def _listed(lanes: Sequence[int]) -> str:
    return ", ".join(map(str, lanes))
