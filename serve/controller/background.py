"""Work beside the controller's rounds: one piece at a time for each job, and no kind of work before another.

What the work is, and what becomes of its failures, is the caller's."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait


class Background:
    """Groups of threads, each for one kind of work, which is begun in the order in which it came.

    Args:
        threads: how many there are for each kind.
    """

    def __init__(self, threads: Mapping[str, int]) -> None:
        self._pools = {
            kind: ThreadPoolExecutor(number, thread_name_prefix=f"controller-{kind}")
            for kind, number in threads.items()
        }
        self._lock = threading.Lock()
        self._under_way: dict[str, tuple[Future[None], str | None]] = {}

    def begin(self, name: str, work: Callable[[], None], kind: str, *, owner: str | None = None) -> bool:
        """Begin a piece of work, unless one of this name, or of this owner, is under way; `work` must not raise.

        Args:
            owner: whose work it is, where each owner gets one piece at a time.
        """
        with self._lock:
            self._under_way = {key: known for key, known in self._under_way.items() if not known[0].done()}
            if name in self._under_way or (owner and any(owner == other for _, other in self._under_way.values())):
                return False
            self._under_way[name] = self._pools[kind].submit(work), owner
            return True

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait for all that was begun; whether it is done."""
        with self._lock:
            futures = [future for future, _ in self._under_way.values() if not future.done()]
        return not wait(futures, timeout_s).not_done

    def close(self, timeout_s: float | None = None) -> bool:
        """Begin nothing more, and wait for what is under way; whether it is done."""
        for pool in self._pools.values():
            pool.shutdown(wait=timeout_s is None, cancel_futures=True)
        return self.wait(timeout_s)
