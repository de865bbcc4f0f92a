"""What went wrong with which piece of work, and since when: pauses that grow, and an end to trying.

Kept in memory: a controller that starts anew has all its patience again. What is worth trying is the caller's."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from ot_ray.errors import ConfigError, LaunchError, NotFoundError, OTRayError
from serve.failures import ApiError, BusyError

Trouble = Literal["passing", "unanswered", "unexpected"]
_FEWEST_TRIES = 8
_FIRST_PAUSE_S = 0.5
# Pauses double up to the first number; trouble that lasted for the second, over several tries, does not pass.
_LONGEST_PAUSE_S: dict[Trouble, float] = {"passing": 30.0, "unanswered": 600.0, "unexpected": 600.0}
_LASTS_S: dict[Trouble, float] = {"passing": float("inf"), "unanswered": 6 * 3600.0, "unexpected": 3600.0}


def kind_of(error: Exception) -> Trouble:
    """How long an error is borne.

    `passing`: the store, the disk, the database, the launcher or a setting, whose operator has all the time there is.
    `unanswered`: whoever was to inspect or run a model did not answer, which the model itself may be the cause of.
    `unexpected`: everything else, missing objects among it.
    """
    if isinstance(error, (BusyError, ApiError)):
        return "unanswered"
    if isinstance(error, NotFoundError):
        return "unexpected"
    # StoreError and DatabaseUnavailableError are OSErrors too.
    return "passing" if isinstance(error, (OSError, ConfigError, LaunchError)) else "unexpected"


def is_known(error: Exception) -> bool:
    """Whether an error's message says all that there is to say, without a stack trace."""
    return isinstance(error, (OTRayError, OSError))


@dataclass
class _History:
    kind: Trouble
    since: float
    tries: int = 0
    until: float = 0.0


class Patience:
    """The trouble with pieces of work, by their names; any thread may use it.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock, self._lock = clock, threading.Lock()
        self._known: dict[str, _History] = {}

    def ready(self, name: str) -> bool:
        """Whether a piece of work may be tried now."""
        with self._lock:
            known = self._known.get(name)
            return known is None or self._clock() >= known.until

    def failed(self, name: str, kind: Trouble) -> bool:
        """Note that a try failed; whether it was one too many. Trouble of another kind than before counts anew."""
        with self._lock:
            now = self._clock()
            known = self._known.get(name)
            if known is None or known.kind != kind:
                known = self._known[name] = _History(kind, now)
            pause = _FIRST_PAUSE_S * 2 ** min(known.tries, 20)
            known.tries += 1
            known.until = now + min(pause, _LONGEST_PAUSE_S[kind])
            return known.tries >= _FEWEST_TRIES and now - known.since >= _LASTS_S[kind]

    def went_well(self, name: str) -> None:
        """Forget the trouble with a piece of work."""
        with self._lock:
            self._known.pop(name, None)

    def in_trouble(self) -> set[str]:
        """Names of all work whose last try failed."""
        with self._lock:
            return set(self._known)
