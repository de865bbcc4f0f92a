"""Connecting to Ray: nested use, and addresses where nothing answers."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time

import pytest

from ot_ray.errors import LaunchError
from ot_ray.launch.cluster import ClusterAddress
from tests.fixtures.s3 import free_port

_CONNECT = """
import sys
from ot_ray.errors import LaunchError
from ot_ray.launch import ray_cluster
for address in sys.argv[1:]:
    try:
        with ray_cluster(address):
            print("connected")
    except LaunchError as error:
        print(f"refused: {error}")
"""
_COUNTED = """
import sys
import ray
from ot_ray.errors import LaunchError
from ot_ray.launch import ray_cluster
tries, init = [], ray.init
def counted(**options):
    tries.append(options)
    return init(**options)
ray.init, ray.__version__ = counted, sys.argv[2] or ray.__version__
try:
    with ray_cluster(sys.argv[1]):
        print("connected")
except LaunchError as error:
    print(len(tries), error)
"""


@pytest.mark.slow
def test_a_second_use_takes_the_ray_that_runs(local_ray: ClusterAddress) -> None:
    import ray

    from ot_ray.launch import ray_cluster

    with ray_cluster(num_cpus=1) as inner:
        assert inner == local_ray
    assert ray.is_initialized()
    assert ray.cluster_resources()["CPU"] == 4


@pytest.mark.slow
def test_an_address_of_the_ray_that_runs_is_taken_by_any_of_its_names(local_ray: ClusterAddress) -> None:
    from ot_ray.launch import ray_cluster

    port = local_ray.ray.rpartition(":")[2]
    for address in (local_ray.ray, f"127.0.0.1:{port}", f"localhost:{port}"):
        with ray_cluster(address) as inner:
            assert inner == local_ray


@pytest.mark.slow
def test_another_address_than_that_of_the_ray_that_runs_is_refused(local_ray: ClusterAddress) -> None:
    import ray

    from ot_ray.launch import ray_cluster

    with socket.create_server(("127.0.0.1", 0)) as somebody:
        other = f"127.0.0.1:{somebody.getsockname()[1]}"
        for address in (other, f"ray://{other}"):
            with pytest.raises(LaunchError, match="belongs to the Ray cluster at") as caught, ray_cluster(address):
                pass
            assert f"address is {address!r}" in str(caught.value)
    with pytest.raises(LaunchError, match="no Ray cluster answers"), ray_cluster(other):
        pass
    assert ray.is_initialized()


@pytest.mark.slow
def test_another_process_reaches_it_by_its_address(local_ray: ClusterAddress) -> None:
    assert local_ray.dashboard is not None
    assert local_ray.dashboard.startswith("http://127.0.0.1:")
    assert _lines(local_ray.ray) == ["connected"]


def test_wrong_addresses_are_refused_at_once() -> None:
    closed = f"127.0.0.1:{free_port()}"
    start = time.monotonic()
    nowhere, client, nonsense, port = _lines(closed, f"ray://{closed}", "http://127.0.0.1:8265", "127.0.0.1:99999")
    assert time.monotonic() - start < 60
    assert nowhere.startswith(f"refused: address is '{closed}', where no Ray cluster answers")
    assert client.startswith(f"refused: address is 'ray://{closed}', where no Ray cluster answers")
    assert nonsense == "refused: address is 'http://127.0.0.1:8265'; use host:port, ray://host:port or auto"
    assert "127.0.0.1:99999" in port


@pytest.mark.slow
def test_what_waiting_cannot_mend_is_refused_at_the_first_try() -> None:
    # A Ray of its own, which asks for a token whatever the session's does.
    code = f"""
import os, subprocess, sys
from ot_ray.launch import ray_cluster
with ray_cluster(num_cpus=1, dashboard=False, show_logs=False) as cluster:
    print(cluster.ray, flush=True)
    for token, version in (("0" * 64, ""), (os.environ["RAY_AUTH_TOKEN"], "2.0.0")):
        environment = {{**os.environ, "RAY_AUTH_TOKEN": token}}
        subprocess.run([sys.executable, "-c", {_COUNTED!r}, cluster.ray, version], env=environment, check=True)
"""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "1" * 64}
    shown = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=280)
    assert shown.returncode == 0, shown.stderr
    address, token, version = shown.stdout.splitlines()
    for line, said in (
        (token, "InvalidAuthToken: Authentication token is missing or incorrect"),
        (version, "Version mismatch: The cluster was started with: Ray: 2.6"),
    ):
        assert line.startswith(f"1 could not connect to Ray at {address}: ")
        assert said in line and "Traceback" not in line


@pytest.mark.slow
def test_a_second_ray_on_the_machine_takes_jobs_too(local_ray: ClusterAddress) -> None:
    code = """
import sys
from ot_ray.launch import JobSpec, RayJobLauncher, ray_cluster, wait_for_job
with ray_cluster(num_cpus=1) as cluster:
    print(cluster.ray)
    launcher = RayJobLauncher(cluster.dashboard)
    wait_for_job(launcher, launcher.submit(JobSpec("second", [sys.executable, "-c", "print('ran')"])), print)
"""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200, env=environment)
    assert shown.returncode == 0, shown.stderr
    assert local_ray.ray not in shown.stdout
    assert "ran" in shown.stdout.split()


def _lines(*addresses: str) -> list[str]:
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    shown = subprocess.run(
        [sys.executable, "-c", _CONNECT, *addresses], capture_output=True, text=True, timeout=120, env=environment
    )
    assert shown.returncode == 0, shown.stderr
    return shown.stdout.splitlines()
