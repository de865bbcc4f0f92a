"""Keeps a job's credentials fresh: takes the next ones from the job's own folder of the store, into their file.

No clock is compared with another: the object is looked at again and again, and whoever writes it does so early."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from ot_ray.errors import OTRayError
from ot_ray.store.base import Store
from ot_ray.store.partial import disk_errors
from ot_ray.store.patient import PatientStore
from ot_ray.store.s3 import S3Store
from ot_ray.store.s3_address import S3Address
from ot_ray.store.s3_session import Credentials, CredentialsFile

_LOOKS = 15
"""Looks at the object in the life of a session; one a minute where a session lasts a quarter of an hour."""
_MOST_BYTES = 64 * 1024
_END_S = 10.0

_log = logging.getLogger(__name__)


@contextmanager
def renewed(store: Store) -> Iterator[None]:
    """While the block runs, the credentials of a store are renewed, if they are of the kind that is.

    The first look at the object is over when the block begins, so that old credentials are used for nothing else.
    While the store does not answer, or holds no newer ones, the present ones stay. Another thread does it, so that a
    job keeps its access though it asks the store for nothing for long.

    Raises:
        StoreError: the file of the credentials cannot be read.
    """
    inner = store.inner if isinstance(store, PatientStore) else store
    file = inner.credentials if isinstance(inner, S3Store) else None
    if file is None or not file.current().renewal:
        yield
        return
    with disk_errors(f"cannot keep {file.path} from others"):
        # A launcher may have shipped it as any other file.
        file.path.chmod(0o600)
    keeper = _Keeper(file)
    keeper.look()
    thread = threading.Thread(target=keeper.run, name="credentials", daemon=True)
    thread.start()
    try:
        yield
    finally:
        keeper.stop.set()
        # A look that hangs holds nobody up.
        thread.join(_END_S)


class _Keeper:
    def __init__(self, file: CredentialsFile) -> None:
        self.stop = threading.Event()
        first = file.current()
        self._pause_s, address = first.lasts_s / _LOOKS, S3Address.parse(first.renewal)
        folder, _, self._key = address.prefix.rpartition("/")
        # It looks again soon anyway.
        changes = {"prefix": folder, "credentials": str(file.path), "attempts": 1}
        self._file, self._store = file, S3Store(address.model_copy(update=changes))
        self._told = False

    def run(self) -> None:
        while not self.stop.wait(self._pause_s):
            self.look()

    def look(self) -> None:
        try:
            self._take()
        except OTRayError as error:
            if not self._told:
                _log.warning("the job's credentials could not be renewed, and are tried again: %s", error)
            self._told = True
        else:
            self._told = False

    def _take(self) -> None:
        now = self._file.current()
        data = self._store.read_range(self._key, 0, _MOST_BYTES)
        found = Credentials.decode(data, "the object of the next credentials")
        # Of two that end in the same second either will do; an older object is left alone.
        if found.access_key_id != now.access_key_id and found.expires_at >= now.expires_at:
            found.replace(self._file.path)
            self._pause_s = found.lasts_s / _LOOKS
