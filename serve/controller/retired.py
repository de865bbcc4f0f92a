"""Removes what the store keeps of models that went out of service long ago.

Taking a model out of service, and back, is the registry's; until its time is over it can be promoted again."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone

from ot_ray.artifacts import Registry
from serve.catalogue.audit import Note
from serve.controller.desk import Desk

_PAUSE_S = 3600.0
_ACTION = "model.remove"


class RetiredModels:
    """Models that were withdrawn or rolled back; those in service, to which an alias may go back, are none of them."""

    def __init__(self, desk: Desk) -> None:
        self._desk, self._next = desk, 0.0

    def sweep(self) -> None:
        """Remove those whose time is over; once an hour at most, because every journal in the store is read."""
        now = self._desk.clock()
        if now < self._next:
            return
        registry, audit = Registry(self._desk.store), self._desk.catalogue.audit
        before = datetime.fromtimestamp(now, timezone.utc) - timedelta(days=self._desk.settings.keep_retired_days)
        for model_id in registry.retired(before):
            audit.write(Note(_ACTION), model_id, "begun")
            removed = registry.remove(model_id)
            audit.write(Note(_ACTION), model_id, "ok" if removed else "kept")
        self._next = now + _PAUSE_S
