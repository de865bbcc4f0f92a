"""An append-only journal in a store: which ids are in service, and which of them is current.

Entries are created once under rising numbers, so racing writers queue up and no entry is ever lost. What
an id stands for is left to registry.py and releases.py."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Literal, NamedTuple

from pydantic import AwareDatetime

from ot_ray.artifacts.manifest import now, to_text
from ot_ray.artifacts.strict_json import parse_json
from ot_ray.config import Config
from ot_ray.errors import AlreadyExistsError, NotFoundError, StoreError
from ot_ray.store import Store

_ATTEMPTS = 32  # each lost race means that another writer's entry was added


class JournalEntry(Config):
    """One change; `model_id` is what became current, or, for `withdraw`, what went out of service."""

    action: Literal["promote", "rollback", "withdraw"]
    model_id: str
    at: AwareDatetime


class Standing(NamedTuple):
    """What a journal says in the end."""

    served: list[str]
    """Ids that were promoted and neither withdrawn nor rolled back, in the order of their last promotion."""
    current: str | None
    """The one of them that is current; None before the first promotion, and after the current one was withdrawn."""


class _Story(NamedTuple):
    standing: Standing
    retired: dict[str, datetime]


class Journal:
    """The journal under one prefix: `000001.json`, `000002.json` and so on."""

    def __init__(self, store: Store, prefix: str) -> None:
        self._store, self._prefix = store, prefix

    def entries(self) -> list[JournalEntry]:
        """All entries, oldest first."""
        return [self._read(key) for key in self._store.list(self._prefix)]

    def current(self) -> str | None:
        """The current id: the last promotion or rollback says it, unless that id was withdrawn since."""
        withdrawn: set[str] = set()
        for key in reversed(list(self._store.list(self._prefix))):
            entry = self._read(key)
            if entry.action != "withdraw":
                return None if entry.model_id in withdrawn else entry.model_id
            withdrawn.add(entry.model_id)
        return None

    def standing(self) -> Standing:
        """What is in service, and what of it is current."""
        return _replay(self.entries()).standing

    def retired(self) -> dict[str, datetime]:
        """Ids that went out of service and have not come back, and when each did."""
        return _replay(self.entries()).retired

    def promote(self, model_id: str) -> None:
        """Make an id current; those promoted before stay in service. Nothing is written if it is current."""
        self._append(lambda standing: None if standing.current == model_id else ("promote", model_id))

    def withdraw(self, model_id: str) -> None:
        """Take an id out of service; where it was current, nothing is. Raises NotFoundError if it is not in service."""

        def change(standing: Standing) -> tuple[str, str]:
            if model_id not in standing.served:
                raise NotFoundError(f"{self._prefix}: {model_id} is not in service, so it cannot be withdrawn")
            return "withdraw", model_id

        self._append(change)

    def rollback(self) -> str:
        """Take the current id out of service and make current the one before; where the current one was withdrawn
        already, only the latter. Returns that id; raises NotFoundError if there is none."""

        def change(standing: Standing) -> tuple[str, str]:
            earlier = [model_id for model_id in standing.served if model_id != standing.current]
            if not earlier:
                raise NotFoundError(f"{self._prefix}: no earlier version to roll back to; promote one by its id")
            return "rollback", earlier[-1]

        return self._append(change)

    def _read(self, key: str) -> JournalEntry:
        return parse_json(JournalEntry, self._store.read(key), key)

    def _append(self, change: Callable[[Standing], tuple[str, str] | None]) -> str:
        for _ in range(_ATTEMPTS):
            entries = self.entries()
            wanted = change(_replay(entries).standing)
            if wanted is None:
                return ""
            entry = JournalEntry(action=wanted[0], model_id=wanted[1], at=now())  # type: ignore[arg-type] - checked as it is made
            try:
                self._store.create(f"{self._prefix}/{len(entries) + 1:06d}.json", to_text(entry))
            except AlreadyExistsError:
                continue
            return entry.model_id
        raise StoreError(f"{self._prefix}: {_ATTEMPTS} other writers came first; try again")


def _replay(entries: list[JournalEntry]) -> _Story:
    served: list[str] = []
    current: str | None = None
    retired: dict[str, datetime] = {}
    for entry in entries:
        gone = {entry.model_id, current} if entry.action == "rollback" else {entry.model_id}
        retired |= {model_id: entry.at for model_id in served if model_id in gone}
        served = [model_id for model_id in served if model_id not in gone]
        if entry.action != "withdraw":
            served.append(entry.model_id)
            retired.pop(entry.model_id, None)
            current = entry.model_id
        elif entry.model_id == current:
            current = None
    return _Story(Standing(served, current), retired)
