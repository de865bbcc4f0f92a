"""An append-only journal in a store: which plug-in is current, and which were before.

Entries are created once under rising numbers, so racing writers queue up and no entry is ever lost. What
an id stands for is left to registry.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from pydantic import AwareDatetime

from ot_ray.artifacts.manifest import now, to_text
from ot_ray.artifacts.strict_json import parse_json
from ot_ray.config import Config
from ot_ray.errors import AlreadyExistsError, NotFoundError, StoreError
from ot_ray.store import Store

_ATTEMPTS = 32  # each lost race means that another writer's entry was added


class JournalEntry(Config):
    """One change; `model_id` is what became current, or, for `withdraw`, what ceased to be."""

    action: Literal["promote", "rollback", "withdraw"]
    model_id: str
    at: AwareDatetime


class Journal:
    """The journal under one prefix: `000001.json`, `000002.json` and so on."""

    def __init__(self, store: Store, prefix: str) -> None:
        self._store, self._prefix = store, prefix

    def entries(self) -> list[JournalEntry]:
        """All entries, oldest first."""
        return [parse_json(JournalEntry, self._store.read(key), key) for key in self._store.list(self._prefix)]

    def current(self) -> str | None:
        """The current id: the last entry alone says it."""
        keys = list(self._store.list(self._prefix))
        if not keys:
            return None
        entry = parse_json(JournalEntry, self._store.read(keys[-1]), keys[-1])
        return None if entry.action == "withdraw" else entry.model_id

    def promote(self, model_id: str) -> None:
        """Make an id current; nothing is written if it is."""

        def change(earlier: list[str], current: str | None) -> tuple[str, str] | None:
            return None if current == model_id else ("promote", model_id)

        self._append(change)

    def withdraw(self) -> str:
        """Leave nothing current. Returns the id that was; raises NotFoundError if none was."""

        def change(earlier: list[str], current: str | None) -> tuple[str, str]:
            if current is None:
                raise NotFoundError(f"{self._prefix}: nothing is current, so nothing can be withdrawn")
            return "withdraw", current

        return self._append(change)

    def rollback(self) -> str:
        """Make current again what was before. Returns that id; raises NotFoundError if there is none."""

        def change(earlier: list[str], current: str | None) -> tuple[str, str]:
            if not earlier:
                raise NotFoundError(f"{self._prefix}: no earlier version to roll back to; promote one by its id")
            return "rollback", earlier[-1]

        return self._append(change)

    def _append(self, change: Callable[[list[str], str | None], tuple[str, str] | None]) -> str:
        for _ in range(_ATTEMPTS):
            entries = self.entries()
            wanted = change(*_replay(entries))
            if wanted is None:
                return ""
            entry = JournalEntry(action=wanted[0], model_id=wanted[1], at=now())  # type: ignore[arg-type]
            try:
                self._store.create(f"{self._prefix}/{len(entries) + 1:06d}.json", to_text(entry))
            except AlreadyExistsError:
                continue
            return entry.model_id
        raise StoreError(f"{self._prefix}: {_ATTEMPTS} other writers came first; try again")


def _replay(entries: list[JournalEntry]) -> tuple[list[str], str | None]:
    """What was current earlier, oldest first, and what is current now."""
    earlier: list[str] = []
    current: str | None = None
    for entry in entries:
        if entry.action == "promote":
            earlier += [current] if current else []
            current = entry.model_id
        elif entry.action == "rollback":
            current = earlier.pop()
        else:
            current = None
    return earlier, current
