"""Brings a database to the tables that this code works with, by the steps in migrations/.

What the tables are is in schema.py."""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa
from alembic import command
from alembic.config import Config as AlembicConfig
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory

from ot_ray.errors import ConfigError
from serve.catalogue.database import Database

_STEPS = Path(__file__).parent / "migrations"
_LOCK = 7_361_905_442  # PostgreSQL's advisory lock of whoever migrates; any number that others don't use


def migrate(database: Database) -> None:
    """Run the steps that are missing, in one transaction that others wait for.

    Raises:
        ConfigError: the database was made by newer code.
        DatabaseUnavailableError: the database does not answer.
    """
    settings = _settings()
    # On SQLite the transaction itself holds the only writer's lock.
    with database.write() as connection:
        if not database.is_sqlite:
            connection.execute(sa.text("SET LOCAL lock_timeout = 0"))
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_LOCK)))
        if _revision(connection, settings) != _newest(settings):
            settings.attributes["connection"] = connection
            command.upgrade(settings, "head")


def prepare(database: Database) -> None:
    """Migrate an empty database; raise ConfigError if another's tables are not what this code works with."""
    settings = _settings()
    with database.read() as connection:
        found = _revision(connection, settings)
    if found is None:
        migrate(database)
    elif found != _newest(settings):
        raise ConfigError("the database's tables are older than this code; run `python -m serve.admin migrate`")


def _revision(connection: sa.Connection, settings: AlembicConfig) -> str | None:
    """The last step that the database has taken; None for an empty one."""
    found = MigrationContext.configure(connection).get_current_revision()
    known = {step.revision for step in ScriptDirectory.from_config(settings).walk_revisions()}
    if found is not None and found not in known:
        raise ConfigError(
            f"the database is at {found[:80]!r}, which this code does not know: newer code has migrated it; "
            "run that code, or restore a backup from before"
        )
    return found


def _newest(settings: AlembicConfig) -> str | None:
    return ScriptDirectory.from_config(settings).get_current_head()


def _settings() -> AlembicConfig:
    settings = AlembicConfig()
    settings.set_main_option("script_location", str(_STEPS).replace("%", "%%"))
    settings.set_main_option("path_separator", "os")
    return settings
