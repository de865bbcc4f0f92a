"""`/v1/cola` over HTTP: sessions, numbers, files, bad input, and a worker that carries out what is asked."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import schemathesis
import torch
from fastapi.testclient import TestClient
from safetensors.torch import load, save

from ot_ray.cola import Auxiliary, AuxiliaryConfig, FitConfig, Site, find_sites, make_fitter
from ot_ray.cola.gradient_files import read_gradients
from ot_ray.model import TEXT_FAMILIES
from ot_ray.model.loading import ModelConfig
from ot_ray.store import LocalStore
from serve.catalogue import Catalogue
from serve.config import ServeConfig
from serve.engine.backend import Backend
from serve.gradients.loading import load_desk, reached_sites
from serve.gradients.worker import GradientWorker
from serve.routes.gradient_model import read_model, site_of
from serve.service import Service
from serve.stored_gradients import SETTLED_S, sweep_gradients
from tests.fixtures.models import tiny_model
from tests.http.tiny_service import BASE
from tests.service.clients import ClientOf, clients
from tests.service.fuzzing import CHECKS

PLACE = "/v1/cola/sessions"
ASKED: dict[str, Any] = {"sites": ["*.q_proj", "*.v_proj"], "auxiliary": {"rank": 2, "seed": 3}}
ROWS = [{"tokens": [5, 6, 7, 8]}, {"tokens": [9, 10, 11], "loss_mask": [0, 0, 1]}]
PATIENCE_S = 120
EXAMPLES = 8


@pytest.fixture
def anna(client_of: ClientOf) -> TestClient:
    return client_of("anna", ("cola",))


@pytest.fixture
def work(settings: ServeConfig, catalogue: Catalogue, store: LocalStore) -> Callable[[], None]:
    """Carries out all that waits, with the base model."""
    made: list[GradientWorker] = []

    def until_nothing_waits() -> None:
        if not made:
            assert settings.gradients is not None
            made.append(GradientWorker(load_desk(settings, settings.gradients, catalogue, store)))
        while made[0].round():
            pass

    return until_nothing_waits


def opened(client: TestClient, **asked: Any) -> dict[str, Any]:
    answer = client.post(PLACE, json={**ASKED, **asked})
    assert answer.status_code == 200, answer.text
    return answer.json()


def ask(client: TestClient, session: dict[str, Any], verb: str, **asked: Any) -> dict[str, Any]:
    answer = client.post(f"{PLACE}/{session['id']}/{verb}", json=asked)
    assert answer.status_code == 202, answer.text
    return answer.json()


def ended(client: TestClient, session: dict[str, Any], number: int) -> dict[str, Any]:
    answer = client.get(f"{PLACE}/{session['id']}/operations/{number}")
    assert answer.status_code == 200 and answer.json()["status"] == "succeeded", answer.text
    return answer.json()


def refused(answer: Any, status: int, code: str | None = None) -> str:
    """The message of an error that is not to be tried again."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert code in (None, error["code"]), error
    assert answer.headers["x-should-retry"] == "false"
    return error["message"]


def fresh(session: dict[str, Any]) -> Auxiliary:
    """A session's auxiliary at version 0."""
    sites = {site["name"]: site_of(site) for site in session["sites"]}
    return Auxiliary(sites, AuxiliaryConfig.model_validate(session["auxiliary"]))


def put(client: TestClient, session: dict[str, Any], tensors: Any, number: int = 0, version: int = 0) -> Any:
    body = tensors if isinstance(tensors, bytes) else save({name: t.contiguous() for name, t in tensors.items()})
    place = f"{PLACE}/{session['id']}/auxiliary?number={number}&version={version}"
    return client.put(place, content=body)


def test_a_thin_client_does_with_four_calls(anna: TestClient, work: Callable[[], None], tmp_path: Path) -> None:
    session = opened(anna, fit="server", fitting={"lr": 0.05, "optimizer": "sgd"})
    assert (session["version"], session["next_number"], session["status"]) == (0, 0, "open")
    losses = []
    for step in range(3):
        ask(anna, session, "forward_backward", number=2 * step, rows=ROWS)
        ask(anna, session, "step", number=2 * step + 1)
        work()
        losses.append(ended(anna, session, 2 * step)["result"]["loss"])
        assert ended(anna, session, 2 * step + 1)["result"] == {"fits": step + 1}
    assert losses == sorted(losses, reverse=True) and losses[0] > losses[-1]
    ask(anna, session, "save", number=6)
    ask(anna, session, "sample", number=7, prompt=[5, 6], max_tokens=3, temperature=0)
    work()
    files = {file["name"]: file for file in ended(anna, session, 6)["result"]["files"]}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= files.keys()
    for name, file in files.items():
        data = anna.get(f"{PLACE}/{session['id']}/saved/6/files/{name}").content
        assert (len(data), hashlib.sha256(data).hexdigest()) == (file["bytes"], file["sha256"])
    assert ended(anna, session, 7)["result"].keys() == {"text", "tokens"}
    assert refused(anna.get(f"{PLACE}/{session['id']}/saved/6/files/none"), 404)
    assert "fits" in refused(anna.get(f"{PLACE}/{session['id']}/gradients/0"), 404, "wrong_fit")
    assert anna.get(f"{PLACE}/{session['id']}").json()["version"] > 0


def test_a_client_that_fits_gets_gradients_and_gives_its_auxiliary(anna: TestClient, work: Callable[[], None]) -> None:
    session = opened(anna)
    place, auxiliary = f"{PLACE}/{session['id']}", fresh(session)
    fitter = make_fitter(auxiliary, FitConfig(optimizer="sgd", lr=0.05))
    losses = []
    for step in range(3):
        ask(anna, session, "forward_backward", number=2 * step, rows=ROWS)
        work()
        passed = ended(anna, session, 2 * step)
        losses.append(passed["result"]["loss"])
        assert (passed["version"], passed["result"]["rows"], passed["result"]["tokens"]) == (step, 2, 4)
        whole = anna.get(f"{place}/gradients/{2 * step}")
        assert len(whole.content) == passed["result"]["bytes"]
        halves = [anna.get(f"{place}/gradients/{2 * step}", headers={"range": r}) for r in ("bytes=0-99", "bytes=100-")]
        assert [half.status_code for half in halves] == [206, 206]
        assert halves[0].content + halves[1].content == whole.content
        assert whole.headers["etag"] == f'"{hashlib.sha256(whole.content).hexdigest()}"'
        file = read_gradients(whole.content, auxiliary.sites)
        assert (file.session, file.number, file.version) == (session["id"], 2 * step, step)
        fitter.collect(file.pairs)
        sent = put(anna, session, auxiliary.tensors, number=2 * step + 1, version=step)
        assert (sent.status_code, sent.json()["kind"]) == (202, "load"), sent.text
        work()
        assert ended(anna, session, 2 * step + 1)["version"] == step + 1
    assert losses == sorted(losses, reverse=True) and losses[0] > losses[-1]
    present = anna.get(f"{place}/auxiliary")
    assert present.headers["x-cola-version"] == "3"
    for name, tensor in load(present.content).items():
        assert torch.equal(tensor, auxiliary.tensors[name].detach())
    # Those of the last two passes are kept.
    assert [anna.get(f"{place}/gradients/{number}").status_code for number in (0, 2, 4)] == [410, 200, 200]
    assert "pass after the next" in refused(anna.get(f"{place}/gradients/0"), 410, "gradients_gone")


def test_the_fresh_auxiliary_is_that_of_the_seed(anna: TestClient) -> None:
    session = opened(anna, auxiliary={"kind": "mlp", "rank": 3, "seed": 11})
    for headers, status in (({}, 200), ({"range": "bytes=0-"}, 206)):
        answer = anna.get(f"{PLACE}/{session['id']}/auxiliary", headers=headers)
        assert (answer.status_code, answer.headers["x-cola-version"]) == (status, "0")
        found = load(answer.content)
        wanted = fresh(session).tensors
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_auxiliaries_of_half_precision_are_taken_in_float32(anna: TestClient, work: Callable[[], None]) -> None:
    session = opened(anna)
    halves = {name: torch.randn(t.shape).to(torch.bfloat16) for name, t in fresh(session).tensors.items()}
    assert put(anna, session, halves).status_code == 202
    work()
    assert ended(anna, session, 0)["version"] == 1
    found = load(anna.get(f"{PLACE}/{session['id']}/auxiliary").content)
    for name, tensor in found.items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, halves[name].float())


def _nan(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[name].view(-1)[-1] = float("nan")


def _rename(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors["other.weight"] = tensors.pop(name)


def _add(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors["more.weight"] = torch.zeros(1)


def _transpose(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[name] = tensors[name].t().contiguous()


def _whole_numbers(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[name] = tensors[name].int()


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (_nan, "{name} holds NaN"),
        (_rename, "{name} is missing"),
        (_add, "more.weight is none of"),
        (_transpose, "{name} is ["),
        (_whole_numbers, "{name} has dtype I32"),
    ],
)
def test_an_auxiliary_that_is_none_is_refused(anna: TestClient, store: LocalStore, spoil: Any, told: str) -> None:
    session = opened(anna)
    tensors = {name: t.clone() for name, t in fresh(session).tensors.items()}
    name = list(tensors)[1]
    spoil(tensors, name)
    assert told.format(name=name) in refused(put(anna, session, tensors), 400, "invalid_auxiliary")
    assert anna.get(f"{PLACE}/{session['id']}").json()["next_number"] == 0
    assert list(store.list("cola")) == []


def test_bodies_that_are_no_auxiliary_are_refused(anna: TestClient, store: LocalStore) -> None:
    session = opened(anna)
    good = save(fresh(session).tensors)
    header = json.dumps({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    twice = (
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    )
    bodies = [b"", b"x", good[:-1], good + b"\0", good[:100], b"\xff" * 64]
    bodies += [len(text).to_bytes(8, "little") + text + b"\0" * 4 for text in (header, twice)]
    for body in bodies:
        message = refused(put(anna, session, body), 400, "invalid_auxiliary")
        assert "the body" in message and "/" not in message
    assert refused(put(anna, session, bytes(9 * 2**20)), 413)
    assert list(store.list("cola")) == []


def test_an_auxiliary_is_for_the_present_version(anna: TestClient, work: Callable[[], None], store: LocalStore) -> None:
    session = opened(anna)
    tensors = {name: torch.ones_like(t) for name, t in fresh(session).tensors.items()}
    assert "version 0" in refused(put(anna, session, tensors, 0, 1), 409, "version_conflict")
    assert "0 is the next" in refused(put(anna, session, tensors, 1, 0), 409, "wrong_number")
    assert list(store.list("cola")) == []
    first = put(anna, session, tensors, 0, 0)
    again = put(anna, session, tensors, 0, 0)
    assert (first.status_code, again.status_code) == (202, 200)
    assert first.json()["number"] == again.json()["number"]
    other = {name: t * 2 for name, t in tensors.items()}
    refused(put(anna, session, other, 0, 0), 409, "number_taken")
    work()
    refused(put(anna, session, other, 1, 0), 409, "version_conflict")
    # One that another session of the group outran fails as an operation, and the session goes on.
    assert put(anna, session, other, 1, 1).status_code == 202
    work()
    assert ended(anna, session, 1)["version"] == 2


def test_numbers_make_a_request_happen_once(anna: TestClient, work: Callable[[], None]) -> None:
    session = opened(anna)
    place = f"{PLACE}/{session['id']}/forward_backward"
    body = {"number": 0, "rows": ROWS}
    first, again = anna.post(place, json=body), anna.post(place, json={**body, "coding": "none"})
    assert (first.status_code, again.status_code) == (202, 200)
    refused(anna.post(place, json={**body, "rows": ROWS[:1]}), 409, "number_taken")
    refused(anna.post(f"{PLACE}/{session['id']}/save", json={"number": 0}), 409, "number_taken")
    assert "1 is the next" in refused(anna.post(place, json={**body, "number": 2}), 409, "wrong_number")
    work()
    last = anna.post(place, json=body)
    assert (last.status_code, last.json()) == (200, ended(anna, session, 0))
    sampled = {"number": 1, "prompt": "abc", "max_tokens": 2}
    answers = [anna.post(f"{PLACE}/{session['id']}/sample", json=sampled) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [202, 200]


def test_a_waiting_operation_tells_where_it_stands(anna: TestClient, client_of: ClientOf) -> None:
    ben = client_of("ben", ("cola",))
    first, second = opened(anna), opened(ben)
    ask(anna, first, "forward_backward", number=0, rows=ROWS)
    asked = ask(ben, second, "forward_backward", number=0, rows=ROWS[:1])
    assert asked["queue"] == {"ahead": 1, "rows": 2, "position": 1}
    ask(ben, second, "save", number=1)
    answer = ben.get(f"{PLACE}/{second['id']}/operations/1")
    assert answer.json()["queue"] == {"ahead": 2, "rows": 3, "position": 2}
    assert answer.headers["retry-after"] == "1"
    assert refused(ben.get(f"{PLACE}/{second['id']}/operations/2"), 404)
    early = ben.get(f"{PLACE}/{second['id']}/gradients/0")
    assert (early.status_code, early.headers["retry-after"]) == (409, "1")


def test_an_answer_waits_for_the_end(anna: TestClient, catalogue: Catalogue) -> None:
    session = opened(anna)
    ask(anna, session, "save", number=0)
    place = f"{PLACE}/{session['id']}/operations/0"
    assert anna.get(f"{place}?wait_s=0.2").json()["status"] == "queued"
    operations = catalogue.gradient_operations
    (claimed,) = operations.claim("h", 600, 1)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(anna.get, f"{place}?wait_s=30")
        assert operations.succeed(claimed, {"files": []})
        answer = waiting.result(PATIENCE_S)
    assert answer.json()["status"] == "succeeded" and "retry-after" not in answer.headers
    for wrong in ("-1", "31", "x", "nan"):
        assert anna.get(f"{place}?wait_s={wrong}").status_code == 400


def test_a_refused_step_leaves_the_session_as_it_was(anna: TestClient, work: Callable[[], None]) -> None:
    session = opened(anna)
    huge = {name: torch.full_like(t, 3e38) for name, t in fresh(session).tensors.items()}
    assert put(anna, session, huge).status_code == 202
    ask(anna, session, "forward_backward", number=1, rows=ROWS)
    work()
    failed = anna.get(f"{PLACE}/{session['id']}/operations/1").json()
    assert (failed["status"], failed["error"]["code"]) == ("failed", "not_finite")
    refused(anna.get(f"{PLACE}/{session['id']}/gradients/1"), 409, "operation_failed")
    assert put(anna, session, fresh(session).tensors, 2, 1).status_code == 202
    ask(anna, session, "forward_backward", number=3, rows=ROWS)
    work()
    assert ended(anna, session, 3)["version"] == 2


@pytest.mark.parametrize(
    ("body", "param", "told"),
    [
        ({"rows": []}, "rows", "at least 1"),
        ({"rows": [{"tokens": []}]}, "rows", "at least 1"),
        ({"rows": [{"tokens": [1, 2**31]}]}, "rows", "less than"),
        ({"rows": [{"tokens": [1, 10**6]}]}, "rows.0.tokens", "the model knows 0 to"),
        ({"rows": [{"tokens": [1, -1]}]}, "rows", "greater than"),
        ({"rows": [{"tokens": [1, 2.5]}]}, "rows", "integer"),
        ({"rows": [{"tokens": [1, True]}]}, "rows", "integer"),
        ({"rows": [{"tokens": [1] * 5000}]}, "rows.0.tokens", "room for"),
        ({"rows": [{"tokens": [1, 2], "loss_mask": [1]}]}, "rows.0.loss_mask", "one each"),
        ({"rows": [{"tokens": [1, 2], "loss_mask": [1, 2]}]}, "rows", "less than"),
        ({"rows": [{"tokens": [1, 2], "loss_mask": [1, 0]}]}, "rows", "Nothing is learnt"),
        ({"rows": [{"tokens": [1]}]}, "rows", "Nothing is learnt"),
        ({"rows": [{"tokens": [1, 2]}] * 65}, "rows", "at most 64"),
        ({"rows": [{"tokens": [1, 2], "labels": [1, 2]}]}, "rows.0.labels", "Unrecognized"),
        ({"rows": ROWS, "coding": "int4"}, "coding", "int8"),
        ({"rows": ROWS, "number": -1}, "number", "greater than"),
    ],
)
def test_rows_that_cannot_be_learnt_are_refused(anna: TestClient, body: dict[str, Any], param: str, told: str) -> None:
    session = opened(anna)
    answer = anna.post(f"{PLACE}/{session['id']}/forward_backward", json={"number": 0, **body})
    assert told in refused(answer, 400)
    assert answer.json()["error"]["param"] == param
    assert anna.get(f"{PLACE}/{session['id']}").json()["next_number"] == 0


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ({"sites": ["*.q_porj"]}, "q_proj"),
        ({"sites": ["*.self_attn"]}, "no linear map"),
        ({"sites": []}, "at least 1"),
        ({"sites": ["a"] * 65}, "at most 64"),
        ({"mode": "joint"}, "needs a group"),
        ({"group": "g"}, "group belongs to"),
        ({"mode": "joint", "group": "../x"}, "group"),
        ({"auxiliary": {"rank": 0}}, "rank"),
        ({"auxiliary": {"rank": 257}}, "at most 256"),
        ({"auxiliary": {"kind": "attention"}}, "low_rank"),
        ({"fitting": {"interval": 2}}, "Unrecognized"),
        ({"fitting": {"betas": [0.9]}}, "betas"),
        ({"fitting": {"lr": float("inf")}}, "lr"),
        ({"interval": 0}, "interval"),
        ({"metadata": {"a": 1}}, "must be text"),
    ],
)
def test_sessions_that_make_no_sense_are_refused(anna: TestClient, body: dict[str, Any], told: str) -> None:
    text = json.dumps({**ASKED, **body})
    answer = anna.post(PLACE, content=text, headers={"content-type": "application/json"})
    assert told in refused(answer, 400)
    assert anna.get(PLACE).json()["data"] == []


def test_a_session_is_of_the_services_model(anna: TestClient) -> None:
    assert opened(anna, model=BASE)["model"] == BASE
    refused(anna.post(PLACE, json={**ASKED, "model": "other"}), 404, "model_not_found")


def test_an_auxiliary_beyond_the_limit_is_refused(
    base_backend: Backend, settings: ServeConfig, catalogue: Catalogue, store: LocalStore
) -> None:
    assert settings.gradients is not None
    small = settings.model_copy(
        update={"gradients": settings.gradients.model_copy(update={"max_auxiliary_bytes": 1024})}
    )
    for client_of in clients(Service(base_backend, small, catalogue, store)):
        message = refused(client_of("anna").post(PLACE, json={**ASKED, "auxiliary": {"kind": "linear"}}), 400)
        assert "1024" in message


def test_gradients_beyond_the_limit_are_not_made(
    base_backend: Backend, settings: ServeConfig, catalogue: Catalogue, store: LocalStore
) -> None:
    assert settings.gradients is not None
    small = settings.gradients.model_copy(update={"operation_bytes": 4096})
    for client_of in clients(Service(base_backend, settings.model_copy(update={"gradients": small}), catalogue, store)):
        anna = client_of("anna")
        session = opened(anna)
        one = sum(4 * (site["inputs"] + site["outputs"]) for site in session["sites"])
        asked = {"number": 0, "rows": [{"tokens": [5] * (4096 // one + 1)}]}
        message = refused(anna.post(f"{PLACE}/{session['id']}/forward_backward", json=asked), 400)
        assert f"{one * (4096 // one + 1)} bytes" in message


def test_a_load_that_fails_leaves_nothing_behind(anna: TestClient, store: LocalStore, work: Callable[[], None]) -> None:
    session = opened(anna)
    for number in range(2):
        tensors = {name: torch.full_like(t, number + 1.0) for name, t in fresh(session).tensors.items()}
        # While the first waits, nobody knows yet that the second comes too late.
        assert put(anna, session, tensors, number, 0).status_code == 202
    assert len(list(store.list("cola"))) == 2
    work()
    assert anna.get(f"{PLACE}/{session['id']}/operations/1").json()["error"]["code"] == "version_conflict"
    assert len(list(store.list("cola"))) == 1
    present = load(anna.get(f"{PLACE}/{session['id']}/auxiliary").content)
    assert all((tensor == 1.0).all() for tensor in present.values())


def test_open_sessions_and_waiting_operations_are_limited(
    base_backend: Backend, settings: ServeConfig, catalogue: Catalogue, store: LocalStore
) -> None:
    assert settings.gradients is not None
    few = settings.gradients.model_copy(update={"open_sessions": 1, "queued_operations": 2})
    for client_of in clients(Service(base_backend, settings.model_copy(update={"gradients": few}), catalogue, store)):
        anna, ben = client_of("anna"), client_of("ben")
        session = opened(anna)
        full = anna.post(PLACE, json=ASKED)
        assert (full.status_code, full.headers["retry-after"]) == (429, "30")
        opened(ben)
        for number in range(2):
            ask(anna, session, "save", number=number)
        full = anna.post(f"{PLACE}/{session['id']}/save", json={"number": 2})
        assert (full.status_code, full.headers["retry-after"]) == (429, "1")
        assert put(anna, session, fresh(session).tensors, 2).status_code == 429
        assert anna.delete(f"{PLACE}/{session['id']}").status_code == 200
        opened(anna)


def test_a_session_is_opened_once_under_one_key(anna: TestClient) -> None:
    answers = [anna.post(PLACE, json=ASKED, headers={"idempotency-key": "k"}) for _ in range(2)]
    assert answers[0].json() == answers[1].json()
    assert len(anna.get(PLACE).json()["data"]) == 1


def test_groups_are_within_one_tenant(anna: TestClient, client_of: ClientOf, work: Callable[[], None]) -> None:
    ben = client_of("ben", ("cola",))
    shared = {"mode": "joint", "group": "g"}
    mine, second, his = opened(anna, **shared), opened(anna, **shared), opened(ben, **shared)
    ones = {name: torch.ones_like(t) for name, t in fresh(mine).tensors.items()}
    assert put(anna, mine, ones).status_code == 202
    work()
    versions = [c.get(f"{PLACE}/{s['id']}").json()["version"] for c, s in ((anna, mine), (anna, second), (ben, his))]
    assert versions == [1, 1, 0]
    conflict = anna.post(PLACE, json={**ASKED, **shared, "auxiliary": {"rank": 4}})
    assert "another auxiliary" in refused(conflict, 409, "group_mismatch")


def test_others_sessions_are_as_none(anna: TestClient, client_of: ClientOf, work: Callable[[], None]) -> None:
    ben = client_of("ben", ("cola",))
    session = opened(anna)
    ask(anna, session, "forward_backward", number=0, rows=ROWS)
    work()
    body = save(fresh(session).tensors)
    for name in (session["id"], "cola-" + "0" * 24, "x", "%00"):
        place = f"{PLACE}/{name}"
        answers = [ben.get(place + path) for path in ("", "/operations/0", "/auxiliary", "/gradients/0")]
        answers.append(ben.put(f"{place}/auxiliary?number=1&version=0", content=body))
        answers.append(ben.post(f"{place}/forward_backward", json={"number": 1, "rows": ROWS}))
        answers += [ben.post(f"{place}/{verb}", json={"number": 1}) for verb in ("step", "save")]
        answers.append(ben.post(f"{place}/sample", json={"number": 1, "prompt": "a"}))
        answers.append(ben.delete(place))
        for answer in answers:
            assert "No such session" in refused(answer, 404)
    assert ben.get(PLACE).json()["data"] == []
    assert ben.get(f"{PLACE}?after={session['id']}").status_code == 404
    assert anna.get(f"{PLACE}/{session['id']}").json()["next_number"] == 1


def test_a_closed_session_takes_and_gives_nothing(
    anna: TestClient, catalogue: Catalogue, store: LocalStore, work: Callable[[], None]
) -> None:
    session, stays = opened(anna), opened(anna)
    for one in (session, stays):
        ask(anna, one, "forward_backward", number=0, rows=ROWS)
    work()
    ask(anna, session, "save", number=1)
    place = f"{PLACE}/{session['id']}"
    assert anna.delete(place).json()["status"] == "closed"
    assert anna.delete(place).status_code == 200
    assert anna.get(f"{place}/operations/1").json()["error"]["code"] == "session_closed"
    refused(anna.post(f"{place}/save", json={"number": 2}), 409, "session_closed")
    refused(put(anna, session, fresh(session).tensors, 2), 409, "session_closed")
    for path in ("gradients/0", "auxiliary", "saved/1/files/x"):
        refused(anna.get(f"{place}/{path}"), 410, "session_closed")
    assert sweep_gradients(catalogue, store, closed_for_s=0) == 1
    refused(anna.get(f"{place}/operations/0"), 410, "session_closed")
    left = list(store.list("cola"))
    assert left and all(stays["id"] in key for key in left)
    assert anna.get(f"{PLACE}/{stays['id']}/gradients/0").status_code == 200
    assert [one["status"] for one in anna.get(PLACE).json()["data"]] == ["open", "closed"]


def test_sharing_sessions_keep_their_auxiliary_until_the_last_is_closed(
    anna: TestClient, catalogue: Catalogue, store: LocalStore, work: Callable[[], None]
) -> None:
    first, second = (opened(anna, mode="joint", group="g") for _ in range(2))
    ones = {name: torch.ones_like(t) for name, t in fresh(first).tensors.items()}
    put(anna, first, ones)
    work()
    anna.delete(f"{PLACE}/{first['id']}")
    assert sweep_gradients(catalogue, store, closed_for_s=0) == 1
    found = load(anna.get(f"{PLACE}/{second['id']}/auxiliary").content)
    assert all(torch.equal(found[name], ones[name]) for name in ones)
    anna.delete(f"{PLACE}/{second['id']}")
    assert sweep_gradients(catalogue, store, closed_for_s=0) == 1
    assert list(store.list("cola")) == []


def test_an_idle_session_is_closed(
    base_backend: Backend, settings: ServeConfig, database_url: str, store: LocalStore
) -> None:
    now = [1_800_000_000.0]
    catalogue = Catalogue.open(database_url, lambda: now[0])
    for client_of in clients(Service(base_backend, settings, catalogue, store)):
        anna = client_of("anna")
        session = opened(anna)
        assert settings.gradients is not None and session["expires_at"] == now[0] + settings.gradients.idle_s
        now[0] += settings.gradients.idle_s - 1
        sweep_gradients(catalogue, store)
        assert anna.get(f"{PLACE}/{session['id']}").json()["status"] == "open"
        now[0] += 1
        sweep_gradients(catalogue, store)
        assert anna.get(f"{PLACE}/{session['id']}").json()["status"] == "closed"
        # What was under way when it was closed may write for a while.
        now[0] += SETTLED_S - 1
        assert sweep_gradients(catalogue, store) == 0
        now[0] += 1
        assert [sweep_gradients(catalogue, store) for _ in range(2)] == [1, 0]
    catalogue.close()


def test_the_audit_log_tells_of_sessions_and_auxiliaries(anna: TestClient, catalogue: Catalogue) -> None:
    session = opened(anna)
    put(anna, session, fresh(session).tensors)
    ask(anna, session, "save", number=1)
    anna.delete(f"{PLACE}/{session['id']}")
    lines = [line for line in catalogue.audit.list().items if line.target == session["id"]]
    assert [line.action for line in lines] == ["cola.close", "cola.save", "cola.load", "cola.create"]
    assert all(line.key_id and line.outcome == "ok" for line in lines)


def test_step_is_for_sessions_that_the_server_fits(anna: TestClient) -> None:
    session = opened(anna)
    refused(anna.post(f"{PLACE}/{session['id']}/step", json={"number": 0}), 400, "wrong_fit")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": [10**6]}, "prompt"),
        ({"prompt": [1] * 5000}, "prompt"),
        ({"prompt": "a", "max_tokens": 257}, "max_tokens"),
        ({"prompt": "a", "temperature": 3}, "temperature"),
        ({"prompt": "a", "top_p": 0}, "top_p"),
    ],
)
def test_samples_that_cannot_be_made_are_refused(anna: TestClient, body: dict[str, Any], param: str) -> None:
    session = opened(anna)
    answer = anna.post(f"{PLACE}/{session['id']}/sample", json={"number": 0, **body})
    refused(answer, 400)
    assert answer.json()["error"]["param"].startswith(param)


def test_a_service_without_gradient_learning_has_none(
    base_backend: Backend, settings: ServeConfig, catalogue: Catalogue, store: LocalStore
) -> None:
    without = settings.model_copy(update={"gradients": None})
    for client_of in clients(Service(base_backend, without, catalogue, store)):
        for place in (PLACE, "/v1/cola/sites", f"{PLACE}/x/auxiliary"):
            refused(client_of("anna").get(place), 404, "unknown_url")
        assert not any("cola" in path for path in client_of(None).get("/openapi.json").json()["paths"])


def test_sites_are_those_that_passes_come_to(anna: TestClient, work: Callable[[], None]) -> None:
    listed = anna.get("/v1/cola/sites").json()["data"]
    assert all(not site["name"].endswith("lm_head") for site in listed)
    session = opened(anna, sites=["*"])
    assert session["sites"] == listed
    ask(anna, session, "forward_backward", number=0, rows=ROWS)
    work()
    sites = {site["name"]: site_of(site) for site in listed}
    file = read_gradients(anna.get(f"{PLACE}/{session['id']}/gradients/0").content, sites)
    assert file.pairs.keys() == sites.keys()


def test_requests_by_the_hundred_are_answered_as_the_document_says(anna: TestClient, catalogue: Catalogue) -> None:
    tenant = catalogue.tenants.named("anna")
    catalogue.tenants.change_limits(tenant.id, {"requests_per_minute": 10**6})
    session = opened(anna)
    ask(anna, session, "forward_backward", number=0, rows=ROWS)
    answered = Counter[int]()
    document = schemathesis.openapi.from_asgi("/openapi.json", anna.app)
    operations = [found.ok() for found in document.get_all_operations()]
    operations = [operation for operation in operations if operation.tags == ["Gradient learning"]]
    assert len(operations) == 14
    for operation in operations:
        for mode in schemathesis.GenerationMode:
            fuzz(operation.as_strategy(generation_mode=mode), anna, session["id"], answered)
    assert answered[200] and answered[404] and answered[400] > 20, answered


def fuzz(cases: Any, client: TestClient, session_id: str, answered: Counter[int]) -> None:
    """Send requests of one operation, half of them about a session that is there; none of them waits or closes it."""

    @hypothesis.settings(
        max_examples=EXAMPLES,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(case=cases)
    def send(case: schemathesis.Case) -> None:
        asked = case.path_parameters or {}
        if "session_id" in asked and case.method != "DELETE" and zlib.crc32(repr(asked).encode()) % 2:
            asked["session_id"] = session_id
        if "wait_s" in (case.query or {}):
            case.query["wait_s"] = 0
        response = case.call(session=client, headers={"authorization": client.headers["authorization"]})
        answered[response.status_code] += 1
        case.validate_response(response, checks=CHECKS)

    send()


@pytest.mark.parametrize("family", sorted(TEXT_FAMILIES))
def test_the_http_side_names_the_sites_that_a_worker_reaches(family: str, tmp_path: Path) -> None:
    model = tiny_model(family, depth=2)
    model.save_pretrained(tmp_path)
    reached = reached_sites(model, find_sites(model, "*"))
    known = read_model(ModelConfig(name="m", source=str(tmp_path)))
    wanted: dict[str, Site] = {name: site for name, site in find_sites(model, "*").items() if name in reached}
    assert known.sites == wanted and list(known.sites) == list(wanted)
    assert known.vocabulary == model.config.vocab_size


def test_sites_that_the_owner_does_not_offer_are_as_if_they_were_no_maps(
    base_backend: Backend, settings: ServeConfig, catalogue: Catalogue, store: LocalStore
) -> None:
    assert settings.gradients is not None
    narrow = settings.gradients.model_copy(update={"sites": ("*.layers.0.*",)})
    offering = settings.model_copy(update={"gradients": narrow})
    for client_of in clients(Service(base_backend, offering, catalogue, store)):
        anna = client_of("anna")
        listed = [site["name"] for site in anna.get("/v1/cola/sites").json()["data"]]
        assert listed and all(".layers.0." in name for name in listed)
        assert [site["name"] for site in opened(anna, sites=["*"])["sites"]] == listed
        deeper = listed[0].replace(".layers.0.", ".layers.1.")
        assert listed[0] in refused(anna.post(PLACE, json={**ASKED, "sites": [deeper]}), 400, "site_not_found")
    desk = load_desk(offering, narrow, catalogue, store)
    assert list(desk.base.sites) == listed
