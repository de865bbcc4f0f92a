"""Progress of long steps: one bar, redrawn in place on a terminal, printed as lines elsewhere.

Workers and jobs have no terminal; their lines reach the person who waits through Ray's log forwarding."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from types import TracebackType
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


class Progress:
    """A bar over `total` steps of one thing, with the latest figures behind it.

    Use as a context manager; `advance` after each step. Where standard error is not a terminal, a line
    is printed at most every `line_interval` seconds, and one at the end.
    """

    def __init__(self, label: str, total: int | None, unit: str = "step", line_interval: float = 5.0) -> None:
        self._label, self._total, self._unit = label, total, unit
        self._interval = 0.1 if sys.stderr.isatty() else line_interval
        self._done, self._start, self._last = 0, time.monotonic(), 0.0
        self._figures = ""
        self._initial: int | None = None
        self._drawn: int | None = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._drawn != self._done:
            self._draw()
        if sys.stderr.isatty():
            sys.stderr.write("\n")

    def advance(self, steps: int = 1, **figures: float | str) -> None:
        """Count `steps` more as done and show `figures` (name to value) behind the bar."""
        self.at(self._done + steps, **figures)

    def at(self, done: int, **figures: float | str) -> None:
        """Show that `done` steps are done in all; a run that resumes starts in the middle."""
        if self._initial is None:
            self._initial = max(0, done - 1)
        self._done = done
        if figures:
            self._figures = " ".join(
                f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
                for name, value in figures.items()
            )
        if time.monotonic() - self._last >= self._interval:
            self._draw()

    def _draw(self) -> None:
        self._last, self._drawn = time.monotonic(), self._done
        bar = tqdm.format_meter(
            self._done,
            self._total,  # type: ignore[arg-type]
            self._last - self._start,
            ncols=110,
            prefix=self._label,
            unit=self._unit,
            initial=self._initial or 0,
            postfix=self._figures or None,
            ascii=" =",
        )
        if sys.stderr.isatty():
            sys.stderr.write(f"\r{bar}\x1b[K")
        else:
            sys.stderr.write(f"{bar}\n")
        sys.stderr.flush()


def track(items: Iterable[T], label: str, unit: str = "step") -> Iterator[T]:
    """Iterate over `items` under a progress bar."""
    total = len(items) if isinstance(items, Sized) else None
    with Progress(label, total, unit) as bar:
        for item in items:
            yield item
            bar.advance()
