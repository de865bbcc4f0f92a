"""Files that appear under their name complete, or not at all, and what a disk's errors mean.

Which files are written, and why, is left to the stores."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO
from uuid import uuid4

from ot_ray.errors import AlreadyExistsError, NotFoundError, StoreError, StoreFullError, StoreUnavailableError
from ot_ray.store.base import TEMPORARY, Advance

CHUNK = 4 * 1024 * 1024  # bytes read or hashed at a time

_MEANING: dict[int, tuple[type[StoreError], str]] = {
    errno.ENOENT: (NotFoundError, "check the name"),
    errno.EISDIR: (NotFoundError, "name a file in that folder"),
    errno.ENOTDIR: (NotFoundError, "a part of the path is a file"),
    errno.EEXIST: (AlreadyExistsError, "choose another name or version, or delete it first"),
    errno.ENOTEMPTY: (AlreadyExistsError, "choose another folder, or delete it first"),
    errno.ENOSPC: (StoreFullError, "free some space and try again; nothing was written"),
    errno.EDQUOT: (StoreFullError, "raise the quota or free some space; nothing was written"),
    errno.EACCES: (StoreError, "check the permissions of the file and its folders"),
    errno.EROFS: (StoreError, "choose a folder that can be written"),
    # What a folder of another machine answers while that machine or the network is away.
    **dict.fromkeys(
        (errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENOTCONN, errno.ESTALE, errno.ETIMEDOUT),
        (StoreUnavailableError, "check the network folder"),
    ),
}


@contextmanager
def disk_errors(task: str) -> Iterator[None]:
    """Turn errors of the file system into StoreErrors that open with `task` ("cannot write x")."""
    try:
        yield
    except StoreError:
        raise
    except OSError as error:
        kind, advice = _MEANING.get(error.errno or 0, (StoreError, "check the disk"))
        raise kind(f"{task}: {error.strerror or error}; {advice}") from error


def temporary_beside(path: Path) -> Path:
    """A fresh name in the same folder, hence on the same file system, that no key can reach."""
    return path.parent / f"{TEMPORARY}{uuid4().hex}"


@contextmanager
def partial_file(path: Path, once: bool = False) -> Iterator[IO[bytes]]:
    """A file to write, which replaces `path` when the block ends and vanishes when it raises.

    Folders above it are made. With `once` an existing file is left alone and FileExistsError raised; of
    several racing writers one succeeds, because a hard link is created or refused in one step.
    """
    _make_folder(path.parent)
    temporary = temporary_beside(path)
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if not once and path.is_dir():
            raise StoreError(f"{path} is a folder, so no file can stand there; choose another key")
        (os.link if once else os.replace)(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


def save(path: Path, chunks: Iterable[bytes], source: str, sha256: str | None, progress: Advance | None) -> None:
    """Write the chunks of `source` to a file and verify their sha256 before the file appears.

    Raises:
        StoreError: the sha256 differs, or the disk refuses; no file is left.
        StoreFullError: the disk is full; no file is left.
    """
    digest = hashlib.sha256()
    with disk_errors(f"cannot write {path}"), partial_file(path) as file:
        for chunk in chunks:
            file.write(chunk)
            digest.update(chunk)
            if progress:
                progress(len(chunk))
        if sha256 is not None and digest.hexdigest() != sha256.lower():
            raise StoreError(
                f"{source}: its sha256 is {digest.hexdigest()}, expected {sha256.lower()}; the object was "
                "damaged or replaced: try again, or publish it anew"
            )


def chunks_of(path: Path, size: int = CHUNK) -> Iterator[bytes]:
    """The bytes of a file, at most `size` at a time. Raises NotFoundError, StoreError."""
    with disk_errors(f"cannot read {path}"), path.open("rb") as file:
        while chunk := file.read(size):
            yield chunk


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise StoreError(f"{folder}: a part of it is a file, so it cannot be a folder; choose another key") from None


def _sync_folder(folder: Path) -> None:
    """Make a new name survive a power cut, as fsync does for the bytes behind it."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
