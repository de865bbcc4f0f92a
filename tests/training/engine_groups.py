"""What groups of DeepSpeed workers do for test_deepspeed_engine.py; each rank leaves what it saw in a file."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ot_ray.errors import ConfigError, TrainingError
from ot_ray.training import DeepSpeedEngine
from tests.training.engines import (
    MODULES,
    SAVED_AT,
    STEPS,
    Net,
    Saved,
    Stored,
    engine_config,
    hollow_net,
    net,
    rows_for,
    run,
    save_pieces,
)


class Case(NamedTuple):
    module: str
    precision: str
    stage: int
    offload: str = ""

    def config(self, **values: Any) -> Any:
        offload = {f"offload_{part}": True for part in self.offload.split("+") if part}
        return engine_config(precision=self.precision, zero_stage=self.stage, **offload, **values)

    def __str__(self) -> str:
        return "-".join(str(part) for part in self if part != "")


PAIR = [
    *(Case("net", precision, stage) for precision in ("float32", "bfloat16") for stage in range(4)),
    *(Case("net", "float32", stage, "optimizer") for stage in (1, 2, 3)),
    Case("net", "float32", 3, "parameters"),
    Case("net", "float32", 3, "optimizer+parameters"),
    Case("net", "bfloat16", 3, "optimizer+parameters"),
    Case("language", "float32", 3),
    Case("distill", "float32", 3),
    Case("distill-lean", "float32", 3),
    Case("distill", "bfloat16", 2),
]
# From a folder of pieces to a stage, within the group of two; "torch" was left by one process of plain PyTorch.
PAIR_MOVES = [("torch", 1), ("torch", 3), ("net-float32-3", 2), ("net-float32-2", 0), ("net-float32-0", 3)]
TRIPLE_MOVES = [("net-float32-3", 3), ("net-float32-1", 2)]
SINGLE_MOVES = [("net-float32-3", 3), ("net-float32-2", 1), ("net-float32-3", 0)]


def run_pair(folder: Path) -> None:
    seen = {
        "cases": {case: _case(case, folder) for case in PAIR},
        "moves": {move: _moved(*move, folder) for move in PAIR_MOVES},
        "filled": {(precision, stage): _filled(precision, stage) for precision, stage in _filled_cases()},
        "float32 bytes": {stage: _float32_growth(stage) for stage in range(4)},
        "poisoned": {(what, stage): _poisoned(what, stage) for what, stage in (("loss", 2), ("gradient", 0))},
        "gathered": _gathered(),
        "few rows": _message(lambda: DeepSpeedEngine(net(), engine_config(batch_size=1))),
        "wrong rows": _message(_wrong_rows),
        "no fill": _message(lambda: DeepSpeedEngine(hollow_net(), engine_config(zero_stage=3))),
    }
    # A norm that DeepSpeed keeps itself, after a step that it left out.
    seen["poisoned"]["gradient", 3] = _poisoned("gradient", 3)
    _leave(seen, folder, "pair")


def run_triple(folder: Path) -> None:
    """Four rows on three ranks, by twos and one by one."""
    uneven = {}
    for stage in range(4):
        for micro in (None, 1):
            config = engine_config(zero_stage=stage, micro_batch_size=micro)
            uneven[stage, micro] = run(DeepSpeedEngine(net(), config), config)
    _leave({"uneven": uneven, "moves": {move: _moved(*move, folder) for move in TRIPLE_MOVES}}, folder, "triple")


def run_single(folder: Path) -> None:
    _leave({"moves": {move: _moved(*move, folder) for move in SINGLE_MOVES}}, folder, "single")


def _leave(seen: dict[str, Any], folder: Path, group: str) -> None:
    torch.save(seen, folder / f"{group}-{os.environ['RANK']}.pt")


def _case(case: Case, folder: Path) -> dict[str, Any]:
    config = case.config()
    engine = DeepSpeedEngine(MODULES[case.module](), config)
    history = run(engine, config, range(SAVED_AT))
    save_pieces(engine, folder / str(case))
    history += run(engine, config, range(SAVED_AT, STEPS))
    engine.barrier()
    saved = Saved(folder / str(case), engine.sizes())
    again = DeepSpeedEngine(MODULES[case.module](), config)
    # It has been somewhere else before, all of which must be forgotten.
    run(again, config, range(2))
    again.restore(SAVED_AT, saved.read)
    copies = _working_copies(again, saved)
    return {
        "history": history,
        "resumed": run(again, config, range(SAVED_AT, STEPS)),
        "copies follow": copies,
        "weights": engine.trainable_state(),
        "frozen gradients": [
            name for name, p in engine.module.named_parameters() if not p.requires_grad and p.grad is not None
        ],
        "float32 buffers": {str(buffer.dtype) for buffer in engine.module.buffers() if buffer.is_floating_point()},
    }


def _working_copies(engine: DeepSpeedEngine, saved: Saved) -> bool:
    """Whether the weights that the model computes with are the masters, rounded to their type."""
    import deepspeed

    same = True
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
                master = saved.whole["weight", name].to(parameter.dtype)
                same = same and torch.equal(parameter.detach().flatten(), master)
    return same


def _moved(source: str, stage: int, folder: Path) -> list[dict[str, float]]:
    config = engine_config(zero_stage=stage)
    engine = DeepSpeedEngine(net(), config)
    engine.restore(SAVED_AT, Saved(folder / source, engine.sizes()).read)
    return run(engine, config, range(SAVED_AT, STEPS))


def _filled_cases() -> list[tuple[str, int]]:
    return [*(("float32", stage) for stage in range(4)), ("bfloat16", 1), ("bfloat16", 3)]


def _filled(precision: str, stage: int) -> dict[str, Any]:
    config, stored = engine_config(precision=precision, zero_stage=stage), Stored()
    engine = DeepSpeedEngine(hollow_net(), config, stored)
    start = {(kind, name, at): tensor for kind, name, at, tensor in engine.pieces()}
    return {"asked": stored.asked, "start": start, "history": run(engine, config)}


def _float32_growth(stage: int) -> tuple[int, int, int]:
    """Bytes of float32 tensors that an engine in bfloat16 adds to the process, and elements that learn and don't."""
    module, config = net().bfloat16(), engine_config(precision="bfloat16", zero_stage=stage)
    counts = [sum(p.numel() for p in module.parameters() if p.requires_grad == learns) for learns in (True, False)]
    before = _float32_bytes()
    engine = DeepSpeedEngine(module, config)
    run(engine, config, range(2))
    return _float32_bytes() - before, counts[0], counts[1]


def _float32_bytes() -> int:
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors if t.dtype == torch.float32}
    return sum(storage.nbytes() for storage in storages.values())


class Poisoned(nn.Module):
    """From its third pass on, on rank 1 only, the loss or else its gradient is not a number."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.inner: Net = net()
        self._what, self._passes = what, 0

    def forward(self, **batch: Tensor) -> dict[str, Tensor]:
        self._passes += 1
        loss = self.inner(**batch)["loss"]
        if self._passes >= 3 and os.environ["RANK"] == "1":
            # The root's slope at 0 is infinite, and infinity times 0 is no number.
            loss = loss * float("nan") if self._what == "loss" else loss + torch.sqrt(loss * 0.0)
        return {"loss": loss}


def _poisoned(what: str, stage: int) -> dict[str, Any]:
    config = engine_config(zero_stage=stage)
    engine = DeepSpeedEngine(Poisoned(what), config)
    history = run(engine, config, range(3))
    return {"history": history, "local_loss": engine.local_loss}


def _gathered() -> list[Any]:
    engine = DeepSpeedEngine(net(), engine_config())
    number = engine.rank
    return [engine.gather({"rank": number, "text": "ü" * (100 * number)}), engine.mean({"a": 2.0 + number, "b": 1.0})]


def _wrong_rows() -> None:
    config = engine_config()
    engine = DeepSpeedEngine(net(), config)
    engine.step({name: tensor[:1] for name, tensor in rows_for(0, engine).items()}, 1e-3)


def _message(work: Any) -> str:
    try:
        work()
    except (TrainingError, ConfigError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"
