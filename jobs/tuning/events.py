"""What a run tells of its progress: numbered files in a store, each written once.

Whoever reads them takes them for data from outside; what is worth telling is hosted.py's."""

from __future__ import annotations

import json
import re
import time
from typing import Any

from ot_ray.errors import AlreadyExistsError
from ot_ray.store import Store

_NAME = re.compile(r"([0-9]{8})\.json")

Event = dict[str, Any]


class EventLog:
    """The files `00000001.json` and so on; a run that goes on where another stopped goes on with its numbers.

    Each is a JSON object with its `type` and `at`, the seconds since 1970:

    - `metrics`: `step`, `total_steps`, `epoch` (passes done), `train_loss`, `train_mean_token_accuracy`, `lr`,
      `tokens` (trained so far), and where they were taken `valid_loss`, `valid_mean_token_accuracy`;
    - `checkpoint`: `step`, `folder` (under the output), `metrics`;
    - `message`: `level` (`info`, `warn`, `error`), `message`.

    Raises:
        StoreError, StoreUnavailableError: the store cannot be read, or by the methods, written.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._before = sorted(name for name in store.list() if _NAME.fullmatch(name))
        self._last = int(self._before[-1].partition(".")[0]) if self._before else 0
        self._own: list[Event] = []

    @property
    def goes_on(self) -> bool:
        """Whether an earlier run told something here."""
        return bool(self._before)

    def tell(self, kind: str, **fields: Any) -> None:
        """Write the next file."""
        event: Event = {"type": kind, **fields, "at": int(time.time())}
        data = json.dumps(event, allow_nan=False).encode()
        while True:
            self._last += 1
            try:
                self._store.create(f"{self._last:08d}.json", data)
            except AlreadyExistsError:
                # Another run of the same job that was thought dead.
                continue
            self._own.append(event)
            return

    def told_from(self, step: int) -> set[tuple[str, int]]:
        """Kind and step of what earlier runs told of this step and later ones: what a run that goes on there would
        tell again."""
        found = set()
        for name in reversed(self._before):
            event = self._read(name)
            if event["type"] == "metrics" and event["step"] < step:
                break
            if "step" in event and event["step"] >= step:
                found.add((event["type"], event["step"]))
        return found

    def metrics(self) -> list[Event]:
        """All `metrics` of this run and the ones before it, by step."""
        events = [*map(self._read, self._before), *self._own]
        return sorted((event for event in events if event["type"] == "metrics"), key=lambda event: event["step"])

    def _read(self, name: str) -> Event:
        return json.loads(self._store.read(name))
