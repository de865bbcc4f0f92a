"""What the engines' tests share: a module with every awkward parameter, uneven rows, and a plain PyTorch loop.

The groups of real workers that run it are in engine_groups.py."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ot_ray.data.batches import rows_of
from ot_ray.training import Engine, TrainingConfig, lr_at
from tests.fixtures.models import VOCAB, tokens
from tests.training.samples import LENGTH, distill_model, language_model, training

STEPS = 6
SAVED_AT = 3
BATCH = 4
WIDTH = 64


class Net(nn.Module):
    """Trainable weights above and below ZeRO-3's threshold for whole ones (100,000 elements), a lone number,
    sizes that no number of ranks divides, a weight in two places, buffers; most of it is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.frozen = nn.Sequential(nn.Linear(WIDTH, 16_001), nn.GELU(), nn.Linear(16_001, WIDTH))
        self.first, self.second = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.second.weight = self.first.weight
        self.requires_grad_(False)
        self.norm = nn.LayerNorm(WIDTH)
        self.wide = nn.Linear(WIDTH, 1601)
        self.scale = nn.Parameter(torch.empty(1))
        self.out = nn.Linear(1601, VOCAB)
        self.register_buffer("shift", torch.empty(WIDTH))
        self.register_buffer("steady", torch.linspace(0, 1, WIDTH, device="cpu"), persistent=False)

    def logits(self, input_ids: Tensor) -> Tensor:
        hidden = self.embed(input_ids)
        hidden = hidden + self.frozen(hidden) + self.second(torch.tanh(self.first(hidden)))
        hidden = hidden + (self.shift + self.steady).to(hidden.dtype)
        return self.out(torch.nn.functional.gelu(self.wide(self.norm(hidden)))) * self.scale

    def forward(self, input_ids: Tensor, labels: Tensor, **rest: Tensor) -> dict[str, Tensor]:
        logits = self.logits(input_ids)[:, :-1].float()
        losses = nn.functional.cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="none")
        learnt = (labels[:, 1:] != -100).sum(dim=1)
        per_row = losses.sum(dim=1) / learnt.clamp_min(1)
        return {"loss": per_row.mean(), "share": learnt.float().mean().detach() / LENGTH}


def net() -> Net:
    torch.manual_seed(11)
    module = Net()
    nn.init.ones_(module.scale)
    nn.init.normal_(module.shift)
    return module


def hollow_net() -> Net:
    """On the meta device but for what a constructor computes."""
    with torch.device("meta"):
        return Net()


class Stored:
    """The values of `net()` as a checkpoint holds them; remembers what was asked for."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.values = {name: tensor.to(dtype) for name, tensor in net().state_dict().items()}
        self.asked: list[tuple[str, int, int]] = []

    def __call__(self, name: str, start: int, end: int) -> Tensor:
        self.asked.append((name, start, end))
        return self.values[name].flatten()[start:end]


def net_logits(module: Any, batch: Mapping[str, Tensor]) -> Tensor:
    return module.logits(batch["input_ids"])


def language_logits(module: Any, batch: Mapping[str, Tensor]) -> Tensor:
    return module.model(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits


MODULES: dict[str, Callable[[], nn.Module]] = {
    "net": net,
    "language": language_model,
    "distill": distill_model,
    "distill-lean": lambda: distill_model(checkpointing=True, head_tokens=5),
}
LOGITS = {"net": net_logits, "language": language_logits}


def engine_config(**values: Any) -> TrainingConfig:
    return training(**{"steps": STEPS, "batch_size": BATCH, "grad_clip": 0.5, **values})


def whole_batch(step: int, size: int = BATCH) -> dict[str, Tensor]:
    """Rows of which more or fewer tokens are learnt, so that a mean over rows is none over tokens."""
    ids = tokens(size, LENGTH, seed=100 + step)
    labels = ids.clone()
    for row in range(size):
        labels[row, : (5 * row + step) % LENGTH] = -100
    if step == 1:
        labels[2] = -100
    positions = torch.arange(LENGTH).expand(size, -1)
    return {"input_ids": ids, "labels": labels, "position_ids": positions, "real": torch.ones_like(ids).bool()}


def rows_for(step: int, engine: Engine, size: int = BATCH) -> dict[str, Tensor]:
    share = rows_of(size, engine.rank, engine.world_size)
    return {name: tensor[share.start : share.stop] for name, tensor in whole_batch(step, size).items()}


def run(engine: Engine, config: TrainingConfig, steps: Iterable[int] = range(STEPS)) -> list[dict[str, float]]:
    return [engine.step(rows_for(step, engine, config.batch_size), lr_at(step, config)) for step in steps]


def plain(name: str, config: TrainingConfig) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """AdamW on the whole batch in one pass, from the definitions: a loss a row, their mean, clipping by the norm."""
    module = MODULES[name]().train()
    learning = {key: p for key, p in module.named_parameters() if p.requires_grad}
    decayed = [p for p in learning.values() if p.dim() > 1]
    others = [p for p in learning.values() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=config.betas, foreach=False, fused=False)
    history = []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, config)
        batch = whole_batch(step, config.batch_size)
        losses = []
        for logits, labels in zip(LOGITS[name](module, batch), batch["labels"], strict=True):
            wanted = labels[1:] != -100
            chosen = nn.functional.log_softmax(logits[:-1][wanted], dim=-1)
            picked = chosen.gather(1, labels[1:][wanted].unsqueeze(1))
            losses.append(-picked.sum() / max(1, int(wanted.sum())))
        loss = sum(losses) / len(losses)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.sqrt(sum(p.grad.pow(2).sum() for p in learning.values()))
        if config.grad_clip and norm > config.grad_clip:
            for p in learning.values():
                p.grad.mul_(config.grad_clip / norm)
        optimizer.step()
        history.append({"loss": float(loss.detach()), "grad_norm": float(norm)})
    return history, {key: p.detach() for key, p in learning.items()}


def save_pieces(engine: Engine, folder: Path) -> None:
    """What this rank must save, as plain lists."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save([tuple(piece) for piece in engine.pieces()], folder / f"{engine.rank}.pt")


class Saved:
    """The pieces of all ranks put together; refuses holes and overlaps."""

    def __init__(self, folder: Path, sizes: Mapping[str, int]) -> None:
        kinds = ("weight", "exp_avg", "exp_avg_sq")
        self.whole = {(kind, name): torch.full((size,), torch.nan) for kind in kinds for name, size in sizes.items()}
        times = {key: torch.zeros(tensor.numel(), dtype=torch.int64) for key, tensor in self.whole.items()}
        files = sorted(folder.glob("*.pt"))
        assert files
        for file in files:
            for kind, name, start, tensor in torch.load(file, weights_only=True):
                assert tensor.dtype == torch.float32 and tensor.dim() == 1
                self.whole[kind, name][start : start + tensor.numel()] = tensor
                times[kind, name][start : start + tensor.numel()] += 1
        assert all(bool((count == 1).all()) for count in times.values()), "each element exactly once"

    def read(self, kind: str, name: str, start: int, end: int) -> Tensor:
        return self.whole[kind, name][start:end]
