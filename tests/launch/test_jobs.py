"""Jobs over the real Jobs API of a local Ray: success, failure, duplicates, stopping."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path
from uuid import uuid4

import pytest

from ot_ray.errors import LaunchError
from ot_ray.launch import JobSpec, RayJobLauncher, wait_for_job
from tests.fixtures.s3 import free_port

pytestmark = pytest.mark.slow

_ENDLESS = (
    "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); print('up', flush=True); time.sleep(600)"
)


def _spec(code: str, *arguments: str, **fields: object) -> JobSpec:
    # A path without a space, as every shell word must survive the way to the job.
    return JobSpec(f"test-{uuid4().hex[:12]}", [sys.executable, "-c", code, *arguments], **fields)  # type: ignore[arg-type]


def _gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    # A process that has ended and that nobody has asked after yet.
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def _pid(path: Path) -> int:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        if path.exists() and path.read_text():
            return int(path.read_text())
        time.sleep(0.1)
    raise TimeoutError("the job did not start")


def test_a_job_gets_its_folder_and_its_environment(job_launcher: RayJobLauncher, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("shipped")
    code = "import os, sys; print(os.environ['COLOUR'], open('mine.txt').read(), sys.argv[1:], sorted(os.listdir()))"
    spec = _spec(code, "two words", "$HOME", working_dir=str(tmp_path), environment={"COLOUR": "blue"}, cpus=0.5)
    shown: list[str] = []
    wait_for_job(job_launcher, job_launcher.submit(spec), shown.append)
    assert "blue shipped ['two words', '$HOME'] ['mine.txt']" in "".join(shown)
    assert job_launcher.status(spec.job_id) == "succeeded"


def test_a_failed_job_says_why(job_launcher: RayJobLauncher) -> None:
    spec = _spec("import sys; print('working'); print('error: data.source is odd', file=sys.stderr); sys.exit(2)")
    job_launcher.submit(spec)
    with pytest.raises(LaunchError, match=rf"job {spec.job_id} ended as failed: error: data\.source is odd"):
        wait_for_job(job_launcher, spec.job_id, lambda piece: None)
    assert "2" in job_launcher.message(spec.job_id)


def test_an_id_is_used_once(job_launcher: RayJobLauncher) -> None:
    spec = _spec("print('once')")
    job_launcher.submit(spec)
    with pytest.raises(LaunchError, match=rf"job {spec.job_id} was not accepted: .*already exists") as caught:
        job_launcher.submit(spec)
    assert "Traceback" not in str(caught.value)
    wait_for_job(job_launcher, spec.job_id, lambda piece: None)


def test_stopping_ends_the_process(job_launcher: RayJobLauncher, tmp_path: Path) -> None:
    spec = _spec(_ENDLESS, str(tmp_path / "pid"))
    job_launcher.submit(spec)
    pid = _pid(tmp_path / "pid")
    assert not _gone(pid)
    job_launcher.stop(spec.job_id)
    assert job_launcher.status(spec.job_id) == "stopped"
    assert _gone(pid)
    job_launcher.stop(spec.job_id)


def test_a_wait_that_is_interrupted_stops_the_job(job_launcher: RayJobLauncher, tmp_path: Path) -> None:
    spec = _spec(_ENDLESS, str(tmp_path / "pid"))
    job_launcher.submit(spec)
    pid = _pid(tmp_path / "pid")
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        wait_for_job(job_launcher, spec.job_id, lambda piece: None)
    assert job_launcher.status(spec.job_id) == "stopped"
    assert _gone(pid)


def test_unknown_jobs_and_wrong_addresses_are_launch_errors(job_launcher: RayJobLauncher) -> None:
    for ask in (job_launcher.status, job_launcher.message, job_launcher.stop):
        with pytest.raises(LaunchError, match=r"job nobody-s cannot be .*does not exist"):
            ask("nobody-s")
    with pytest.raises(LaunchError, match="does not answer"):
        RayJobLauncher(f"http://127.0.0.1:{free_port()}")


def test_a_folder_that_is_not_there_is_refused(job_launcher: RayJobLauncher, tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match=r"was not accepted: .*nowhere"):
        job_launcher.submit(_spec("print()", working_dir=str(tmp_path / "nowhere")))
