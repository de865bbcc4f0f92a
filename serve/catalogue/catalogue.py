"""The service's database as one object, with a member for each table.

Every method of a member is one transaction of its own."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import sqlalchemy as sa

from ot_ray.errors import ConfigError
from serve.catalogue.adapters import Adapters
from serve.catalogue.audit import Audit
from serve.catalogue.checkpoints import Checkpoints
from serve.catalogue.config import DatabaseConfig
from serve.catalogue.counts import Counts
from serve.catalogue.database import Database
from serve.catalogue.events import Events
from serve.catalogue.files import Files
from serve.catalogue.gradient_operations import GradientOperations
from serve.catalogue.gradient_sessions import GradientSessions
from serve.catalogue.idempotency import Idempotency
from serve.catalogue.jobs import Jobs
from serve.catalogue.keys import Keys
from serve.catalogue.leases import Leases
from serve.catalogue.migration import migrate, prepare
from serve.catalogue.runs import Runs
from serve.catalogue.tenants import Tenants
from serve.catalogue.webhooks import Webhooks
from serve.failures import DatabaseUnavailableError

_PAUSE_S = 0.5


class Catalogue:
    """Tenants, keys, files, jobs, events, checkpoints, adapters, gradient learning, webhooks, counts, leases and the
    audit log.

    Any number of threads and processes share one database; a forked process opens its own."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self.tenants = Tenants(database)
        self.keys = Keys(database)
        self.files = Files(database)
        self.jobs = Jobs(database)
        self.runs = Runs(database)
        self.events = Events(database)
        self.checkpoints = Checkpoints(database)
        self.adapters = Adapters(database)
        self.gradient_sessions = GradientSessions(database)
        self.gradient_operations = GradientOperations(database)
        self.webhooks = Webhooks(database)
        self.idempotency = Idempotency(database)
        self.counts = Counts(database)
        self.audit = Audit(database)
        self.leases = Leases(database)

    @classmethod
    def open(cls, database: str | DatabaseConfig, clock: Callable[[], float] = time.time) -> Catalogue:
        """Open a database by its configuration or its URL; a file that is not there is made, without tables.

        Args:
            clock: seconds since 1970, which tests may move.

        Raises:
            ConfigError: the URL is none, holds a password, or names a file that cannot be made.
        """
        config = DatabaseConfig(url=database) if isinstance(database, str) else database
        _make_file(config.url)
        return cls(Database(config, clock))

    def now(self) -> int:
        """Whole seconds since 1970, as rows have them."""
        return self._database.now()

    def migrate(self, patience_s: float = 0.0) -> None:
        """Bring the tables to what this code works with; any number of processes may do so at once.

        Args:
            patience_s: seconds to wait for a database that does not answer.

        Raises:
            ConfigError: the database was made by newer code.
            DatabaseUnavailableError: it does not answer.
        """
        deadline = time.monotonic() + patience_s
        while True:
            try:
                migrate(self._database)
                return
            except DatabaseUnavailableError:
                if time.monotonic() >= deadline:
                    raise
            time.sleep(_PAUSE_S)

    def prepare(self) -> None:
        """Make the tables of an empty database; one that has any must have those that this code works with.

        Raises:
            ConfigError: the tables are older or newer than this code.
            DatabaseUnavailableError: the database does not answer.
        """
        prepare(self._database)

    def close(self) -> None:
        """Give the connections back."""
        self._database.close()


def _make_file(url: str) -> None:
    parsed = sa.make_url(url)
    if parsed.get_backend_name() != "sqlite":
        return
    assert parsed.database is not None
    path = Path(parsed.database)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Hashes of keys and webhooks' secrets are in it; SQLite gives its side files the same mode.
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
    except OSError as error:
        raise ConfigError(
            f"database {path}: cannot be opened: {error.strerror}; choose a folder that can be written"
        ) from None
