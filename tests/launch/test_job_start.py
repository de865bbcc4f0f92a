"""How a job's command starts: what it sees of its node's environment, and that the kernel ends it in time."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ot_ray.launch.job_start import job_environment, start_command

SECRET = {
    "AWS_ACCESS_KEY_ID": "x",
    "AWS_WEB_IDENTITY_TOKEN_FILE": "/var/run/token",
    "AWS_SHARED_CREDENTIALS_FILE": "/home/owner/.aws/credentials",
    "HF_TOKEN": "x",
    "OPENAI_API_KEY": "x",
    "Stripe_Secret": "x",
    "SECRET_KEY_BASE": "x",
    "DATABASE_URL": "x",
    "PGPASSWORD": "x",
    "PGPASSFILE": "x",
    "MYSQL_ROOT_PASSWORD": "x",
    "GOOGLE_APPLICATION_CREDENTIALS": "/x.json",
    "BROKER": "amqp://user:word@host/",
}
PLAIN = {
    "PATH": "/bin",
    "HOME": "/home/a",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": "/a:/b",
    "KEYBOARD": "de",
    "S3_ADDRESS": "https://host:9000/path",
}
RAY = {"RAY_ADDRESS": "10.0.0.1:6379", "RAY_AUTH_TOKEN": "t", "RAY_JOB_CONFIG_JSON_ENV_VAR": "{}"}


def test_secrets_stay_behind_but_rays_own_for_who_joins_it() -> None:
    around = {**SECRET, **PLAIN, **RAY}
    assert job_environment(around) == {**PLAIN, **RAY}
    assert job_environment(around, joins_ray=False) == PLAIN
    assert job_environment(around, ["HF_TOKEN"], joins_ray=False) == {**PLAIN, "HF_TOKEN": "x"}


@pytest.mark.parametrize("name", SECRET)
def test_each_is_a_secret(name: str) -> None:
    assert job_environment({name: SECRET[name]}) == {}


def test_the_command_is_run_with_just_that(tmp_path: Path) -> None:
    place = tmp_path / "seen.json"
    code = f"import json, os, sys; json.dump([sys.argv[1:], dict(os.environ)], open({str(place)!r}, 'w'))"
    command = start_command(
        [sys.executable, "-c", code, "--keep", "two words", "--", "$HOME"],
        ["MY_TOKEN"],
        {"CUDA_VISIBLE_DEVICES": "", "RAY_ADDRESS": "here=1"},
        joins_ray=False,
    )
    around = {**SECRET, **RAY, "MY_TOKEN": "given", "PATH": os.defpath, "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run(command, env=around, check=True)
    arguments, seen = json.loads(place.read_text())
    assert arguments == ["--keep", "two words", "--", "$HOME"]
    # What the C library and Python add of themselves.
    seen.pop("LC_CTYPE", None)
    kept = {name: around[name] for name in ("MY_TOKEN", "PATH", "PYTHONPATH")}
    assert seen == {**kept, "CUDA_VISIBLE_DEVICES": "", "RAY_ADDRESS": "here=1"}


def test_the_kernel_ends_a_command_that_takes_too_long() -> None:
    command = start_command([sys.executable, "-c", "import time; time.sleep(3600)"], time_limit_s=1)
    assert subprocess.run(command, timeout=120, check=False).returncode == -signal.SIGALRM


def test_a_command_that_is_not_there_says_so() -> None:
    command = start_command(["no-such-command"])
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 1
    assert "error: no-such-command cannot be started: No such file or directory" in ended.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's signal at a parent's death is Linux's")
def test_a_command_does_not_outlive_who_started_it(tmp_path: Path) -> None:
    place = tmp_path / "pid"
    code = f"import os, time; open({str(place)!r}, 'w').write(str(os.getpid()) + ' '); time.sleep(3600)"
    command = start_command([sys.executable, "-c", code])
    # As Ray does: by a shell, in a session of its own.
    starts = "import subprocess, sys, time; subprocess.Popen('exec ' + sys.argv[1], shell=True, "
    starts += "start_new_session=True); time.sleep(3600)"
    parent = subprocess.Popen([sys.executable, "-c", starts, shlex.join(command)], cwd=Path(__file__).parents[2])
    try:
        wait_until(lambda: place.exists() and place.read_text().endswith(" "))
    finally:
        parent.kill()
        parent.wait()
    pid = int(place.read_text())
    wait_until(lambda: not lives(pid))


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
