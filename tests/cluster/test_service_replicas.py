"""A service of several engines and several HTTP sides, under load: what is promoted, withdrawn or revoked shows on
each of them, and nothing that happens to a replica loses a request."""

from __future__ import annotations

import os
import signal
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
import torch
from transformers import PreTrainedModel

from ot_ray.artifacts import Registry
from ot_ray.launch.cluster import ClusterAddress
from ot_ray.model import plug_in
from ot_ray.store import LocalStore
from serve.local import shutdown
from tests.cluster.deployed import Deployed, Replica, until
from tests.cluster.load import TOKENS, ask_whole, check, expected, load, long_streams
from tests.http.tiny_service import BASE, PLAN, byte_model, byte_tokenizer, tuned_state
from tests.service.running import Running, administer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

# The promises: seconds until a promotion and a revocation hold everywhere.
PROMOTED_S, REVOKED_S = 5.0, 1.0
# Tokens of a choice in a long stream.
LONG = 100


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return byte_model()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two checkpoints, a store, and a database with a tenant."""
    folder = tmp_path_factory.mktemp("replicas")
    for seed in range(2):
        byte_model(seed).save_pretrained(folder / f"base-{seed}")
        byte_tokenizer().save_pretrained(folder / f"base-{seed}")
    administer(f"sqlite:///{folder}/service.db", "migrate")
    administer(f"sqlite:///{folder}/service.db", "tenant", "create", "anna", "requests_per_minute=1000000")
    return folder


@pytest.fixture(scope="module")
def service(local_ray: ClusterAddress, place: Path) -> Iterator[Deployed]:
    settings = {
        "model": {"name": BASE, "source": str(place / "base-0")},
        "store": str(place / "store"),
        "database": {"url": f"sqlite:///{place}/service.db"},
        "jobs": {"launcher": "processes", "folder": str(place / "jobs"), "sequence_length": 64},
        "apis": 2,
        "engines": 2,
        "num_cpus": 0.5,
        "max_concurrent": 4,
        "max_choices": 128,
    }
    deployed = Deployed(place, local_ray, settings)
    deployed.deploy()
    yield deployed
    shutdown()


@pytest.fixture
def settled(service: Deployed) -> Deployed:
    """Two engines and two HTTP sides that run."""
    service.deploy()
    service.wait(Api=2, Engine=2)
    return service


@pytest.fixture(scope="module")
def running(service: Deployed, place: Path) -> Running:
    return Running(service.url, f"sqlite:///{place}/service.db", LocalStore(place / "store"), place / "none")


@pytest.fixture(scope="module")
def key(running: Running) -> str:
    return running.key("anna", "inference")


@pytest.fixture
def client(service: Deployed, key: str) -> Iterator[openai.OpenAI]:
    """A customer's, as it comes."""
    with openai.OpenAI(base_url=service.url, api_key=key) as opened:
        yield opened


@pytest.fixture
def impatient(client: openai.OpenAI) -> openai.OpenAI:
    """One that never tries again."""
    return client.with_options(max_retries=0)


@pytest.fixture(scope="module")
def texts(model: PreTrainedModel) -> list[str]:
    """What the base says, in short and in long answers."""
    return [expected(model, byte_tokenizer(), tokens) for tokens in (TOKENS, LONG)]


def kill(replica: Replica) -> None:
    assert replica.pid is not None
    os.kill(replica.pid, signal.SIGKILL)


def test_promotion_withdrawal_and_rollback_show_on_every_engine(
    settled: Deployed, running: Running, model: PreTrainedModel, client: openai.OpenAI
) -> None:
    registry = Registry(running.store)
    states = [tuned_state(model, seed) for seed in range(1, 5)]

    def add(suffix: str, state: dict[str, torch.Tensor]) -> str:
        return registry.add(BASE, "anna", suffix, state, bundle_id="b-1", plan=PLAN, report={}).model_id

    new, gone, first, second = map(add, ("new", "gone", "back", "back"), states)
    for promoted in (gone, first, second):
        registry.promote(promoted)

    def seen() -> list[set[str]]:
        """What each engine serves."""
        return [{card.id for card in cards} for cards in settled.ask_all("models", "anna")]

    until(lambda: seen() == [{BASE, gone, first, second}] * 2, seen)
    registry.promote(new)
    registry.withdraw(gone)
    registry.rollback(BASE, "anna", "back")
    done = time.monotonic()
    # An engine that is asked later than this has to know; on a busy machine it may be asked late.
    while (asked := time.monotonic()) and (last := seen()) != [{BASE, new, first}] * 2:
        assert asked < done + PROMOTED_S, f"{asked - done:.1f} s after it, engines serve {last}"
    said = {new: states[0], first: states[2], first.rpartition(":")[0]: states[2]}
    texts = {name: expected(plug_in(model, PLAN, state), byte_tokenizer()) for name, state in said.items()}
    for _ in range(4):
        assert {name: ask_whole(client, name).texts[0] for name in texts} == texts
        for withdrawn in (gone, second):
            with pytest.raises(openai.NotFoundError):
                client.completions.create(model=withdrawn, prompt="x")


def test_revoked_key_is_refused_by_every_http_side(settled: Deployed, running: Running) -> None:
    said = administer(running.database, "key", "create", "anna", "--scopes", "inference").split()
    key_id, key = said[0], said[-1]
    sides = settled.replicas("Api")
    with httpx.Client(base_url=settled.url, headers={"authorization": f"Bearer {key}"}) as asking:
        assert set(asked_of_each(asking, settled, sides).values()) == {200}
        administer(running.database, "key", "revoke", key_id)
        time.sleep(REVOKED_S)
        assert set(asked_of_each(asking, settled, sides).values()) == {401}


def asked_of_each(client: httpx.Client, service: Deployed, sides: dict[str, Replica]) -> dict[str, int]:
    """The status of many requests by the id each has, until every side has answered one."""
    statuses: dict[str, int] = {}

    def everybody_has() -> bool:
        for _ in range(8):
            name = uuid.uuid4().hex
            statuses[name] = client.get("/models", headers={"x-request-id": name}).status_code
        logs = map(service.log, sides.values())
        return all(any(name in log for name in statuses) for log in logs)

    until(everybody_has)
    return statuses


def test_killed_engine_loses_no_request(
    settled: Deployed, client: openai.OpenAI, impatient: openai.OpenAI, texts: list[str]
) -> None:
    victim = next(iter(settled.replicas("Engine").values()))
    with long_streams(client, BASE, count=4, n=48, tokens=LONG) as streams:
        until(lambda: all(stats.rows for stats in settled.ask_all("stats")))
        with load(impatient, BASE) as answers:
            kill(victim)
            until(lambda: victim.id not in settled.replicas("Engine", None))
            settled.wait(Api=2, Engine=2)
        long = [stream.result() for stream in streams]
    broken = check(answers, *texts)
    # What had not begun was asked of the other engine by the service itself.
    assert all(answer.begun for answer in broken), [str(answer) for answer in broken]
    assert sum(not answer.streamed for answer in answers) > 10
    cut = check(long, *texts)
    assert 1 <= len(cut) < 4, [str(answer) for answer in long]
    for answer in [*cut, *broken]:
        assert isinstance(answer.error, openai.APIError) and "being restarted" in answer.error.message, str(answer)


def test_killed_http_side_loses_no_request(settled: Deployed, client: openai.OpenAI, texts: list[str]) -> None:
    victim = next(iter(settled.replicas("Api").values()))
    with long_streams(client, BASE, count=6, n=32, tokens=LONG) as streams:
        with load(client, BASE) as answers:
            kill(victim)
            until(lambda: victim.id not in settled.replicas("Api", None))
            settled.wait(Api=2, Engine=2)
        long = [stream.result() for stream in streams]
    broken = check(answers, *texts)
    assert all(answer.begun and answer.streamed for answer in broken), [str(answer) for answer in broken]
    assert 1 <= len(check(long, *texts)) < 6, [str(answer) for answer in long]
    # Nobody listens to what the killed one had asked for.
    until(lambda: not any(stats.rows or stats.waiting for stats in settled.ask_all("stats")))


def test_rolling_update_loses_nothing(
    settled: Deployed, place: Path, client: openai.OpenAI, impatient: openai.OpenAI, texts: list[str]
) -> None:
    newer = [expected(byte_model(1), byte_tokenizer(), tokens) for tokens in (TOKENS, LONG)]
    before = {**settled.replicas("Engine"), **settled.replicas("Api")}
    changes = {"model": {"name": BASE, "source": str(place / "base-1")}, "max_concurrent": 3}
    with load(impatient, BASE) as answers, load(impatient, BASE, 2, 0, 32, LONG) as long:
        settled.deploy(**changes)
        until(lambda: not before.keys() & {**settled.replicas("Engine", None), **settled.replicas("Api", None)}.keys())
        settled.wait(Api=2, Engine=2)
    assert check(answers, *texts, *newer) == [] and check(long, *texts, *newer) == []
    assert {next(iter(answer.texts.values())) for answer in answers} == {texts[0], newer[0]}
    assert ask_whole(client, BASE).texts[0] == newer[0]


def test_update_that_cannot_start_leaves_what_runs(
    settled: Deployed, tmp_path: Path, impatient: openai.OpenAI, texts: list[str]
) -> None:
    before = settled.replicas("Engine").keys()
    with load(impatient, BASE) as answers:
        settled.deploy(model={"name": BASE, "source": str(tmp_path)})
        until(lambda: settled.status() == "DEPLOY_FAILED")
        assert settled.replicas("Engine").keys() == before
    assert check(answers, *texts) == []


def test_engines_come_and_go_with_the_load(service: Deployed, impatient: openai.OpenAI, texts: list[str]) -> None:
    service.deploy(engines=1, max_engines=2, max_concurrent=2, scale_window_s=11, scale_up_s=1, scale_down_s=2)
    service.wait(Api=2, Engine=1)
    with load(impatient, BASE, streams=1, wholes=0) as light:
        with load(impatient, BASE) as heavy:
            until(lambda: len(service.replicas("Engine")) == 2)
        until(lambda: len(service.replicas("Engine", None)) == 1)
    assert check([*light, *heavy], *texts) == []
