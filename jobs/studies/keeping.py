"""Results of a study's runs, kept as JSON under keys that say what decided them."""

from __future__ import annotations

import json
from typing import Any

from ot_ray.errors import NotFoundError
from ot_ray.store import Store


def keep_result(store: Store, key: str, result: dict[str, Any]) -> None:
    """Keep what was computed."""
    store.write(key, (json.dumps(result, indent=2) + "\n").encode())


def kept_result(store: Store, key: str) -> dict[str, Any] | None:
    """What was computed under a key before; None where nothing was, or where it cannot be read."""
    try:
        found = json.loads(store.read(key))
    except (NotFoundError, ValueError):
        return None
    return found if isinstance(found, dict) else None
