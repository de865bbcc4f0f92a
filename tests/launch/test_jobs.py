"""Jobs over the real Jobs API of a local Ray: success, failure, duplicates, stopping."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from uuid import uuid4

import pytest
import ray

from ot_ray.errors import AlreadyExistsError, LaunchError, NotFoundError
from ot_ray.launch import JobSpec, RayJobLauncher, wait_for_job
from ot_ray.launch.cluster import ClusterAddress
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


def test_a_job_gets_its_folder_its_environment_and_its_own_cluster(
    job_launcher: RayJobLauncher, local_ray: ClusterAddress, tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/mine.txt").write_text("shipped")
    code = "import os, sys; print(os.environ['COLOUR'], open('mine.txt').read(), sys.argv[1:], sorted(os.listdir()))"
    code += f"; import json; json.dump(dict(os.environ), open({str(tmp_path / 'seen.json')!r}, 'w'))"
    given = {"COLOUR": "blue", "MY_KEY": "given"}
    spec = _spec(code, "two words", "$HOME", working_dir=str(tmp_path / "mine"), environment=given, cpus=0.5)
    shown: list[str] = []
    wait_for_job(job_launcher, job_launcher.submit(spec), shown.append)
    assert "blue shipped ['two words', '$HOME'] ['mine.txt']" in "".join(shown)
    assert job_launcher.status(spec.job_id) == "succeeded"
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert seen["RAY_ADDRESS"] == local_ray.ray
    assert seen["CUDA_VISIBLE_DEVICES"] == ""
    assert seen["MY_KEY"] == "given"
    assert "not-for-jobs" not in json.dumps(seen)


def test_a_job_that_needs_no_ray_finds_none_and_its_time_ends(job_launcher: RayJobLauncher, tmp_path: Path) -> None:
    place = tmp_path / "seen.json"
    code = f"import json, os, time; json.dump(dict(os.environ), open({str(place)!r}, 'w')); time.sleep(3600)"
    spec = _spec(code, joins_ray=False, time_limit_s=3)
    job_launcher.submit(spec)
    with pytest.raises(LaunchError, match="ended as failed"):
        wait_for_job(job_launcher, spec.job_id, lambda piece: None)
    if place.exists():
        seen = json.loads(place.read_text())
        assert not {"RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_JOB_CONFIG_JSON_ENV_VAR", "SERVICE_PASSWORD"} & seen.keys()
        assert "not-for-jobs" not in place.read_text()


def test_a_failed_job_says_why(job_launcher: RayJobLauncher) -> None:
    spec = _spec("import sys; print('working'); print('error: data.source is odd', file=sys.stderr); sys.exit(2)")
    job_launcher.submit(spec)
    with pytest.raises(LaunchError, match=rf"job {spec.job_id} ended as failed: error: data\.source is odd"):
        wait_for_job(job_launcher, spec.job_id, lambda piece: None)
    assert "2" in job_launcher.message(spec.job_id) and job_launcher.exit_status(spec.job_id) == 2


def test_an_id_is_used_once(job_launcher: RayJobLauncher) -> None:
    spec = _spec("print('once')")
    job_launcher.submit(spec)
    with pytest.raises(AlreadyExistsError, match=rf"job {spec.job_id} was not accepted: .*already exists") as caught:
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
        with pytest.raises(NotFoundError, match=r"job nobody-s cannot be .*does not exist"):
            ask("nobody-s")
    with pytest.raises(LaunchError, match="does not answer"):
        RayJobLauncher(f"http://127.0.0.1:{free_port()}")


@pytest.mark.parametrize(
    ("error", "no_room", "ended"),
    [
        ("JOB_SUPERVISOR_ACTOR_START_TIMEOUT", True, None),
        ("JOB_SUPERVISOR_ACTOR_DIED", False, None),
        ("JOB_ENTRYPOINT_COMMAND_ERROR", False, -9),
        (None, False, None),
    ],
)
def test_a_job_that_found_no_room_is_told_from_one_that_failed(
    error: str | None, no_room: bool, ended: int | None
) -> None:
    """By a dashboard in miniature, since a real one waits for a quarter of an hour."""
    record = {"type": "SUBMISSION", "submission_id": "one", "status": "FAILED", "entrypoint": "x", "error_type": error}
    record["driver_exit_code"] = -9  # type: ignore[assignment]
    version = {"version": "4", "ray_version": ray.__version__, "ray_commit": "", "session_name": ""}

    class Dashboard(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            data = json.dumps(version if self.path == "/api/version" else record).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Dashboard)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        launcher = RayJobLauncher(f"http://127.0.0.1:{server.server_address[1]}")
        assert launcher.status("one") == "failed"
        assert launcher.found_no_room("one") is no_room and launcher.exit_status("one") == ended
    finally:
        server.shutdown()
        thread.join(90)
        server.server_close()


def test_a_folder_that_is_not_there_is_refused(job_launcher: RayJobLauncher, tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match=r"was not accepted: .*nowhere"):
        job_launcher.submit(_spec("print()", working_dir=str(tmp_path / "nowhere")))
