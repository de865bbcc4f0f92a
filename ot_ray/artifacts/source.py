"""Where a bundle is taken from: a folder that holds one, or a store where it is published."""

from __future__ import annotations

from pathlib import Path

from pydantic import model_validator

from ot_ray.artifacts.bundle import Bundle, open_bundle
from ot_ray.artifacts.publication import fetch_bundle
from ot_ray.artifacts.releases import Releases
from ot_ray.config import Config
from ot_ray.store import open_store


class BundleSource(Config):
    """Names a bundle: `folder` alone, or `store` and `model`, with `version` or without for the current release."""

    folder: str | None = None
    """A folder that holds a bundle."""
    store: str | None = None
    """Folder or `s3://` address where bundles are published."""
    model: str | None = None
    """The owner's name of the model."""
    version: str | None = None
    """The published version; unset, the one that is current when the bundle is opened."""
    public_key: str | None = None
    """The owner's public key, a PEM file; with it the signature is checked, and must be there."""

    @model_validator(mode="after")
    def _one_or_the_other(self) -> BundleSource:
        if self._elsewhere():
            return self
        published = (self.store, self.model, self.version)
        if (self.folder is None) == all(part is None for part in published):
            raise ValueError("name a folder, or a store with model and version")
        if self.folder is None and (self.store is None or self.model is None):
            raise ValueError("a bundle in a store needs both store and model")
        return self

    def _elsewhere(self) -> bool:
        """Whether a subclass's own field names the bundle."""
        return False

    def open(self, cache: Path) -> Bundle:
        """Open the bundle, verified; one from a store is downloaded into `cache`, a folder not yet there.

        Raises:
            ArtifactError, SignatureError, NotFoundError: as `open_bundle` and `fetch_bundle`; NotFoundError also
                where no version is named and none is released.
        """
        key = Path(self.public_key) if self.public_key else None
        if self.folder is not None:
            return open_bundle(self.folder, key)
        assert self.store and self.model
        store = open_store(self.store)
        return fetch_bundle(
            store, self.model, self.version or Releases(store, self.model).require_current(), cache, key
        )
