"""The controller over a real database, store and launcher: every way that a job can take, step by step."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ot_ray.artifacts import BundleManifest, Registry
from ot_ray.errors import AdapterRejectedError, ConfigError, LaunchError, StoreError
from ot_ray.launch import JobSpec, ProcessLauncher
from ot_ray.model import SplitPlan
from ot_ray.store import LocalStore
from serve.catalogue.records import Job
from serve.controller.acceptance import AcceptanceWork, Outcome, accept
from serve.controller.background import Background
from serve.controller.loop import Controller
from serve.failures import BusyError
from tests.service.controller_scene import EXAMPLES, Scene

NOON = 20_000 * 86_400 + 43_200
_PATIENCE_S = 240.0
Run = Callable[..., Controller]


both_databases = pytest.mark.parametrize("database", ["sqlite", "postgres"], indirect=True)


@pytest.fixture
def database(request: pytest.FixtureRequest) -> str:
    """The URL of an empty database; SQLite where the test does not say."""
    return request.getfixturevalue(f"{getattr(request, 'param', 'sqlite')}_url")


@pytest.fixture
def scene(
    database: str, store: LocalStore, released: BundleManifest, tuned_adapters: Path, tmp_path: Path
) -> Iterator[Scene]:
    bundle = {"model": released.model, "version": released.version, "bundle_id": released.bundle_id}
    made = Scene(database, store, ProcessLauncher(tmp_path / "processes"), bundle, tuned_adapters)
    yield made
    made.close()


@pytest.fixture
def controller_of(scene: Scene) -> Iterator[Run]:
    opened: list[Controller] = []

    def controller_of(**settings: object) -> Controller:
        opened.append(scene.controller(**settings))
        return opened[-1]

    yield controller_of
    for controller in opened:
        controller.close()


@both_databases
def test_a_job_succeeds_and_says_how(scene: Scene, controller_of: Run) -> None:
    job = scene.job(scene.tenant("anna"))
    (done,) = scene.run(controller_of(), job)
    assert done.status == "succeeded", scene.told(job)
    assert done.error is None and done.attempt == 1 and done.stage is None and done.estimated_finish is None
    assert done.resolved is not None and done.resolved["n_epochs"] == 2
    records = scene.served(job)
    suffix = f"job-{job.id[6:14]}"
    assert sorted(record.model_id.rpartition(":")[0] for record in records) == [
        f"ft:tiny:anna:{suffix}",
        f"ft:tiny:anna:{suffix}-step-2",
        f"ft:tiny:anna:{suffix}-step-4",
    ]
    assert done.fine_tuned_model in {record.model_id for record in records}
    assert done.fine_tuned_model.startswith(f"ft:tiny:anna:{suffix}:")
    checkpoints = scene.catalogue.checkpoints.list(job.tenant_id, job.id).items
    assert [item.step_number for item in checkpoints] == [4, 2]
    assert {item.fine_tuned_model_checkpoint for item in checkpoints} < {record.model_id for record in records}
    assert done.tokens and done.trained_tokens == done.tokens
    (file_id,) = done.result_files
    results = scene.catalogue.files.get(job.tenant_id, file_id)
    assert results.purpose == "fine-tune-results" and results.bytes == len(b"step,train_loss\n1,2.0\n")
    assert scene.store.read(f"files/{job.tenant_id}/{file_id}") == b"step,train_loss\n1,2.0\n"
    assert list(scene.store.list(f"jobs/{job.id}")) == []
    assert scene.deliveries(job) == ["fine_tuning.job.succeeded"]


def test_events_tell_the_whole_way_in_order(scene: Scene, controller_of: Run) -> None:
    job = scene.job(scene.tenant("anna"))
    scene.run(controller_of(), job)
    events = scene.events(job)
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    told = [event.message for event in events if not event.message.startswith("The training file")]
    assert told == [
        f"Created fine-tuning job: {job.id}",
        "Files validated, moving job to queued state",
        "Fine-tuning job started",
        "Step 1/4: training loss=2.00",
        "Step 2/4: training loss=1.00",
        "Checkpoint created at step 2",
        "Step 3/4: training loss=0.67",
        "Step 4/4: training loss=0.50",
        "Checkpoint created at step 4",
        f"New fine-tuned model created: {scene.look(job).fine_tuned_model}",
        "The job has successfully completed",
    ]
    metrics = [event.data for event in events if event.type == "metrics"]
    assert metrics[1] == {
        "step": 2,
        "total_steps": 4,
        "epoch": 1.0,
        "train_loss": 1.0,
        "train_mean_token_accuracy": 0.5,
        "lr": 0.001,
        "tokens": 200,
    }


@pytest.mark.parametrize(
    ("text", "code", "message"),
    [
        ('{"prompt": "a", "completion": "b"}\n' * 4, "invalid_n_examples", "4 example"),
        (EXAMPLES + "nonsense\n", "invalid_training_file", "Line 13"),
        ("", "invalid_n_examples", "0 example"),
    ],
)
def test_bad_files_fail_the_job_before_it_is_queued(
    scene: Scene, controller_of: Run, text: str, code: str, message: str
) -> None:
    job = scene.job(scene.tenant("anna"), text)
    (done,) = scene.run(controller_of(), job)
    assert done.status == "failed" and done.attempt == 0
    assert done.error is not None and done.error["code"] == code and done.error["param"] == "training_file"
    assert message in done.error["message"]
    assert scene.deliveries(job) == ["fine_tuning.job.failed"]
    assert scene.events(job)[-1].level == "error"


def test_a_job_s_own_error_is_its_end_without_paths_and_without_a_second_try(scene: Scene, controller_of: Run) -> None:
    job = scene.job(scene.tenant("anna"), error_at=3)
    (done,) = scene.run(controller_of(), job)
    assert done.status == "failed" and done.attempt == 1
    assert done.error == {"code": "training_failed", "message": "train.jsonl: line 3 is odd", "param": None}
    assert str(scene.store.root) not in json.dumps([event.message for event in scene.events(job)])
    assert scene.served(job) == []
    assert scene.deliveries(job) == ["fine_tuning.job.failed"]


@both_databases
def test_a_lost_attempt_is_followed_by_one_that_goes_on(scene: Scene, controller_of: Run) -> None:
    job = scene.job(scene.tenant("anna"), crash_at=2)
    (done,) = scene.run(controller_of(), job)
    assert done.status == "succeeded" and done.attempt == 2
    steps = [event.data["step"] for event in scene.events(job) if event.type == "metrics" and event.data]
    assert steps == [1, 2, 3, 4]
    assert sum("The cluster lost the job" in message for message in scene.told(job)) == 1


def test_attempts_run_out(scene: Scene, controller_of: Run) -> None:
    job = scene.job(scene.tenant("anna"), crash_at=2)
    (done,) = scene.run(controller_of(attempts=1), job)
    assert done.status == "failed" and done.attempt == 1
    assert done.error is not None and done.error["code"] == "server_error"


@both_databases
@pytest.mark.parametrize(
    ("plan", "attempts", "code", "end"),
    [
        (
            {"killed_at": 1},
            2,
            "training_failed",
            "before its first step, each time, 2 times in a row: killed by signal 9.",
        ),
        ({"killed_at": 3}, 3, "training_failed", "after step 2, each time, 2 times in a row: killed by signal 9."),
        ({"leaves_at": 1}, 2, "server_error", "before its first step, each time, 2 times in a row: exit status 3."),
    ],
)
def test_a_process_that_ends_again_and_again_without_a_step_is_the_job_s_own_end(
    scene: Scene, controller_of: Run, plan: dict[str, Any], attempts: int, code: str, end: str
) -> None:
    job = scene.job(scene.tenant("anna"), **plan)
    (done,) = scene.run(controller_of(attempts=2), job)
    assert done.status == "failed" and done.error is not None and done.attempt == attempts
    assert done.error["code"] == code and done.error["message"] == f"Its process ended by itself {end}"
    # The run that got further than those before was the cluster's to lose; the others took nothing of that.
    assert sum("The cluster lost the job" in message for message in scene.told(job)) == attempts - 2
    assert sum("It is begun again" in message for message in scene.told(job)) == 1
    assert scene.deliveries(job) == ["fine_tuning.job.failed"]


def test_a_job_that_the_launcher_forgot_begins_again(scene: Scene, controller_of: Run, tmp_path: Path) -> None:
    controller = controller_of()
    job = scene.job(scene.tenant("anna"), hang_at=2)
    scene.until(controller, lambda: "Checkpoint created at step 2" in scene.told(job))
    scene.launcher.stop(job.id)
    shutil.rmtree(tmp_path / "processes" / job.id)
    # The step at which it hangs is done, so that the second attempt goes on to the end.
    (done,) = scene.run(controller, job)
    assert done.status == "succeeded" and done.attempt == 2
    assert any("the launcher does not know it any more" in message for message in scene.told(job))


def test_a_running_job_is_cancelled_and_its_process_is_gone(scene: Scene, controller_of: Run) -> None:
    controller = controller_of()
    job = scene.job(scene.tenant("anna"), hang_at=1)
    scene.until(controller, lambda: "Step 1/4: training loss=2.00" in scene.told(job))
    assert scene.launcher.status(job.id) == "running"
    assert scene.catalogue.jobs.want(job.tenant_id, job.id, "cancel", expected=("running",))
    (done,) = scene.run(controller, job)
    assert done.status == "cancelled" and done.fine_tuned_model is None
    assert scene.launcher.status(job.id) == "stopped"
    assert scene.deliveries(job) == ["fine_tuning.job.cancelled"]
    assert scene.told(job)[-1] == "The fine-tuning job was cancelled"


@both_databases
def test_pause_keeps_the_checkpoints_and_resume_goes_on_from_them(scene: Scene, controller_of: Run) -> None:
    controller = controller_of()
    job = scene.job(scene.tenant("anna"), hang_at=2)
    scene.until(controller, lambda: "Checkpoint created at step 2" in scene.told(job))
    assert scene.catalogue.jobs.want(job.tenant_id, job.id, "pause", expected=("running",))
    scene.until(controller, lambda: scene.look(job).status == "paused")
    assert scene.launcher.status(job.id) == "stopped"
    assert list(scene.store.list(f"jobs/{job.id}/checkpoints"))
    charged = scene.charged(job)
    for _ in range(3):
        controller.tick()
        controller.wait()
    assert scene.look(job).status == "paused"
    assert scene.catalogue.jobs.move(job.id, {"paused"}, "queued", event="resumed", wanted="run")
    (done,) = scene.run(controller, job)
    assert done.status == "succeeded" and done.attempt == 2
    steps = [event.data["step"] for event in scene.events(job) if event.type == "metrics" and event.data]
    assert steps == [1, 2, 3, 4]
    assert scene.charged(job) == charged == done.tokens


def test_a_run_that_takes_too_long_is_stopped(scene: Scene, controller_of: Run) -> None:
    job = scene.job(scene.tenant("anna"), hang_at=1)
    (done,) = scene.run(controller_of(time_limit_s=0.5), job)
    assert done.status == "failed"
    assert done.error is not None and done.error["code"] == "time_limit_exceeded"
    assert scene.launcher.status(job.id) == "stopped"


def test_a_run_that_its_own_alarm_ends_took_too_long(scene: Scene, controller_of: Run) -> None:
    job = scene.job(scene.tenant("anna"), killed_at=2, signal=int(signal.SIGALRM))
    (done,) = scene.run(controller_of(), job)
    assert done.status == "failed" and done.attempt == 1
    assert done.error is not None and done.error["code"] == "time_limit_exceeded"


def test_a_rejected_adapter_fails_the_job_with_the_reasons(scene: Scene, controller_of: Run) -> None:
    job = scene.job(scene.tenant("anna"), adapter="bad")
    (done,) = scene.run(controller_of(), job)
    assert done.status == "failed" and done.fine_tuned_model is None
    assert done.error is not None and done.error["code"] == "adapter_rejected"
    assert scene.served(job) == []


def test_cancelling_is_heard_until_the_model_is_promoted(scene: Scene, controller_of: Run) -> None:
    def cancel(work: AcceptanceWork) -> Outcome:
        scene.catalogue.jobs.want(job.tenant_id, job.id, "cancel", expected=("running",))
        return accept(work)

    scene.accept = cancel
    job = scene.job(scene.tenant("anna"))
    (done,) = scene.run(controller_of(), job)
    assert done.status == "cancelled" and done.fine_tuned_model is None
    assert scene.told(job)[-2] == "Checkpoint created at step 4"
    assert scene.served(job) == []
    assert list(scene.store.list("plug_ins")) == []
    assert scene.deliveries(job) == ["fine_tuning.job.cancelled"]


def test_pausing_comes_too_late_once_the_training_is_done(scene: Scene, controller_of: Run) -> None:
    def pause(work: AcceptanceWork) -> Outcome:
        scene.catalogue.jobs.want(job.tenant_id, job.id, "pause", expected=("running",))
        return accept(work)

    scene.accept = pause
    job = scene.job(scene.tenant("anna"))
    (done,) = scene.run(controller_of(), job)
    assert done.status == "succeeded"


def test_a_plug_in_that_fails_its_canary_is_not_promoted(scene: Scene, controller_of: Run) -> None:
    def canary(model_id: str) -> None:
        raise AdapterRejectedError("rejected", ["its perplexity is 9.0 times the base model's"])

    scene.canary = canary
    job = scene.job(scene.tenant("anna"))
    (done,) = scene.run(controller_of(), job)
    assert done.status == "failed" and done.error is not None
    assert "its perplexity is 9.0 times" in done.error["message"]
    assert scene.served(job) == []
    assert list(scene.store.list("plug_ins")) == []


@pytest.mark.parametrize(
    "error",
    [
        StoreError("403: the token has expired"),
        OSError(28, "no space left on device"),
        ConfigError("jobs.role_arn is not set"),
        LaunchError("no process"),
        BusyError("no engine is free"),
    ],
)
def test_what_is_away_for_a_while_delays_the_end(scene: Scene, controller_of: Run, error: Exception) -> None:
    def failing(work: AcceptanceWork) -> Outcome:
        calls.append(work)
        if len(calls) < 15:
            raise error
        return accept(work)

    calls: list[AcceptanceWork] = []
    scene.accept = failing
    job = scene.job(scene.tenant("anna"))
    _hurry(scene, 60)
    assert [done.status for done in scene.run(controller_of(time_limit_s=1e9), job)] == ["succeeded"]


def test_a_model_that_no_engine_can_run_is_given_up_in_the_end(scene: Scene, controller_of: Run) -> None:
    def canary(model_id: str) -> None:
        tries.append(scene.clock())
        raise BusyError("the engine died")

    tries: list[float] = []
    scene.canary = canary
    job = scene.job(scene.tenant("anna"))
    _hurry(scene, 60)
    (done,) = scene.run(controller_of(time_limit_s=1e9), job)
    assert done.status == "failed" and done.error is not None and done.error["code"] == "server_error"
    assert tries[-1] - tries[0] >= 6 * 3600
    # Not again and again, with everybody's engine.
    assert len(tries) < 100
    assert not [key for key in scene.store.list("plug_ins") if key.endswith(".safetensors")]


def test_odd_reports_are_noted_and_skipped(scene: Scene, controller_of: Run) -> None:
    controller = controller_of(events_per_tick=2)
    job = scene.job(scene.tenant("anna"), hang_at=1)
    scene.until(controller, lambda: "Step 1/4: training loss=2.00" in scene.told(job))
    odd = [
        b"",
        b"\xff",
        b"[1]",
        b'{"type": "metrics", "step": -1, "at": 0}',
        b'{"type": "metrics", "step": 2, "train_loss": NaN, "at": 0}',
        b'{"type": "metrics", "step": 2, "at": 0, "fine_tuned_model": "ft:other"}',
        b'{"type": "checkpoint", "step": 2, "folder": "../../other", "at": 0}',
        b'{"type": "status", "status": "succeeded", "at": 0}',
        b"[" * 10_000,
        b" " * 20_000,
    ]
    for number, data in enumerate(odd, start=2):
        scene.store.write(f"jobs/{job.id}/events/{number:08d}.json", data)
    scene.store.write(
        f"jobs/{job.id}/events/{len(odd) + 2:08d}.json",
        json.dumps({"type": "message", "level": "info", "message": "a\x00b /etc/x/secret.txt", "at": 0}).encode(),
    )
    scene.until(controller, lambda: scene.told(job)[-1] == "a b secret.txt")
    unread = [message for message in scene.told(job) if message == "A progress report of the job could not be read."]
    assert len(unread) == len(odd)
    scene.catalogue.jobs.want(job.tenant_id, job.id, "cancel", expected=("running",))
    scene.run(controller, job)


def test_the_end_is_estimated_from_the_pace(scene: Scene, controller_of: Run) -> None:
    controller = controller_of()
    job = scene.job(scene.tenant("anna"), hang_at=1, steps=100)
    scene.until(controller, lambda: "Step 1/100: training loss=2.00" in scene.told(job))
    assert scene.look(job).estimated_finish is None
    first = json.loads(scene.store.read(f"jobs/{job.id}/events/00000001.json"))["at"]
    report = {"type": "metrics", "step": 11, "total_steps": 100, "at": first + 10_000}
    scene.store.write(f"jobs/{job.id}/events/00000002.json", json.dumps(report).encode())
    scene.until(controller, lambda: "Step 11/100" in scene.told(job))
    # 10 steps took 10,000 s, and 89 are left.
    assert -1 <= (scene.look(job).estimated_finish or 0) - first - 89_000 < 5000
    scene.catalogue.jobs.want(job.tenant_id, job.id, "cancel", expected=("running",))
    (done,) = scene.run(controller, job)
    assert done.status == "cancelled" and done.estimated_finish is None


@both_databases
def test_tenants_take_turns_and_limits_hold(scene: Scene, controller_of: Run) -> None:
    controller = controller_of(max_running=2)
    anna, bert = scene.tenant("anna", running_jobs=1), scene.tenant("bert")
    jobs = [scene.job(anna), scene.job(anna), scene.job(bert), scene.job(bert)]
    most: list[tuple[int, int]] = []

    def watch() -> bool:
        running = scene.catalogue.jobs.running()
        most.append((len(running), sum(job.tenant_id == anna.id for job in running)))
        return scene.ended(*jobs)

    scene.until(controller, watch)
    assert max(total for total, _ in most) == 2 and max(mine for _, mine in most) == 1
    assert {scene.look(job).status for job in jobs} == {"succeeded"}
    started = {job.id: _seq_time(scene, job) for job in jobs}
    assert started[jobs[0].id] <= started[jobs[1].id] and started[jobs[2].id] <= started[jobs[3].id]


@both_databases
def test_a_job_beyond_the_day_s_tokens_waits_and_says_until_when(scene: Scene, controller_of: Run) -> None:
    scene.time = lambda: NOON
    tenant = scene.tenant("anna", tokens_per_day=1)
    first, second = scene.job(tenant), scene.job(tenant)
    controller = controller_of()
    # More than a whole day's share is taken on a day of which nothing is used, so the first one runs.
    (done,) = scene.run(controller, first)
    assert done.status == "succeeded"
    scene.until(controller, lambda: any("today's limit" in message for message in scene.told(second)))
    for _ in range(3):
        controller.tick()
        controller.wait()
    assert scene.look(second).status == "queued"
    assert sum("today's limit" in message for message in scene.told(second)) == 1
    scene.catalogue.tenants.change_limits(tenant.id, {"tokens_per_day": 10**9})
    (done,) = scene.run(controller, second)
    assert done.status == "succeeded"


def test_a_disabled_tenant_s_jobs_wait(scene: Scene, controller_of: Run) -> None:
    controller, tenant = controller_of(), scene.tenant("anna")
    job = scene.job(tenant)
    scene.catalogue.tenants.disable(tenant.id)
    scene.until(controller, lambda: scene.look(job).status == "queued")
    # The job has its own copy of what was checked, so that its owner may delete the file.
    assert scene.store.read(f"jobs/{job.id}/input/train.jsonl").decode() == EXAMPLES
    for _ in range(3):
        controller.tick()
        controller.wait()
    assert scene.look(job).status == "queued"
    scene.catalogue.tenants.enable(tenant.id)
    assert [done.status for done in scene.run(controller, job)] == ["succeeded"]


@both_databases
def test_two_controllers_do_no_harm(scene: Scene, controller_of: Run) -> None:
    """Without the lease that keeps one of them idle: both take every round."""
    tenant = scene.tenant("anna")
    jobs = [scene.job(tenant, crash_at=2), scene.job(tenant), scene.job(tenant, error_at=1)]
    both = [controller_of(), controller_of()]
    for controller in both:
        controller._holder = "both"
    assert all(controller.tick() for controller in both)

    def others() -> bool:
        both[1].tick()
        return scene.ended(*jobs)

    scene.until(both[0], others)
    both[1].wait()
    assert [scene.look(job).status for job in jobs] == ["succeeded", "succeeded", "failed"]
    for job in jobs:
        assert len(scene.deliveries(job)) == 1
        events = scene.events(job)
        assert len({event.source_key for event in events if event.source_key}) == sum(
            event.source_key is not None for event in events
        )
    steps = [event.data["step"] for event in scene.events(jobs[0]) if event.type == "metrics" and event.data]
    assert steps == [1, 2, 3, 4]


@both_databases
def test_one_leads_and_the_next_takes_over(scene: Scene, controller_of: Run) -> None:
    first, second = controller_of(lease_s=600), controller_of()
    assert first.tick()
    assert not second.tick()
    first.close()
    assert second.tick()


def test_a_job_that_the_service_cannot_handle_is_given_up(scene: Scene, controller_of: Run) -> None:
    job = scene.job(scene.tenant("anna"))
    shutil.rmtree(scene.store.root / "bundles")
    _hurry(scene, 60)
    (done,) = scene.run(controller_of(), job)
    assert done.status == "failed"
    assert done.error is not None and done.error["code"] == "server_error"


class _NoRoom(ProcessLauncher):
    """A cluster that has no room for the first runs, and gives them up."""

    def __init__(self, folder: Path, times: int) -> None:
        super().__init__(folder)
        self.times, self.refused = times, set[str]()

    def submit(self, spec: JobSpec) -> str:
        if len(self.refused) < self.times:
            self.refused.add(spec.job_id)
            return spec.job_id
        return super().submit(spec)

    def status(self, job_id: str) -> str:
        return "failed" if job_id in self.refused else super().status(job_id)

    def found_no_room(self, job_id: str) -> bool:
        return job_id in self.refused

    def stop(self, job_id: str, timeout_s: float = 30.0) -> None:
        if job_id not in self.refused:
            super().stop(job_id, timeout_s)

    def forget(self, job_id: str) -> None:
        if job_id not in self.refused:
            super().forget(job_id)


def test_runs_for_which_there_was_no_room_are_not_counted(scene: Scene, controller_of: Run) -> None:
    scene.launcher = _NoRoom(scene.launcher.folder, times=3)
    job = scene.job(scene.tenant("anna"))
    (done,) = scene.run(controller_of(attempts=1), job)
    assert done.status == "succeeded" and done.attempt == 4, scene.told(job)
    assert "The job waits until the cluster has room for it." in scene.told(job)
    assert not any("lost" in message for message in scene.told(job))


def test_acceptances_hold_up_no_validation_and_no_training(scene: Scene, controller_of: Run) -> None:
    def held(work: AcceptanceWork) -> Outcome:
        assert free.wait(_PATIENCE_S)
        return accept(work)

    def rounds(condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + _PATIENCE_S
        while not condition():
            assert time.monotonic() < deadline, "waited too long"
            controller.tick()
            time.sleep(0.02)

    free = threading.Event()
    scene.accept = held
    controller = controller_of(background=1)
    try:
        first = scene.job(scene.tenant("anna"))
        rounds(lambda: scene.look(first).stage == "accepting")
        second = scene.job(scene.tenant("bert"))
        rounds(lambda: scene.look(second).stage == "accepting")
    finally:
        free.set()
    assert [done.status for done in scene.run(controller, first, second)] == ["succeeded", "succeeded"]


def test_work_of_a_kind_is_done_in_turns_by_owner() -> None:
    background, free, done = Background({"slow": 1, "quick": 1}), threading.Event(), list[str]()

    def slow(name: str) -> Callable[[], None]:
        return lambda: (free.wait(_PATIENCE_S), done.append(name))[1]

    try:
        begun = [background.begin(name, slow(name), "slow", owner=name[0]) for name in ("a1", "a2", "a3", "b1", "b1")]
        assert begun == [True, False, False, True, False]
        assert background.begin("c", free.set, "quick")
        assert background.wait(_PATIENCE_S) and done == ["a1", "b1"]
        assert background.begin("a2", slow("a2"), "slow", owner="a")
    finally:
        free.set()
        assert background.close()


class _Unstoppable(ProcessLauncher):
    """Cannot end the runs that it was told."""

    def __init__(self, folder: Path, jobs: set[str]) -> None:
        super().__init__(folder)
        self.jobs, self.asked = jobs, list[str]()

    def stop(self, job_id: str, timeout_s: float = 30.0) -> None:
        self.asked.append(job_id)
        if job_id in self.jobs:
            raise LaunchError(f"job {job_id} did not stop")
        super().stop(job_id, timeout_s)


def test_jobs_that_cannot_be_cleaned_hold_up_no_other(scene: Scene, controller_of: Run) -> None:
    controller, tenant = controller_of(), scene.tenant("anna")
    jobs = [scene.job(tenant) for _ in range(21)]
    now = time.time()
    for number, job in enumerate(jobs):
        scene.time = lambda number=number: now + number
        scene.catalogue.jobs.move(job.id, {"validating_files"}, "queued", event="queued")
        scene.catalogue.runs.begin(job, job.id, "begun", charge=0, per_day=1)
        scene.catalogue.jobs.move(job.id, {"running"}, "cancelled", event="ended")
    launcher = scene.launcher = _Unstoppable(scene.launcher.folder, {job.id for job in jobs[:-1]})
    controller = controller_of()
    scene.until(controller, lambda: scene.ended(jobs[-1]))
    # They are tried again, after a pause.
    asked = len(launcher.asked)
    launcher.jobs.clear()
    controller.tick()
    controller.wait()
    assert len(launcher.asked) == asked
    scene.time = lambda: now + 100
    scene.until(controller, lambda: scene.ended(*jobs))


def test_what_was_accepted_is_not_judged_again(
    scene: Scene, controller_of: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def promote_and_fail(registry: Registry, model_id: str) -> None:
        promote(registry, model_id)
        scene.canary = refuse
        controller._desk = dataclasses.replace(controller._desk, canary=refuse)
        if len(scene.served(job)) == 1 and not failed:
            failed.append(model_id)
            # What another controller saw a moment ago changes nothing either.
            controller._desk.fail(dataclasses.replace(scene.look(job), stage="accepting"), "server_error", "late")
            raise RuntimeError("killed in the middle")

    def refuse(model_id: str) -> None:
        raise AdapterRejectedError("rejected", ["it was accepted before"])

    promote, failed = Registry.promote, list[str]()
    monkeypatch.setattr(Registry, "promote", promote_and_fail)
    job = scene.job(scene.tenant("anna"))
    controller = controller_of()
    (done,) = scene.run(controller, job)
    assert failed and done.status == "succeeded", scene.told(job)
    assert len(scene.served(job)) == 3


def test_a_model_that_another_job_removed_is_entered_again(
    scene: Scene, controller_of: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def promote_what_is_gone(registry: Registry, model_id: str) -> None:
        monkeypatch.undo()
        assert registry.remove(model_id)
        registry.promote(model_id)

    monkeypatch.setattr(Registry, "promote", promote_what_is_gone)
    job = scene.job(scene.tenant("anna"))
    (done,) = scene.run(controller_of(), job)
    assert done.status == "succeeded" and len(scene.served(job)) == 3


@both_databases
def test_models_that_went_out_of_service_are_removed_after_their_time(scene: Scene, controller_of: Run) -> None:
    registry, day = Registry(scene.store), 24 * 3600

    def entered(suffix: str, value: float) -> str:
        state, plan = {"layers.0.fc1.bias": torch.full((2,), value)}, SplitPlan(bottom=1, keep=2, top=1)
        return registry.add("tiny", "anna", suffix, state, bundle_id="b-1", plan=plan, report={}).model_id

    def promoted(suffix: str, value: float) -> str:
        registry.promote(made := entered(suffix, value))
        return made

    kept = [promoted("a", 1), promoted("a", 2), promoted("b", 1), entered("c", 1)]
    gone = sorted([promoted("a", 3), promoted("b", 2)])
    back = promoted("d", 1)
    for model_id in (gone[0], back):
        registry.withdraw(model_id)
    registry.rollback("tiny", "anna", "b")
    registry.promote(back)
    controller, begun = controller_of(), time.time()
    for days, left in ((0, True), (29, True), (29.03, True), (31, False), (32, False)):
        scene.time = lambda days=days: begun + days * day
        controller.tick()
        assert controller.wait(_PATIENCE_S)
        there = [bool(list(scene.store.list("/".join(["plug_ins", *model_id.split(":")[1:]])))) for model_id in gone]
        assert there == [left, left], days
    for model_id in (*kept, back):
        assert registry.load_state(model_id)
    assert registry.rollback("tiny", "anna", "a").model_id == kept[1], "the alias goes back as before"
    lines = [(line.target, line.outcome) for line in scene.catalogue.audit.walk(action="model.remove")]
    assert lines == [(model_id, outcome) for model_id in gone for outcome in ("begun", "ok")]


def _hurry(scene: Scene, seconds: float) -> None:
    """Let so many seconds pass whenever somebody looks at the clock."""
    begun, looks = time.time(), itertools.count()
    scene.time = lambda: begun + seconds * next(looks)


def _seq_time(scene: Scene, job: Job) -> int:
    return scene.look(job).started_at or 0
