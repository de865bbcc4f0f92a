"""Folders of files with known sizes and hashes: writing one whole or not at all, and checking one.

What the files mean is left to the modules that write and open them."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from ot_ray.artifacts.manifest import FileEntry, foreign
from ot_ray.errors import AlreadyExistsError, NotFoundError
from ot_ray.store.partial import chunks_of, disk_errors, temporary_beside


@contextmanager
def staged_folder(folder: Path) -> Iterator[Path]:
    """A fresh folder to write, which takes the name `folder` when the block ends and vanishes when it raises.

    Raises:
        AlreadyExistsError: `folder` is there and not empty, or is a file.
    """
    target = folder.absolute()
    with disk_errors(f"cannot write {folder}"):
        if target.is_symlink() or (target.exists() and (not target.is_dir() or any(target.iterdir()))):
            raise AlreadyExistsError(f"{folder} is already there; choose another folder or delete it")
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = temporary_beside(target)
        staging.mkdir()
    try:
        yield staging
        with disk_errors(f"cannot write {folder}"):
            os.rename(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def list_files(folder: Path) -> tuple[list[str], list[str]]:
    """All plain files under a folder, and what else is wrong there; links are never followed.

    Returns:
        Relative paths, sorted, and one line for each link, special file and empty folder.

    Raises:
        NotFoundError: there is no such folder.
    """
    if not folder.is_dir():
        raise NotFoundError(f"{folder} is no folder; check the name, or fetch it first")
    names, problems = [], []
    for place, folders, files in os.walk(folder):
        for leaf in sorted([*folders, *files]):
            path = Path(place, leaf)
            name = path.relative_to(folder).as_posix()
            if path.is_symlink():
                problems.append(f"{name} is a link; put the file itself there")
            elif path.is_file():
                names.append(name)
            elif not path.is_dir():
                problems.append(f"{name} is no plain file; remove it")
            elif not any(path.iterdir()):
                problems.append(f"{name} is an empty folder; remove it")
    return sorted(names), problems


def describe_files(folder: Path, names: Iterable[str]) -> dict[str, FileEntry]:
    """Size and sha256 of files, by name."""
    return {name: _entry(folder / name) for name in sorted(names)}


def check_files(folder: Path, expected: Mapping[str, FileEntry], beside: Iterable[str]) -> list[str]:
    """Compare a folder with what its manifest says.

    Args:
        beside: files that are there and that the manifest does not list, such as itself.

    Returns:
        One line for each file that is missing, extra, of another size or changed; empty if all is well.
    """
    names, problems = list_files(folder)
    present, wanted = set(names), {*expected, *beside}
    problems += [foreign(name) or f"{name} is not in the manifest; remove it" for name in sorted(present - wanted)]
    problems += [f"{name} is missing; fetch it again" for name in sorted(wanted - present)]
    for name in sorted(present & expected.keys()):
        size = (folder / name).stat().st_size
        if size != expected[name].bytes:
            problems.append(f"{name} has {size} bytes, the manifest says {expected[name].bytes}; fetch it again")
        elif (found := _entry(folder / name)) != expected[name]:
            problems.append(
                f"{name} was changed: its sha256 is {found.sha256}, the manifest says "
                f"{expected[name].sha256}; fetch it again"
            )
    return problems


def _entry(path: Path) -> FileEntry:
    digest, size = hashlib.sha256(), 0
    for chunk in chunks_of(path):
        digest.update(chunk)
        size += len(chunk)
    return FileEntry(bytes=size, sha256=digest.hexdigest())
