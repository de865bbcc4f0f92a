from __future__ import annotations

import sqlite3
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import PreTrainedModel

from ot_ray.cola import Auxiliary, BasePass, CustomerRows, Mode, Pair, Passed, find_sites
from ot_ray.errors import StoreUnavailableError
from ot_ray.store import LocalStore
from serve.catalogue import Catalogue
from serve.catalogue.records import GradientSession
from serve.gradients.leases import HeldOperations
from serve.gradients.worker import GradientWorker
from serve.stored_gradients import gradients_key, saved_prefix
from tests.http.tiny_service import END, byte_model, tokens_of
from tests.service.gradient_scene import Scene, auxiliary_of, by_autograd, desk_of, rows_of

TOLERANCE = {"rtol": 2e-4, "atol": 2e-5}
"""Of float32, whose sums come in another order in a batch."""
PATIENCE_S = 120.0


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return byte_model(seed=3, depth=2).requires_grad_(False)


@pytest.fixture
def scene(catalogue: Catalogue, store: LocalStore, model: PreTrainedModel) -> Scene:
    return Scene(catalogue, store, model)


def finish(worker: GradientWorker) -> None:
    """Rounds until nothing is runnable."""
    while worker.round():
        pass


def assert_close(found: dict[str, Pair], wanted: dict[str, Pair]) -> None:
    assert found.keys() == wanted.keys()
    for site in wanted:
        torch.testing.assert_close(found[site].x, wanted[site].x, **TOLERANCE)
        torch.testing.assert_close(found[site].g, wanted[site].g, **TOLERANCE)


def test_a_pass_yields_what_autograd_does(scene: Scene, model: PreTrainedModel, tmp_path: Path) -> None:
    session, rows = scene.session(), rows_of(1, 9, 12)
    own = auxiliary_of(session, model, seed=5)
    scene.upload(session, own.tensors, version=0)
    number = scene.forward_backward(session, rows, skipped=3)
    finish(scene.worker())

    loss, pairs = by_autograd(model, [(1.0, own)], own, rows, skipped=3)
    result = scene.result(session, number)
    assert result["loss"] == pytest.approx(loss, rel=1e-5)
    assert (result["tokens"], result["rows"], result["coding"], result["errors"]) == (6 + 9, 2, "none", None)
    file = scene.gradients(session, number, tmp_path)
    assert (file.session, file.number, file.version) == (session.id, number, 1)
    assert_close(file.pairs, pairs)
    assert result["bytes"] == scene.store.info(gradients_key(scene.found(session, number))).size
    assert scene.found(session, number).version == 1


class CountingPass(BasePass):
    """Knows whose rows each pass had."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model, find_sites(model, "*"), device="cpu")
        self.passes: list[CustomerRows] = []

    def forward(self, rows: CustomerRows, mode: Mode, **more: Any) -> Passed:
        self.passes.append(rows)
        return super().forward(rows, mode, **more)


def test_sessions_of_all_modes_and_kinds_share_one_pass(scene: Scene, model: PreTrainedModel, tmp_path: Path) -> None:
    linear = {"kind": "linear"}
    mlp = {"kind": "mlp", "rank": 3, "alpha": 3.0, "seed": 2}
    sessions = [
        scene.session("anna"),
        scene.session("anna", auxiliary=mlp, sites=["*.q_proj"]),
        scene.session("ben", mode="joint", group="us"),
        scene.session("ben", mode="joint", group="us"),
        scene.session("carl", mode="collaboration", group="us"),
        scene.session("carl", mode="collaboration", group="us", auxiliary=linear, sites=["*.fc1", "*.v_proj"]),
        scene.session("carl", mode="collaboration", group="others"),
    ]
    assert sessions[2].auxiliary_id == sessions[3].auxiliary_id
    own = [auxiliary_of(session, model, seed=seed) for seed, session in enumerate(sessions)]
    own[3] = own[2]
    for session, auxiliary in zip(sessions, own, strict=True):
        if session is not sessions[3]:
            scene.upload(session, auxiliary.tensors, version=0)
    finish(scene.worker())
    rows = [rows_of(10 + i, *lengths) for i, lengths in enumerate([(5,), (7, 4), (6,), (9,), (8, 3), (5,), (6, 6)])]
    numbers = [scene.forward_backward(session, some) for session, some in zip(sessions, rows, strict=True)]
    base = CountingPass(model)
    finish(GradientWorker(desk_of(scene.catalogue, scene.store, model, base, max_rows=64)))

    assert [len(one.customers) for one in base.passes] == [10]
    through = [[(1.0, auxiliary)] for auxiliary in own]
    through[4] = through[5] = [(0.5, own[4]), (0.5, own[5])]
    for session, number, some, sums, auxiliary in zip(sessions, numbers, rows, through, own, strict=True):
        loss, pairs = by_autograd(model, sums, auxiliary, some)
        assert scene.result(session, number)["loss"] == pytest.approx(loss, rel=1e-5)
        assert_close(scene.gradients(session, number, tmp_path).pairs, pairs)


def test_a_pass_holds_no_more_than_it_may(scene: Scene, model: PreTrainedModel) -> None:
    lengths = [(4,), (20, 20), (5, 5), (18,), (6,)]
    for i, some in enumerate(lengths):
        scene.forward_backward(scene.session(f"tenant{i}"), rows_of(i, *some))
    base = CountingPass(model)
    finish(
        GradientWorker(
            desk_of(scene.catalogue, scene.store, model, base, max_rows=5, max_tokens=60, operation_tokens=60)
        )
    )
    shapes = [tuple(one.input_ids.shape) for one in base.passes]
    assert sum(rows for rows, _ in shapes) == 7
    assert all(rows <= 5 and rows * longest <= 60 for rows, longest in shapes)
    assert (3, 20) in shapes, "rows of similar length go together"


def peft_losses(model: PreTrainedModel, session: GradientSession, batches: list[list[list[int]]]) -> list[float]:
    """Losses of LoRA by back-propagation and AdamW from the session's own start, and a last one without a step."""
    config = session.settings["auxiliary"]
    names = [site["name"] for site in session.settings["sites"]]
    plain = byte_model(seed=3, depth=2)
    tuned = get_peft_model(
        plain, LoraConfig(r=config["rank"], lora_alpha=config["alpha"], target_modules=names, lora_dropout=0.0)
    )
    start = auxiliary_of(session, model).tensors
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                parameter.copy_(start[name.removeprefix("base_model.model.").replace(".default", "")])
    learnt = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learnt, lr=session.settings["fitting"]["lr"], weight_decay=0.0)
    losses = []
    for batch in batches:
        sums, count = torch.zeros(()), 0
        for row in batch:
            logits = tuned(torch.tensor([row])).logits[0, :-1]
            sums = sums + F.cross_entropy(logits, torch.tensor(row[1:]), reduction="sum")
            count += len(row) - 1
        loss = sums / count
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


def test_ten_fits_of_the_server_are_ten_steps_of_lora(scene: Scene, model: PreTrainedModel) -> None:
    session = scene.session(fit="server", interval=1)
    batches = [rows_of(i, 8, 11) for i in range(11)]
    numbers = [scene.forward_backward(session, batch) for batch in batches]
    # No state stays in memory between two rounds.
    finish(scene.worker(cached_bytes=0))
    results = [scene.result(session, number) for number in numbers]
    assert [result["fits"] for result in results] == list(range(1, 12))
    assert [result["bytes"] for result in results] == [0] * 11
    wanted = peft_losses(model, session, batches)
    assert [result["loss"] for result in results] == pytest.approx(wanted, rel=1e-4)
    start = auxiliary_of(session, model)
    assert abs(wanted[10] - by_autograd(model, [(1.0, start)], start, batches[10])[0]) > 0.01, "it learns"


def test_the_server_fits_when_asked_and_exactly_what_was_collected(scene: Scene, model: PreTrainedModel) -> None:
    asked, counted = scene.session(fit="server"), scene.session(fit="server", interval=3)
    for i in range(3):
        scene.forward_backward(asked, rows_of(i, 6))
        scene.forward_backward(counted, rows_of(i, 6))
    step = scene.ask(asked, "step")
    nothing = scene.ask(asked, "step")
    finish(scene.worker())
    assert scene.result(asked, step) == {"fits": 1}
    assert scene.result(asked, nothing) == {"fits": 1}
    assert scene.found(asked, nothing).version == scene.found(asked, step).version
    one, other = scene.present(asked).tensors, scene.present(counted).tensors
    for name in one:
        assert torch.equal(one[name], other[name])
    start = auxiliary_of(asked, model).tensors
    assert not torch.equal(
        one["model.decoder.layers.0.fc1.lora_B.weight"], start["model.decoder.layers.0.fc1.lora_B.weight"]
    )


def test_a_shared_auxiliary_is_never_fitted_to_gradients_of_an_older_one(scene: Scene, model: PreTrainedModel) -> None:
    together = [scene.session("anna", mode="joint", group="us", fit="server", interval=2) for _ in range(3)]
    in_turn = scene.session("ben", fit="server", interval=2)
    for i in range(6):
        scene.forward_backward(together[i % 3], rows_of(i, 6))
        scene.forward_backward(in_turn, rows_of(i, 6))
    base = CountingPass(model)
    finish(GradientWorker(desk_of(scene.catalogue, scene.store, model, base)))
    assert max(len(one.customers) for one in base.passes) == 3, "two of the group, and the other tenant's"
    one, other = scene.present(together[0]).tensors, scene.present(in_turn).tensors
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-5)


def test_what_is_in_memory_is_what_the_store_has(scene: Scene) -> None:
    warm, cold = (scene.session(fit="server", interval=2, auxiliary={"rank": 2, "seed": 7}) for _ in range(2))
    for i in range(5):
        scene.forward_backward(warm, rows_of(i, 7))
    finish(scene.worker())
    for i in range(5):
        scene.forward_backward(cold, rows_of(i, 7))
        finish(scene.worker(cached_bytes=0))
    one, other = scene.present(warm).tensors, scene.present(cold).tensors
    assert all(torch.equal(one[name], other[name]) for name in one)
    states = list(scene.store.list(f"cola/{warm.tenant_id}/{warm.auxiliary_id}"))
    assert len(states) == 4, "the present state and the one before, each with its fitter's"


def test_a_session_that_goes_wrong_goes_wrong_alone(scene: Scene, model: PreTrainedModel, tmp_path: Path) -> None:
    good = [scene.session("anna"), scene.session("ben", auxiliary={"kind": "linear"})]
    bad = scene.session("carl")
    for seed, session in enumerate(good):
        scene.upload(session, auxiliary_of(session, model, seed=seed).tensors, version=0)
    scene.upload(bad, auxiliary_of(bad, model, seed=9).tensors, version=0)
    rows = [rows_of(1, 6), rows_of(2, 8, 5)]
    worker = scene.worker()

    def passed() -> tuple[list[dict[str, Pair]], int]:
        numbers = [scene.forward_backward(session, some) for session, some in zip(good, rows, strict=True)]
        number = scene.forward_backward(bad, rows_of(3, 7))
        finish(worker)
        return [scene.gradients(*one, tmp_path).pairs for one in zip(good, numbers, strict=True)], number

    healthy, _ = passed()
    huge = {name: torch.full_like(tensor, 1e30) for name, tensor in auxiliary_of(bad, model).tensors.items()}
    loaded = scene.upload(bad, huge, version=1)
    beside, number = passed()
    assert scene.result(bad, loaded) == {}
    failed = scene.found(bad, number)
    assert failed.status == "failed"
    assert failed.error is not None
    assert (failed.error["code"], failed.error["type"]) == ("not_finite", "invalid_request_error")
    for one, other in zip(healthy, beside, strict=True):
        for site in one:
            assert torch.equal(one[site].x, other[site].x)
            assert torch.equal(one[site].g, other[site].g)
    scene.upload(bad, auxiliary_of(bad, model, seed=9).tensors, version=2)
    _, again = passed()
    assert scene.result(bad, again)["tokens"] == 6, "the session goes on"


def test_a_fit_that_diverges_is_undone(scene: Scene, model: PreTrainedModel) -> None:
    session = scene.session(
        fit="server", interval=1, fitting={"optimizer": "sgd", "lr": 1e38}, auxiliary={"alpha": 1e9}
    )
    number = scene.forward_backward(session, rows_of(1, 8))
    finish(scene.worker())
    failed = scene.found(session, number)
    assert (failed.status, (failed.error or {})["code"]) == ("failed", "not_finite")
    assert scene.catalogue.gradient_sessions.auxiliary(session.auxiliary_id).version == 0
    step = scene.ask(session, "step")
    finish(scene.worker())
    assert scene.result(session, step) == {"fits": 0}


@pytest.mark.parametrize("fault", ["version", "shape", "name", "nan", "bytes"])
def test_an_upload_that_does_not_fit_is_refused_and_changes_nothing(
    scene: Scene, model: PreTrainedModel, fault: str
) -> None:
    session = scene.session()
    tensors = dict(auxiliary_of(session, model, seed=1).tensors)
    name = next(iter(tensors))
    if fault == "shape":
        tensors[name] = tensors[name].t()
    elif fault == "name":
        tensors["other"] = tensors.pop(name)
    elif fault == "nan":
        tensors[name] = tensors[name] * torch.nan
    number = scene.upload(session, tensors, version=1 if fault == "version" else 0)
    if fault == "bytes":
        scene.store.write(scene.found(session, number).request["key"], b"no safetensors")
    after = scene.forward_backward(session, rows_of(1, 6))
    finish(scene.worker())
    failed = scene.found(session, number)
    assert failed.status == "failed"
    assert failed.error is not None
    assert failed.error["type"] == "invalid_request_error"
    assert failed.error["code"] == {"version": "version_conflict", "nan": "not_finite"}.get(fault)
    assert scene.result(session, after)["tokens"] == 5
    assert scene.found(session, after).version == 0


def test_rows_that_would_break_the_pass_fail_alone(scene: Scene) -> None:
    wrong = [[[5, 9999, 3]], [[4] * 500], [[]], []]
    bad = [scene.session("anna") for _ in wrong]
    numbers = [scene.forward_backward(session, rows) for session, rows in zip(bad, wrong, strict=True)]
    head = scene.session("anna", sites=["lm_head"])
    headless = scene.forward_backward(head, rows_of(1, 6))
    good = scene.session("ben")
    fine = scene.forward_backward(good, rows_of(1, 6))
    finish(scene.worker())
    for session, number in zip(bad, numbers, strict=True):
        assert "rows" in (scene.found(session, number).error or {})["param"]
    assert (scene.found(head, headless).error or {})["code"] == "site_not_reached"
    assert scene.result(good, fine)["rows"] == 1


class NarrowPass(CountingPass):
    """Has memory for three rows."""

    def forward(self, rows: CustomerRows, mode: Mode, **more: Any) -> Passed:
        if len(rows.customers) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().forward(rows, mode, **more)


def test_what_does_not_fit_into_memory_is_halved_until_it_does(scene: Scene, model: PreTrainedModel) -> None:
    small = [scene.session(f"tenant{i}") for i in range(5)]
    numbers = [scene.forward_backward(session, rows_of(i, 6)) for i, session in enumerate(small)]
    large = scene.session("large")
    refused = scene.forward_backward(large, rows_of(9, 6, 6, 6, 6))
    base = NarrowPass(model)
    finish(GradientWorker(desk_of(scene.catalogue, scene.store, model, base)))
    for session, number in zip(small, numbers, strict=True):
        assert scene.result(session, number)["tokens"] == 5
    error = scene.found(large, refused).error
    assert error is not None
    assert error["code"] == "too_large"


def test_another_tenants_queue_makes_nobody_wait(scene: Scene) -> None:
    for _ in range(20):
        greedy = scene.session("greedy")
        for i in range(5):
            scene.forward_backward(greedy, rows_of(i, 4))
    modest = scene.session("modest")
    number = scene.forward_backward(modest, rows_of(1, 4))
    worker = scene.worker(max_rows=8)
    worker.round()
    assert scene.result(modest, number)["rows"] == 1
    assert worker.ended[0] <= 8 + 8
    worker.close()


def test_gradients_that_nobody_needs_any_more_go(scene: Scene) -> None:
    session, worker = scene.session(), scene.worker()
    numbers = [scene.forward_backward(session, rows_of(i, 5)) for i in range(4)]
    finish(worker)
    there = [scene.store.exists(gradients_key(scene.found(session, number))) for number in numbers]
    assert there == [False, False, True, True]


class Interrupted(LocalStore):
    """Does something before it takes its first file, or gives its first one."""

    def __init__(self, root: Path, interrupt: Any, method: str = "upload") -> None:
        super().__init__(root)
        self._interrupt, self._method = interrupt, method

    def upload(self, *args: Any, **more: Any) -> Any:
        self._called("upload")
        return super().upload(*args, **more)

    def download(self, *args: Any, **more: Any) -> None:
        self._called("download")
        super().download(*args, **more)

    def _called(self, method: str) -> None:
        if method == self._method and self._interrupt is not None:
            interrupt, self._interrupt = self._interrupt, None
            interrupt()


def test_a_version_that_goes_while_it_is_read_is_read_anew(
    scene: Scene, model: PreTrainedModel, tmp_path: Path
) -> None:
    fitted = scene.session(mode="collaboration", group="us", fit="server", interval=1)
    reader = scene.session(mode="collaboration", group="us")
    scene.forward_backward(fitted, rows_of(1, 6))
    other = scene.worker()
    finish(other)

    def fit_twice() -> None:
        for seed in (2, 3):
            scene.forward_backward(fitted, rows_of(seed, 6))
        finish(other)

    number = scene.forward_backward(reader, rows_of(4, 6))
    store = Interrupted(tmp_path / "store", fit_twice, "download")
    finish(GradientWorker(desk_of(scene.catalogue, store, model)))
    own, mate = auxiliary_of(reader, model), scene.present(fitted)
    loss, _ = by_autograd(model, [(0.5, own), (0.5, mate)], own, rows_of(4, 6))
    assert scene.result(reader, number)["loss"] == pytest.approx(loss, rel=1e-5)


class KilledError(BaseException):
    """What no handler of the worker's takes for an error of an operation."""


def killed() -> None:
    raise KilledError


def until_taken_over(worker: GradientWorker, scene: Scene, session: GradientSession, number: int) -> None:
    """Rounds until a lease of somebody else's has run out and its operation is done."""
    deadline = time.monotonic() + PATIENCE_S
    while scene.found(session, number).status in ("queued", "running"):
        assert time.monotonic() < deadline
        if not worker.round():
            time.sleep(0.1)


@pytest.mark.parametrize("fit", ["client", "server"])
def test_what_a_lost_worker_began_is_done_once_by_the_next(
    scene: Scene, model: PreTrainedModel, tmp_path: Path, fit: str
) -> None:
    session = scene.session(fit=fit, interval=1)
    number = scene.forward_backward(session, rows_of(1, 6))
    scene.forward_backward(session, rows_of(2, 6))
    # It is lost after the pass, with the result in its hands.
    store = Interrupted(tmp_path / "store", killed)
    lost = GradientWorker(desk_of(scene.catalogue, store, model, lease_s=1), "lost")
    with pytest.raises(KilledError):
        lost.round()
    assert scene.found(session, number).status == "running"
    until_taken_over(scene.worker(), scene, session, number)
    finish(scene.worker())
    assert scene.found(session, number).attempt == 2
    fits = [scene.result(session, one)["fits"] for one in (number, number + 1)]
    version = scene.catalogue.gradient_sessions.auxiliary(session.auxiliary_id).version
    assert (fits, version) == (([1, 2], 2) if fit == "server" else ([None, None], 0))


@pytest.mark.parametrize("fit", ["client", "server"])
def test_a_worker_that_was_taken_for_lost_changes_nothing(
    scene: Scene, model: PreTrainedModel, tmp_path: Path, fit: str
) -> None:
    session = scene.session(fit=fit, interval=1)
    number = scene.forward_backward(session, rows_of(1, 6))
    next_one = scene.worker()
    store = Interrupted(tmp_path / "store", lambda: until_taken_over(next_one, scene, session, number))
    slow = GradientWorker(desk_of(scene.catalogue, store, model, lease_s=1), "slow")
    finish(slow)
    assert slow.ended == (0, 0)
    assert next_one.ended == (1, 0)
    done = scene.found(session, number)
    assert (done.status, done.attempt) == ("succeeded", 2)
    assert done.holder != "slow"
    version = scene.catalogue.gradient_sessions.auxiliary(session.auxiliary_id).version
    assert version == (1 if fit == "server" else 0)
    # What the slow one had in memory is no state of the session's.
    scene.forward_backward(session, rows_of(2, 6))
    finish(slow)
    if fit == "server":
        assert scene.result(session, 1)["fits"] == 2


def test_an_operation_over_which_workers_are_lost_is_given_up(
    scene: Scene, model: PreTrainedModel, tmp_path: Path
) -> None:
    session, store = scene.session(), LocalStore(tmp_path / "store")
    number = scene.forward_backward(session, rows_of(1, 6))
    for _ in range(2):
        worker = GradientWorker(desk_of(scene.catalogue, Interrupted(store.root, killed), model, attempts=2))
        with pytest.raises(KilledError):
            worker.round()
        worker.close()
    finish(scene.worker(attempts=2))
    error = scene.found(session, number).error
    assert error is not None
    assert error["type"] == "server_error"


def test_a_store_that_does_not_answer_is_waited_for(scene: Scene, model: PreTrainedModel, tmp_path: Path) -> None:
    def away() -> None:
        raise StoreUnavailableError("the store is away")

    session, store = scene.session(fit="server", interval=1), Interrupted(tmp_path / "store", away)
    number = scene.forward_backward(session, rows_of(1, 6))
    worker = GradientWorker(desk_of(scene.catalogue, store, model))
    assert not worker.round()
    assert scene.found(session, number).status == "running"
    assert worker.round()
    assert scene.result(session, number)["fits"] == 1
    assert scene.found(session, number).attempt == 1


def lease_of(database_url: str, operation_id: str) -> int:
    """When a lease ends, in seconds since 1970."""
    with closing(sqlite3.connect(database_url.removeprefix("sqlite:///"))) as connection:
        query = "SELECT lease_until FROM gradient_operations WHERE id = ?"
        return connection.execute(query, (operation_id,)).fetchone()[0]


def test_a_fault_of_the_worker_itself_is_no_endless_one(
    scene: Scene, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = scene.session()
    number = scene.forward_backward(session, rows_of(1, 6))
    with monkeypatch.context() as patch:
        patch.setattr("serve.gradients.collecting.packed", lambda *_: 1 / 0)
        worker = GradientWorker(desk_of(scene.catalogue, scene.store, model, lease_s=1))
        with pytest.raises(ZeroDivisionError):
            worker.round()
    until_taken_over(worker, scene, session, number)
    assert scene.result(session, number)["rows"] == 1
    assert scene.found(session, number).attempt == 2


def test_leases_are_renewed_until_they_are_lost(scene: Scene, database_url: str) -> None:
    session = scene.session()
    scene.forward_backward(session, rows_of(1, 6))
    (operation,) = scene.catalogue.gradient_operations.claim("me", 1, 8)
    held = HeldOperations(scene.catalogue, "me", lease_s=600, every_s=0.05)
    held.add(operation.id)
    first, deadline = lease_of(database_url, operation.id), time.monotonic() + PATIENCE_S
    held.start()
    try:
        while lease_of(database_url, operation.id) < first + 500:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert operation.id in held
        scene.catalogue.gradient_sessions.close(session.id)
        while operation.id in held:
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        held.close()


def test_what_a_worker_holds_when_it_closes_is_given_back(scene: Scene, model: PreTrainedModel, tmp_path: Path) -> None:
    session = scene.session()
    number = scene.forward_backward(session, rows_of(1, 6))
    worker = GradientWorker(desk_of(scene.catalogue, Interrupted(tmp_path / "store", killed), model))
    with pytest.raises(KilledError):
        worker.round()
    worker.close()
    assert scene.found(session, number).status == "queued"
    finish(scene.worker())
    assert scene.result(session, number)["rows"] == 1


@pytest.mark.parametrize("fit", ["client", "server"])
def test_a_session_that_is_closed_meanwhile_gets_no_results(
    scene: Scene, model: PreTrainedModel, tmp_path: Path, fit: str
) -> None:
    session = scene.session(fit=fit, interval=1)
    number = scene.forward_backward(session, rows_of(1, 6))
    store = Interrupted(tmp_path / "store", lambda: scene.catalogue.gradient_sessions.close(session.id))
    worker = GradientWorker(desk_of(scene.catalogue, store, model))
    finish(worker)
    assert worker.ended == (0, 0)
    assert (scene.found(session, number).error or {})["code"] == "session_closed"
    assert list(scene.store.list("cola")) == []
    assert scene.catalogue.gradient_sessions.auxiliary(session.auxiliary_id).version == 0


def test_two_workers_do_each_operation_once(scene: Scene, database_url: str) -> None:
    sessions = [scene.session(f"tenant{i % 3}", fit="server", interval=1) for i in range(6)]
    numbers = [[scene.forward_backward(session, rows_of(i, 5)) for i in range(4)] for session in sessions]
    catalogues = [Catalogue.open(database_url) for _ in range(2)]
    workers = [
        GradientWorker(desk_of(catalogue, scene.store, byte_model(seed=3, depth=2), operation_rows=1, max_rows=2))
        for catalogue in catalogues
    ]
    errors: list[BaseException] = []
    deadline = time.monotonic() + PATIENCE_S

    def work(worker: GradientWorker) -> None:
        try:
            # One may find nothing while the other has the rest.
            while sum(sum(one.ended) for one in workers) < 24 and time.monotonic() < deadline:
                if not worker.round():
                    time.sleep(0.01)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(worker,)) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for catalogue in catalogues:
        catalogue.close()
    assert not errors
    assert sum(worker.ended[0] for worker in workers) == 24
    for session, some in zip(sessions, numbers, strict=True):
        assert [scene.result(session, number)["fits"] for number in some] == [1, 2, 3, 4]
        assert [scene.found(session, number).attempt for number in some] == [1] * 4


def test_saved_low_rank_is_a_lora_of_peft(scene: Scene, model: PreTrainedModel, tmp_path: Path) -> None:
    session = scene.session()
    own = auxiliary_of(session, model, seed=4)
    scene.upload(session, own.tensors, version=0)
    number = scene.ask(session, "save")
    finish(scene.worker())
    files = scene.result(session, number)["files"]
    assert [file["name"] for file in files] == ["adapter_config.json", "adapter_model.safetensors"]
    for file in files:
        key = f"{saved_prefix(scene.found(session, number))}/{file['name']}"
        scene.store.download(key, tmp_path / "lora" / file["name"], file["sha256"])
        assert (tmp_path / "lora" / file["name"]).stat().st_size == file["bytes"]
    opened = PeftModel.from_pretrained(byte_model(seed=3, depth=2), str(tmp_path / "lora"))
    rows = rows_of(1, 9)
    loss, _ = by_autograd(model, [(1.0, own)], own, rows)
    logits = opened(torch.tensor(rows)).logits[0, :-1]
    assert F.cross_entropy(logits, torch.tensor(rows[0][1:])).item() == pytest.approx(loss, rel=1e-5)


def test_other_kinds_are_saved_as_they_are(scene: Scene, model: PreTrainedModel, tmp_path: Path) -> None:
    session = scene.session(auxiliary={"kind": "mlp", "rank": 3})
    own = auxiliary_of(session, model, seed=4)
    scene.upload(session, own.tensors, version=0)
    number = scene.ask(session, "save")
    finish(scene.worker())
    assert [file["name"] for file in scene.result(session, number)["files"]] == [
        "auxiliary.json",
        "auxiliary.safetensors",
    ]
    scene.store.download(f"{saved_prefix(scene.found(session, number))}/auxiliary.safetensors", tmp_path / "saved")
    saved = load_file(tmp_path / "saved")
    assert all(torch.equal(saved[name], tensor) for name, tensor in own.tensors.items())


def greedy(model: PreTrainedModel, own: Auxiliary, prompt: list[int], most: int) -> list[int]:
    """The likeliest tokens, each from a pass over the whole text."""
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: output + own.delta(name, args[0]).reshape(output.shape)
        )
        for name in own.sites
    ]
    made: list[int] = []
    with torch.no_grad():
        while len(made) < most:
            token = int(model(torch.tensor([prompt + made])).logits[0, -1].argmax())
            if token == END:
                break
            made.append(token)
    for handle in handles:
        handle.remove()
    return made


def test_samples_go_through_the_auxiliary(scene: Scene, model: PreTrainedModel) -> None:
    session = scene.session()
    own = auxiliary_of(session, model, seed=4)
    scene.upload(session, own.tensors, version=0)
    cold = {"prompt": "Once upon", "max_tokens": 12, "temperature": 0.0, "top_p": 1.0, "seed": None}
    warm = {**cold, "prompt": tokens_of("Once"), "temperature": 1.0, "seed": 3}
    first = scene.ask(session, "sample", cold)
    seeded = [scene.ask(session, "sample", warm) for _ in range(2)]
    other = scene.ask(session, "sample", {**warm, "seed": 4})
    long = scene.ask(session, "sample", {**cold, "max_tokens": 500})
    worker = scene.worker()
    finish(worker)
    made = greedy(model, own, tokens_of("Once upon"), 12)
    decoded = desk_of(scene.catalogue, scene.store, model).tokenizer.decode(made, skip_special_tokens=True)
    assert scene.result(session, first) == {"text": decoded, "tokens": len(made)}
    assert made != greedy(model, auxiliary_of(session, model), tokens_of("Once upon"), 12)
    one, two = (scene.result(session, number) for number in seeded)
    assert one == two
    assert scene.result(session, other) != one
    assert (scene.found(session, long).error or {})["code"] == "context_length_exceeded"
