"""Which published version of a model is current: an append-only journal beside the bundles.

Publishing and fetching the bundles themselves is left to publication.py."""

from __future__ import annotations

from ot_ray.artifacts.journal import Journal, JournalEntry
from ot_ray.artifacts.publication import checked_name, list_versions
from ot_ray.errors import NotFoundError
from ot_ray.store import Store


class Releases:
    """The releases of one model, `releases/<model>/000001.json` and so on; the last entry is current.

    Raises:
        ArtifactError: the model's name is no name.
    """

    def __init__(self, store: Store, model: str) -> None:
        self._store, self._model = store, checked_name("model", model)
        self._journal = Journal(store, f"releases/{model}")

    def current(self) -> str | None:
        """The current version; None before the first release."""
        return self._journal.current()

    def entries(self) -> list[JournalEntry]:
        """What was released, rolled back and withdrawn, oldest first; `model_id` holds the version."""
        return self._journal.entries()

    def released(self, version: str) -> bool:
        """Whether a version was ever released, current or not."""
        return any(entry.action == "promote" and entry.model_id == version for entry in self.entries())

    def release(self, version: str) -> None:
        """Make a published version current.

        Raises:
            NotFoundError: it is not published; names those that are.
        """
        self._require_published(version)
        self._journal.promote(version)

    def rollback(self) -> str:
        """Make current again what was before, and return it. Raises NotFoundError if nothing was."""
        return self._journal.rollback()

    def require_current(self) -> str:
        """The current version.

        Raises:
            NotFoundError: nothing is released; names the published versions.
        """
        version = self.current()
        if version is None:
            raise NotFoundError(
                f"no version of {self._model} is released in {self._store.url}; set version to one of the published "
                f"versions: {self._published()}"
            )
        return version

    def _require_published(self, version: str) -> None:
        if version not in list_versions(self._store, self._model):
            raise NotFoundError(
                f"version {version} of {self._model} is not published in {self._store.url}, so it cannot be released; "
                f"published versions: {self._published()}"
            )

    def _published(self) -> str:
        return ", ".join(list_versions(self._store, self._model)) or "none"
