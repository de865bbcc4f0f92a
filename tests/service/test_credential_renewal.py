"""A job's credentials live for minutes and are renewed while it is wanted; a gate enforces what they allow."""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from ot_ray.artifacts import InspectionLimits
from ot_ray.errors import ConfigError, CredentialsExpiredError, StoreError, StoreUnavailableError
from ot_ray.launch import ProcessLauncher
from ot_ray.store import LocalStore, PatientStore, S3Address, S3Store, Store, renewed, scoped
from serve.catalogue import Catalogue
from serve.catalogue.records import Job
from serve.catalogue.runs import Line
from serve.controller.credentials import Renewals, credentials_key, first_use_s, lend, write_credentials
from serve.controller.desk import Desk
from serve.controller.starting import launch
from serve.settings.jobs import JobsConfig
from tests.http.tiny_service import BASE
from tests.service.iam_gate import IamGate, Lent
from tests.service.job_samples import a_job

SETTINGS = JobsConfig(role_arn="arn:aws:iam::123456789012:role/jobs", time_limit_s=7 * 24 * 3600)
_PATIENCE_S = 120.0
_MIB = 2**20


@pytest.fixture
def gate(s3_server: str) -> Iterator[IamGate]:
    gate = IamGate(s3_server)
    # A look at the next credentials every fifth of a second.
    gate.life_s = 3.0
    yield gate
    gate.close()


@pytest.fixture
def store(gate: IamGate, s3_url: str) -> S3Store:
    """The service's own way to the store."""
    options = f"endpoint_url={quote(gate.url, safe='')}&part_size={5 * _MIB}&base_delay=0.01&attempts=3"
    return S3Store(S3Address.parse(f"{S3Address.parse(s3_url).place}?{options}"))


class Visitor:
    """A job's way to the store."""

    def __init__(self, gate: IamGate, store: S3Store, job: Job, folder: Path) -> None:
        self.path = folder / f"{job.id}.json"
        write_credentials(store, job, SETTINGS, self.path)
        self.store = S3Store(store.address.model_copy(update={"credentials": str(self.path)}))
        self.own = scoped(self.store, f"jobs/{job.id}")
        self.file = self.store.credentials
        assert self.file is not None
        self.gate, self.job, self.owner = gate, job, store

    @property
    def key_id(self) -> str:
        assert self.file is not None
        return self.file.key_id()

    def renew(self) -> None:
        """Give it new credentials, wait until they lie in its file, and end the old ones."""
        old = self.gate.session(self.key_id)
        assert old is not None
        new = lend(self.owner, self.job, SETTINGS)
        until(lambda: self.key_id == new.access_key_id)
        old.over = True

    def end(self) -> None:
        """End what it has, and give it no more."""
        old = self.gate.session(self.key_id)
        assert old is not None
        old.over = True


@pytest.fixture
def visitor(gate: IamGate, store: S3Store, tmp_path: Path) -> Visitor:
    return Visitor(gate, store, a_job(), tmp_path)


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


def test_what_ends_is_followed_by_the_next(visitor: Visitor, gate: IamGate) -> None:
    used = []
    with renewed(PatientStore(visitor.own, 1.0)):
        for number in range(3):
            visitor.own.write(f"events/{number}.json", b"%d" % number)
            used.append(visitor.key_id)
            visitor.renew()
            # Every kind of request, at once.
            assert visitor.own.read(f"events/{number}.json") == b"%d" % number
            assert visitor.own.info(f"events/{number}.json").size == 1
            assert len([*visitor.own.list("events")]) == number + 1
    assert len(set(used)) == 3
    assert {lent.seconds for lent in gate.lent} == {900}
    assert not [passed for passed in gate.seen if passed.status >= 400]
    until(lambda: "credentials" not in {thread.name for thread in threading.enumerate()})


def test_in_the_middle_of_an_upload_in_parts(visitor: Visitor, gate: IamGate, tmp_path: Path) -> None:
    """A part that was signed with credentials that have ended meanwhile is signed anew."""

    def before(key_id: str, method: str, path: str) -> int | None:
        if "partNumber=2" in path and key_id == first:
            visitor.renew()
        return None

    data = bytes(range(256)) * (11 * 4 * 1024)
    (tmp_path / "big").write_bytes(data)
    with renewed(visitor.own):
        first, gate.before = visitor.key_id, before
        visitor.own.upload(tmp_path / "big", "output/adapter/adapter.safetensors")
        assert visitor.key_id != first
        assert visitor.own.read("output/adapter/adapter.safetensors") == data
    refused = [passed for passed in gate.seen if passed.status >= 400]
    assert len(refused) == 1 and "partNumber=2" in refused[0].path and refused[0].key_id == first


def test_a_store_that_is_away_is_looked_at_again(visitor: Visitor, gate: IamGate) -> None:
    def before(key_id: str, method: str, path: str) -> int | None:
        if "/credentials/" in path and looks:
            looks.pop()
            return 503
        return None

    looks = [1, 2, 3]
    gate.before = before
    with renewed(visitor.own):
        until(lambda: not looks)
        visitor.renew()
        visitor.own.write("events/1.json", b"1")


def test_a_job_whose_credentials_ran_out_ends_at_once(visitor: Visitor, tmp_path: Path) -> None:
    """However patient its store is, and whatever the request: the answer to a HEAD has no words."""
    (tmp_path / "big").write_bytes(bytes(6 * _MIB))
    (tmp_path / "small").write_bytes(b"1")
    visitor.own.write("events/1.json", b"1")
    patient: Store = PatientStore(visitor.own, 3600.0)
    calls: list[Callable[[], object]] = [
        lambda: patient.read("events/1.json"),
        lambda: patient.info("events/1.json"),
        lambda: patient.exists("events/1.json"),
        lambda: patient.write("events/2.json", b"2"),
        lambda: patient.create("events/2.json", b"2"),
        lambda: patient.upload(tmp_path / "small", "output/small"),
        lambda: patient.upload(tmp_path / "big", "output/big"),
        lambda: patient.download("events/1.json", tmp_path / "copy"),
        lambda: [*patient.list("events")],
        lambda: patient.delete("checkpoints/1"),
    ]
    assert visitor.file is not None
    lent = visitor.file.current()
    with renewed(visitor.own):
        visitor.end()
        for call in calls:
            with pytest.raises(CredentialsExpiredError, match="not renewed in time") as caught:
                call()
            assert isinstance(caught.value, OSError)
            assert lent.secret_access_key not in str(caught.value)
            assert lent.session_token not in str(caught.value)


def test_a_job_cannot_get_at_what_others_are_lent(
    visitor: Visitor, gate: IamGate, store: S3Store, tmp_path: Path
) -> None:
    other = Visitor(gate, store, a_job(id="ftjob-89abcdef0123456789abcdef"), tmp_path)
    theirs, mine = credentials_key(other.job), credentials_key(visitor.job)
    store.write("credentials/1.json", b"of the service")
    assert visitor.store.read(mine) == store.read(mine)
    attempts: list[Callable[[], object]] = [
        lambda: visitor.store.read(theirs),
        lambda: visitor.store.info(theirs),
        lambda: [*visitor.store.list(f"jobs/{other.job.id}")],
        lambda: [*visitor.store.list("jobs")],
        lambda: [*visitor.store.list()],
        lambda: visitor.store.read("credentials/1.json"),
        # Nor can it say what it, or its next run, will be lent.
        lambda: visitor.store.write(mine, b"x"),
        lambda: visitor.store.create(f"jobs/{visitor.job.id}/credentials/2.json", b"x"),
        lambda: visitor.store.delete(mine),
        lambda: visitor.store.delete_prefix(f"jobs/{visitor.job.id}/credentials"),
        # With its own credentials it makes no others.
        lambda: lend(visitor.store, visitor.job, SETTINGS),
    ]
    for attempt in attempts:
        with pytest.raises(StoreError, match="denied") as caught:
            attempt()
        assert not isinstance(caught.value, CredentialsExpiredError | StoreUnavailableError)
    assert visitor.store.read(mine) == store.read(mine)


@pytest.mark.parametrize("ahead_s", [-600.0, 600.0])
def test_clocks_that_differ_by_minutes(visitor: Visitor, gate: IamGate, store: S3Store, ahead_s: float) -> None:
    gate.life_s, gate.ahead_s = 900.0, ahead_s
    for _ in range(2):
        given = lend(store, visitor.job, SETTINGS)
        # The token service's clock shows whole seconds.
        assert 899 <= given.lasts_s <= 901
        assert abs(given.expires_at - time.time() - 900 - ahead_s) < _PATIENCE_S


class Rounds:
    """Running jobs of a real database, and renewals whose clock the test moves."""

    def __init__(self, catalogue: Catalogue, store: Store, gate: IamGate) -> None:
        self.catalogue, self.store, self.gate, self.now = catalogue, store, gate, 1000.0
        self.tenant = catalogue.tenants.create("anna")
        self.renewals = self.begin()

    def begin(self) -> Renewals:
        return Renewals(self.catalogue, self.store, SETTINGS, lambda: self.now)

    def job(self, model: str = BASE) -> Job:
        job = self.catalogue.jobs.create(
            self.tenant.id,
            model=model,
            bundle={"model": model, "version": "1", "bundle_id": "one"},
            training_file="file-1",
            seed=1,
            method={},
            hyperparameters={},
        )
        assert job is not None
        self.catalogue.jobs.move(job.id, {"validating_files"}, "queued", event="queued")
        assert self.catalogue.runs.begin(job, job.id, "begun", charge=0, per_day=1)
        job = self.catalogue.jobs.find(job.id)
        assert self.catalogue.runs.to_stage(job, "training", expected={"launching"})
        return self.catalogue.jobs.find(job.id)

    def after(self, seconds: float) -> int:
        """How many sessions are made in a round so much later."""
        self.now += seconds
        before = len(self.gate.lent)
        self.renewals.step()
        return len(self.gate.lent) - before

    def keys(self) -> list[str]:
        return [key for key in self.store.list("jobs") if "/credentials/" in key]


@pytest.fixture
def rounds(catalogue: Catalogue, store: S3Store, gate: IamGate) -> Rounds:
    gate.life_s = 900.0
    return Rounds(catalogue, PatientStore(store, 0.0), gate)


def test_what_runs_is_renewed_at_a_third_of_its_life(rounds: Rounds) -> None:
    first, second = rounds.job(), rounds.job()
    assert rounds.after(0) == 2
    assert rounds.keys() == sorted(map(credentials_key, (first, second)))
    # The token service's clock shows whole seconds.
    assert [rounds.after(seconds) for seconds in (0, 1, 290, 20, 1, 290, 20)] == [0, 0, 0, 2, 0, 0, 2]
    # A controller that starts anew cannot know when that was.
    rounds.renewals = rounds.begin()
    assert [rounds.after(seconds) for seconds in (1, 1)] == [2, 0]


def _cancelled(rounds: Rounds, job: Job) -> None:
    assert rounds.catalogue.jobs.want(job.tenant_id, job.id, "cancel", expected={"running"})


def _paused(rounds: Rounds, job: Job) -> None:
    assert rounds.catalogue.jobs.want(job.tenant_id, job.id, "pause", expected={"running"})


def _done(rounds: Rounds, job: Job) -> None:
    assert rounds.catalogue.runs.to_stage(job, "accepting", expected={"training"})


def _failed(rounds: Rounds, job: Job) -> None:
    assert rounds.catalogue.runs.end(job, "failed", "failed", error={"code": "x", "message": "x", "param": None})


@pytest.mark.parametrize("end", [_cancelled, _paused, _done, _failed])
def test_what_is_not_wanted_any_more_gets_none(rounds: Rounds, end: Callable[[Rounds, Job], None]) -> None:
    job, other = rounds.job(), rounds.job()
    assert rounds.after(0) == 2
    end(rounds, job)
    assert rounds.after(1000) == 1
    # Nor is what it was lent last still there.
    assert rounds.keys() == [credentials_key(other)]
    assert [rounds.after(1000), rounds.after(1000)] == [1, 1]


def test_a_lost_run_gets_none_and_its_successor_its_own(rounds: Rounds) -> None:
    job = rounds.job()
    assert rounds.after(0) == 1
    assert rounds.catalogue.runs.begin_again(job, f"{job.id}-2", Line("lost:1", "lost"))
    assert rounds.after(1) == 1
    (key,) = rounds.keys()
    assert key == f"jobs/{job.id}/credentials/2.json" != credentials_key(job)


def test_a_job_that_ends_while_others_are_renewed_is_seen(rounds: Rounds) -> None:
    first, second = rounds.job(), rounds.job()

    def made(lent: Lent) -> None:
        _cancelled(rounds, second if first.id in json.dumps(lent.policy) else first)

    rounds.gate.made = made
    assert rounds.after(0) == 1
    assert len(rounds.keys()) == 1


def test_a_token_service_that_is_away_is_asked_again(rounds: Rounds) -> None:
    rounds.job()
    rounds.gate.sts_away = True
    for _ in range(2):
        with pytest.raises(StoreUnavailableError):
            rounds.after(30)
    rounds.gate.sts_away = False
    assert rounds.after(30) == 1


def test_one_that_cannot_be_renewed_holds_up_no_other(rounds: Rounds) -> None:
    rounds.job(model="a*b")
    good = rounds.job()
    with pytest.raises(ConfigError, match="cannot be granted"):
        rounds.after(0)
    assert rounds.keys() == [credentials_key(good)]


def test_a_local_store_has_none(catalogue: Catalogue, tmp_path: Path, gate: IamGate) -> None:
    store = LocalStore(tmp_path / "local")
    rounds = Rounds(catalogue, store, gate)
    rounds.job()
    assert rounds.after(0) == 0 and not [*store.list()]
    assert first_use_s(store) == float("inf")


class _Full(ProcessLauncher):
    """A cluster in which nothing begins."""

    def __init__(self, folder: Path, status: str) -> None:
        super().__init__(folder)
        self.stands, self.stopped = status, list[str]()

    def status(self, job_id: str) -> str:
        return self.stands

    def stop(self, job_id: str, timeout_s: float = 30.0) -> None:
        self.stopped.append(job_id)


@pytest.mark.parametrize("status", ["pending", "stopped"])
def test_a_run_that_waits_for_room_too_long_waits_anew_with_new_credentials(
    rounds: Rounds, tmp_path: Path, catalogue: Catalogue, status: str
) -> None:
    def unreached(*given: object) -> Any:
        raise AssertionError(given)

    job, launcher = rounds.job(), _Full(tmp_path / "jobs", status)
    # A job that is being launched for so long that it was stopped is one that never began.
    job = dataclasses.replace(job, stage="launching")
    assert job.launched_at is not None
    local = LocalStore(tmp_path / "local")
    for store, seconds, attempt in ((local, 10_000, 1), (rounds.store, 710, 1), (rounds.store, 730, 2)):
        at = job.launched_at + seconds
        usual = (unreached, unreached, unreached, InspectionLimits())
        launch(Desk(catalogue, store, launcher, SETTINGS, *usual, lambda at=at: at), job)
        assert catalogue.jobs.find(job.id).attempt == attempt
        assert launcher.stopped == [job.id] * (attempt - 1)
    now = catalogue.jobs.find(job.id)
    assert (now.stage, now.submission_id) == ("launching", f"{job.id}-2")
    # It is no run that the cluster lost.
    assert not catalogue.runs.taken(job.id, "lost:")
