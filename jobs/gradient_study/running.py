"""Runs of the study side by side in processes of this machine, their results kept as they come.

Which runs there are is choosing.py's, what one computes work.py's."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing.connection import Connection

import torch

from jobs.command import quiet_libraries
from jobs.gradient_study.choosing import Run
from jobs.gradient_study.texts import CustomerTexts, kept_texts
from jobs.gradient_study.work import Result
from jobs.studies.keeping import keep_result, kept_result
from ot_ray.errors import OTRayError, StudyError
from ot_ray.progress import Progress
from ot_ray.store import Store, open_store


@dataclass(frozen=True)
class Place:
    """Where results are kept, and the texts that runs are about."""

    store: str
    texts: str
    customers: tuple[str, ...]


class Computed:
    """Computes what is not kept yet; use as a context manager.

    Args:
        processes, threads: runs side by side, and the threads of each.
    """

    def __init__(self, place: Place, processes: int, threads: int) -> None:
        self._place = place
        # What forks while PyTorch's threads run may hang.
        spawn = multiprocessing.get_context("spawn")
        # Nothing is ever sent: its other end closes when this one is closed, or this process is gone.
        self._theirs, self._ours = spawn.Pipe(duplex=False)
        self._pool = ProcessPoolExecutor(processes, spawn, initializer=_begin, initargs=(threads, self._theirs))

    def __enter__(self) -> Computed:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is not None:
            self._ours.close()
        self._pool.shutdown(cancel_futures=True)
        self._ours.close()
        self._theirs.close()

    def __call__(self, name: str, runs: Sequence[Run]) -> dict[str, Result]:
        """The results of runs by their keys; of one that failed, why, under `failed`.

        Args:
            name: what the progress bar calls them.

        Raises:
            StudyError: a process died.
            StoreError: a result could not be kept.
        """
        found = Kept(self._place.store)(name, runs)
        missing = {run.key: run for run in runs if run.key not in found}
        with Progress(name, len(missing), "run") as bar:
            try:
                futures = {self._pool.submit(_compute, self._place, run): key for key, run in missing.items()}
                for future in as_completed(futures):
                    found[futures[future]] = future.result()
                    bar.advance()
            except BrokenProcessPool:
                raise StudyError(
                    "a process of the study died, for want of memory perhaps; what was measured is kept, and the same "
                    "command goes on; lower processes if it happens again"
                ) from None
        return found


class Kept:
    """Computes nothing, and finds what is kept."""

    def __init__(self, store: str) -> None:
        self._store = store

    def __call__(self, name: str, runs: Sequence[Run]) -> dict[str, Result]:
        store = open_store(self._store)
        found = ((run.key, kept_result(store, run.key)) for run in runs)
        return {key: result for key, result in found if result is not None}


def _begin(threads: int, command: Connection) -> None:
    # Ctrl-C reaches every process of the terminal; the command ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(command,), daemon=True).start()
    quiet_libraries()
    torch.set_num_threads(threads)


def _end_with(command: Connection) -> None:
    """End when the command does, however it does: nobody else would, and a run takes a while."""
    command.poll(None)
    os._exit(1)


def _compute(place: Place, run: Run) -> Result:
    store, texts = _opened(place)
    begun = time.monotonic()
    try:
        result = run.work.compute(texts)
    except OTRayError as error:
        return {"failed": str(error)}
    result["seconds"] = round(time.monotonic() - begun, 1)
    keep_result(store, run.key, result)
    return result


@lru_cache(maxsize=1)
def _opened(place: Place) -> tuple[Store, CustomerTexts]:
    store = open_store(place.store)
    return store, kept_texts(store, place.texts, place.customers)
