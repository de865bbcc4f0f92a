"""What a customer has at home, the base install, is enough to tune a bundle, to inspect the adapter, and for gradient
learning."""

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
place, verb = sys.argv[1:3]
sys.argv = [verb, *sys.argv[3:]]
runpy.run_module(verb, run_name="__main__", alter_sys=True)
"""
INSPECT = """
import ot_ray
bundle = ot_ray.open_bundle(f"{place}/bundle").manifest
adapter = ot_ray.inspect_adapter(f"{place}/out", bundle)
print("tensors", len(adapter.tensors))
"""
WHAT_CAME = """
print("blocked", sorted(BLOCKED & set(sys.modules)))
"""


def at_home(place: Path, verb: str, settings: list[str], then: str = "") -> list[str]:
    """The lines that a verb prints, and what is run after it."""
    arguments = [json.dumps(NOT_AT_HOME), str(place), verb, *settings]
    program = AT_HOME + then + WHAT_CAME
    ended = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=200, cwd=ROOT
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.splitlines()


@pytest.mark.slow
def test_tuning_needs_the_base_install_only(tmp_path: Path) -> None:
    build(tmp_path)
    settings = [
        f"bundle.folder={tmp_path}/bundle", f"data.source={tmp_path}/train.jsonl", "sequence_length=16",
        "training={steps: 2, batch_size: 2}", f"output={tmp_path}/out", "method=lora",
    ]  # fmt: skip
    # Two low-rank factors for each of six linear maps in each of two layers.
    assert at_home(tmp_path, "jobs.tune", settings, INSPECT)[-2:] == ["tensors 24", "blocked []"]


@pytest.mark.slow
def test_gradient_learning_needs_the_base_install_only(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"Paragraph {number} of a customer's own text.\n" for number in range(200)))
    settings = [f"data.source={text}", "sequence_length=16", "run.steps=2", "run.rows=2", f"output={tmp_path}/out"]
    client = "from ot_ray.client import ColaClient, ColaTrainer"
    assert at_home(tmp_path, "jobs.cola", settings, client)[-1] == "blocked []"
    assert (tmp_path / "out/customer/lora/adapter_model.safetensors").is_file()
