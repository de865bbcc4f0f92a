"""How much a tenant used: requests a minute, trained tokens a day."""

from __future__ import annotations

import sqlalchemy as sa

from serve.catalogue import schema
from serve.catalogue.database import Database

_DAY_S = 24 * 3600
_requests = schema.request_counts
_tokens = schema.token_counts


class Counts:
    """The tables of counts, in windows that begin with each minute and each day (UTC)."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def request(self, tenant_id: str) -> tuple[int, int]:
        """Count one request.

        Returns:
            Requests of the tenant in this minute, this one included; and seconds until the next minute, at least 1.
        """
        now = self._database.now()
        counted = self._database.insert(_requests).values(tenant_id=tenant_id, minute=now // 60, count=1)
        counted = counted.on_conflict_do_update(
            index_elements=["tenant_id", "minute"], set_={"count": _requests.c.count + 1}
        )
        with self._database.write() as connection:
            count = connection.execute(counted.returning(_requests.c.count)).scalar_one()
        return int(count), 60 - now % 60

    def tokens_left(self, tenant_id: str, per_day: int) -> tuple[int, int]:
        """Tokens that a tenant may still train on today, and seconds until the next day."""
        now = self._database.now()
        used = sa.select(_tokens.c.tokens).where(_tokens.c.tenant_id == tenant_id, _tokens.c.day == now // _DAY_S)
        with self._database.read() as connection:
            spent = connection.execute(used).scalar_one_or_none() or 0
        return max(0, per_day - spent), _DAY_S - now % _DAY_S

    def take_tokens(self, tenant_id: str, tokens: int, per_day: int) -> bool:
        """Take tokens of today's share; False, and nothing is taken, if fewer are left.

        More than a whole day's share at once is taken on a day of which nothing was used."""
        now = self._database.now()
        day = now // _DAY_S
        spent = self._database.insert(_tokens).values(tenant_id=tenant_id, day=day, tokens=0)
        spent = spent.on_conflict_do_nothing(index_elements=["tenant_id", "day"])
        fits = sa.or_(_tokens.c.tokens + tokens <= per_day, _tokens.c.tokens == 0)
        take = sa.update(_tokens).where(_tokens.c.tenant_id == tenant_id, _tokens.c.day == day, fits)
        with self._database.write() as connection:
            connection.execute(spent)
            taken = take.values(tokens=_tokens.c.tokens + tokens).returning(_tokens.c.tokens)
            return connection.execute(taken).one_or_none() is not None

    def sweep(self) -> None:
        """Forget the windows that are over."""
        now = self._database.now()
        with self._database.write() as connection:
            connection.execute(sa.delete(_requests).where(_requests.c.minute < now // 60 - 10))
            connection.execute(sa.delete(_tokens).where(_tokens.c.day < now // _DAY_S - 31))
