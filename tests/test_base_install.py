"""What a customer has at home, the base install, is enough to tune a bundle and to inspect the adapter."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.jobs.scene import build

ROOT = Path(__file__).parents[1]
NOT_AT_HOME = [
    "ray", "deepspeed", "datasets", "boto3", "matplotlib", "fastapi", "starlette", "uvicorn", "pyarrow", "sqlalchemy",
    "lm_eval",
]  # fmt: skip
AT_HOME = """
import json, runpy, sys

BLOCKED = set(json.loads(sys.argv.pop(1)))

class Present:
    # A finder that does not find what is blocked, as if it were not installed.

    def __init__(self, finder):
        self._finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in BLOCKED else self._finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self._finder, name)

sys.meta_path[:] = [Present(finder) for finder in sys.meta_path]
place = sys.argv[1]
import ot_ray
sys.argv = ["jobs.tune", *sys.argv[2:]]
runpy.run_module("jobs.tune", run_name="__main__", alter_sys=True)
bundle = ot_ray.open_bundle(f"{place}/bundle").manifest
adapter = ot_ray.inspect_adapter(f"{place}/out", bundle)
print("tensors", len(adapter.tensors), "blocked", sorted(BLOCKED & set(sys.modules)))
"""


@pytest.mark.slow
def test_tuning_needs_the_base_install_only(tmp_path: Path) -> None:
    build(tmp_path)
    settings = [
        f"bundle.folder={tmp_path}/bundle", f"data.source={tmp_path}/train.jsonl", "sequence_length=16",
        "training={steps: 2, batch_size: 2}", f"output={tmp_path}/out", "method=lora",
    ]  # fmt: skip
    ended = subprocess.run(
        [sys.executable, "-c", AT_HOME, json.dumps(NOT_AT_HOME), str(tmp_path), *settings],
        capture_output=True,
        text=True,
        timeout=200,
        cwd=ROOT,
    )
    assert ended.returncode == 0, ended.stderr
    # Two low-rank factors for each of six linear maps in each of two layers.
    assert ended.stdout.splitlines()[-1] == "tensors 24 blocked []"
