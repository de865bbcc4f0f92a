"""A store in a local folder: one file an object, at the key's path under the root.

Atomic writing and the meaning of disk errors are left to `partial`."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from ot_ray.errors import NotFoundError
from ot_ray.store.base import (
    TEMPORARY,
    Advance,
    ObjectInfo,
    check_deletable,
    check_key,
    check_prefix,
    check_range,
)
from ot_ray.store.partial import chunks_of, disk_errors, partial_file, save, temporary_beside


class LocalStore:
    """A store in a folder, which the first write makes. See `Store` for the methods.

    A key cannot be an object and a folder at once, as it can on S3. A process that is killed while it
    writes leaves a file that no key reaches and `list` does not show.
    """

    url: str

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root).expanduser().absolute()
        self.url = self.root.as_uri()

    def __repr__(self) -> str:
        return f"LocalStore({str(self.root)!r})"

    def read(self, key: str) -> bytes:
        path = self._path(key)
        with disk_errors(f"cannot read {path}"):
            return path.read_bytes()

    def read_range(self, key: str, start: int, end: int) -> bytes:
        check_range(key, start, end)
        path = self._path(key)
        with disk_errors(f"cannot read {path}"), path.open("rb") as file:
            file.seek(start)
            return file.read(end - start)

    def info(self, key: str) -> ObjectInfo:
        path = self._path(key)
        with disk_errors(f"cannot read {path}"):
            status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise NotFoundError(f"{path} is no file; name an object, not a folder")
        return ObjectInfo(key, status.st_size, None)

    def exists(self, key: str) -> bool:
        try:
            self.info(key)
        except NotFoundError:
            return False
        return True

    def write(self, key: str, data: bytes) -> None:
        self._put(key, data, once=False)

    def create(self, key: str, data: bytes) -> None:
        self._put(key, data, once=True)

    def upload(self, path: str | Path, key: str, progress: Advance | None = None) -> ObjectInfo:
        target, digest, size = self._path(key), hashlib.sha256(), 0
        with disk_errors(f"cannot write {target}"), partial_file(target) as file:
            for chunk in chunks_of(Path(path)):
                file.write(chunk)
                digest.update(chunk)
                size += len(chunk)
                if progress:
                    progress(len(chunk))
        return ObjectInfo(key, size, digest.hexdigest())

    def download(self, key: str, path: str | Path, sha256: str | None = None, progress: Advance | None = None) -> None:
        source = self._path(key)
        self.info(key)  # a missing object must not leave the folders made for its copy
        save(Path(path), chunks_of(source), str(source), sha256, progress)

    def list(self, prefix: str = "") -> Iterator[str]:
        folder = self.root / check_prefix(prefix)
        keys = []
        with disk_errors(f"cannot list {folder}"):
            for place, folders, names in os.walk(folder, onerror=_unless_missing):
                folders[:] = [name for name in folders if not name.startswith(TEMPORARY)]
                within = Path(place).relative_to(self.root)
                keys += [(within / name).as_posix() for name in names if not name.startswith(TEMPORARY)]
        yield from sorted(keys)

    def delete(self, key: str) -> None:
        path = self._path(key)
        with suppress(NotFoundError), disk_errors(f"cannot delete {path}"):
            if not path.is_dir():
                path.unlink()

    def delete_prefix(self, prefix: str) -> None:
        folder = self.root / check_deletable(prefix)
        # One rename hides the whole folder, so that no reader meets a half-deleted one.
        doomed = temporary_beside(folder)
        with suppress(NotFoundError), disk_errors(f"cannot delete {folder}"):
            os.rename(f"{folder}/", doomed)
            shutil.rmtree(doomed)

    def _path(self, key: str) -> Path:
        return self.root / check_key(key)

    def _put(self, key: str, data: bytes, once: bool) -> None:
        path = self._path(key)
        with disk_errors(f"cannot write {path}"), partial_file(path, once) as file:
            file.write(data)


def _unless_missing(error: OSError) -> None:
    """A folder that was never made, or was deleted meanwhile, has no keys; other errors count."""
    if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
        raise error
