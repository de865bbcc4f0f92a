"""The bytes of an adapter on its way in, in the store: pieces that may come again, overlap or be cut, then whole files.

Who may send them, and what an upload's row says, is left to offsite_adapters.py."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

from ot_ray.errors import NotFoundError, StoreError
from ot_ray.store import Store
from ot_ray.store.partial import CHUNK, disk_errors
from serve.routes.transfers import spool
from serve.wire.offsite import AnnouncedFile

_PIECE = re.compile(r"([0-9]{16})-([0-9]{16})")


def upload_prefix(adapter_id: str) -> str:
    """Everything of one upload lies below it."""
    return f"adapters/{adapter_id}"


def adapter_prefix(adapter_id: str) -> str:
    """Below it lie the files of an upload that is complete, and nothing else."""
    return f"{upload_prefix(adapter_id)}/adapter"


class Receiving:
    """One upload's bytes.

    A piece is an object whose name says which bytes it holds; how far a file is follows from the names alone, so
    that it survives a restart and is the same on every replica.

    Args:
        files: as the upload's row has them.
        folder: of this machine, for files while they are put together; None takes the system's own.
    """

    def __init__(self, store: Store, adapter_id: str, files: list[dict[str, Any]], folder: str | None = None) -> None:
        self._store, self._id, self._folder = store, adapter_id, folder
        self.files = {file["name"]: AnnouncedFile(**file) for file in files}

    def received(self, name: str) -> int:
        """Bytes of a file that are here, from the first on."""
        if self._is_whole(name):
            return self.files[name].bytes
        offset = 0
        for start, end, _ in self._pieces(name):
            if start > offset:
                break
            offset = max(offset, end)
        return offset

    def add(self, name: str, start: int, path: Path) -> None:
        """Keep the bytes of a file of this machine as a piece that begins at `start`."""
        end = start + path.stat().st_size
        self._store.upload(path, f"{self._place(name)}/{start:016d}-{end:016d}")

    def forget_pieces(self) -> None:
        """Remove whatever is not part of a whole file."""
        self._store.delete_prefix(f"{upload_prefix(self._id)}/pieces")

    def assemble(self, name: str) -> str | None:
        """Make a whole file of its pieces; one that is whole stays.

        Returns:
            None, or why it is not what was announced; its pieces are removed then.
        """
        if self._is_whole(name):
            self._store.delete_prefix(self._place(name))
            return None
        wanted = self.files[name]
        with spool(self._folder) as file:
            size, sha256 = self._join(name, Path(file.name))
            if (size, sha256) == (wanted.bytes, wanted.sha256):
                self._store.upload(file.name, f"{adapter_prefix(self._id)}/{name}")
        if (size, sha256) != (wanted.bytes, wanted.sha256) and self._is_whole(name):
            # Another has made it of these pieces meanwhile, and removed them.
            return None
        self._store.delete_prefix(self._place(name))
        if size < wanted.bytes:
            return f"{name} has {size} of {wanted.bytes} bytes; send the rest"
        if sha256 != wanted.sha256:
            return f"{name} came with sha256 {sha256}, and {wanted.sha256} was announced; send it again"
        return None

    def _join(self, name: str, target: Path) -> tuple[int, str]:
        digest, offset = hashlib.sha256(), 0
        with disk_errors("cannot keep an upload"), target.open("wb") as file:
            for start, end, key in self._pieces(name):
                if start > offset:
                    break
                while offset < end:
                    data = self._store.read_range(key, offset - start, min(offset - start + CHUNK, end - start))
                    if not data:
                        raise StoreError(f"{key} is shorter than its name says; delete the upload and send it again")
                    file.write(data)
                    digest.update(data)
                    offset += len(data)
        return offset, digest.hexdigest()

    def _pieces(self, name: str) -> list[tuple[int, int, str]]:
        """First byte, byte after the last, and key of each piece, by where they begin."""
        found = []
        for key in self._store.list(self._place(name)):
            match = _PIECE.fullmatch(key.rpartition("/")[2])
            if match:
                found.append((int(match[1]), int(match[2]), key))
        return sorted(found)

    def _is_whole(self, name: str) -> bool:
        try:
            return self._store.info(f"{adapter_prefix(self._id)}/{name}").size == self.files[name].bytes
        except NotFoundError:
            return False

    def _place(self, name: str) -> str:
        return f"{upload_prefix(self._id)}/pieces/{name}"
