"""The names that the package promises, pinned, and how little importing it loads."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version

import pytest

import ot_ray

PUBLIC = {
    "BundleSource", "DataConfig", "DistillLoss", "DistillModel", "FiveSettings", "OTRayError", "SplitPlan",
    "TrainingConfig", "__version__", "adapter_state", "emulate", "fit", "inspect_adapter", "load_sequences",
    "open_bundle", "open_store", "perplexity", "plain_state", "plug_in", "prepare_tuning", "uniform_layers",
    "write_adapter", "write_bundle",
}  # fmt: skip


def test_the_names_are_these() -> None:
    assert set(ot_ray.__all__) == PUBLIC
    assert set(dir(ot_ray)) >= PUBLIC


@pytest.mark.parametrize("name", sorted(PUBLIC - {"__version__"}))
def test_every_name_is_what_it_says(name: str) -> None:
    assert getattr(ot_ray, name).__name__ == name


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'plugin'"):
        _ = ot_ray.plugin


def test_the_version_is_the_package_s() -> None:
    assert ot_ray.__version__ == version("ot_ray")


def test_importing_it_loads_no_heavy_package() -> None:
    heavy = ["ray", "torch", "transformers", "peft", "deepspeed", "pydantic"]
    code = f"import sys, ot_ray; print([name for name in {heavy} if name in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert shown.stdout.strip() == "[]"
