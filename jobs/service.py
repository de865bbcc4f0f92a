"""The service as a process of its own, for jobs that show it: started, asked, stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from ot_ray.errors import LaunchError


@contextmanager
def running_service(config: dict[str, Any], address: str, timeout_s: float = 180.0) -> Iterator[str]:
    """Run `python -m serve` on a Ray cluster for a while.

    Args:
        config: the service's settings; its `port` among them.
        address: the Ray cluster's.

    Returns:
        The address that OpenAI clients take, ending in `/v1`.

    Raises:
        LaunchError: it did not come up; its last output is in the message.
    """
    with tempfile.TemporaryDirectory() as temporary:
        settings, log = Path(temporary) / "serve.yaml", Path(temporary) / "serve.log"
        settings.write_text(yaml.safe_dump(config), encoding="utf-8")
        command = [sys.executable, "-m", "serve", "--config", str(settings), "--address", address]
        with log.open("wb") as output:
            # A session of its own: Ctrl-C reaches us alone, and we stop it in order.
            process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
        url = f"http://127.0.0.1:{config['port']}"
        try:
            _wait(process, url, log, timeout_s)
            yield f"{url}/v1"
        finally:
            _stop(process)


def complete(url: str, model: str, prompt: str, max_tokens: int = 24) -> str:
    """Ask a model for its most likely continuation of a prompt, over HTTP."""
    body = {"model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
    request = urllib.request.Request(
        f"{url}/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)["choices"][0]["text"]
    except urllib.error.HTTPError as error:
        raise LaunchError(f"{url} answered {error.code}: {error.read().decode(errors='replace')[:500]}") from None


def _wait(process: subprocess.Popen, url: str, log: Path, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise LaunchError(f"the service ended with code {process.returncode}: {_tail(log)}")
        try:
            urllib.request.urlopen(f"{url}/healthz", timeout=10).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.3)
    raise LaunchError(f"the service did not answer within {timeout_s:.0f} s: {_tail(log)}")


def _stop(process: subprocess.Popen) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGINT)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _tail(log: Path) -> str:
    return " | ".join(log.read_text(errors="replace").strip().splitlines()[-3:])
