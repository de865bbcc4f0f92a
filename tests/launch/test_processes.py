"""Jobs as processes: they outlive whoever submitted them, start once, stop whole, and see no secrets."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ot_ray.errors import AlreadyExistsError, LaunchError, NotFoundError
from ot_ray.launch import JobSpec, ProcessLauncher, wait_for_job

_ENDLESS = (
    "import os, subprocess, sys, time;"
    "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']);"
    "open('pids.new', 'w').write(f'{os.getpid()} {child.pid}'); os.rename('pids.new', 'pids'); time.sleep(600)"
)


@pytest.fixture
def launcher(tmp_path: Path) -> ProcessLauncher:
    return ProcessLauncher(tmp_path / "jobs")


def _spec(job_id: str, code: str, *arguments: str, **fields: object) -> JobSpec:
    return JobSpec(job_id, ["python", "-c", code, *arguments], **fields)  # type: ignore[arg-type]


def _until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 90
    while not condition():
        assert time.monotonic() < deadline, "waited 90 s"
        time.sleep(0.02)


def _done(launcher: ProcessLauncher, job_id: str) -> str:
    _until(lambda: launcher.status(job_id) not in ("pending", "running"))
    return launcher.status(job_id)


def _gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def _pids(tmp_path: Path, job_id: str) -> list[int]:
    path = tmp_path / "jobs" / job_id / "work" / "pids"
    _until(path.exists)
    return [int(pid) for pid in path.read_text().split()]


def test_a_job_gets_its_folder_and_environment_and_no_secrets(
    launcher: ProcessLauncher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hidden")
    monkeypatch.setenv("PGPASSWORD", "hidden")
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "mine.txt").write_text("shipped")
    code = "import os, sys; print(os.environ, open('mine.txt').read(), sys.argv[1:])"
    spec = _spec("one", code, "two words", "$HOME", working_dir=str(folder), environment={"COLOUR": "blue"}, cpus=2)
    shown: list[str] = []
    wait_for_job(launcher, launcher.submit(spec), shown.append)
    output = "".join(shown)
    assert "shipped ['two words', '$HOME']" in output
    assert (
        "'COLOUR': 'blue'" in output and "'OMP_NUM_THREADS': '2'" in output and "'CUDA_VISIBLE_DEVICES': ''" in output
    )
    assert "hidden" not in output
    assert launcher.status("one") == "succeeded"
    # Credentials may have been in its folder.
    assert sorted(path.name for path in (tmp_path / "jobs" / "one").iterdir()) == [
        "exit.json",
        "lock",
        "log",
        "spec.json",
        "started",
    ]


def test_a_failed_job_says_why(launcher: ProcessLauncher) -> None:
    launcher.submit(_spec("one", "import sys; sys.exit('error: data.source is odd')"))
    with pytest.raises(LaunchError, match=r"job one ended as failed: error: data\.source is odd"):
        wait_for_job(launcher, "one", lambda piece: None)
    assert "exit status 1" in launcher.message("one") and launcher.exit_status("one") == 1
    launcher.submit(JobSpec("two", ["no-such-command"]))
    assert _done(launcher, "two") == "failed"
    assert "could not be started" in launcher.message("two")


def test_of_many_submissions_of_an_id_one_starts(launcher: ProcessLauncher, tmp_path: Path) -> None:
    mark = tmp_path / "marks"
    spec = _spec("one", "import sys; open(sys.argv[1], 'a').write('x')", str(mark))
    outcomes: list[str] = []

    def submit() -> None:
        try:
            outcomes.append(ProcessLauncher(tmp_path / "jobs").submit(spec))
        except AlreadyExistsError:
            outcomes.append("already")

    threads = [threading.Thread(target=submit) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["already"] * 7 + ["one"]
    assert _done(launcher, "one") == "succeeded"
    with pytest.raises(AlreadyExistsError):
        launcher.submit(spec)
    assert mark.read_text() == "x"
    assert [path.name for path in (tmp_path / "jobs").iterdir()] == ["one"]


def test_stopping_ends_the_job_and_its_children(launcher: ProcessLauncher, tmp_path: Path) -> None:
    launcher.submit(_spec("one", _ENDLESS))
    pids = _pids(tmp_path, "one")
    launcher.stop("one")
    assert launcher.status("one") == "stopped"
    _until(lambda: all(_gone(pid) for pid in pids))
    launcher.stop("one")


def test_a_time_limit_ends_the_job(launcher: ProcessLauncher, tmp_path: Path) -> None:
    launcher.submit(_spec("one", _ENDLESS, time_limit_s=3.0))
    assert _done(launcher, "one") == "failed"
    assert "time limit of 3 s" in launcher.message("one")


def test_a_job_outlives_its_submitter(launcher: ProcessLauncher, tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from ot_ray.launch import JobSpec, ProcessLauncher;"
        f"ProcessLauncher(sys.argv[1]).submit(JobSpec('one', ['python', '-c', {_ENDLESS!r}]));"
        "os.killpg(0, signal.SIGKILL)"
    )
    submitter = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "jobs")], start_new_session=True, check=False
    )
    assert submitter.returncode == -signal.SIGKILL
    _until(lambda: launcher.status("one") == "running")
    assert not any(_gone(pid) for pid in _pids(tmp_path, "one"))
    launcher.stop("one")


def test_a_submitter_killed_before_the_start_is_made_up_for(launcher: ProcessLauncher, tmp_path: Path) -> None:
    launcher.submit(_spec("one", "pass"))
    assert _done(launcher, "one") == "succeeded"
    folder = tmp_path / "jobs" / "one"
    for name in ("started", "exit.json"):
        (folder / name).unlink()
    (folder / "work").mkdir()
    assert _done(launcher, "one") == "succeeded"


def test_a_supervisor_that_is_killed_takes_the_job_along_and_says_so(launcher: ProcessLauncher, tmp_path: Path) -> None:
    launcher.submit(_spec("one", _ENDLESS))
    job, child = _pids(tmp_path, "one")
    supervisor = int(Path(f"/proc/{job}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(supervisor, signal.SIGKILL)
    assert _done(launcher, "one") == "failed"
    assert "went away" in launcher.message("one")
    _until(lambda: _gone(job))
    os.kill(child, signal.SIGKILL)


def test_a_job_that_nothing_can_watch_is_told(launcher: ProcessLauncher, monkeypatch: pytest.MonkeyPatch) -> None:
    (launcher.folder / "one" / "work").mkdir(parents=True)
    started: list[Path] = []
    monkeypatch.setattr(ProcessLauncher, "_supervise", started.append)
    monkeypatch.setattr("ot_ray.launch.processes._POLL_S", 1e-4)
    with pytest.raises(LaunchError, match="nothing can watch job one"):
        launcher.status("one")
    assert 1 < len(started) < 20


def test_a_job_whose_record_is_broken_has_failed(launcher: ProcessLauncher) -> None:
    folder = launcher.folder / "one"
    (folder / "work").mkdir(parents=True)
    (folder / "spec.json").write_text("")
    assert _done(launcher, "one") == "failed"
    assert "could not be watched: JSONDecodeError" in launcher.message("one")


def test_of_a_forgotten_job_only_its_end_stays(launcher: ProcessLauncher) -> None:
    launcher.submit(_spec("one", _ENDLESS))
    with pytest.raises(LaunchError, match="job one is not done"):
        launcher.forget("one")
    launcher.stop("one")
    for _ in range(2):
        launcher.forget("one")
        assert [path.name for path in (launcher.folder / "one").iterdir()] == ["exit.json"]
        assert launcher.status("one") == "stopped"
    assert not launcher.found_no_room("one")
    with pytest.raises(AlreadyExistsError):
        launcher.submit(_spec("one", "pass"))
    launcher.stop("one")
    with pytest.raises(NotFoundError):
        launcher.forget("two")


def test_what_killed_submissions_left_is_swept(tmp_path: Path) -> None:
    for name, age in (("old", 2 * 24 * 3600), ("new", 60)):
        folder = tmp_path / f".new-{name}"
        (folder / "work").mkdir(parents=True)
        os.utime(folder, (time.time() - age, time.time() - age))
    ProcessLauncher(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".new-new"]


def test_a_log_does_not_grow_without_end(tmp_path: Path) -> None:
    """In a process of its own, whose output the log is."""
    path = tmp_path / "log"
    code = "from ot_ray.launch import supervisor as s; s._MOST_LOG_BYTES = 1000; s._cut_log(); print('more')"
    path.write_bytes(b"x" * 1001)
    with path.open("ab") as log:
        subprocess.run([sys.executable, "-c", code], stdout=log, check=True)
    assert path.read_text() == "[what was here is left out: the log was too long]\nmore\n"


def test_unknown_jobs_are_not_found(launcher: ProcessLauncher) -> None:
    for job_id in ("nobody-s", "../jobs", ""):
        for ask in (launcher.status, launcher.message, launcher.stop):
            with pytest.raises(NotFoundError, match="unknown"):
                ask(job_id)
    with pytest.raises(LaunchError, match="job_id is"):
        launcher.submit(_spec("../one", "pass"))
    with pytest.raises(LaunchError, match=r"was not accepted: .*nowhere"):
        launcher.submit(_spec("one", "pass", working_dir="nowhere"))


def test_logs_come_while_the_job_runs(launcher: ProcessLauncher) -> None:
    launcher.submit(_spec("one", "import time; print('up', flush=True); time.sleep(600)"))

    async def first() -> str:
        async for piece in launcher.logs("one"):
            return piece
        return ""

    assert asyncio.run(first()) == "up\n"
    assert launcher.status("one") == "running"
    launcher.stop("one")
