"""A run's figures, scraped from the port where a real Ray exports its metrics."""

from __future__ import annotations

import re
import time
import urllib.request
from uuid import uuid4

import pytest

from ot_ray.launch import RunMetrics
from ot_ray.launch.cluster import ClusterAddress

pytestmark = pytest.mark.slow


def test_figures_are_exported_under_the_model_s_name(local_ray: ClusterAddress) -> None:
    model = f"opt-{uuid4().hex[:8]}"
    metrics = RunMetrics(model)
    metrics.observe({"step": 3, "loss": 2.5, "kd_loss": 0.25, "tokens_per_s": 1234.0, "mfu": 0.5, "unknown": 1.0})
    metrics.observe({"step": 4, "loss": float("nan"), "data_wait_share": 0.125, "seconds_left": 60.0})

    found = _scraped(model, {"data_wait_share", "seconds_left", "step"})
    assert {name: value for name, (value, _) in found.items()} == {
        "step": 4.0,
        "loss": 2.5,
        "kd_loss": 0.25,
        "tokens_per_s": 1234.0,
        "mfu": 0.5,
        "data_wait_share": 0.125,
        "seconds_left": 60.0,
    }
    # Besides the tags that Ray gives every metric there is the model, and nothing that grows.
    for _, tags in found.values():
        assert {tag for tag in tags if tag[0].islower() and not tag.startswith("otel_")} == {"model"}


def _scraped(model: str, wanted: set[str]) -> dict[str, tuple[float, set[str]]]:
    import ray

    (node,) = ray.nodes()
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    deadline = time.monotonic() + 120
    while True:
        found: dict[str, tuple[float, set[str]]] = {}
        with urllib.request.urlopen(address, timeout=60) as answer:
            for line in answer.read().decode().splitlines():
                match = re.fullmatch(r"ray_ot_ray_(\w+)\{(.*)\} (\S+)", line)
                if match and f'model="{model}"' in match[2]:
                    found[match[1]] = float(match[3]), set(re.findall(r'(\w+)="', match[2]))
        if (wanted <= found.keys() and found["step"][0] == 4.0) or time.monotonic() > deadline:
            return found
        time.sleep(0.5)
