"""Lets time pass for rows that go by the database's own clock, which no test can move."""

from __future__ import annotations

import sqlalchemy as sa


def let_pass(url: str, column: str, seconds: int) -> None:
    """Make a column `table.column` of times so many seconds older, in every row."""
    table, _, name = column.partition(".")
    engine = sa.create_engine(url.replace("postgresql://", "postgresql+psycopg://"))
    with engine.begin() as connection:
        connection.execute(sa.text(f"UPDATE {table} SET {name} = {name} - {seconds}"))
    engine.dispose()
