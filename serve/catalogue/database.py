"""A connection pool with the transactions that every table's class uses, on SQLite and PostgreSQL alike.

What is read and written in them is left to the tables' classes."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import InterfaceError, InternalError, OperationalError
from sqlalchemy.exc import TimeoutError as NoConnectionError

from ot_ray.errors import NotFoundError
from serve.catalogue.config import DatabaseConfig
from serve.catalogue.records import Page
from serve.failures import DatabaseUnavailableError

T = TypeVar("T")
_ORDERS = ("asc", "desc")
_LOCK_MS = 30_000
_READS = {"begin": "BEGIN"}


class Database:
    """Transactions on one database; safe for threads, but not for forked processes.

    Args:
        clock: seconds since 1970, which tests may move.
    """

    def __init__(self, config: DatabaseConfig, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.engine = _engine(config)
        self._reading = self.engine.execution_options(**_READS)
        self.is_sqlite = self.engine.dialect.name == "sqlite"
        self._wait_s = config.wait_s
        self._writer = threading.Lock()

    def now(self) -> int:
        """Whole seconds since 1970, by this machine's clock."""
        return int(self._clock())

    def shared_now(self) -> sa.ColumnElement[int]:
        """Whole seconds since 1970 by the database's own clock, to be read within a statement: for what machines whose
        clocks differ have to agree on."""
        if self.is_sqlite:
            return sa.cast(sa.func.strftime("%s", "now"), sa.BigInteger)
        return sa.cast(sa.func.floor(sa.extract("epoch", sa.func.clock_timestamp())), sa.BigInteger)

    @contextmanager
    def read(self) -> Iterator[sa.Connection]:
        """A transaction that only reads.

        Raises:
            DatabaseUnavailableError: the database did not answer.
        """
        with _told(), self._reading.begin() as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[sa.Connection]:
        """A transaction that may write; on SQLite it holds the one writer's lock from its beginning.

        Raises:
            DatabaseUnavailableError: the database did not answer; if it went away during the commit, nobody knows
                whether the transaction took place.
        """
        with _told(), self._turn(), self.engine.begin() as connection:
            yield connection

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """SQLite has one writer at a time; its own waiting is by trying again, which is unfair to who tries late."""
        if not self.is_sqlite:
            yield
            return
        if not self._writer.acquire(timeout=self._wait_s):
            raise _unavailable()
        try:
            yield
        finally:
            self._writer.release()

    def insert(self, table: sa.Table) -> Any:
        """An insert that takes `on_conflict_do_nothing` and `on_conflict_do_update`."""
        return sqlite.insert(table) if self.is_sqlite else postgresql.insert(table)

    def close(self) -> None:
        """Give the connections back."""
        self.engine.dispose()


def page(
    connection: sa.Connection,
    table: sa.Table,
    where: list[sa.ColumnElement[bool]],
    make: Callable[[Mapping[Any, Any]], T],
    *,
    after: str | None,
    limit: int,
    order: str = "desc",
    by: sa.ColumnElement[Any] | None = None,
) -> Page[T]:
    """Up to `limit` rows by time of creation and then of insertion, the newest first.

    Args:
        where: which rows the listing holds; `after` must be one of them.
        after: the id of the last row of the page before.
        order: `desc`, or `asc` for the oldest first.
        by: a number to go by in place of the time of creation.

    Raises:
        NotFoundError: the listing holds no row with the id `after`.
    """
    if order not in _ORDERS:
        raise ValueError(f"order is {order!r}; use one of {_ORDERS}")
    columns = (table.c.created_at if by is None else by, table.c.position)
    query = sa.select(table).where(*where)
    if after is not None:
        found = connection.execute(sa.select(*columns).where(table.c.id == after, *where)).one_or_none()
        if found is None:
            raise NotFoundError(f"after is {after[:80]!r}, which names nothing in this list; pass the last id you got")
        place, cursor = sa.tuple_(*columns), sa.tuple_(*(sa.literal(value, sa.BigInteger) for value in found))
        query = query.where(place < cursor if order == "desc" else place > cursor)
    query = query.order_by(*(column.desc() if order == "desc" else column.asc() for column in columns))
    rows = connection.execute(query.limit(limit + 1)).mappings().all()
    return Page([make(row) for row in rows[:limit]], has_more=len(rows) > limit)


@contextmanager
def _told() -> Iterator[None]:
    """Failures of the database in the service's words; none of the driver's text reaches a client."""
    try:
        yield
    except (OperationalError, InterfaceError, InternalError, NoConnectionError) as error:
        raise _unavailable() from error


def _unavailable() -> DatabaseUnavailableError:
    return DatabaseUnavailableError("The service's database does not answer at the moment; try again.")


def _engine(config: DatabaseConfig) -> sa.Engine:
    url = sa.make_url(config.url)
    common: dict[str, Any] = {
        "json_serializer": partial(json.dumps, allow_nan=False),
        "pool_size": config.connections,
        "max_overflow": 0,
        "pool_timeout": config.wait_s,
        "hide_parameters": True,  # errors are logged, and parameters hold customers' data
    }
    if url.get_backend_name() == "sqlite":
        engine = sa.create_engine(url, poolclass=sa.QueuePool, connect_args={"timeout": config.wait_s}, **common)
        event.listen(engine, "connect", _prepare_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
        return engine
    # A server that was cut off is noticed within seconds, and its connections are made anew; it in turn gives back
    # the locks of a client that was.
    network = {"connect_timeout": 5, "keepalives_idle": 10, "keepalives_interval": 5, "tcp_user_timeout": 15_000}
    network |= {"options": f"-c lock_timeout={_LOCK_MS} -c idle_in_transaction_session_timeout={2 * _LOCK_MS}"}
    return sa.create_engine(
        url.set(drivername="postgresql+psycopg"),
        pool_pre_ping=True,
        isolation_level="READ COMMITTED",
        connect_args=network,
        **common,
    )


def _prepare_sqlite(connection: Any, _: Any) -> None:
    connection.isolation_level = None  # transactions begin where `_begin_sqlite` says, not where the driver guesses
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")
    connection.execute("PRAGMA foreign_keys=ON")


def _begin_sqlite(connection: sa.Connection) -> None:
    connection.exec_driver_sql(connection.get_execution_options().get("begin", "BEGIN IMMEDIATE"))
