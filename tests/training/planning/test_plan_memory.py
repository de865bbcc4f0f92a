"""A plan's memory and messages, against live runs of the engine on two workers.

Compared are bytes of tensors, as an allocator is asked for them: all that live in a rank's process at the worst
moment of a step, less those of the cases before."""

from __future__ import annotations

import gc
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig

from ot_ray.model import DistillLoss, DistillModel, SplitPlan, empty_model, uniform_layers
from ot_ray.training import DeepSpeedEngine, TrainingConfig
from ot_ray.training.planning import hardware_of, plan_distillation
from ot_ray.training.planning.activations import packed_rows
from ot_ray.training.planning.live_bytes import LiveBytes
from tests.training.samples import PATIENCE, run_group

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2 * PATIENCE)]

WORKERS, LENGTH, DEPTH = 2, 64, 10
PLAN = SplitPlan(bottom=1, keep=5, top=1)
CASES: list[dict[str, Any]] = [
    {"zero_stage": 0, "precision": "bfloat16", "micro_batch_size": 1},
    {"zero_stage": 1, "precision": "float32", "micro_batch_size": 2},
    {"zero_stage": 2, "precision": "bfloat16", "micro_batch_size": 1, "offload_optimizer": True},
    {"zero_stage": 3, "precision": "bfloat16", "micro_batch_size": 1},
]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    """What rank 0 saw in each case."""
    folder = tmp_path_factory.mktemp("measured")
    run_group(measure_cases, WORKERS, folder)
    return json.loads((folder / "0.json").read_text())


@pytest.mark.parametrize("case", range(len(CASES)), ids=[str(tuple(case.values())) for case in CASES])
def test_a_plan_foretells_a_live_run(case: int, measured: list[dict[str, float]]) -> None:
    plan = plan_distillation(_shape(), PLAN, _training(CASES[case]), LENGTH, WORKERS, hardware_of("cpu"), torch.float32)
    # On a CPU, what is offloaded lies beside the rest.
    assert plan.memory.device + plan.memory.host == pytest.approx(measured[case]["bytes"], rel=0.15)
    assert plan.memory.checkpoint == pytest.approx(measured[case]["saved"], rel=0.001)
    # Beside gradients and weights, ranks exchange norms and figures.
    assert plan.speed.traffic.wire == pytest.approx(measured[case]["sent"], rel=0.01)


def _training(case: dict[str, Any]) -> TrainingConfig:
    return TrainingConfig.model_validate({"steps": 2, "batch_size": 4, "checkpoint_every": 1, **case})


def _shape() -> Any:
    """About 40 million parameters: large beside what an engine keeps for itself."""
    values = {"hidden_size": 512, "ffn_dim": 2048, "num_attention_heads": 8, "vocab_size": 16000, "dropout": 0.0}
    return AutoConfig.for_model(
        "opt", **values, num_hidden_layers=DEPTH, word_embed_proj_dim=512, max_position_embeddings=256
    )


def measure_cases(folder: Path) -> None:
    """What each worker runs."""
    seen = [_measure(_training(case)) for case in CASES]
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(seen))


def _measure(config: TrainingConfig) -> dict[str, float]:
    gc.collect()
    # DeepSpeed never lets go of an engine.
    live = LiveBytes()
    live.leave_out(*_tensors())
    model = empty_model(_shape(), getattr(torch, config.precision))
    module = DistillModel(model, PLAN, uniform_layers(DEPTH - 2, PLAN.keep), DistillLoss())
    engine = DeepSpeedEngine(module, config, fill=lambda name, start, end: torch.linspace(-0.1, 0.1, end - start))
    engine.module.train()
    batch = packed_rows(config.batch_size // WORKERS, LENGTH)
    engine.step(batch, 1e-4)
    gc.collect()
    live.adopt(*_tensors())
    live.restart()
    messages = _Messages()
    with live, messages:
        engine.step(batch, 1e-4)
    saved = sum(piece.tensor.nbytes for piece in engine.pieces())
    return {"bytes": live.peak, "sent": messages.sent, "saved": saved}


class _Messages(TorchDispatchMode):
    """Bytes that a rank sends over rings of `WORKERS`."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d" and func is not torch.ops.c10d.barrier.default:
            # The whole of what is gathered or reduced is the larger of what goes in and what comes out.
            whole = max(sum(t.nbytes for t in tree_leaves(arg) if isinstance(t, torch.Tensor)) for arg in args)
            self.sent += whole * (WORKERS - 1) / WORKERS * (2 if "allreduce" in str(func) else 1)
        return func(*args, **(kwargs or {}))


def _tensors() -> list[torch.Tensor]:
    return [found for found in gc.get_objects() if issubclass(type(found), torch.Tensor) and not found.is_meta]
