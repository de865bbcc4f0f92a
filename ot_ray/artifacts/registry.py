"""Promoted plug-ins in a store: adapters that never change, and journals of which are in service.

Building a model from an adapter is left to the caller; journals are in journal.py."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Annotated

import torch
from pydantic import AwareDatetime, Field
from safetensors.torch import load_file, save_file

from ot_ray.artifacts.folder import describe_files
from ot_ray.artifacts.journal import Journal
from ot_ray.artifacts.manifest import (
    BundleId,
    ClassName,
    SchemaVersion,
    Sha256,
    now,
    schema_version,
    to_text,
)
from ot_ray.artifacts.model_id import MODEL_ID_PATTERN, ModelId, parse_model_id, parse_model_name
from ot_ray.artifacts.publication import checked_name
from ot_ray.artifacts.strict_json import parse_json
from ot_ray.config import Config
from ot_ray.errors import AlreadyExistsError, ArtifactError, NotFoundError
from ot_ray.model import SplitPlan
from ot_ray.store import Store

_ROOT, _RECORD, _WEIGHTS = "plug_ins", "record.json", "adapter.safetensors"

_log = logging.getLogger(__name__)


class PlugInRecord(Config):
    """One plug-in: `record.json`, written after its tensors."""

    schema_version: SchemaVersion = 1
    """Format of this document, as `schema_version` gives it."""
    model_id: Annotated[str, Field(pattern=f"^{MODEL_ID_PATTERN}$")]
    """``ft:<model>:<tenant>:<suffix>:<id>``; the id is the start of `sha256`."""
    bundle_id: BundleId
    """The bundle that was tuned."""
    plan: SplitPlan
    """The split; tensors are named by position in the bundle."""
    sha256: Sha256
    """Hash of adapter.safetensors, which holds the tensors and the names of the classes."""
    report: dict[str, float]
    """The owner's evaluation, number by name."""
    classes: tuple[ClassName, ...] | None = Field(default=None, exclude_if=lambda classes: classes is None)
    """The classes of an image model's head, in the order of its rows; None for a language model."""
    created: AwareDatetime
    """When it was added, UTC."""


class Registry:
    """Plug-ins of all tenants, under `plug_ins/<model>/<tenant>/<suffix>/` of a store.

    Each suffix has versions. Those that were promoted, and neither withdrawn nor rolled back, are in service under
    their ids; at most one of them is current, and answers to the suffix's alias too. Adding does not promote.
    """

    def __init__(self, store: Store) -> None:
        self._store = store

    def add(
        self,
        model: str,
        tenant: str,
        suffix: str,
        state: Mapping[str, torch.Tensor],
        *,
        bundle_id: str,
        plan: SplitPlan,
        report: Mapping[str, float],
        classes: Sequence[str] | None = None,
    ) -> PlugInRecord:
        """Store a tuned adapter. The id follows from its tensors and classes, so adding the same one again returns
        its record.

        Args:
            state: plain tensors, as `plain_state` gives them.
            classes: of an image model's head, as the adapter's manifest names them.

        Raises:
            ArtifactError: a name or figure does not fit the record.
        """
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, _WEIGHTS)
            # The same head under other names is another plug-in, so the file that the id follows from names them.
            named = {"classes": json.dumps(list(classes))} if classes is not None else None
            save_file({name: tensor.cpu().contiguous() for name, tensor in state.items()}, path, metadata=named)
            sha256 = describe_files(Path(folder), [_WEIGHTS])[_WEIGHTS].sha256
            parts = parse_model_id(str(ModelId(model, tenant, suffix, sha256[:12])))
            record = PlugInRecord(
                schema_version=schema_version((), classes),
                model_id=str(parts),
                bundle_id=bundle_id,
                plan=plan,
                sha256=sha256,
                report=dict(report),
                classes=tuple(classes) if classes is not None else None,
                created=now(),
            )
            # A known id keeps its file: it may be serving.
            if not all(self._store.exists(_key(parts, name)) for name in (_RECORD, _WEIGHTS)):
                self._store.upload(path, _key(parts, _WEIGHTS))
        try:
            self._store.create(_key(parts, _RECORD), to_text(record))
        except AlreadyExistsError:
            return self.get(record.model_id)
        return record

    def get(self, model_id: str) -> PlugInRecord:
        """The record of a plug-in, promoted or not.

        Raises:
            NotFoundError: no such plug-in.
            ArtifactError: the id or the stored record is malformed.
        """
        parts = parse_model_id(model_id)
        try:
            data = self._store.read(_key(parts, _RECORD))
        except NotFoundError as error:
            raise NotFoundError(f"there is no plug-in {model_id}; list the current ones, or add it first") from error
        record = parse_json(PlugInRecord, data, _key(parts, _RECORD))
        if record.model_id != model_id:
            raise ArtifactError(f"{_key(parts, _RECORD)}: model_id is {record.model_id}; restore it from a backup")
        return record

    def load_state(self, model_id: str) -> dict[str, torch.Tensor]:
        """The tensors of a plug-in, verified, as `plug_in` takes them.

        Raises:
            NotFoundError: no such plug-in.
            StoreError: the stored bytes are not those that were added.
        """
        record = self.get(model_id)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, _WEIGHTS)
            self._store.download(_key(parse_model_id(model_id), _WEIGHTS), path, sha256=record.sha256)
            # Copies, because loaded tensors may be views of the file.
            return {name: tensor.clone() for name, tensor in load_file(path).items()}

    def served(self, model: str, tenant: str | None = None) -> list[PlugInRecord]:
        """The plug-ins in service for a base model, of one tenant or of all, sorted by id.

        One whose record cannot be read is left out and logged, so that it harms nobody else's.

        Raises:
            ArtifactError: `model` or `tenant` is no name.
        """
        place = f"{_ROOT}/{checked_name('model', model)}"
        if tenant is not None:
            place += f"/{checked_name('tenant', tenant)}"
        ids = (model_id for journal in self._journals(place) for model_id in journal.standing().served)
        return [record for record in map(self._readable, sorted(ids)) if record is not None]

    def resolve(self, name: str) -> PlugInRecord:
        """The plug-in in service under an id, or the current one under an alias.

        Raises:
            NotFoundError: the name is no plug-in's, or nothing is in service under it.
            ArtifactError: the stored record is malformed.
        """
        try:
            parts = parse_model_name(name)
        except ArtifactError as error:
            raise NotFoundError(str(error)) from None
        served, current = self._journal(parts).standing()
        model_id = current if not parts.id else name if name in served else None
        if model_id is None:
            raise NotFoundError(f"no plug-in is in service as {name}; promote one")
        return self.get(model_id)

    def promote(self, model_id: str) -> None:
        """Make a plug-in the current one of its suffix; those promoted before stay in service under their ids.

        Promoting the current one changes nothing.

        Raises:
            NotFoundError: no such plug-in, or it was removed meanwhile; it is not in service then.
        """
        self.get(model_id)
        parts = parse_model_id(model_id)
        if not self._store.exists(_key(parts, _WEIGHTS)):
            raise NotFoundError(f"{model_id} has lost its tensors; add it again")
        journal = self._journal(parts)
        journal.promote(model_id)
        try:
            self.get(model_id)
        except NotFoundError:
            # `remove` looks at the journal after it took the record, so that one of both sees the other.
            with suppress(NotFoundError):
                journal.withdraw(model_id)
            raise

    def withdraw(self, model_id: str) -> None:
        """Take a plug-in out of service; if it was the current one, the alias names nothing until a promotion or a
        rollback.

        Raises:
            NotFoundError: it is not in service.
            ArtifactError: the id is malformed.
        """
        self._journal(parse_model_id(model_id)).withdraw(model_id)

    def remove(self, model_id: str) -> bool:
        """Delete a plug-in that is not in service: never promoted, withdrawn or rolled back. It may be added again.

        Returns:
            Whether it is gone; False if it is in service, which changes nothing.

        Raises:
            ArtifactError: the id is malformed.
        """
        parts = parse_model_id(model_id)
        journal = self._journal(parts)
        if model_id in journal.standing().served:
            return False
        try:
            record = self._store.read(_key(parts, _RECORD))
        except NotFoundError:
            record = None
        self._store.delete(_key(parts, _RECORD))
        if record is not None and model_id in journal.standing().served:
            self._store.write(_key(parts, _RECORD), record)
            return False
        self._store.delete(_key(parts, _WEIGHTS))
        return True

    def rollback(self, model: str, tenant: str, suffix: str) -> PlugInRecord:
        """Take the current version out of service, and make current the one promoted before it (where the current one
        was withdrawn, the one that was promoted last of those in service).

        Raises:
            NotFoundError: there is none.
        """
        return self.get(self._journal(_checked(model, tenant, suffix)).rollback())

    def current(self) -> list[PlugInRecord]:
        """The current plug-in of every suffix that has one, sorted by id."""
        ids = (journal.current() for journal in self._journals(_ROOT))
        return [self.get(model_id) for model_id in sorted(filter(None, ids))]

    def retired(self, before: datetime) -> list[str]:
        """Plug-ins of all base models and tenants that are still stored, but went out of service before a moment and
        have not come back; sorted."""
        gone = [
            model_id
            for journal in self._journals(_ROOT)
            for model_id, when in journal.retired().items()
            if when < before
        ]
        return sorted(model_id for model_id in gone if any(True for _ in self._store.list(_folder(model_id))))

    def _readable(self, model_id: str) -> PlugInRecord | None:
        try:
            return self.get(model_id)
        except (ArtifactError, NotFoundError):
            _log.exception("plug-in %s is in service, but its record cannot be read", model_id)
            return None

    def _journals(self, prefix: str) -> Iterator[Journal]:
        folders = (key.rpartition("/")[0] for key in self._store.list(prefix))
        places = sorted({place for place in folders if place.endswith("/journal") and place.count("/") == 4})
        return (Journal(self._store, place) for place in places)

    def _journal(self, parts: ModelId) -> Journal:
        return Journal(self._store, f"{_place(parts)}/journal")


def _checked(model: str, tenant: str, suffix: str) -> ModelId:
    return parse_model_id(str(ModelId(model, tenant, suffix, "0" * 12)))


def _place(parts: ModelId) -> str:
    return f"{_ROOT}/{parts.model}/{parts.tenant}/{parts.suffix}"


def _folder(model_id: str) -> str:
    parts = parse_model_id(model_id)
    return f"{_place(parts)}/{parts.id}"


def _key(parts: ModelId, name: str) -> str:
    return f"{_place(parts)}/{parts.id}/{name}"
