"""The whole service, with its Ray, its replicas and its database, is killed at random points under jobs that customers
made: every job ends once, with the truth in its events. What is killed, and started again, is service_scene.py's."""

from __future__ import annotations

import json
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import openai
import pytest

from ot_ray.artifacts import generate_key, write_bundle
from ot_ray.model import emulate
from ot_ray.store import LocalStore
from serve.catalogue import Catalogue
from serve.catalogue.records import ENDED, Job
from tests.cluster.service_scene import VICTIMS, Platform
from tests.fixtures.postgres import PostgresServer
from tests.http.tiny_service import BASE, PLAN, byte_model, byte_tokenizer
from tests.service.controller_scene import EVENTS
from tests.service.job_records import JobRecords, ended_once
from tests.service.running import configured
from tests.service.webhook_receiver import Receiver, receiver

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]

TENANTS = ("anna", "ben")
EXAMPLES = "".join(
    json.dumps({"prompt": f"{number} and one make", "completion": f" {number + 1}, as all know"}) + "\n"
    for number in range(60)
).encode()
MANY = 50
"""Epochs of a job that is cancelled."""
_AWAY = (openai.APIConnectionError, openai.InternalServerError, openai.RateLimitError)


class Customers(JobRecords):
    """Tenants with a client each, and what the service keeps of them."""

    def __init__(self, platform: Platform, url: str, database: str, store: LocalStore, keys: dict[str, str]) -> None:
        self._platform, self.store = platform, store
        self.catalogue = Catalogue.open(database)
        self._clients = {
            tenant: openai.OpenAI(base_url=url, api_key=key, timeout=20, max_retries=0) for tenant, key in keys.items()
        }
        self._files: dict[str, str] = {}
        self._owners: dict[str, str] = {}

    def close(self) -> None:
        self.catalogue.close()

    def ask(self, tenant: str, call: Callable[[openai.OpenAI], Any]) -> Any:
        """What the service answers, however often it has to be asked."""
        answers: list[Any] = []

        def answered() -> bool:
            try:
                answers.append(call(self._clients[tenant]))
            except _AWAY:
                return False
            return True

        self._platform.until(answered, "an answer")
        return answers[0]

    def told_at(self, tenant: str, url: str) -> None:
        kinds: Any = list(EVENTS)
        self.ask(tenant, lambda client: client.webhooks.create(name="inbox", url=url, event_types=kinds))

    def job(self, tenant: str, epochs: int, batch: int = 2) -> Job:
        """A new job, of a file that is sent once."""
        if tenant not in self._files:
            sent = {"file": ("train.jsonl", EXAMPLES), "purpose": "fine-tune"}
            self._files[tenant] = self.ask(tenant, lambda client: client.files.create(**sent)).id  # type: ignore
        figures = {"n_epochs": epochs, "batch_size": batch}
        asked: Any = {
            "model": BASE,
            "training_file": self._files[tenant],
            "seed": 3,
            "method": {"type": "supervised", "supervised": {"hyperparameters": figures}},
            # The same key again makes no second job.
            "extra_headers": {"idempotency-key": f"{tenant}-{len(self._owners)}"},
        }
        made = self.ask(tenant, lambda client: client.fine_tuning.jobs.create(**asked))
        self._owners[made.id] = tenant
        return self.catalogue.jobs.find(made.id)

    def order(self, job: Job, name: str) -> None:
        """Have a job cancelled, paused or resumed; one that is past that is left as it is."""

        def call(client: openai.OpenAI) -> None:
            try:
                getattr(client.fine_tuning.jobs, name)(job.id)
            except openai.BadRequestError:
                self._platform.tell(f"{name} came too late")

        self.ask(self._owners[job.id], call)
        self._platform.tell(f"{name} was asked for")

    def over(self, jobs: Sequence[tuple[Job, int]]) -> bool:
        """Whether all have ended, and nothing is left of them."""
        return all(now.status in ENDED and now.cleaned_at is not None for now in self._now(jobs))

    def states(self, jobs: Sequence[tuple[Job, int]]) -> str:
        return ", ".join(f"{now.status}/{now.stage}/{now.attempt}" for now in self._now(jobs))

    def _now(self, jobs: Sequence[tuple[Job, int]]) -> list[Job]:
        now: list[Job] = []
        self._platform.until(lambda: now.extend(self.look(job) for job, _ in jobs[len(now) :]) or True, "a look")
        return now

    def models(self, tenant: str) -> set[str]:
        """Those of the tenant that the service lists and that answer."""
        listed = {model.id for model in self.ask(tenant, lambda client: list(client.models.list()))} - {BASE}
        for model in listed:
            asked: Any = {"model": model, "prompt": "1 and", "max_tokens": 1}
            assert self.ask(tenant, lambda client, asked=asked: client.completions.create(**asked)).choices
        return listed


@pytest.fixture(scope="module")
def owned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Folders of a tiny model's checkpoint and bundle, and the owner's public key."""
    folder, base, tokenizer = tmp_path_factory.mktemp("owned"), byte_model(), byte_tokenizer()
    base.save_pretrained(folder / "checkpoint")
    tokenizer.save_pretrained(folder / "checkpoint")
    private, public = generate_key(folder)
    write_bundle(
        folder / "bundle",
        emulate(base, PLAN, [0, 3]),
        tokenizer,
        PLAN,
        name=BASE,
        version="1",
        card="# Tiny\n",
        recommended={},
        private_key=private,
    )
    return folder / "checkpoint", folder / "bundle", public


@pytest.fixture
def inbox() -> Iterator[Receiver]:
    with receiver() as box:
        yield box


@pytest.mark.parametrize(("seed", "own_ray"), [(19, False), (2, True)])
def test_whatever_is_killed_every_job_ends_once(
    seed: int,
    own_ray: bool,
    own_postgres: PostgresServer,
    owned: tuple[Path, Path, Path],
    inbox: Receiver,
    tmp_path: Path,
) -> None:
    settings: dict[str, Any] = {
        "num_cpus": 0.5,
        "jobs": {"attempts": 20, "cpus": 0.5, "checkpoint_every": 10, "lease_s": 3, "max_running": 2},
    }
    url = own_postgres.url(own_postgres.database())
    file, running = configured(tmp_path, *owned, TENANTS, database=url, **settings)
    keys = {tenant: running.key(tenant) for tenant in TENANTS}
    # Ray's sockets lie below it, and their paths may have 107 characters.
    place = tempfile.mkdtemp(prefix="ot", dir="/tmp")
    platform = Platform(place, file, running, own_postgres, own_ray)
    customers = Customers(platform, running.url, url, running.store, keys)
    try:
        _play(random.Random(seed), platform, customers, inbox)
    except AssertionError as error:
        raise AssertionError(f"{error}\nseed {seed}:\n{platform}") from error
    finally:
        platform.stop()
        customers.close()
        shutil.rmtree(place, ignore_errors=True)


def _play(draw: random.Random, platform: Platform, customers: Customers, inbox: Receiver) -> None:
    for tenant in TENANTS:
        customers.told_at(tenant, inbox.url(f"/{tenant}"))
    # Of each tenant one runs at a time.
    cancelled, paused = customers.job("anna", MANY, batch=4), customers.job("ben", 3)
    jobs = [(cancelled, MANY), (paused, 3), (customers.job("anna", 1), 1), (customers.job("ben", 1), 1)]
    platform.tell("the jobs are made")
    orders = {1: ("cancel", cancelled, _trains), 2: ("pause", paused, _trains), 3: ("resume", paused, _is_aside)}
    for number, victim in enumerate(draw.sample(VICTIMS, len(VICTIMS))):
        platform.pause(draw.uniform(0, 6))
        if customers.over(jobs):
            jobs.append((customers.job(draw.choice(TENANTS), 1), 1))
        platform.tell(f"jobs are {customers.states(jobs)}")
        platform.kill(victim, draw)
        if number in orders:
            name, job, is_due = orders[number]
            platform.until(lambda job=job, is_due=is_due: is_due(customers, job), f"{name} is due")
            customers.order(job, name)
    platform.until(lambda: customers.over(jobs), "all jobs are over")
    platform.tell(f"jobs are {customers.states(jobs)}")
    for job, epochs in jobs:
        # One that was done before it was to be cancelled has succeeded.
        status = customers.look(job).status if job is cancelled else "succeeded"
        ended_once(customers, job, status, epochs + 1)
    platform.until(lambda: not platform.jobs(), "no process of a job is left")
    for tenant, job in (("anna", cancelled), ("ben", paused)):
        assert customers.models(tenant) == {record.model_id for record in customers.served(job)}
    platform.until(lambda: len(_delivered(inbox)) == len(jobs), "the webhooks are delivered")
    assert set(_delivered(inbox)) == {job.id for job, _ in jobs}


def _trains(customers: Customers, job: Job) -> bool:
    now = customers.look(job)
    if now.status in ("paused", *ENDED):
        return True
    return now.stage == "training" and any(told.startswith("Step ") for told in customers.told(job))


def _is_aside(customers: Customers, job: Job) -> bool:
    return customers.look(job).status in ("paused", *ENDED)


def _delivered(inbox: Receiver) -> dict[str, str]:
    """By job, the one id of the deliveries that told of its end."""
    told: dict[str, set[str]] = {}
    for _, headers, body in list(inbox.received):
        told.setdefault(json.loads(body)["data"]["id"], set()).add(headers["webhook-id"])
    counts = Counter(len(ids) for ids in told.values())
    assert set(counts) <= {1}, told
    return {job_id: next(iter(ids)) for job_id, ids in told.items()}
