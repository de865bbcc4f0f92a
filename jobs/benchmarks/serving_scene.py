"""What the serving benchmark serves: one base model, many tenants' plug-ins, and the same as whole models.

Nothing here is tuned: the clock doesn't ask what a model says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from jobs.benchmarks.shapes import Shape
from ot_ray.artifacts import Registry, load_full, open_model_source
from ot_ray.model import ModelConfig, SplitPlan, adapter_state, depth_of, plug_in
from ot_ray.model.loading import DTYPES
from ot_ray.store import open_store

NAME = "base"
_VARIANTS = 4
_NOISE = 0.02


@dataclass(frozen=True)
class Scene:
    """Where everything lies."""

    base: Path
    """The base model's checkpoint."""
    registry: str
    """URL of the store with the promoted plug-ins."""
    models: dict[str, str]
    """Each plug-in's folder as a whole model, by its id; in the order in which tenants were made."""


def random_base(shape: Shape, tokenizer: str, folder: Path, dtype: str) -> str:
    """Write a model of published layers and random weights, with the vocabulary of a tokenizer that is at hand."""
    words = AutoTokenizer.from_pretrained(tokenizer)
    torch.manual_seed(0)
    wanted = shape.model_copy(update={"values": {**shape.values, "vocab_size": len(words)}}).config()
    ends = {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}
    wanted.update(ends)
    AutoModelForCausalLM.from_config(wanted, dtype=DTYPES[dtype]).save_pretrained(folder)
    words.save_pretrained(folder)
    return str(folder)


def build_scene(model: ModelConfig, plan: SplitPlan, tenants: int, folder: Path) -> Scene:
    """Give every tenant a plug-in and a whole model with the same weights.

    A few different adapters go round, and tenants with equal ones share a folder, so that disks hold them.

    Raises:
        SplitError: the model has too few layers for the plan.
    """
    source = open_model_source(model)
    base = load_full(model, source=source)
    plan.middle(depth_of(base))
    registry = Registry(open_store(str(folder / "registry")))
    words = source.tokenizer()
    states, places = [], []
    for variant in range(min(_VARIANTS, tenants)):
        states.append(_moved(base, plan, variant))
        places.append(folder / f"whole-{variant}")
        plug_in(base, plan, states[-1]).save_pretrained(places[-1])
        words.save_pretrained(places[-1])
    models = {}
    for tenant in range(tenants):
        which = tenant % len(states)
        record = registry.add(
            model.name, f"tenant-{tenant}", "load", states[which], bundle_id="none", plan=plan, report={}
        )
        registry.promote(record.model_id)
        models[record.model_id] = str(places[which])
    return Scene(Path(model.source), str(folder / "registry"), models)


def prompts(count: int, length: int, vocabulary: int) -> Sequence[Sequence[int]]:
    """Random token ids [count, length], without the first ids, which control tokens have."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(min(16, vocabulary // 2), vocabulary, (count, length), generator=generator).tolist()


def _moved(base: PreTrainedModel, plan: SplitPlan, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: tensor + _NOISE * torch.randn(tensor.shape, generator=generator).to(tensor)
        for name, tensor in adapter_state(base, plan).items()
    }
