"""Starts a job's command on the node where it runs: with the node's secrets left behind, a limit on its time, and no
life beyond that of whoever started it.

A script of the standard library, `python -m ot_ray.launch.job_start`; what a job may know is said in its spec."""

from __future__ import annotations

import argparse
import ctypes
import os
import re
import signal
import sys
from collections.abc import Collection, Mapping, Sequence

SECRETS = re.compile(
    r"AWS_.*|AZURE_.*|GOOGLE_.*|GCP_.*|PG[A-Z]+|DATABASE_URL|.*_DSN|HF_TOKEN_PATH|RAY_AUTH_TOKEN.*"
    r"|(.*_)?(TOKEN|SECRET|SECRETS|KEY|KEYS|PASSWD|PASS|CREDENTIALS)(_.*)?|.*PASSWORD.*",
    re.IGNORECASE,
)
"""Names of variables that hold secrets, or say where secrets lie."""

_PASSWORD_IN_URL = re.compile(r"://[^/\s@]*:[^/\s@]*@")

_PR_SET_PDEATHSIG = 1
_RAY = re.compile(r"RAY_ADDRESS|RAY_JOB_CONFIG_JSON_ENV_VAR|RAY_AUTH_.*")
_RAY_SECRETS = re.compile(r"RAY_AUTH_TOKEN(_PATH)?")


def job_environment(
    environment: Mapping[str, str], given: Collection[str] = (), *, joins_ray: bool = True
) -> dict[str, str]:
    """What a job sees of the environment of its node.

    Args:
        given: names that the job's spec sets itself; they stay.
        joins_ray: whether the job may join the cluster, for which it needs the address and Ray's token.
    """
    left = {}
    for name, value in environment.items():
        of_ray = joins_ray and _RAY_SECRETS.fullmatch(name)
        secret = SECRETS.fullmatch(name) or _PASSWORD_IN_URL.search(value)
        kept = name in given or of_ray or not secret
        if kept and (joins_ray or not _RAY.fullmatch(name)):
            left[name] = value
    return left


def start_command(
    command: Sequence[str],
    given: Collection[str] = (),
    fixed: Mapping[str, str] | None = None,
    *,
    joins_ray: bool = True,
    time_limit_s: float | None = None,
) -> list[str]:
    """The command that starts `command` so. Python runs it: the command's own where that is a Python, else this one.

    Args:
        given, joins_ray: as in `job_environment`.
        fixed: variables of the command itself, whatever its surroundings say.
        time_limit_s: wall-clock seconds after which the kernel ends the process.
    """
    own = bool(command) and os.path.basename(command[0]).startswith("python")
    options = [option for name in sorted(given) for option in ("--keep", name)]
    options += [option for pair in sorted((fixed or {}).items()) for option in ("--set", "=".join(pair))]
    options += [] if joins_ray else ["--no-ray"]
    # Whole seconds are what the kernel's timer takes.
    options += [] if time_limit_s is None else ["--seconds", str(max(1, round(time_limit_s)))]
    python = command[0] if own else sys.executable
    return [python, "-m", "ot_ray.launch.job_start", *options, "--", *command]


def _end_with_parent() -> None:
    # Ray has a process that watches for the parent's end. It may be killed with the rest of Ray, and waits for ever
    # where nobody reaps the parent, as under a container's bare first process.
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def main(arguments: Sequence[str]) -> None:
    """Become the job's command."""
    parser = argparse.ArgumentParser(prog="python -m ot_ray.launch.job_start", allow_abbrev=False)
    parser.add_argument("--keep", action="append", default=[], metavar="NAME")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--no-ray", action="store_true")
    parser.add_argument("--seconds", type=int)
    parser.add_argument("command", nargs="+")
    asked = parser.parse_args(arguments)
    fixed = dict(pair.split("=", 1) for pair in asked.set)
    environment = {**job_environment(os.environ, asked.keep, joins_ray=not asked.no_ray), **fixed}
    _end_with_parent()
    if asked.seconds is not None:
        # The timer stays with the process when it becomes the command.
        signal.alarm(asked.seconds)
    try:
        os.execvpe(asked.command[0], asked.command, environment)
    except OSError as error:
        raise SystemExit(f"error: {asked.command[0]} cannot be started: {error.strerror}") from None


if __name__ == "__main__":
    main(sys.argv[1:])
