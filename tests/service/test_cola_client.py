"""The customer's device against the real service: learning as by back-propagation, and whatever is cut, killed or
refused on the way."""

from __future__ import annotations

import json
import pickle
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from ot_ray.client import ColaClient, ColaSession, ColaTrainer
from ot_ray.client.cola_files import fetch_saved
from ot_ray.client.cola_state import StateFile
from ot_ray.client.cola_wire import ended, session_state, site_of
from ot_ray.client.http import Http
from ot_ray.cola import CODINGS, Auxiliary, FitConfig
from ot_ray.errors import (
    AlreadyExistsError,
    ArtifactError,
    ConfigError,
    GradientLearningError,
    NotFiniteError,
    ServiceError,
)
from serve.engine.backend import Backend
from serve.stored_gradients import gradients_key
from tests.fixtures.tcp_proxy import TcpProxy
from tests.service.cola_scene import (
    AUXILIARY,
    LR,
    SITES,
    WAIT_S,
    Backpropagation,
    ColaScene,
    batches,
    cola_service,
    same,
    until,
)

ROOT = Path(__file__).parents[2]
RTOL, ATOL = 2e-3, 2e-5  # of float32, where sums are made in another order


@pytest.fixture(scope="module")
def scene(
    tmp_path_factory: pytest.TempPathFactory, checkpoint: Path, empty_database: Path, base_backend: Backend
) -> Iterator[ColaScene]:
    with cola_service(tmp_path_factory.mktemp("cola"), checkpoint, empty_database, base_backend) as running:
        yield running
    until(lambda: not any(thread.name == "cola-gradients" for thread in threading.enumerate()))


@pytest.fixture
def client(scene: ColaScene) -> ColaClient:
    return scene.client()


@pytest.fixture
def session(client: ColaClient) -> Iterator[ColaSession]:
    opened = client.create(SITES, auxiliary=AUXILIARY)
    yield opened
    opened.close()


def opened(client: ColaClient, **more: Any) -> ColaSession:
    return client.create(SITES, auxiliary=AUXILIARY, **more)


@pytest.mark.parametrize("interval", [1, 4])
def test_ten_steps_equal_back_propagation(session: ColaSession, base: PreTrainedModel, interval: int) -> None:
    trainer = ColaTrainer(session, FitConfig(lr=LR, interval=interval))
    beside = Backpropagation(base, trainer.auxiliary.copy().tensors, interval)
    data = batches(10)
    losses = [beside.train_batch(rows) for rows in data]
    beside.flush()
    trained = list(trainer.train(data))
    assert trainer.flush() is (interval == 4)
    assert [one.loss for one in trained] == pytest.approx(losses, rel=1e-5)
    assert [one.fitted for one in trained] == [batch % interval == interval - 1 for batch in range(10)]
    assert trainer.settle() == (10 if interval == 1 else 3)
    present, version = session.auxiliary()
    assert (version, same(present, trainer.auxiliary.tensors)) == (trainer.settle(), True)
    start = Auxiliary(session.sites, AUXILIARY)
    for name, wanted in beside.tensors.items():
        torch.testing.assert_close(present.tensors[name], wanted, rtol=RTOL, atol=ATOL)
        assert not torch.allclose(start.tensors[name], wanted, rtol=RTOL, atol=ATOL)


def test_batch_by_batch_is_the_same_to_the_last_bit(client: ColaClient) -> None:
    data = batches(6)
    ends = []
    for overlapped in (True, False):
        session = opened(client)
        trainer = ColaTrainer(session, FitConfig(lr=LR, interval=3))
        trained = list(trainer.train(data)) if overlapped else [trainer.train_batch(rows) for rows in data]
        ends.append((trained, trainer.auxiliary))
        session.close()
    assert ends[0][0] == ends[1][0]
    assert same(ends[0][1], ends[1][1].tensors)


@pytest.mark.parametrize("coding", CODINGS[1:])
def test_codings_cost_what_they_say_and_still_learn(session: ColaSession, coding: str) -> None:
    (rows,) = batches(1)
    whole = session.forward_backward(rows).gradients()
    coded = session.forward_backward(rows, coding).gradients()
    lost, size = {"x": 0.0, "g": 0.0}, {"x": 0.0, "g": 0.0}
    seen: set[int] = set()
    for name, pair in whole.pairs.items():
        for side in lost:
            wanted, found = getattr(pair, side), getattr(coded.pairs[name], side).float()
            if wanted.data_ptr() not in seen:
                seen.add(wanted.data_ptr())
                lost[side] += (found - wanted).double().square().sum().item()
                size[side] += wanted.double().square().sum().item()
    assert coded.errors == pytest.approx({side: (lost[side] / size[side]) ** 0.5 for side in lost}, rel=1e-3)
    assert 0 < max(coded.errors.values()) < 0.05
    trainer = ColaTrainer(session, FitConfig(lr=LR), coding=coding)
    trained = [trainer.train_batch(rows) for _ in range(8)]
    assert all(one.errors.keys() == {"x", "g"} for one in trained)
    losses = [one.loss for one in trained]
    assert all(loss is not None for loss in losses)
    assert losses[-1] < 0.97 * losses[0]  # type: ignore[operator]


def test_the_four_calls_of_a_thin_client(client: ColaClient, base: PreTrainedModel, tmp_path: Path) -> None:
    session = opened(client, fit="server", fitting=FitConfig(lr=LR))
    beside = Backpropagation(base, session.auxiliary()[0].tensors)
    for step, rows in enumerate(batches(3), 1):
        passed = session.forward_backward(rows)
        assert session.step().result(WAIT_S) == step
        assert passed.result().loss == pytest.approx(beside.train_batch(rows), rel=1e-5)
    text = session.sample([5, 6, 7], max_tokens=5, temperature=0).result(WAIT_S)
    assert text == session.sample([5, 6, 7], max_tokens=5, temperature=0).result(WAIT_S)
    folder = session.save(tmp_path / "saved")
    assert folder == tmp_path / "saved"
    assert {path.name for path in folder.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    with pytest.raises(AlreadyExistsError, match="already there"):
        session.save(folder)
    for name, wanted in beside.tensors.items():
        torch.testing.assert_close(session.auxiliary()[0].tensors[name], wanted, rtol=RTOL, atol=ATOL)
    session.close()


def test_two_clients_at_once_do_not_meet(scene: ColaScene, base: PreTrainedModel) -> None:
    ends: dict[str, tuple[list[float | None], Auxiliary]] = {}
    seeds = {"anna": 1, "otto": 2}

    def learn(tenant: str) -> None:
        session = opened(scene.client(tenant))
        trainer = ColaTrainer(session, FitConfig(lr=LR, interval=2))
        ends[tenant] = [one.loss for one in trainer.train(batches(6, seed=seeds[tenant]))], trainer.auxiliary
        trainer.settle()
        session.close()

    threads = [threading.Thread(target=learn, args=(tenant,)) for tenant in seeds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert ends.keys() == seeds.keys()
    for tenant, seed in seeds.items():
        beside = Backpropagation(base, Auxiliary(ends[tenant][1].sites, AUXILIARY).tensors, interval=2)
        assert ends[tenant][0] == pytest.approx([beside.train_batch(rows) for rows in batches(6, seed=seed)], rel=1e-5)
        for name, wanted in beside.tensors.items():
            torch.testing.assert_close(ends[tenant][1].tensors[name].detach(), wanted, rtol=RTOL, atol=ATOL)


def test_a_download_that_is_cut_goes_on_where_it_was(session: ColaSession, monkeypatch: pytest.MonkeyPatch) -> None:
    future = session.forward_backward(batches(1, rows=16, longest=100)[0])
    whole, size = future.gradients(), future.result().bytes
    asked: list[str | None] = []
    stream = Http.stream

    class Cut:
        """An answer whose connection breaks after a third of the file."""

        def __init__(self, response: Any) -> None:
            self._response, self._left = response, size // 3

        def __getattr__(self, name: str) -> Any:
            return getattr(self._response, name)

        def read(self, size: int) -> bytes:
            if not self._left:
                raise ConnectionResetError("cut")
            data = self._response.read(min(size, self._left))
            self._left -= len(data)
            return data

    @contextmanager
    def cut(http: Http, path: str, headers: dict[str, str]) -> Iterator[Any]:
        asked.append(headers.get("range"))
        with stream(http, path, headers) as response:
            yield Cut(response) if len(asked) <= 2 else response

    monkeypatch.setattr(Http, "stream", cut)
    found = future.gradients()
    assert asked == [None, f"bytes={size // 3}-", f"bytes={2 * (size // 3)}-"]
    for name, pair in whole.pairs.items():
        assert torch.equal(pair.x, found.pairs[name].x)
        assert torch.equal(pair.g, found.pairs[name].g)


def test_learning_goes_on_through_a_network_that_breaks(scene: ColaScene) -> None:
    data, fitting = batches(4, rows=6), FitConfig(lr=LR, interval=2)
    undisturbed = ColaTrainer(opened(scene.client()), fitting)
    trained = list(undisturbed.train(data))
    proxy, ended, chance = TcpProxy(scene.port), threading.Event(), random.Random(0)
    session, cuts = opened(scene.client(port=proxy.port)), 0

    def cut() -> None:
        nonlocal cuts
        for place in range(9):
            if place < 8:
                proxy.cut_after_brought = proxy.brought + chance.randint(500, 120_000)
            # Only now, so that nothing comes through uncounted.
            proxy.restore()
            while not proxy.is_cut.wait(0.05):
                if ended.is_set():
                    return
            cuts += 1

    thread = threading.Thread(target=cut)
    thread.start()
    try:
        trainer = ColaTrainer(session, fitting)
        assert list(trainer.train(data)) == trained
        trainer.settle()
    finally:
        ended.set()
        thread.join(WAIT_S)
        proxy.close()
    assert cuts >= 4
    assert same(trainer.auxiliary, undisturbed.auxiliary.tensors)


class Killed(BaseException):
    """The process would be gone here."""


def _kills(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Let the process end before or after the `after`th thing that it does to the world outside."""
    left = iter(range(after, -1, -1))
    lock = threading.Lock()

    def dying(act: Callable[..., Any]) -> Callable[..., Any]:
        def acted(*args: Any, **kwargs: Any) -> Any:
            with lock:
                place = next(left, 0)
            if place == 0:
                raise Killed
            done = act(*args, **kwargs)
            if place == 1:
                raise Killed
            return done

        return acted

    monkeypatch.setattr(Http, "answer", dying(Http.answer))
    monkeypatch.setattr(Http, "stream", dying(Http.stream))
    monkeypatch.setattr(StateFile, "write", dying(StateFile.write))


@pytest.mark.parametrize("seed", range(4))
def test_a_client_that_is_killed_anywhere_resumes_exactly(client: ColaClient, tmp_path: Path, seed: int) -> None:
    data, fitting = batches(7), FitConfig(lr=LR, interval=3)
    undisturbed = ColaTrainer(opened(client), fitting)
    losses = [one.loss for one in undisturbed.train(data)]
    undisturbed.flush()
    session_id, chance = opened(client).id, random.Random(seed)
    found: dict[int, float | None] = {}
    for life in range(200):
        with pytest.MonkeyPatch.context() as patched:
            trainer = ColaTrainer(client.resume(session_id), fitting, tmp_path)
            if life < 12:
                _kills(patched, chance.randint(0, 14))
            try:
                for one in trainer.train(data[trainer.batches :]):
                    found[one.batch] = one.loss
                trainer.flush()
                trainer.settle()
                break
            except Killed:
                until(lambda: not any(thread.name == "cola-gradients" for thread in threading.enumerate()))
    else:
        raise AssertionError("it never came to the end")
    assert life >= 2
    trainer = ColaTrainer(client.resume(session_id), fitting, tmp_path)
    assert (trainer.batches, trainer.refused, trainer.fitter.steps) == (7, 0, 3)
    assert found.items() <= dict(enumerate(losses)).items()
    assert same(trainer.auxiliary, undisturbed.auxiliary.tensors)
    present, version = client.resume(session_id).auxiliary()
    assert same(present, trainer.auxiliary.tensors)
    assert version == 3


DEVICE = """
import json, sys
from ot_ray.client import ColaClient, ColaTrainer
from ot_ray.cola import FitConfig

# The base install is enough.
assert not {"ray", "fastapi", "sqlalchemy"} & set(sys.modules)
url, key, session, folder, fitting, data = json.loads(sys.stdin.read())
trainer = ColaTrainer(ColaClient(url, key).resume(session), FitConfig(**fitting), folder)
for one in trainer.train(data[trainer.batches :]):
    pass
"""


def test_a_process_that_is_killed_resumes_exactly(scene: ColaScene, tmp_path: Path) -> None:
    data, fitting = batches(300, rows=2), {"lr": LR, "interval": 2}
    key = scene.key("device")
    session = opened(ColaClient(scene.url, key))
    process = subprocess.Popen([sys.executable, "-c", DEVICE], stdin=subprocess.PIPE, cwd=ROOT)
    try:
        assert process.stdin is not None
        process.stdin.write(json.dumps([scene.url, key, session.id, str(tmp_path), fitting, data]).encode())
        process.stdin.close()
        file = StateFile(tmp_path)
        until(lambda: ((state := file.read()) is not None and state["batches"] >= 5) or process.poll() is not None)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        assert process.wait(WAIT_S) == -signal.SIGKILL
    trainer = ColaTrainer(ColaClient(scene.url, key).resume(session.id), FitConfig(**fitting), tmp_path)
    done = trainer.batches
    assert 5 <= done < 290
    end = done + 4
    assert [one.batch for one in trainer.train(data[done:end])] == list(range(done, end))
    undisturbed = ColaTrainer(opened(scene.client()), FitConfig(**fitting))
    for _ in undisturbed.train(data[:end]):
        pass
    assert trainer.fitter.steps == undisturbed.fitter.steps == end // 2
    assert same(trainer.auxiliary, undisturbed.auxiliary.tensors)


def test_what_is_not_finite_is_refused_and_the_session_goes_on(session: ColaSession) -> None:
    rows, sane = batches(1)[0], session.auxiliary()[0]
    wild = sane.copy()
    for name, tensor in wild.tensors.items():
        tensor.fill_(1e30 if "lora_B" in name else 1.0)
    assert session.upload(wild, 0).result(WAIT_S) == 1
    with pytest.raises(NotFiniteError):
        session.forward_backward(rows).result(WAIT_S)
    trainer = ColaTrainer(session, FitConfig(lr=LR, interval=2))
    trained = trainer.train_batch(rows)
    assert (trained.batch, trained.loss, trained.fitted) == (0, None, False)
    assert trained.refused is not None and "finite" in trained.refused
    assert (trainer.batches, trainer.refused, trainer.fitter.collected) == (1, 1, 0)
    assert session.upload(sane, 1).result(WAIT_S) == 2
    trainer = ColaTrainer(session, FitConfig(lr=LR))
    assert trainer.train_batch(rows).fitted
    assert trainer.settle() == 3


def test_a_fit_that_runs_away_is_not_sent(session: ColaSession, tmp_path: Path) -> None:
    data, wild = batches(2), FitConfig(optimizer="sgd", lr=3e38, weight_decay=1e6, interval=2)
    trainer = ColaTrainer(session, wild, tmp_path)
    assert trainer.train_batch(data[0]).refused is None
    with pytest.raises(NotFiniteError, match=r"fit 1 made \S+ infinite"):
        trainer.train_batch(data[1])
    assert session.state().version == 0
    again = ColaTrainer(session, wild, tmp_path)
    assert (again.batches, again.fitter.collected) == (1, 1)


def test_gradients_of_another_version_are_refused(session: ColaSession) -> None:
    trainer = ColaTrainer(session, FitConfig(lr=LR))
    rows = batches(1)[0]
    # Somebody else's hand on the same session.
    session.upload(session.auxiliary()[0], 0).result(WAIT_S)
    with pytest.raises(GradientLearningError, match="of version 1, not 0"):
        trainer.train_batch(rows)
    assert (trainer.batches, trainer.fitter.steps) == (0, 0)


def test_a_file_that_is_not_what_the_service_said_is_refused(scene: ColaScene, session: ColaSession) -> None:
    (rows,) = batches(1)
    sizes = [session.forward_backward(rows).result(WAIT_S).bytes for _ in range(2)]
    first, second = (gradients_key(scene.catalogue.gradient_operations.find(session.id, number)) for number in (0, 1))
    scene.store.write(first, scene.store.read(second))
    with pytest.raises(ArtifactError, match="sha256"):
        session.forward_backward(rows, number=0).gradients()
    assert sizes[0] == sizes[1]
    assert session.forward_backward(rows, number=1).gradients().number == 1


@pytest.mark.parametrize("name", ["../evil", "", ".hidden", "a/b", "a" * 129, "a\n"])
def test_saved_files_with_names_that_lead_elsewhere_are_refused(tmp_path: Path, name: str) -> None:
    files = [{"name": name, "bytes": 1, "sha256": "0" * 64}]
    with pytest.raises(ServiceError, match="names a file"):
        fetch_saved(Http("http://127.0.0.1:9", "sk-x"), "/v1/x", files, tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


def test_answers_that_are_not_understood_say_so() -> None:
    for read, value in ((session_state, {}), (session_state, {"id": 1, "sites": 2}), (site_of, {"name": "q"})):
        with pytest.raises(ServiceError, match="does not know; update ot_ray"):
            read(value)
    with pytest.raises(ServiceError, match="does not know"):
        ended({"status": "lost"}, "cola-1")
    failed = {"status": "failed", "kind": "step", "number": 1, "error": {"message": "no", "code": "not_finite"}}
    with pytest.raises(NotFiniteError, match="step 1 failed: no"):
        ended(failed, "cola-1")
    error = pickle.loads(pickle.dumps(ServiceError("no", 409, "number_taken")))
    assert (str(error), error.status, error.code) == ("no", 409, "number_taken")


def test_the_service_s_refusals_are_told(client: ColaClient, session: ColaSession) -> None:
    with pytest.raises(ServiceError, match=r"model\.decoder\.layers\.0\.self_attn\.q_proj"):
        client.create("*.q_prox")
    with pytest.raises(ServiceError) as caught:
        client.resume("cola-0")
    assert caught.value.status == 404
    other = Auxiliary(session.sites, AUXILIARY.model_copy(update={"rank": 5}))
    with pytest.raises((ServiceError, GradientLearningError)):
        session.upload(other, 0).result(WAIT_S)
    with pytest.raises(ServiceError) as caught:
        session.upload(session.auxiliary()[0], 7).result(WAIT_S)
    assert caught.value.status == 409
    with pytest.raises(GradientLearningError, match="no rows"):
        session.forward_backward([])
    with pytest.raises(GradientLearningError, match="a row has"):
        session.forward_backward([{"ids": [1, 2]}])


def test_what_a_client_finds(client: ColaClient, session: ColaSession) -> None:
    sites = client.sites()
    assert session.sites.items() <= sites.items()
    assert {name.rpartition(".")[2] for name in session.sites} == {"q_proj", "v_proj"}
    found = {one.id: one for one in client.sessions()}[session.id]
    assert found == session.state()
    assert (found.status, found.fit, found.mode, found.auxiliary) == ("open", "client", "alone", AUXILIARY)
    assert session.settings.next_number == session.next_number == 0
    assert repr(client) not in ("", None) and "sk-" not in repr(client) + repr(session)


def test_a_pass_that_is_asked_for_again_is_made_once(client: ColaClient, session: ColaSession) -> None:
    (rows,) = batches(1)
    first = session.forward_backward(rows)
    again = client.resume(session.id).forward_backward(rows, number=0)
    assert (first.number, again.number, session.state().next_number) == (0, 0, 1)
    assert first.result(WAIT_S) == again.result(WAIT_S)
    with pytest.raises(ServiceError) as caught:
        client.resume(session.id).forward_backward(batches(1, seed=1)[0], number=0)
    assert caught.value.status == 409


def test_a_trainer_whose_loop_was_left_goes_on(session: ColaSession) -> None:
    data = batches(6)
    trainer = ColaTrainer(session, FitConfig(lr=LR, interval=3))
    loop = trainer.train(data)
    next(loop)
    with pytest.raises(GradientLearningError, match="under way"):
        trainer.train_batch(data[1])
    with pytest.raises(GradientLearningError, match="under way"):
        trainer.flush()
    loop.close()
    for _ in trainer.train(data[trainer.batches :]):
        pass
    # Passes that were under way when the loop was left were not made again: six, and two fits.
    assert trainer.settle() == 2
    assert session.next_number == 8
    assert trainer.batches == 6


def test_trainers_that_cannot_be(client: ColaClient, session: ColaSession, tmp_path: Path) -> None:
    server = opened(client, fit="server")
    with pytest.raises(GradientLearningError, match="fitted by the service"):
        ColaTrainer(server)
    ColaTrainer(session, FitConfig(lr=LR), tmp_path).train_batch(batches(1)[0])
    with pytest.raises(GradientLearningError, match="state is of fitting"):
        ColaTrainer(session, FitConfig(lr=2 * LR), tmp_path)
    other = opened(client)
    with pytest.raises(GradientLearningError, match=f"state is of session {session.id}"):
        ColaTrainer(other, FitConfig(lr=LR), tmp_path)
    (tmp_path / "trainer.safetensors").write_bytes(b"something else")
    with pytest.raises(GradientLearningError, match="no state of a trainer"):
        ColaTrainer(session, FitConfig(lr=LR), tmp_path)
    for one in (server, other):
        one.close()


def test_a_client_without_a_key_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OT_RAY_API_KEY", raising=False)
    with pytest.raises(ConfigError, match="there is no key"):
        ColaClient("http://127.0.0.1:9")
