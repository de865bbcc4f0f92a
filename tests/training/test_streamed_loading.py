"""ZeRO-3 opens a model that no rank could hold: the peak memory of each rank is its own part and little more."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ot_ray.training import DeepSpeedEngine, TrainingConfig
from tests.training.samples import PATIENCE, run_group

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2 * PATIENCE)]

RANKS = 5
LAYERS, ROWS, COLUMNS = 10, 12_288, 4_096
MODEL_BYTES = LAYERS * ROWS * COLUMNS * 2
BOUND = MODEL_BYTES * 3 // 10


class Tall(nn.Module):
    """Few big frozen layers, and a small one that learns."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(COLUMNS, ROWS, bias=False) for _ in range(LAYERS))
        self.layers.requires_grad_(False)
        self.head = nn.Linear(16, 16, bias=False)


def _open(folder: Path, name: str) -> tuple[Path, int, int]:
    """File, where the tensor's bytes begin, and how many they are."""
    path = folder / f"{name}.safetensors"
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        start, end = json.loads(file.read(length))[name]["data_offsets"]
    return path, 8 + length + start, end - start


def _read(folder: Path, name: str, start: int, end: int) -> Tensor:
    path, offset, _ = _open(folder, name)
    values = torch.empty(end - start, dtype=torch.bfloat16)
    with path.open("rb", buffering=0) as file:
        file.seek(offset + 2 * start)
        assert file.readinto(values.view(torch.uint8).numpy()) == values.numel() * 2
    return values


def _memory(kind: str) -> int:
    """Bytes, from the kernel's own account of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(kind)) * 1024


def load(folder: Path) -> None:
    config = TrainingConfig(steps=1, batch_size=RANKS, precision="bfloat16", zero_stage=3)
    # What DeepSpeed itself takes, once a process, is no part of the model.
    DeepSpeedEngine(nn.Linear(4, 4), config)
    with torch.device("meta"):
        module = Tall()
    asked = []

    def fill(name: str, start: int, end: int) -> Tensor:
        asked.append(2 * (end - start))
        return _read(folder, name, start, end)

    # The peak so far is forgotten, so that it counts from here.
    Path("/proc/self/clear_refs").write_text("5")
    before = _memory("VmHWM")
    engine = DeepSpeedEngine(module, config, fill)
    growth = _memory("VmHWM") - before
    torch.save(
        {
            "growth": growth,
            "asked": sum(asked),
            "parts": {name: p.ds_tensor[:1000].clone() for name, p in engine.module.named_parameters()},
        },
        folder / f"{os.environ['RANK']}.pt",
    )


def test_no_rank_holds_the_model(tmp_path: Path) -> None:
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in Tall().named_parameters()}
    for number, (name, shape) in enumerate(shapes.items()):
        # Whole numbers up to 256 are exact in bfloat16; the period divides no layer and no part of one.
        values = torch.arange(251).add(number).fmod(251).bfloat16().repeat(-(-shape.numel() // 251))[: shape.numel()]
        save_file({name: values.view(shape)}, tmp_path / f"{name}.safetensors")
    run_group(load, RANKS, tmp_path)
    for rank in range(RANKS):
        seen = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert MODEL_BYTES // RANKS <= seen["asked"] < MODEL_BYTES // RANKS + 2**20
        assert MODEL_BYTES // RANKS < seen["growth"] < BOUND < MODEL_BYTES / 3
        for name, shape in shapes.items():
            part = -(-shape.numel() // RANKS)
            stored = _read(tmp_path, name, part * rank, min(part * rank + 1000, shape.numel()))
            assert torch.equal(seen["parts"][name][: stored.numel()][:part], stored[:part])
