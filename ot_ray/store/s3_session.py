"""Credentials of an S3 store that live for minutes: the file that they lie in, and boto3's use of that file.

Who makes them is left to `s3_credentials`; who puts the next ones into the file, to `s3_renewal`."""

from __future__ import annotations

import json
import math
import os
import threading
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ot_ray.errors import StoreError
from ot_ray.store.partial import disk_errors, temporary_beside
from ot_ray.store.s3_failures import load_boto3

_TYPES: dict[str, type] = {"expires_at": int, "lasts_s": float}
_LONGEST_FIELD = 8192
# For boto3 they never expire: the file is looked at before every request anyway.
_NEVER = "9999-01-01T00:00:00Z"


@dataclass(frozen=True)
class Credentials:
    """An AWS session. The secrets stay out of its text form."""

    access_key_id: str
    secret_access_key: str = field(repr=False)
    session_token: str = field(repr=False)
    expires_at: int
    """Seconds since 1970, by the clock of whoever made them."""
    lasts_s: float
    """Seconds between their making and their end."""
    renewal: str = ""
    """`s3://` address of the object in which the next ones appear, which these may read; empty if none come."""

    def encode(self) -> bytes:
        """As `decode` reads it."""
        return json.dumps(asdict(self)).encode("ascii")

    @classmethod
    def decode(cls, data: bytes, where: str) -> Credentials:
        """Read what `encode` wrote. Raises StoreError, which shows nothing of it."""
        problem = StoreError(f"{where} holds no credentials that can be read; they are made anew with the next session")
        try:
            values = json.loads(data)
        except (ValueError, RecursionError):
            raise problem from None
        names = [item.name for item in fields(cls)]
        if not isinstance(values, dict) or sorted(values) != sorted(names):
            raise problem
        for name in names:
            value, kind = values[name], _TYPES.get(name, str)
            if type(value) is not kind or (kind is str and len(value) > _LONGEST_FIELD):
                raise problem
        if not (0 < values["lasts_s"] < math.inf and values["access_key_id"]):
            raise problem
        return cls(**values)

    def write(self, path: Path) -> None:
        """Make a file of them, for its owner's eyes only. Raises AlreadyExistsError, StoreError."""
        with disk_errors(f"cannot write {path}"):
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(handle, "wb") as file:
                file.write(self.encode())

    def replace(self, path: Path) -> None:
        """As `write`, in place of a file that is there; readers see the old one or the new one. Raises StoreError."""
        temporary = temporary_beside(path)
        try:
            self.write(temporary)
            with disk_errors(f"cannot write {path}"):
                os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


class CredentialsFile:
    """A file of credentials that somebody may replace at any time. Any thread may use it."""

    def __init__(self, path: str | Path) -> None:
        # A job that changes its folder keeps its credentials.
        self.path = Path(path).absolute()
        self._lock = threading.Lock()
        self._seen: tuple[int, ...] | None = None
        self._current: Credentials | None = None

    def current(self) -> Credentials:
        """What the file holds now. Raises NotFoundError, StoreError."""
        with self._lock, disk_errors(f"cannot read {self.path}"):
            status = self.path.stat()
            now = (status.st_mtime_ns, status.st_ino, status.st_size)
            if self._current is None or now != self._seen:
                self._current = Credentials.decode(self.path.read_bytes(), str(self.path))
                self._seen = now
            return self._current

    def key_id(self) -> str:
        """Which credentials these are. No secret. Raises as `current`."""
        return self.current().access_key_id


def boto_session(file: CredentialsFile | None) -> Any:
    """A session of boto3 that signs with what the file holds at the time of each request, and finds no others.

    Args:
        file: None for the credentials that boto3 finds by itself.

    Raises:
        MissingDependencyError: boto3 is not installed.
        NotFoundError, StoreError: the file cannot be read.
    """
    boto3 = load_boto3()
    if file is None:
        # Of its own, since boto3's shared session may not be built by two threads at once.
        return boto3.session.Session()
    import botocore.session
    from botocore.credentials import RefreshableCredentials

    def metadata() -> dict[str, str]:
        now = file.current()
        return {
            "access_key": now.access_key_id,
            "secret_key": now.secret_access_key,
            "token": now.session_token,
            "expiry_time": _NEVER,
        }

    # An advisory refresh is made before every request; where one fails, those at hand are used.
    credentials = RefreshableCredentials.create_from_metadata(
        metadata(), metadata, "credentials-file", advisory_timeout=math.inf, mandatory_timeout=0
    )
    inner = botocore.session.get_session()
    inner.register_component("credential_provider", _Only(credentials))
    return boto3.session.Session(botocore_session=inner)


class _Only:
    """A chain of credentials with one link."""

    def __init__(self, credentials: Any) -> None:
        self._credentials = credentials

    def load_credentials(self) -> Any:
        return self._credentials
