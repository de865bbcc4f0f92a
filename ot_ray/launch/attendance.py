"""Waiting, aloud and not for ever, until the cluster has room for a group of workers.

The wait holds a placement group: a question that Ray answers with machines and an autoscaler understands."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

from ot_ray.errors import LaunchError

_QUIET_S = 3.0
_TELL_EVERY_S = 60.0
_EXTRA_S = 5.0
_POLL_S = 0.5


def tell_on_stderr(text: str) -> None:
    """Print one line for the person who waits."""
    print(text, file=sys.stderr, flush=True)


class Attendance:
    """How long a run has been without its workers, and whether there is room for them.

    The clock runs from the first `gather` until `started` says that a group came up, over as many attempts
    as that takes.

    Args:
        fewest, most: workers that the run needs and can use.
        resources: what each needs, as Ray counts it, e.g. ``{"CPU": 1.0, "GPU": 1.0}``.
        timeout_s: seconds without workers after which the run is given up; `workers.start_timeout_s`.
    """

    def __init__(
        self,
        fewest: int,
        most: int,
        resources: Mapping[str, float],
        timeout_s: float,
        tell: Callable[[str], None] = tell_on_stderr,
    ) -> None:
        self._fewest, self._most, self._resources = fewest, most, dict(resources)
        self._timeout_s, self._tell = timeout_s, tell
        self._since: float | None = None
        self._told = -_TELL_EVERY_S

    def gather(self) -> int:
        """Wait until the fewest workers can be placed, telling so at once and every minute.

        Returns:
            How many can be placed, from the fewest to the most.

        Raises:
            LaunchError: the time is up; the message names what was asked, what there was, and the settings.
        """
        if self._since is None:
            self._since = time.monotonic()
        self._check_time()
        quiet_until = time.monotonic() + _QUIET_S
        with _placement([self._resources] * self._fewest) as placed:
            while not placed(_POLL_S):
                # Told before the time is checked, so that a poll that stalls does not end the wait in silence.
                if time.monotonic() > quiet_until:
                    self._tell_now_and_then()
                self._check_time()
            return self._fewest + self._room_for_more()

    def started(self) -> None:
        """A group came up: the clock stands at nought again."""
        self._since, self._told = None, -_TELL_EVERY_S

    def _room_for_more(self) -> int:
        extra = self._most - self._fewest
        if not extra:
            return 0
        # One by one, so that each that fits counts; Ray needs a moment to place them.
        deadline = time.monotonic() + _EXTRA_S
        with ExitStack() as held:
            for count in range(extra):
                placed = held.enter_context(_placement([self._resources]))
                if not placed(max(_POLL_S, deadline - time.monotonic())):
                    return count
        return extra

    def _left(self) -> float:
        assert self._since is not None
        return self._timeout_s - (time.monotonic() - self._since)

    def _check_time(self) -> None:
        if self._left() > 0:
            return
        raise LaunchError(
            f"workers.count is {asked(self._fewest, self._most)}, but the cluster had room for {self._room()} "
            f"({each(self._resources)} each) for {self._timeout_s:.0f} s; add machines, lower workers.count, "
            "workers.cpus or workers.gpus, or wait longer with workers.start_timeout_s"
        )

    def _tell_now_and_then(self) -> None:
        if time.monotonic() - self._told < _TELL_EVERY_S:
            return
        self._told = time.monotonic()
        workers = "1 worker" if self._fewest == 1 else f"{self._fewest} workers"
        self._tell(
            f"waiting for {workers} with {each(self._resources)} each; the cluster has room for {self._room()} "
            f"({max(0.0, self._left()):.0f} s left, workers.start_timeout_s)"
        )

    def _room(self) -> int:
        # A placement group that cannot be placed holds nothing, so that this is what it sees itself.
        return min(room_for(self._resources), self._fewest)


def asked(fewest: int, most: int) -> str:
    """`workers.count` as it is written in a configuration."""
    return str(fewest if fewest == most else [fewest, most])


def each(resources: Mapping[str, float]) -> str:
    """What one worker needs, in words."""
    return " and ".join(f"{amount:g} {name}" for name, amount in resources.items())


def room_for(resources: Mapping[str, float]) -> int:
    """How many workers with these resources the cluster's free capacity holds at this moment."""
    from ray._private.state import available_resources_per_node

    needs = {name: amount for name, amount in resources.items() if amount > 0}
    # Ray counts in ten-thousandths.
    return sum(
        min(int((free.get(name, 0.0) + 1e-6) // amount) for name, amount in needs.items())
        for free in available_resources_per_node().values()
    )


@contextmanager
def _placement(bundles: list[dict[str, float]]) -> Iterator[Callable[[float], bool]]:
    from ray.util import placement_group, remove_placement_group

    group = placement_group(bundles, strategy="PACK")
    try:
        yield lambda seconds: bool(group.wait(seconds))
    finally:
        remove_placement_group(group)
