"""The database: tables, listings, and what happens when many write at once, on SQLite and on PostgreSQL."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext

from ot_ray.artifacts.manifest import NAME_PATTERN
from ot_ray.config import parse
from ot_ray.errors import AlreadyExistsError, ConfigError, NotFoundError
from serve.catalogue import Catalogue, DatabaseConfig, TenantLimits, tenants
from serve.catalogue.idempotency import Begun, Busy
from serve.catalogue.records import Job
from serve.catalogue.schema import metadata
from serve.failures import DatabaseUnavailableError
from tests.fixtures.postgres import PostgresServer
from tests.service.database_time import let_pass

T = TypeVar("T")
TOGETHER = 8
HOSTILE = [
    "",
    "'; DROP TABLE jobs; --",
    "ftjob-\x00",
    "ftjob-\ud800",
    "x" * 100_000,
    "../../etc/passwd",
    "%",
    "\u202eid",
]


class Clock:
    """A time that tests move."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def timed(any_database_url: str, clock: Clock) -> Iterator[Catalogue]:
    """An empty database whose time stands still until a test moves it."""
    opened = Catalogue.open(DatabaseConfig(url=any_database_url, wait_s=120), clock)
    yield opened
    opened.close()


def new_job(catalogue: Catalogue, tenant_id: str, **fields: object) -> Job:
    """A job of a tenant, with whatever its columns need."""
    values = {
        "model": "tiny",
        "bundle": {"model": "tiny", "version": "1", "bundle_id": "tiny-1"},
        "training_file": "file-1",
        "seed": 1,
        "method": {"type": "supervised"},
        "hyperparameters": {"n_epochs": "auto"},
    }
    job = catalogue.jobs.create(tenant_id, **{**values, **fields})  # type: ignore[arg-type]
    assert job is not None
    return job


def at_once(work: Callable[[int], T], count: int = TOGETHER) -> list[T]:
    """What `work(0)`, `work(1)`... give, begun by as many threads at the same moment."""
    barrier = threading.Barrier(count)

    def run(number: int) -> T:
        barrier.wait()
        return work(number)

    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(run, range(count)))


def processes(url: str, statement: str, count: int = 2) -> None:
    """Run a statement over `catalogue` in several processes at once; each must end well."""
    script = (
        f"import sys\nfrom serve.catalogue import Catalogue\ncatalogue = Catalogue.open(sys.argv[1])\n{statement}\n"
    )
    running = [subprocess.Popen([sys.executable, "-c", script, url], stderr=subprocess.PIPE) for _ in range(count)]
    for process in running:
        _, error = process.communicate(timeout=240)
        assert process.returncode == 0, error.decode()


def tables_of(url: str) -> sa.Engine:
    return sa.create_engine(url.replace("postgresql://", "postgresql+psycopg://"))


def test_migrated_tables_are_those_of_the_code(bare_database_url: str) -> None:
    catalogue = Catalogue.open(bare_database_url)
    catalogue.migrate()
    catalogue.migrate()
    catalogue.close()
    engine = tables_of(bare_database_url)
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
        assert compare_metadata(context, metadata) == []
        found = sa.inspect(connection)
        for table in metadata.sorted_tables:
            indexes = [index for index in found.get_indexes(table.name) if not index.get("duplicates_constraint")]
            assert {index["name"] for index in indexes} == {index.name for index in table.indexes}
    engine.dispose()


def test_several_processes_migrate_one_empty_database(bare_database_url: str) -> None:
    processes(bare_database_url, "catalogue.migrate()", count=3)
    catalogue = Catalogue.open(bare_database_url)
    assert catalogue.tenants.list() == []
    catalogue.close()


def test_a_database_of_newer_code_is_refused(any_database_url: str) -> None:
    engine = tables_of(any_database_url)
    with engine.begin() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    engine.dispose()
    catalogue = Catalogue.open(any_database_url)
    for act in (catalogue.migrate, catalogue.prepare):
        with pytest.raises(ConfigError, match=r"'9999'.*newer code"):
            act()
    catalogue.close()


def test_prepare_makes_the_tables_of_an_empty_database(bare_database_url: str) -> None:
    catalogue = Catalogue.open(bare_database_url)
    catalogue.prepare()
    catalogue.prepare()
    assert catalogue.tenants.list() == []
    catalogue.close()


def test_the_audit_log_can_only_be_added_to(any_catalogue: Catalogue, any_database_url: str) -> None:
    any_catalogue.audit.add("key.create", "key_1", tenant_id="ten_1", scopes=["files"])
    engine = tables_of(any_database_url)
    for statement in ("UPDATE audit SET target = 'x'", "DELETE FROM audit"):
        with pytest.raises(sa.exc.DatabaseError, match="only added to"), engine.begin() as connection:
            connection.execute(sa.text(statement))
    engine.dispose()
    (line,) = any_catalogue.audit.list().items
    assert (line.action, line.target, line.detail, line.outcome) == ("key.create", "key_1", {"scopes": ["files"]}, "ok")


def test_the_audit_log_is_read_in_pages_and_walked_whole(
    any_catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.catalogue.audit._BATCH", 4)
    for number in range(10):
        any_catalogue.audit.add("a" if number % 2 else "b", str(number), tenant_id="ten_1")
    first = any_catalogue.audit.list(limit=4)
    assert [line.target for line in first.items] == ["9", "8", "7", "6"] and first.has_more
    rest = any_catalogue.audit.list(after=first.items[-1].seq, limit=6)
    assert [line.target for line in rest.items] == ["5", "4", "3", "2", "1", "0"] and not rest.has_more
    assert [line.target for line in any_catalogue.audit.walk()] == [str(number) for number in range(10)]
    assert [line.target for line in any_catalogue.audit.walk(action="a")] == ["1", "3", "5", "7", "9"]
    assert list(any_catalogue.audit.walk(tenant_id="ten_2")) == []
    with pytest.raises(NotFoundError, match="999"):
        any_catalogue.audit.list(after=999)


def test_names_of_tenants_are_names_and_taken_once(any_catalogue: Catalogue) -> None:
    tenant = any_catalogue.tenants.create("anna", TenantLimits(running_jobs=3))
    assert any_catalogue.tenants.named("anna") == any_catalogue.tenants.get(tenant.id) == tenant
    with pytest.raises(AlreadyExistsError, match="anna"):
        any_catalogue.tenants.create("anna")
    for name in ("", "a b", "../x", "a:b", "é", "a" * 65, "-a", "a\n", "a\x00"):
        with pytest.raises(ConfigError, match="no name"):
            any_catalogue.tenants.create(name)
    assert tenants.NAME_PATTERN == NAME_PATTERN
    assert at_once(lambda _: _outcome(lambda: any_catalogue.tenants.create("bea"))).count("ok") == 1


def test_limits_change_one_by_one(any_catalogue: Catalogue) -> None:
    tenant = any_catalogue.tenants.create("anna")
    changed = any_catalogue.tenants.change_limits(tenant.id, {"queued_jobs": 0})
    assert changed.limits == TenantLimits(queued_jobs=0)
    with pytest.raises(ConfigError, match="did you mean queued_jobs"):
        any_catalogue.tenants.change_limits(tenant.id, {"queue_jobs": 1})
    with pytest.raises(ConfigError, match="running_jobs is -1"):
        any_catalogue.tenants.change_limits(tenant.id, {"running_jobs": -1})
    with pytest.raises(NotFoundError):
        any_catalogue.tenants.change_limits("ten_x", {"running_jobs": 1})
    assert any_catalogue.tenants.get(tenant.id) == changed


def test_listings_page_through_rows_of_one_second(timed: Catalogue) -> None:
    tenant, other = timed.tenants.create("anna"), timed.tenants.create("bea")
    made = [new_job(timed, tenant.id).id for _ in range(7)]
    foreign = new_job(timed, other.id)
    seen, after = [], None
    while True:
        page = timed.jobs.list(tenant.id, after=after, limit=3)
        seen += [job.id for job in page.items]
        if not page.has_more:
            break
        after = seen[-1]
    assert seen == made[::-1]
    for unknown in (foreign.id, "ftjob-unknown", *HOSTILE):
        with pytest.raises(NotFoundError):
            timed.jobs.list(tenant.id, after=unknown)


def test_listings_go_by_time_first(timed: Catalogue, clock: Clock) -> None:
    tenant = timed.tenants.create("anna")
    names = []
    for seconds in (0, 10, -5):
        clock.now += seconds
        file = timed.files.create(tenant.id, filename=f"{seconds}", bytes=1, sha256="0", purpose="fine-tune")
        assert file is not None
        names.append(file.filename)
    newest_first = [file.filename for file in timed.files.list(tenant.id).items]
    assert newest_first == ["10", "-5", "0"]
    oldest_first = timed.files.list(tenant.id, order="asc", limit=2)
    assert [file.filename for file in oldest_first.items] == ["0", "-5"]
    rest = timed.files.list(tenant.id, order="asc", after=oldest_first.items[-1].id)
    assert [file.filename for file in rest.items] == ["10"]


def test_ids_of_others_and_of_nobody_are_the_same_answer(any_catalogue: Catalogue) -> None:
    anna, bea = any_catalogue.tenants.create("anna"), any_catalogue.tenants.create("bea")
    job = new_job(any_catalogue, anna.id)
    assert any_catalogue.jobs.get(anna.id, job.id) == job
    for job_id in (job.id, "ftjob-unknown", *HOSTILE):
        with pytest.raises(NotFoundError):
            any_catalogue.jobs.get(bea.id, job_id)
        with pytest.raises(NotFoundError):
            any_catalogue.events.list(bea.id, job_id)
        with pytest.raises(NotFoundError):
            any_catalogue.checkpoints.list(bea.id, job_id)
        with pytest.raises(NotFoundError):
            any_catalogue.files.get(bea.id, job_id)
        assert any_catalogue.keys.authenticate(job_id) is None


def test_text_of_any_kind_is_stored(any_catalogue: Catalogue) -> None:
    tenant = any_catalogue.tenants.create("anna")
    for name in HOSTILE:
        file = any_catalogue.files.create(tenant.id, filename=name, bytes=1, sha256="0", purpose="fine-tune")
        assert file is not None
        stored = any_catalogue.files.get(tenant.id, file.id).filename
        assert stored == name.replace("\x00", "\ufffd").replace("\ud800", "\ufffd")
    job = new_job(any_catalogue, tenant.id, metadata={"a\x00": "\ud800", 'q"': "'"}, suffix="\x00")
    assert any_catalogue.jobs.get(tenant.id, job.id).metadata == {"a\x00": "\ud800", 'q"': "'"}
    assert [found.id for found in any_catalogue.jobs.list(tenant.id, metadata={'q"': "'"}).items] == [job.id]
    assert any_catalogue.jobs.list(tenant.id, metadata={'q"': "x"}).items == []


def test_a_status_changes_once_however_many_try(any_catalogue: Catalogue) -> None:
    tenant = any_catalogue.tenants.create("anna")
    for event in ("fine_tuning.job.succeeded", "fine_tuning.job.failed"):
        any_catalogue.webhooks.create(tenant.id, "https://a.example/hook", [event])
    job = new_job(any_catalogue, tenant.id)
    assert any_catalogue.jobs.move(job.id, {"validating_files"}, "running", event="begun", stage="training")
    ended = at_once(
        lambda number: any_catalogue.jobs.move(
            job.id,
            {"running"},
            "failed" if number % 2 else "succeeded",
            event=f"ended {number}",
            deliver="fine_tuning.job.failed" if number % 2 else "fine_tuning.job.succeeded",
        )
    )
    assert ended.count(True) == 1
    winner = ended.index(True)
    found = any_catalogue.jobs.get(tenant.id, job.id)
    assert found.status == ("failed" if winner % 2 else "succeeded") and found.finished_at and found.stage is None
    messages = [event.message for event in any_catalogue.events.all(job.id)]
    assert messages == [f"Created fine-tuning job: {job.id}", "begun", f"ended {winner}"]
    (delivery,) = any_catalogue.webhooks.deliveries(tenant.id)
    assert delivery.type == f"fine_tuning.job.{found.status}" and delivery.payload["data"] == {"id": job.id}
    for status in ("succeeded", "failed", "cancelled"):
        assert not any_catalogue.jobs.move(job.id, {status, "running"}, "queued", event="again")
    assert not any_catalogue.jobs.note(job.id, trained_tokens=1)


def test_threads_and_processes_lose_no_event_and_no_count(any_catalogue: Catalogue, any_database_url: str) -> None:
    tenant_id = any_catalogue.tenants.create("anna").id
    job = new_job(any_catalogue, tenant_id)
    taken = at_once(lambda number: any_catalogue.events.add(job.id, f"step {number % 4}", source_key=f"{number % 4}"))
    assert taken.count(True) == 4
    at_once(lambda _: any_catalogue.counts.take_tokens(tenant_id, 3, 10**9))
    add, count = f"catalogue.events.add({job.id!r}, 'x')", f"catalogue.counts.take_tokens({tenant_id!r}, 3, 10**9)"
    processes(any_database_url, f"for _ in range(20):\n    {add}\n    {count}")
    events = any_catalogue.events.all(job.id)
    assert [event.seq for event in events] == list(range(1, 1 + 4 + 40 + 1))
    engine = tables_of(any_database_url)
    with engine.connect() as connection:  # of all days, since one may end during the test
        assert connection.execute(sa.text("SELECT SUM(tokens) FROM token_counts")).scalar_one() == 3 * (40 + TOGETHER)
    engine.dispose()


def test_checkpoints_of_a_step_are_noted_once(any_catalogue: Catalogue) -> None:
    tenant = any_catalogue.tenants.create("anna")
    job = new_job(any_catalogue, tenant.id)
    values: dict[str, Any] = {"metrics": {"train_loss": 1.5}, "fine_tuned_model_checkpoint": "ft:tiny:anna:x:1"}
    for step in (10, 20, 30):
        added = at_once(
            lambda _, step=step: any_catalogue.checkpoints.add(tenant.id, job.id, step_number=step, **values)
        )
        assert added.count(True) == 1
    page = any_catalogue.checkpoints.list(tenant.id, job.id, limit=2)
    assert [item.step_number for item in page.items] == [30, 20] and page.has_more
    rest = any_catalogue.checkpoints.list(tenant.id, job.id, after=page.items[-1].id)
    assert [item.step_number for item in rest.items] == [10] and rest.items[0].metrics == {"train_loss": 1.5}


def test_quotas_hold_for_requests_at_the_same_time(any_catalogue: Catalogue) -> None:
    tenant = any_catalogue.tenants.create("anna")
    file = {"filename": "a", "sha256": "0", "purpose": "fine-tune"}
    added = at_once(lambda _: any_catalogue.files.create(tenant.id, bytes=10, most_bytes=35, **file))  # type: ignore[arg-type]
    assert sum(item is not None for item in added) == 3 and any_catalogue.files.kept_bytes(tenant.id) == 30

    def job(_: int) -> bool:
        try:
            new_job(any_catalogue, tenant.id, most_waiting=5)
        except AssertionError:
            return False
        return True

    assert at_once(job).count(True) == 5 and len(any_catalogue.jobs.with_status("validating_files")) == 5


def test_rows_with_an_id_of_the_callers_are_made_once(any_catalogue: Catalogue) -> None:
    tenant = any_catalogue.tenants.create("anna")
    jobs = at_once(lambda _: new_job(any_catalogue, tenant.id, job_id="ftjob-1", most_waiting=1))
    assert all(job == jobs[0] for job in jobs) and len(any_catalogue.events.all("ftjob-1")) == 1


def test_a_days_tokens_are_never_overdrawn(timed: Catalogue, clock: Clock) -> None:
    tenant = timed.tenants.create("anna")
    taken = at_once(lambda _: timed.counts.take_tokens(tenant.id, 30, 100))
    assert taken.count(True) == 3
    left, seconds = timed.counts.tokens_left(tenant.id, 100)
    assert left == 10 and 0 < seconds <= 86400
    assert not timed.counts.take_tokens(tenant.id, 500, 100)
    clock.now += seconds
    assert timed.counts.take_tokens(tenant.id, 500, 100), "a job larger than a day's share has a day to itself"
    assert not timed.counts.take_tokens(tenant.id, 1, 100)


def test_a_lease_has_one_holder(any_catalogue: Catalogue, any_database_url: str) -> None:
    leases = any_catalogue.leases
    took = at_once(lambda number: leases.take("controller", f"c{number}", 600))
    assert took.count(True) == 1
    holder, other = f"c{took.index(True)}", f"c{took.index(False)}"
    let_pass(any_database_url, "leases.expires_at", 400)
    assert leases.take("controller", holder, 600) and not leases.take("controller", other, 600)
    let_pass(any_database_url, "leases.expires_at", 400)
    assert not leases.take("controller", other, 600), "the second taking made it last longer"
    let_pass(any_database_url, "leases.expires_at", 200)
    assert leases.take("controller", other, 600) and not leases.take("controller", holder, 600)
    leases.release("controller", holder)
    assert not leases.take("controller", holder, 600)
    leases.release("controller", other)
    assert leases.take("controller", holder, 600)


def test_machines_whose_clocks_differ_agree_on_what_is_held(timed: Catalogue, any_database_url: str) -> None:
    tenant_id = timed.tenants.create("anna").id
    assert timed.leases.take("controller", "one", 600)
    begun = timed.idempotency.begin(tenant_id, "k", "print", stale_s=600)
    assert isinstance(begun, Begun)
    for hours in (-10_000, 10):
        other = Catalogue.open(any_database_url, lambda hours=hours: time.time() + 3600 * hours)
        assert not other.leases.take("controller", "other", 600)
        assert isinstance(other.idempotency.begin(tenant_id, "k", "print", stale_s=600), Busy)
        other.close()
    assert timed.leases.take("controller", "one", 600)


def test_expired_and_deleted_files_are_in_no_answer(timed: Catalogue, clock: Clock) -> None:
    tenant = timed.tenants.create("anna")
    values = {"filename": "a", "bytes": 5, "sha256": "0", "purpose": "fine-tune"}
    lasting = timed.files.create(tenant.id, **values)  # type: ignore[arg-type]
    ending = timed.files.create(tenant.id, expires_at=int(clock.now) + 10, **values)  # type: ignore[arg-type]
    assert lasting is not None and ending is not None and timed.files.expired() == []
    clock.now += 10
    assert [file.id for file in timed.files.expired()] == [ending.id]
    with pytest.raises(NotFoundError):
        timed.files.get(tenant.id, ending.id)
    assert timed.files.kept_bytes(tenant.id) == 5
    timed.files.forget(ending.id)
    assert timed.files.expired() == []
    timed.files.delete(tenant.id, lasting.id)
    with pytest.raises(NotFoundError):
        timed.files.delete(tenant.id, lasting.id)
    assert timed.files.list(tenant.id).items == []


def test_a_verdict_on_an_adapter_stays(any_catalogue: Catalogue) -> None:
    tenant = any_catalogue.tenants.create("anna")
    made = any_catalogue.adapters.create(tenant.id, bundle={"model": "tiny"}, suffix="x", files=[], bytes=0)
    assert made is not None and made.state == "receiving"
    assert any_catalogue.adapters.move(made.id, {"receiving"}, "received")
    verdicts = at_once(
        lambda number: any_catalogue.adapters.move(
            made.id, {"received"}, "rejected" if number % 2 else "accepted", reasons=[str(number)]
        )
    )
    (kept,) = [item for item in verdicts if item is not None]
    assert any_catalogue.adapters.get(tenant.id, made.id) == kept and kept.finished_at is not None
    assert any_catalogue.adapters.move(made.id, {"accepted", "rejected"}, "received") is None


def test_sqlite_that_stays_locked_is_told(sqlite_url: str) -> None:
    catalogue = Catalogue.open(DatabaseConfig(url=sqlite_url, wait_s=0.1))
    holder = sqlite3.connect(sqlite_url.removeprefix("sqlite:///"), isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    with pytest.raises(DatabaseUnavailableError, match="does not answer"):
        catalogue.tenants.create("anna")
    assert catalogue.tenants.list() == [], "readers go on"
    holder.execute("ROLLBACK")
    holder.close()
    catalogue.tenants.create("anna")
    catalogue.close()


def test_the_sqlite_file_is_its_owners_alone(tmp_path: Path) -> None:
    catalogue = Catalogue.open(f"sqlite:///{tmp_path / 'new' / 'service.db'}")
    catalogue.migrate()
    modes = {path.name: oct(path.stat().st_mode & 0o777) for path in (tmp_path / "new").iterdir()}
    assert len(modes) == 3 and set(modes.values()) == {"0o600"}, modes
    catalogue.close()
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be opened"):
        Catalogue.open(f"sqlite:///{tmp_path / 'file' / 'service.db'}")


def test_connections_are_made_anew_after_the_server_was_killed(own_postgres: PostgresServer) -> None:
    catalogue = Catalogue.open(own_postgres.url())
    catalogue.migrate()
    tenant = catalogue.tenants.create("anna")
    own_postgres.kill()
    with pytest.raises(DatabaseUnavailableError):
        catalogue.tenants.get(tenant.id)
    with pytest.raises(DatabaseUnavailableError):
        catalogue.tenants.create("bea")
    own_postgres.start()
    assert catalogue.tenants.list() == [tenant], "what was committed is there"
    own_postgres.restart()
    assert catalogue.tenants.create("bea").name == "bea"
    catalogue.close()


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("postgresql://u:hunter2@host/db", "PGPASSWORD"),
        ("postgresql://u@host/db?password=hunter2", "PGPASSWORD"),
        ("sqlite://", "names no file"),
        ("sqlite:///:memory:", "names no file"),
        ("mysql://u@host/db", "does not know"),
        ("hunter2", "no address"),
    ],
)
def test_addresses_that_are_refused_do_not_show_passwords(url: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason) as refused:
        parse(DatabaseConfig, {"url": url}, "service.yaml")
    assert "hunter2" not in str(refused.value)


def _outcome(act: Callable[[], object]) -> str:
    try:
        act()
    except AlreadyExistsError:
        return "there"
    return "ok"
