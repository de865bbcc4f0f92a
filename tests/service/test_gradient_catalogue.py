"""Gradient learning in the database, on SQLite and on PostgreSQL: numbers, order, leases, turns, and what ends once."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from ot_ray.errors import NotFoundError
from serve.catalogue import Catalogue, DatabaseConfig
from serve.catalogue.gradient_refusals import (
    GroupMismatchError,
    NumberTakenError,
    NumberTooHighError,
    SessionClosedError,
    TooManyQueuedError,
    VersionError,
)
from serve.catalogue.records import GradientOperation, GradientSession
from tests.service.database_time import let_pass

SITE = {"name": "a", "layout": "linear", "inputs": 2, "outputs": 2}
SETTINGS: dict[str, Any] = {
    "sites": [SITE],
    "auxiliary": {"kind": "low_rank", "rank": 2},
    "mode": "alone",
    "group": None,
    "fit": "client",
    "interval": None,
    "fitting": {"lr": 0.001},
    "metadata": None,
}
LEASES = "gradient_operations.lease_until"
ERROR = {"type": "server_error", "message": "m", "param": None, "code": None}


class Clock:
    """A time that tests move."""

    now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def timed(any_database_url: str, clock: Clock) -> Iterator[Catalogue]:
    """An empty database whose time of rows stands still; leases go by the database's own."""
    opened = Catalogue.open(DatabaseConfig(url=any_database_url, wait_s=120), clock)
    yield opened
    opened.close()


def opened(catalogue: Catalogue, tenant_id: str, **settings: Any) -> GradientSession:
    session = catalogue.gradient_sessions.create(
        tenant_id, model="tiny", settings={**SETTINGS, **settings}, idle_s=3600
    )
    assert session is not None
    return session


def submitted(
    catalogue: Catalogue, session: GradientSession, number: int, kind: Any = "forward_backward", **more: Any
) -> GradientOperation:
    operation, _ = catalogue.gradient_operations.submit(session, kind, number, f"{number}", {"n": number}, 99, **more)
    return operation


def at_once(work: Callable[[int], Any], count: int) -> list[Any]:
    barrier = threading.Barrier(count)

    def run(number: int) -> Any:
        barrier.wait()
        return work(number)

    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(run, range(count)))


def numbers(operations: list[GradientOperation]) -> list[tuple[str, int]]:
    return [(operation.session_id, operation.number) for operation in operations]


def test_an_operation_is_taken_in_once_and_in_order(any_catalogue: Catalogue) -> None:
    tenant = any_catalogue.tenants.create("anna").id
    session, operations = opened(any_catalogue, tenant), any_catalogue.gradient_operations
    first, is_new = operations.submit(session, "step", 0, "d", {"a": 1}, 2)
    again, is_new_again = operations.submit(session, "step", 0, "d", {"a": 1}, 2)
    assert (is_new, is_new_again, again) == (True, False, first)
    for kind, digest in (("step", "other"), ("save", "d")):
        with pytest.raises(NumberTakenError):
            operations.submit(session, kind, 0, digest, {}, 2)  # type: ignore[arg-type]
    with pytest.raises(NumberTooHighError) as refused:
        operations.submit(session, "step", 2, "d", {}, 2)
    assert refused.value.awaited == 1
    submitted(any_catalogue, session, 1)
    with pytest.raises(TooManyQueuedError):
        operations.submit(session, "step", 2, "d", {}, 2)
    assert operations.find(session.id, 0) == first
    with pytest.raises(NotFoundError):
        operations.find(session.id, 2)
    assert any_catalogue.gradient_sessions.find(session.id).next_number == 2


def test_one_number_submitted_by_many_at_once_is_one_operation(any_catalogue: Catalogue) -> None:
    session = opened(any_catalogue, any_catalogue.tenants.create("anna").id)
    found = at_once(lambda _: any_catalogue.gradient_operations.submit(session, "step", 0, "d", {}, 99), 6)
    assert len({operation.id for operation, _ in found}) == 1
    assert sum(is_new for _, is_new in found) == 1


def test_a_sessions_operations_are_carried_out_one_after_another(any_catalogue: Catalogue) -> None:
    session = opened(any_catalogue, any_catalogue.tenants.create("anna").id)
    operations = any_catalogue.gradient_operations
    for number in range(2):
        submitted(any_catalogue, session, number)
    (claimed,) = operations.claim("h", 600, 10)
    assert (claimed.number, claimed.attempt, claimed.request) == (0, 1, {"n": 0})
    assert operations.claim("h", 600, 10) == []
    assert operations.claim("other", 600, 10) == []
    assert operations.succeed(claimed, {"loss": 1.5})
    ended = operations.find(session.id, 0)
    assert (ended.status, ended.result, ended.version, ended.request) == ("succeeded", {"loss": 1.5}, 0, {})
    assert [operation.number for operation in operations.claim("other", 600, 10)] == [1]


def test_an_operation_whose_holder_is_silent_is_begun_anew_and_ends_once(
    any_catalogue: Catalogue, any_database_url: str
) -> None:
    session = opened(any_catalogue, any_catalogue.tenants.create("anna").id)
    operations = any_catalogue.gradient_operations
    submitted(any_catalogue, session, 0)
    (lost,) = operations.claim("dead", 600, 10)
    let_pass(any_database_url, LEASES, 600)
    (taken,) = operations.claim("alive", 600, 10)
    assert (taken.id, taken.attempt) == (lost.id, 2)
    assert operations.renew("dead", [lost.id], 600) == set()
    assert operations.renew("alive", [taken.id, "none"], 600) == {taken.id}
    moved = {"version": 1, "auxiliary_key": "k", "expected_version": 0}
    assert not operations.succeed(lost, {"loss": 0.0}, **moved)
    assert not operations.fail(lost, ERROR)
    assert any_catalogue.gradient_sessions.auxiliary(session.auxiliary_id).version == 0
    assert operations.succeed(taken, {"loss": 1.0}, **moved)
    assert not operations.succeed(taken, {"loss": 2.0})
    assert operations.find(session.id, 0).result == {"loss": 1.0}


def test_a_lease_that_is_renewed_is_not_taken_over(any_catalogue: Catalogue, any_database_url: str) -> None:
    session = opened(any_catalogue, any_catalogue.tenants.create("anna").id)
    submitted(any_catalogue, session, 0)
    operations = any_catalogue.gradient_operations
    (held,) = operations.claim("h", 600, 10)
    let_pass(any_database_url, LEASES, 400)
    assert operations.renew("h", [held.id], 600) == {held.id}
    let_pass(any_database_url, LEASES, 400)
    assert operations.claim("other", 600, 10) == []


def test_what_a_holder_that_stops_gives_back_is_begun_at_once(any_catalogue: Catalogue) -> None:
    session = opened(any_catalogue, any_catalogue.tenants.create("anna").id)
    submitted(any_catalogue, session, 0)
    operations = any_catalogue.gradient_operations
    (given_back,) = operations.claim("h", 600, 10)
    operations.release("another")
    assert operations.claim("next", 600, 10) == []
    operations.release("h")
    assert not operations.succeed(given_back, {})
    (again,) = operations.claim("next", 600, 10)
    assert again.id == given_back.id


def test_the_auxiliary_moves_with_the_operation_or_not_at_all(any_catalogue: Catalogue) -> None:
    session = opened(any_catalogue, any_catalogue.tenants.create("anna").id)
    operations, sessions = any_catalogue.gradient_operations, any_catalogue.gradient_sessions
    submitted(any_catalogue, session, 0)
    (claimed,) = operations.claim("h", 600, 10)
    assert not operations.succeed(claimed, {}, version=6, auxiliary_key="k", expected_version=5)
    assert operations.find(session.id, 0).status == "running"
    assert sessions.auxiliary(session.auxiliary_id).key is None
    assert operations.succeed(claimed, {}, version=1, auxiliary_key="k", expected_version=0)
    present = sessions.auxiliary(session.auxiliary_id)
    assert (present.version, present.key) == (1, "k")
    assert operations.find(session.id, 0).version == sessions.find(session.id).version == 1


def test_a_failed_operation_leaves_the_session_open(any_catalogue: Catalogue) -> None:
    session = opened(any_catalogue, any_catalogue.tenants.create("anna").id)
    operations = any_catalogue.gradient_operations
    submitted(any_catalogue, session, 0)
    (claimed,) = operations.claim("h", 600, 10)
    assert operations.fail(claimed, ERROR)
    assert operations.find(session.id, 0).error == ERROR
    submitted(any_catalogue, session, 1)
    assert [operation.number for operation in operations.claim("h", 600, 10)] == [1]


def test_tenants_take_turns_however_much_one_asks(any_catalogue: Catalogue) -> None:
    busy, quiet = (any_catalogue.tenants.create(name).id for name in ("busy", "quiet"))
    many = [opened(any_catalogue, busy) for _ in range(4)]
    for session in many:
        submitted(any_catalogue, session, 0)
    one = opened(any_catalogue, quiet)
    submitted(any_catalogue, one, 0)
    operations = any_catalogue.gradient_operations
    served = [operation for _ in range(3) for operation in operations.claim("h", 600, 1)]
    assert numbers(served) == [(many[0].id, 0), (one.id, 0), (many[1].id, 0)]
    for operation in served:
        assert operations.succeed(operation, {})
    late = opened(any_catalogue, quiet)
    submitted(any_catalogue, late, 0)
    assert numbers(operations.claim("h", 600, 2)) == [(late.id, 0), (many[2].id, 0)]


def test_many_that_claim_at_once_get_each_operation_once(any_catalogue: Catalogue) -> None:
    tenants = [any_catalogue.tenants.create(name).id for name in ("anna", "bert")]
    sessions = [opened(any_catalogue, tenant) for tenant in tenants for _ in range(4)]
    for session in sessions:
        for number in range(3):
            submitted(any_catalogue, session, number)
    operations, done = any_catalogue.gradient_operations, Counter[tuple[str, int]]()

    def work(worker: int) -> None:
        while claimed := operations.claim(f"h{worker}", 600, 2):
            for operation in claimed:
                assert operations.succeed(operation, {})
                done[operation.session_id, operation.number] += 1

    # One may find nothing to claim while the others hold what comes first; each does so once at the end.
    while sum(done.values()) < 24:
        at_once(work, 3)
    assert set(done.values()) == {1}


def test_sessions_of_a_joint_group_share_one_auxiliary_and_one_worker(any_catalogue: Catalogue) -> None:
    anna, bert = (any_catalogue.tenants.create(name).id for name in ("anna", "bert"))
    joint = {"mode": "joint", "group": "g"}
    first, second = opened(any_catalogue, anna, **joint), opened(any_catalogue, anna, **joint)
    foreign = opened(any_catalogue, bert, **joint)
    assert first.auxiliary_id == second.auxiliary_id != foreign.auxiliary_id
    sessions, operations = any_catalogue.gradient_sessions, any_catalogue.gradient_operations
    assert [session.id for session in sessions.group(anna, "g")] == [first.id, second.id]
    for session in (first, second, foreign):
        submitted(any_catalogue, session, 0)
    (held,) = operations.claim("h", 600, 1)
    assert held.session_id == first.id
    assert numbers(operations.claim("other", 600, 10)) == [(foreign.id, 0)]
    assert numbers(operations.claim("h", 600, 10)) == [(second.id, 0)]


def test_joint_sessions_opened_at_once_share_one_auxiliary(any_catalogue: Catalogue) -> None:
    tenant = any_catalogue.tenants.create("anna").id
    made = at_once(lambda _: opened(any_catalogue, tenant, mode="joint", group="g"), 6)
    assert len({session.id for session in made}) == 6
    assert len({session.auxiliary_id for session in made}) == 1


@pytest.mark.parametrize(
    ("first", "second", "field"),
    [
        ({"mode": "joint"}, {"mode": "collaboration"}, "mode"),
        ({"mode": "joint"}, {"mode": "joint", "auxiliary": {"kind": "linear"}}, "auxiliary"),
        ({"mode": "joint"}, {"mode": "joint", "fit": "server"}, "fit"),
        ({"mode": "collaboration"}, {"mode": "joint"}, "mode"),
    ],
)
def test_a_group_is_of_one_mode(
    any_catalogue: Catalogue, first: dict[str, Any], second: dict[str, Any], field: str
) -> None:
    tenant = any_catalogue.tenants.create("anna").id
    there = opened(any_catalogue, tenant, group="g", **first)
    with pytest.raises(GroupMismatchError) as refused:
        opened(any_catalogue, tenant, group="g", **second)
    assert refused.value.field == field
    any_catalogue.gradient_sessions.close(there.id)
    assert opened(any_catalogue, tenant, group="g", **second).auxiliary_id != there.auxiliary_id


def test_members_of_a_collaboration_have_auxiliaries_of_their_own(any_catalogue: Catalogue) -> None:
    tenant = any_catalogue.tenants.create("anna").id
    shape = {"mode": "collaboration", "group": "g"}
    made = [
        opened(any_catalogue, tenant, **shape),
        opened(any_catalogue, tenant, **shape, auxiliary={"kind": "linear"}),
    ]
    assert len({session.auxiliary_id for session in made}) == 2


def test_versions_that_are_gone_or_will_not_come_are_refused(any_catalogue: Catalogue) -> None:
    session = opened(any_catalogue, any_catalogue.tenants.create("anna").id)
    operations = any_catalogue.gradient_operations
    with pytest.raises(VersionError) as refused:
        operations.submit(session, "load", 0, "d", {}, 99, version=1)
    assert refused.value.present == 0
    submitted(any_catalogue, session, 0, "load", version=0)
    # The load that waits will bring it to version 1.
    submitted(any_catalogue, session, 1, "load", version=1)
    with pytest.raises(VersionError):
        operations.submit(session, "load", 2, "d", {}, 99, version=3)
    (claimed,) = operations.claim("h", 600, 10)
    assert operations.succeed(claimed, {}, version=1, auxiliary_key="k", expected_version=0)
    with pytest.raises(VersionError):
        operations.submit(session, "load", 2, "d", {}, 99, version=0)


def test_closing_ends_what_is_under_way(any_catalogue: Catalogue) -> None:
    session = opened(any_catalogue, any_catalogue.tenants.create("anna").id)
    sessions, operations = any_catalogue.gradient_sessions, any_catalogue.gradient_operations
    first = submitted(any_catalogue, session, 0)
    submitted(any_catalogue, session, 1)
    (claimed,) = operations.claim("h", 600, 10)
    closed = sessions.close(session.id)
    assert (closed.status, sessions.close(session.id)) == ("closed", closed)
    assert not operations.succeed(claimed, {})
    for number in range(2):
        ended = operations.find(session.id, number)
        assert (ended.status, ended.error and ended.error["code"]) == ("failed", "session_closed")
    assert operations.claim("h", 600, 10) == []
    with pytest.raises(SessionClosedError):
        operations.submit(session, "step", 2, "d", {}, 99)
    again, is_new = operations.submit(session, "forward_backward", 0, "0", {}, 99)
    assert (again.id, is_new) == (first.id, False)


def test_sessions_of_which_nothing_is_asked_expire(timed: Catalogue, clock: Clock) -> None:
    tenant = timed.tenants.create("anna").id
    sessions, operations = timed.gradient_sessions, timed.gradient_operations
    idle, used, busy = (opened(timed, tenant) for _ in range(3))
    clock.now += 1800
    submitted(timed, used, 0)
    (claimed,) = operations.claim("h", 600, 10)
    assert operations.succeed(claimed, {})
    submitted(timed, busy, 0)
    assert sessions.expire_idle() == []
    clock.now += 1800
    assert [session.id for session in sessions.expire_idle()] == [idle.id]
    clock.now += 10_000
    # Whose operation waits is not closed for it.
    assert [session.id for session in sessions.expire_idle()] == [used.id]
    assert sessions.find(busy.id).status == "open"
    assert [line.action for line in timed.audit.list().items] == ["cola.expire"] * 2


def test_closed_sessions_are_cleaned_once(any_catalogue: Catalogue) -> None:
    tenant = any_catalogue.tenants.create("anna").id
    sessions, operations = any_catalogue.gradient_sessions, any_catalogue.gradient_operations
    session = opened(any_catalogue, tenant)
    opened(any_catalogue, tenant)
    submitted(any_catalogue, session, 0)
    sessions.cleaned(session.id)
    assert sessions.uncleaned() == [] and operations.find(session.id, 0)
    sessions.close(session.id)
    assert [one.id for one in sessions.uncleaned()] == [session.id]
    sessions.cleaned(session.id)
    assert sessions.uncleaned() == []
    with pytest.raises(NotFoundError):
        operations.find(session.id, 0)
    assert [one.status for one in sessions.list(tenant).items] == ["open", "closed"]


def test_gradients_go_when_the_next_but_one_is_there(any_catalogue: Catalogue) -> None:
    session = opened(any_catalogue, any_catalogue.tenants.create("anna").id)
    operations = any_catalogue.gradient_operations
    gone: list[int] = []
    for number, kind in enumerate(["forward_backward", "load", "forward_backward", "forward_backward", "step"]):
        submitted(any_catalogue, session, number, kind)
        (claimed,) = operations.claim("h", 600, 10)
        assert operations.succeed(claimed, {})
        gone += [operation.number for operation in operations.old_gradients(session.id, number)]
        assert gone == ([0] if number >= 3 else [])
    assert operations.find(session.id, 0).dropped_at is not None
    assert operations.find(session.id, 2).dropped_at is None


def test_an_operation_tells_what_is_before_it(any_catalogue: Catalogue) -> None:
    anna, bert = (any_catalogue.tenants.create(name).id for name in ("anna", "bert"))
    first, second = opened(any_catalogue, anna), opened(any_catalogue, bert)
    operations = any_catalogue.gradient_operations
    submitted(any_catalogue, first, 0, rows=3)
    submitted(any_catalogue, second, 0, rows=4)
    last = submitted(any_catalogue, first, 1, rows=5)
    queue = operations.ahead(last)
    assert (queue.ahead, queue.rows, queue.position) == (2, 7, 2)
    for claimed in operations.claim("h", 600, 10):
        assert operations.succeed(claimed, {})
    queue = operations.ahead(last)
    assert (queue.ahead, queue.rows, queue.position) == (0, 0, 1)


def test_sessions_of_others_and_of_nobody_are_the_same_answer(any_catalogue: Catalogue) -> None:
    anna, bert = (any_catalogue.tenants.create(name).id for name in ("anna", "bert"))
    mine = opened(any_catalogue, anna)
    sessions = any_catalogue.gradient_sessions
    assert sessions.find(mine.id, anna) == sessions.find(mine.id) == mine
    for session_id, tenant in ((mine.id, bert), ("cola-none", anna), ("cola-\x00\ud800", anna)):
        with pytest.raises(NotFoundError):
            sessions.find(session_id, tenant)
    assert sessions.list(bert).items == []
    with pytest.raises(NotFoundError):
        sessions.list(bert, after=mine.id)


def test_open_sessions_are_counted(any_catalogue: Catalogue) -> None:
    tenant, sessions = any_catalogue.tenants.create("anna").id, any_catalogue.gradient_sessions
    made = at_once(lambda _: sessions.create(tenant, model="m", settings=SETTINGS, idle_s=60, most_open=2), 5)
    there = [session for session in made if session is not None]
    assert len(there) == 2
    sessions.close(there[0].id)
    again = sessions.create(tenant, model="m", settings=SETTINGS, idle_s=60, most_open=2, session_id="cola-x")
    assert again is not None
    assert sessions.create(tenant, model="m", settings=SETTINGS, idle_s=60, most_open=2, session_id="cola-x") == again
