"""Finding an owner's model: a folder, a prefix on S3 or a hub's snapshot, with its small files at hand.

What the files say is left to model_source.py."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path

from huggingface_hub import snapshot_download

from ot_ray.artifacts.weights import INDEX, SINGLE, shards_of
from ot_ray.errors import ConfigError, NotFoundError
from ot_ray.model import ModelConfig
from ot_ray.model.loading import unreadable
from ot_ray.store import LocalStore, PatientStore, Store, open_store

SHAPE = ("config.json",)
DESCRIPTION = (
    *SHAPE,
    "generation_config.json",
    "preprocessor_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template*",
)
WEIGHTS = (SINGLE, INDEX)
"""With the shards that the index names."""


class ModelFiles:
    """The files of one model."""

    store: Store
    """Holds all of them at its root."""
    folder: Path
    """Holds the small ones; a copy that lives as long as this object where the model is on S3."""
    commit: str | None
    """Commit on the hub."""
    where: str
    """The address without its options, for messages."""

    def __init__(self, config: ModelConfig, patterns: Iterable[str], patience_s: float = 0.0) -> None:
        """Args:
            patterns: names of files to fetch from a hub; of these, all but weights are copied from S3.
            patience_s: seconds that every call waits for S3 to come back, now and later.

        Raises:
            ConfigError: there is nothing at `config.source`.
            StoreError: S3 does not hand it out.
        """
        self.commit, self.where = None, config.source.split("?", 1)[0]
        self._copied: weakref.finalize | None = None
        if config.source.startswith("s3://"):
            self.store = PatientStore(open_store(config.source), patience_s)
            self.folder = self._copy([name for name in patterns if name not in WEIGHTS])
        elif _is_path(config.source):
            self.folder = Path(config.source).expanduser().absolute()
            if not self.folder.is_dir():
                raise ConfigError(
                    f"model.source is {config.source!r}: no such folder; name a folder with a checkpoint, an s3:// "
                    "address or a model on the hub"
                )
            self.store = LocalStore(self.folder)
        else:
            self.folder = _snapshot(config, tuple(patterns))
            self.commit = self.folder.name
            self.store = LocalStore(self.folder)

    def described_by(self) -> list[str]:
        """Names of the small files that belong to the model, sorted."""
        return sorted(
            path.name for path in self.folder.iterdir() if path.is_file() and _matches(path.name, DESCRIPTION)
        )

    def close(self) -> None:
        """Remove the copy of the small files, if one was made."""
        if self._copied is not None:
            self._copied()

    def _copy(self, patterns: list[str]) -> Path:
        folder = Path(tempfile.mkdtemp(prefix="ot_ray-model-"))
        self._copied = weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        try:
            self.store.download("config.json", folder / "config.json")
        except NotFoundError:
            raise ConfigError(
                f"model.source is {self.where!r}: no config.json stands there; name the prefix of a checkpoint with "
                "config.json, safetensors weights and a tokenizer"
            ) from None
        if tuple(patterns) != SHAPE:
            for name in self.store.list():
                if "/" not in name and name != "config.json" and _matches(name, patterns):
                    self.store.download(name, folder / name)
        return folder


def _is_path(source: str) -> bool:
    return source.startswith(("/", ".", "~")) or source.count("/") > 1 or Path(source).is_dir()


def _snapshot(config: ModelConfig, patterns: tuple[str, ...]) -> Path:
    folder = _fetch(config.source, config.revision, patterns)
    index = folder / INDEX
    if INDEX in patterns and index.is_file() and not (folder / SINGLE).is_file():
        # Shards are called as the index says, and other weights beside them stay on the hub.
        _fetch(config.source, folder.name, (INDEX, *shards_of(index.read_bytes(), config.source)))
    return folder


def _fetch(source: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=list(patterns)))
    except (OSError, ValueError) as error:
        raise unreadable(source, error) from None


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
