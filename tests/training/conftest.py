"""A tiny model with its tokenizer in a folder, and one group of workers that many tests look at."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.artifacts.samples import tiny_tokenizer
from tests.fixtures.models import VOCAB, tiny_model
from tests.training.samples import run_group
from tests.training.workers import run_everything


@pytest.fixture(scope="session")
def distilling(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The plain values of a `DistillConfig` over a saved model and a JSONL file."""
    folder = tmp_path_factory.mktemp("distilling")
    tiny_model("llama").save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    words = [f"w{2 + i % (VOCAB - 2)}" for i in range(400)]
    rows = [{"text": " ".join(words[start : start + 40])} for start in range(0, 360, 7)]
    (folder / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {
        "model": {"name": "tiny", "source": str(folder / "model")},
        "split": {"bottom": 2, "keep": 2, "top": 1},
        "data": {"source": str(folder / "text.jsonl")},
        "sequence_length": 16,
        "training": {"steps": 12, "batch_size": 4, "lr": 3e-3, "zero_stage": 3, "checkpoint_every": 5},
        "store": str(folder / "store"),
        "run": "nightly",
    }


@pytest.fixture(scope="session")
def group(tmp_path_factory: pytest.TempPathFactory, distilling: dict[str, Any]) -> list[dict[str, Any]]:
    """What each of two DeepSpeed workers saw, by rank; see `workers.run_everything`."""
    folder = tmp_path_factory.mktemp("group")
    run_group(run_everything, 2, folder, distilling)
    return [{**torch.load(folder / f"{rank}.pt", weights_only=False), "folder": folder} for rank in range(2)]


@pytest.fixture
def store_folder(tmp_path: Path) -> str:
    return str(tmp_path / "store")
