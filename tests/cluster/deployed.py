"""The service on a Ray as a platform team runs it: `serve deploy` of a config file, and what Serve says of replicas."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from ray import serve as ray_serve
from ray.util.state import get_log

from ot_ray.launch.cluster import ClusterAddress
from serve.local import APPLICATION
from tests.fixtures.s3 import free_port

T = TypeVar("T")
PATIENCE_S = 900.0


@dataclass(frozen=True)
class Replica:
    """One process of a deployment."""

    id: str
    pid: int | None
    """None of one that does not run yet."""
    state: str
    node: str | None
    log_file: str | None


class Deployed:
    """A service that is deployed with `serve deploy`, again and again.

    Args:
        folder: for the config file.
        settings: of the service.
    """

    def __init__(self, folder: Path, cluster: ClusterAddress, settings: dict[str, Any]) -> None:
        assert cluster.dashboard is not None
        self._ray, self._dashboard, self._settings = cluster.ray, cluster.dashboard, settings
        self._file, self._port = folder / "serve.yaml", free_port()
        self.url = f"http://127.0.0.1:{self._port}/v1"

    def deploy(self, **changes: Any) -> None:
        """Send the settings with these changes; what replaces what is Serve's to do."""
        application = {
            "name": APPLICATION,
            "route_prefix": "/",
            "import_path": "serve.app:build_app",
            "args": {**self._settings, **changes},
        }
        options = {"host": "127.0.0.1", "port": self._port}
        config = {"proxy_location": "HeadOnly", "http_options": options, "applications": [application]}
        self._file.write_text(yaml.safe_dump(config))
        command = [str(Path(sys.executable).with_name("serve")), "deploy", str(self._file), "-a", self._dashboard]
        said: list[str] = []

        def sent() -> bool:
            # On a busy machine the dashboard may not answer in time.
            done = subprocess.run(command, cwd=self._file.parent, capture_output=True, text=True, check=False)
            said.append(done.stdout + done.stderr)
            return done.returncode == 0

        until(sent, lambda: said[-1])

    def wait(self, **counts: int) -> None:
        """Until everything runs as it was deployed.

        Args:
            counts: replicas by deployment, where they are known.
        """
        until(lambda: self._settled(counts), lambda: json.dumps(self._details(), indent=1)[-4000:])
        until(self._answers)

    def status(self) -> str:
        """Of the application, in Serve's words."""
        return self._details().get("status", "")

    def replicas(self, deployment: str, state: str | None = "RUNNING") -> dict[str, Replica]:
        """The replicas of a deployment by id: those that run, or, with None, all."""
        # For a moment after a deployment, Serve lists none.
        found = until(lambda: self._details().get("deployments", {}).get(deployment))["replicas"]
        made = [
            Replica(item["replica_id"], item.get("pid"), item["state"], item.get("node_id"), item.get("log_file_path"))
            for item in found
            if state in (None, item["state"])
        ]
        return {replica.id: replica for replica in made}

    def log(self, replica: Replica) -> str:
        """What a replica has logged so far."""
        assert replica.log_file is not None
        name = replica.log_file.lstrip("/")
        return "".join(get_log(self._ray, node_id=replica.node, filename=name, tail=-1))

    def ask_all(self, method: str, *arguments: object) -> list[Any]:
        """The answer of every engine."""
        engine = ray_serve.get_deployment_handle("Engine", APPLICATION)
        return engine.broadcast(method, *arguments).results(timeout_s=PATIENCE_S)

    def _settled(self, counts: dict[str, int]) -> bool:
        details = self._details()
        if details.get("status") != "RUNNING":
            return False
        for name, deployment in details["deployments"].items():
            states = [replica["state"] for replica in deployment["replicas"]]
            wanted = counts.get(name) or deployment["target_num_replicas"]
            if deployment["status"] != "HEALTHY" or states != ["RUNNING"] * wanted:
                return False
        return True

    def _answers(self) -> bool:
        try:
            urllib.request.urlopen(self.url.replace("/v1", "/healthz"), timeout=30).close()
        except (urllib.error.URLError, OSError):
            return False
        return True

    def _details(self) -> dict[str, Any]:
        def read() -> dict[str, Any] | None:
            try:
                with urllib.request.urlopen(f"{self._dashboard}/api/serve/applications/", timeout=60) as answer:
                    return json.load(answer)
            except OSError:
                return None

        found = until(read)
        assert found is not None
        return found["applications"].get(APPLICATION, {})


def until(found: Callable[[], T], tell: Callable[[], object] = lambda: "") -> T:
    """What `found` returns, as soon as that is true of it."""
    deadline = time.monotonic() + PATIENCE_S
    while not (result := found()):
        assert time.monotonic() < deadline, f"not within {PATIENCE_S:g} s: {tell()}"
        time.sleep(0.2)
    return result
