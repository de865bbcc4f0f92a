"""Peak memory of this process and everything it started."""

from __future__ import annotations

import threading
from types import TracebackType

import psutil


class PeakMemory:
    """Samples the proportional memory (PSS) of the process tree while open; shared pages count once."""

    def __init__(self, interval_s: float = 2.0) -> None:
        self.peak_bytes = 0
        self._interval_s = interval_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="peak-memory", daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(self._interval_s):
            self.peak_bytes = max(self.peak_bytes, tree_bytes(psutil.Process()))


def tree_bytes(root: psutil.Process) -> int:
    """Memory of a process and its descendants; where the system has no PSS, resident memory."""
    total = 0
    for process in [root, *root.children(recursive=True)]:
        try:
            memory = process.memory_full_info()
            total += getattr(memory, "pss", memory.rss)
        except psutil.Error:
            # It ended while we looked, or belongs to somebody else.
            continue
    return total
