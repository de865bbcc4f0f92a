"""Which jobs start next: tenants take turns, and limits hold jobs back without losing them.

Pure functions of what the database says; starting is left to starting.py."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Waiting:
    """A job in the queue. Jobs are given in the order in which their tenant queued them.

    `tokens` are those that starting it takes from the tenant's day: 0 where they were taken before.
    """

    job_id: str
    tenant_id: str
    tokens: int = 0


@dataclass(frozen=True)
class Share:
    """What a tenant may do now: `running` of `running_jobs` run, `spent` of `tokens_per_day` tokens are used.

    `last_start` says when a job of the tenant started last, in any unit; tenants that never started have 0.
    """

    running_jobs: int
    tokens_per_day: int
    running: int = 0
    spent: int = 0
    last_start: float = 0.0


@dataclass(frozen=True)
class Turn:
    """The jobs to start, in this order, and those that wait for tokens of another day."""

    start: tuple[Waiting, ...]
    out_of_tokens: tuple[Waiting, ...]


def choose(waiting: Iterable[Waiting], shares: Mapping[str, Share], max_running: int) -> Turn:
    """Choose the jobs to start now.

    Of the tenants with a job that may start, the one whose last start is longest ago is next; among equals the one
    whose job stands first in `waiting`. Within a tenant the order is first in, first out: a job that waits for
    tokens holds back the tenant's own later jobs and nobody else's. One that takes more than a whole day's starts
    on a day of which none are used.

    Args:
        waiting: all jobs in the queue.
        shares: for every tenant with a waiting or running job.
        max_running: jobs of all tenants that may run at once.
    """
    queues: dict[str, list[Waiting]] = defaultdict(list)
    place: dict[str, int] = {}
    for position, job in enumerate(waiting):
        queues[job.tenant_id].append(job)
        place[job.job_id] = position
    room = max_running - sum(share.running for share in shares.values())
    running = {tenant: shares[tenant].running for tenant in queues}
    spent = {tenant: shares[tenant].spent for tenant in queues}
    turns: dict[str, tuple[int, float]] = {tenant: (0, shares[tenant].last_start) for tenant in queues}
    start: list[Waiting] = []
    out_of_tokens: list[Waiting] = []
    while room > len(start):
        for tenant in list(queues):
            job = queues[tenant][0]
            if running[tenant] >= shares[tenant].running_jobs:
                del queues[tenant]
            elif job.tokens and spent[tenant] and spent[tenant] + job.tokens > shares[tenant].tokens_per_day:
                out_of_tokens.append(job)
                del queues[tenant]
        if not queues:
            break
        tenant = min(queues, key=lambda tenant: (turns[tenant], place[queues[tenant][0].job_id]))
        job = queues[tenant].pop(0)
        start.append(job)
        running[tenant] += 1
        spent[tenant] += job.tokens
        # Whoever started in this round comes after all who did not, in the order of their starts.
        turns[tenant] = (1, float(len(start)))
        if not queues[tenant]:
            del queues[tenant]
    return Turn(tuple(start), tuple(out_of_tokens))
