"""The fair queue: turns, limits and order, by hand and for thousands of random histories."""

from __future__ import annotations

import random
from collections import Counter, defaultdict

import pytest

from serve.controller.queue import Share, Waiting, choose


def _share(**fields: float) -> Share:
    return Share(**{"running_jobs": 9, "tokens_per_day": 1000, **fields})  # type: ignore[arg-type]


def _started(waiting: list[Waiting], shares: dict[str, Share], max_running: int = 9) -> list[str]:
    return [job.job_id for job in choose(waiting, shares, max_running).start]


def test_tenants_take_turns_however_many_jobs_one_has() -> None:
    waiting = [Waiting(f"a{number}", "a") for number in range(4)] + [Waiting("b0", "b"), Waiting("c0", "c")]
    shares = {tenant: _share() for tenant in "abc"}
    assert _started(waiting, shares) == ["a0", "b0", "c0", "a1", "a2", "a3"]
    assert _started(waiting, shares, max_running=2) == ["a0", "b0"]


def test_who_started_longest_ago_is_next() -> None:
    waiting = [Waiting("a0", "a"), Waiting("b0", "b"), Waiting("c0", "c")]
    shares = {"a": _share(last_start=30), "b": _share(last_start=10), "c": _share(last_start=20)}
    assert _started(waiting, shares) == ["b0", "c0", "a0"]


def test_limits_of_tenant_and_cluster_count_what_runs() -> None:
    waiting = [Waiting("a0", "a"), Waiting("b0", "b"), Waiting("b1", "b")]
    shares = {"a": _share(running_jobs=1, running=1), "b": _share(running_jobs=2, running=1), "c": _share(running=3)}
    assert _started(waiting, shares) == ["b0"]
    assert _started(waiting, shares, max_running=5) == []
    assert _started(waiting, shares, max_running=4) == []


def test_tokens_hold_back_the_tenant_alone() -> None:
    waiting = [Waiting("a0", "a", 600), Waiting("a1", "a", 1), Waiting("b0", "b", 1000)]
    shares = {"a": _share(spent=401), "b": _share()}
    turn = choose(waiting, shares, 9)
    assert [job.job_id for job in turn.start] == ["b0"]
    assert [job.job_id for job in turn.out_of_tokens] == ["a0"]
    assert _started(waiting, {**shares, "a": _share(spent=400)}) == ["a0", "b0"]
    assert _started(waiting, {**shares, "a": _share(spent=399)}) == ["a0", "b0", "a1"]


def test_more_than_a_whole_day_s_tokens_wait_for_an_unused_day() -> None:
    waiting = [Waiting("a0", "a", 1001), Waiting("a1", "a", 1)]
    assert _started(waiting, {"a": _share(spent=1)}) == []
    assert _started(waiting, {"a": _share()}) == ["a0"]


def test_a_job_whose_tokens_are_paid_needs_no_more() -> None:
    assert _started([Waiting("a0", "a", 0)], {"a": _share(spent=5000)}) == ["a0"]


@pytest.mark.parametrize("seed", range(40))
def test_nobody_starves_and_no_limit_is_passed(seed: int) -> None:
    """A random history: arrivals, ends and new days, with the queue asked after each."""
    draw = random.Random(seed)
    tenants = [f"t{number}" for number in range(draw.randint(1, 5))]
    limits = {tenant: (draw.randint(1, 3), draw.randint(10, 40)) for tenant in tenants}
    max_running = draw.randint(1, 4)
    queue: list[Waiting] = []
    running: list[Waiting] = []
    spent: Counter[str] = Counter()
    last_start: defaultdict[str, float] = defaultdict(float)
    order: defaultdict[str, list[int]] = defaultdict(list)
    made = 0

    def ask() -> None:
        counts = Counter(job.tenant_id for job in running)
        shares = {
            tenant: Share(limits[tenant][0], limits[tenant][1], counts[tenant], spent[tenant], last_start[tenant])
            for tenant in tenants
        }
        for job in choose(queue, shares, max_running).start:
            queue.remove(job)
            running.append(job)
            spent[job.tenant_id] += job.tokens
            last_start[job.tenant_id] = made + len(order[job.tenant_id]) / 1000
            order[job.tenant_id].append(int(job.job_id))
        counts = Counter(job.tenant_id for job in running)
        assert len(running) <= max_running
        assert all(counts[tenant] <= limits[tenant][0] for tenant in tenants)
        assert all(spent[tenant] <= limits[tenant][1] for tenant in tenants)

    for _ in range(300):
        action = draw.random()
        if action < 0.45:
            tenant = draw.choice(tenants) if draw.random() < 0.5 else tenants[0]
            made += 1
            queue.append(Waiting(str(made), tenant, draw.randint(1, limits[tenant][1])))
        elif action < 0.9 and running:
            running.remove(draw.choice(running))
        else:
            spent.clear()
        ask()
        made += 1
    for _ in range(10 * len(queue) + 10):
        running.clear()
        spent.clear()
        ask()
        made += 1
    assert queue == []
    assert all(numbers == sorted(numbers) for numbers in order.values())


def test_turns_bound_how_long_a_tenant_waits() -> None:
    """With n tenants and one place, a tenant's job starts within n - 1 starts of others."""
    draw = random.Random(0)
    tenants = [f"t{number}" for number in range(6)]
    last_start = dict.fromkeys(tenants, 0.0)
    queue = [Waiting(f"{tenant}-{number}", tenant) for number in range(50) for tenant in tenants]
    draw.shuffle(queue)
    starts: list[str] = []
    while queue:
        shares = {tenant: _share(last_start=last_start[tenant]) for tenant in tenants}
        (job,) = choose(queue, shares, 1).start
        queue.remove(job)
        starts.append(job.tenant_id)
        last_start[job.tenant_id] = len(starts)
    for at in range(0, len(starts), 6):
        assert sorted(starts[at : at + 6]) == tenants
