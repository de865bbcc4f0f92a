"""Whole folders to and from any store.

What a folder holds, and which of its files makes it visible, is left to the caller."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

from ot_ray.errors import AlreadyExistsError, NotFoundError, StoreError
from ot_ray.store.base import Advance, ObjectInfo, Store, check_key, check_prefix, join_key
from ot_ray.store.partial import disk_errors, temporary_beside


def upload_folder(
    store: Store, folder: str | Path, prefix: str, last: str | None = None, progress: Advance | None = None
) -> list[ObjectInfo]:
    """Upload every file of a folder, at any depth, under a prefix; links to files are followed.

    Args:
        last: path in the folder of the file whose presence makes the whole visible, such as
            `manifest.json`. It is read into memory and created once, after all others; without it, every
            file replaces an older one.

    Files of a failed upload stay, invisible without `last`, and the next try replaces them. Two publishers
    of one prefix are told apart when either finds the other's `last`; until then files of the same name
    replace each other, so a manifest should hold each file's sha256.

    Returns:
        Key, size and sha256 of each file, in the order of upload.

    Raises:
        NotFoundError: the folder has no files, or `last` is not among them.
        AlreadyExistsError: `last` is in the store, from before or from another publisher.
    """
    folder, prefix = Path(folder), check_prefix(prefix)
    files = _files(folder)
    if last is not None and last not in files:
        raise NotFoundError(f"{folder} has no file {last}, which must be uploaded last; write it first")
    keys = {name: check_key(join_key(prefix, name)) for name in files if name != last}
    done = []
    for name, key in keys.items():
        if last is not None:
            _refuse_published(store, join_key(prefix, last))
        done.append(store.upload(folder / name, key, progress))
    if last is not None:
        done.append(_publish(store, folder / last, join_key(prefix, last), progress))
    return done


def download_folder(store: Store, prefix: str, folder: str | Path, progress: Advance | None = None) -> None:
    """Download all objects under a prefix into a folder, which appears only when complete.

    Raises:
        NotFoundError: no object stands under the prefix.
        AlreadyExistsError: the folder is there and not empty, or is a file.
    """
    folder, prefix = Path(folder), check_prefix(prefix)
    _refuse_occupied(folder)
    keys = list(store.list(prefix))
    if not keys:
        raise NotFoundError(f"{store.url}: nothing stands under {prefix!r}; check the name, or upload it first")
    staging = temporary_beside(folder.absolute())
    try:
        for key in keys:
            name = check_key(key).removeprefix(join_key(prefix, ""))
            store.download(key, staging / name, progress=progress)
        with disk_errors(f"cannot write {folder}"):
            os.rename(staging, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _files(folder: Path) -> list[str]:
    names = []
    for path in folder.rglob("*"):
        if path.is_file():
            names.append(path.relative_to(folder).as_posix())
        elif path.is_symlink() or not path.is_dir():
            raise StoreError(f"{path} is a broken link, a link to a folder or no plain file; remove or replace it")
    if not names:
        raise NotFoundError(f"{folder} is no folder with files; name the folder to upload")
    return sorted(names)


def _refuse_published(store: Store, key: str) -> None:
    if store.exists(key):
        raise AlreadyExistsError(
            f"{key} is already in {store.url}, and what it publishes is never replaced; choose another version"
        )


def _publish(store: Store, path: Path, key: str, progress: Advance | None) -> ObjectInfo:
    with disk_errors(f"cannot read {path}"):
        data = path.read_bytes()
    store.create(key, data)
    if progress:
        progress(len(data))
    return ObjectInfo(key, len(data), hashlib.sha256(data).hexdigest())


def _refuse_occupied(folder: Path) -> None:
    with disk_errors(f"cannot write {folder}"):
        if folder.is_symlink() or (folder.exists() and (not folder.is_dir() or any(folder.iterdir()))):
            raise AlreadyExistsError(f"{folder} is already there and not empty; choose another folder or delete it")
