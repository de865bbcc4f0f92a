"""Scores by what decides them, each a JSON object that is written once.

What decides a score is put together by task_identity.py and by whoever knows the model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from ot_ray.errors import AlreadyExistsError, ArtifactError, NotFoundError
from ot_ray.evaluation.harness.scoring import TaskScore
from ot_ray.store import Store

SCHEMA = 1
"""Raised when the code comes to give other scores for the same identity."""


class ScoreCache:
    """Scores in a store.

    Args:
        store: a folder or bucket; several runs may share it, at once too.
    """

    def __init__(self, store: Store) -> None:
        self._store = store

    def get(self, identity: Mapping[str, Any]) -> TaskScore | None:
        """The score that was put under this identity, or None.

        Raises:
            ArtifactError: what stands there is no score.
            StoreError: the store does not answer.
        """
        key = _key(identity)
        try:
            kept = json.loads(self._store.read(key))
            return TaskScore.model_validate(kept["score"])
        except NotFoundError:
            return None
        except (ValueError, KeyError, TypeError, ValidationError):
            raise ArtifactError(f"{self._store.url}: {key} is no score; delete it, and it is computed anew") from None

    def put(self, identity: Mapping[str, Any], score: TaskScore) -> None:
        """Keep a score; where somebody else was first, theirs stays. Raises StoreError."""
        content = {"identity": identity, "score": score.model_dump(mode="json")}
        try:
            self._store.create(_key(identity), json.dumps(content, indent=2).encode() + b"\n")
        except AlreadyExistsError:
            return


def _key(identity: Mapping[str, Any]) -> str:
    return f"scores/{identity_key({'schema': SCHEMA, **identity})}.json"


def identity_key(identity: Mapping[str, Any]) -> str:
    """sha256 of an identity, in hexadecimal."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
