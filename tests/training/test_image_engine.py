"""Distilling image models with their weights sharded over two ranks, against one process of plain PyTorch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ot_ray.model import IMAGE_FAMILIES
from ot_ray.training import TorchEngine
from tests.training.image_groups import config, module, run_pair, seen
from tests.training.samples import PATIENCE, run_group


@pytest.mark.slow
@pytest.mark.timeout(PATIENCE + 60)
def test_sharded_distillation_is_that_of_one_process(tmp_path: Path) -> None:
    run_group(run_pair, 2, tmp_path)
    found = json.loads((tmp_path / "seen.json").read_text())
    assert found.keys() == IMAGE_FAMILIES.keys()
    for model_type, sharded in found.items():
        alone = seen(TorchEngine(module(model_type), config(), device="cpu"))
        assert sharded["losses"] == pytest.approx(alone["losses"], rel=1e-4), model_type
        assert sharded["nll"] == pytest.approx(alone["nll"], rel=1e-4), model_type
        assert alone["losses"][-1] < alone["losses"][0]
