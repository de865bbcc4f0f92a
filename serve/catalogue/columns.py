"""What the tables are made of: their common columns, and types that SQLite and PostgreSQL both keep.

The tables are in schema.py and gradient_schema.py."""

from __future__ import annotations

import re
from typing import Any

import sqlalchemy as sa
from sqlalchemy.types import TypeDecorator

metadata = sa.MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "uq": "uq_%(table_name)s_%(column_0_name)s",
        "ix": "ix_%(table_name)s_%(column_0_name)s",
    }
)

_UNSTORABLE = re.compile("[\x00\ud800-\udfff]")


class Text(TypeDecorator[str]):
    """Text of any origin: what no database stores (NUL, halves of surrogate pairs) becomes U+FFFD.

    An id that holds such a character is compared like any other and names nothing."""

    impl = sa.Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Any) -> str | None:
        return value if value is None else _UNSTORABLE.sub("\N{REPLACEMENT CHARACTER}", value)


JSON = sa.JSON(none_as_null=True)
Position = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def position() -> sa.Column[int]:
    """Insertion order, which tells rows of one second apart in a listing."""
    return sa.Column("position", Position, primary_key=True, autoincrement=True)


def row_id() -> sa.Column[str]:
    return sa.Column("id", Text, unique=True, nullable=False)


def tenant() -> sa.Column[str]:
    return sa.Column("tenant_id", Text, sa.ForeignKey("tenants.id"), nullable=False)


def job() -> sa.Column[str]:
    return sa.Column("job_id", Text, sa.ForeignKey("jobs.id"), nullable=False)


def text(name: str, nullable: bool = True) -> sa.Column[str]:
    return sa.Column(name, Text, nullable=nullable)


def json(name: str, nullable: bool = True) -> sa.Column[Any]:
    return sa.Column(name, JSON, nullable=nullable)


def number(name: str, nullable: bool = True, default: int | None = None) -> sa.Column[int]:
    stated = None if default is None else str(default)
    return sa.Column(name, sa.BigInteger, nullable=nullable, server_default=stated)


def time(name: str, nullable: bool = True) -> sa.Column[int]:
    return number(name, nullable)


def table(name: str, *parts: Any) -> sa.Table:
    # Without AUTOINCREMENT, SQLite gives the number of a deleted last row to the next one.
    return sa.Table(name, metadata, *parts, sqlite_autoincrement=True)
