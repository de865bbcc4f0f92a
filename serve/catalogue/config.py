"""Where the service's database is."""

from __future__ import annotations

from pydantic import Field, model_validator
from sqlalchemy import make_url
from sqlalchemy.exc import ArgumentError

from ot_ray.config import Config

_FORMS = "write sqlite:////folder/service.db or postgresql://user@host/database"


class DatabaseConfig(Config):
    """The database with tenants, keys, files, jobs and the audit log."""

    url: str
    """`sqlite:///path`, or `postgresql://user@host:port/database`. Its password is never written here: PostgreSQL's
    client library takes it from PGPASSWORD or from the file that PGPASSFILE names."""
    connections: int = Field(default=10, ge=1)
    """Connections that one process keeps at most."""
    wait_s: float = Field(default=30.0, gt=0)
    """Seconds to wait for a connection or for SQLite's lock before a request is answered 503."""

    start_wait_s: float = Field(default=120.0, ge=0)
    """Seconds that a replica of the service waits for the database when it starts, before it is started once more."""

    # A rule of the section, not of the field, because the message of a field's rule would show the password.
    @model_validator(mode="after")
    def _is_safe(self) -> DatabaseConfig:
        try:
            parsed = make_url(self.url)
        except ArgumentError:
            raise ValueError(f"url is no address of a database; {_FORMS}") from None
        if parsed.password is not None or "password" in parsed.query:
            raise ValueError("url holds a password; leave it out and set PGPASSWORD or PGPASSFILE")
        if parsed.drivername not in ("sqlite", "postgresql", "postgresql+psycopg"):
            raise ValueError(f"url names {parsed.drivername}, which the service does not know; {_FORMS}")
        if parsed.get_backend_name() == "sqlite" and parsed.database in (None, "", ":memory:"):
            raise ValueError(f"url names no file, but several processes share SQLite's; {_FORMS}")
        return self
