"""What a session saves, file by file into a folder that appears when all of them are verified.

What the files mean is left to whoever opens them: a low-rank auxiliary is a plain PEFT adapter."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ot_ray.client.downloads import fetch_file, staged
from ot_ray.client.http import Http, quoted
from ot_ray.errors import ServiceError
from ot_ray.store.partial import disk_errors

_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def fetch_saved(http: Http, place: str, files: Sequence[Mapping[str, Any]], folder: Path) -> Path:
    """Download saved files.

    Args:
        place: the path that they are under.
        files: `{name, bytes, sha256}` each.

    Returns:
        The folder.

    Raises:
        AlreadyExistsError: the folder is there and not empty.
        ArtifactError: what came has another hash than the service said.
        ServiceError: the service refused, does not answer, or names files in a way that no folder should have.
    """
    folder = folder.absolute()
    for file in files:
        # A name must not lead out of the folder, nor hide in it.
        if not _NAME.fullmatch(str(file["name"])) or not _SHA256.fullmatch(str(file["sha256"])):
            raise ServiceError(f"{http.url} names a file {str(file['name'])[:80]!r}; ask its operator")
    staging = staged(folder, http.url + place)
    for file in files:
        name = str(file["name"])
        fetch_file(http, f"{place}/{quoted(name)}", staging / name, int(file["bytes"]), str(file["sha256"]))
    with disk_errors(f"cannot write {folder}"):
        os.rename(staging, folder)
    return folder
