"""Bundle out, one step of tuning, adapter back, plugged in: every method, wherever the adapter layers lie."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from ot_ray.artifacts import Bundle, Registry, inspect_adapter, open_bundle, plain_state, write_adapter, write_bundle
from ot_ray.model import (
    METHODS,
    BottleneckSettings,
    LoraSettings,
    Method,
    SplitPlan,
    adapter_state,
    depth_of,
    emulate,
    merged_adapter_state,
    plug_in,
    prepare_tuning,
    uniform_layers,
)
from ot_ray.model.families import layers_of
from ot_ray.store import open_store
from tests.fixtures.models import tiny_model, tokens

DEPTH = 6
# Bottom alone, top alone, and both, of one layer and of several (the paper's Figure 3).
PLANS = [
    SplitPlan(bottom=bottom, keep=keep, top=top)
    for bottom, keep, top in [(1, 2, 0), (3, 1, 0), (0, 2, 1), (0, 1, 3), (1, 2, 1), (2, 1, 2), (1, 2, 3), (3, 2, 1)]
]
FILES = {
    "full": {"adapter.safetensors"},
    "lora": {"adapter_config.json", "adapter_model.safetensors"},
    "bottleneck": {"adapter.safetensors"},
    "bitfit": {"adapter.safetensors"},
}


@dataclass(frozen=True)
class Trip:
    """What the owner has, what the customer tuned, and what came back."""

    full: PreTrainedModel
    bundle: Bundle
    tuned: torch.nn.Module
    folder: Path
    plan: SplitPlan

    def state(self) -> dict[str, torch.Tensor]:
        found = inspect_adapter(self.folder, self.bundle.manifest)
        return plain_state(found, adapter_state(self.full, self.plan))


def bundle_of(full: PreTrainedModel, plan: SplitPlan, folder: Path) -> Bundle:
    kept = uniform_layers(len(plan.middle(DEPTH)), plan.keep)
    write_bundle(folder, emulate(full, plan, kept), None, plan, name="t", version="1", card="# T\n", recommended={})
    return open_bundle(folder)


def step(model: torch.nn.Module) -> None:
    """One step of AdamW, of a size that no type rounds away."""
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=0.05)
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    optimizer.step()


def trip(
    full: PreTrainedModel, plan: SplitPlan, method: Method, place: Path, dtype: torch.dtype = torch.float32
) -> Trip:
    bundle = bundle_of(full, plan, place / "bundle")
    torch.manual_seed(0)
    tuned = prepare_tuning(bundle.load_model(dtype), plan, method, LoraSettings(rank=2), BottleneckSettings(size=3))
    step(tuned)
    folder = place / "adapter"
    write_adapter(folder, tuned.eval(), bundle.manifest, method=method, steps=1, learning_rate=0.05)
    return Trip(full, bundle, tuned, folder, plan)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens()).logits


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("model_type", ["gpt2", "opt"])
def test_whatever_the_position_and_size(model_type: str, plan: SplitPlan, method: Method, tmp_path: Path) -> None:
    done = trip(tiny_model(model_type, DEPTH), plan, method, tmp_path)
    assert {path.name for path in done.folder.iterdir()} == FILES[method] | {"manifest.json"}
    state, direct = done.state(), merged_adapter_state(done.tuned, plan)  # type: ignore[arg-type]
    assert state.keys() == direct.keys()
    assert all(torch.equal(state[name], direct[name]) for name in state)

    plugged = plug_in(done.full, plan, state)
    positions = [*range(plan.bottom), *range(DEPTH - plan.top, DEPTH)]
    for position, (ours, original) in enumerate(zip(layers_of(plugged), layers_of(done.full), strict=True)):
        old, new = original.state_dict(), ours.state_dict()
        changed = new.keys() != old.keys() or any(not torch.equal(new[name], old[name]) for name in old)
        assert changed == (position in positions), position
    for bundle, position in zip(plan.adapter_positions(plan.depth), positions, strict=True):
        for name, tensor in layers_of(plugged)[position].state_dict().items():
            assert torch.equal(tensor, direct[f"layers.{bundle}.{name}"]), name

    # The same adapter on the emulated model is the tuned model itself.
    again, wanted = logits(plug_in(done.bundle.load_model(), plan, state)), logits(done.tuned)
    if method == "lora":
        torch.testing.assert_close(again, wanted, rtol=1e-4, atol=1e-4)
    else:
        assert torch.equal(again, wanted)
    assert depth_of(plugged) == DEPTH


def test_files_hold_no_more_than_was_tuned(tmp_path: Path) -> None:
    plan, sizes = SplitPlan(bottom=1, keep=2, top=1), {}
    for method in METHODS:
        done = trip(tiny_model("opt", DEPTH), plan, method, tmp_path / method)
        file = next(done.folder.glob("*.safetensors"))
        held = sum(tensor.numel() for tensor in load_file(file).values())
        assert held == sum(p.numel() for p in done.tuned.parameters() if p.requires_grad)
        sizes[method] = file.stat().st_size
    assert all(sizes[method] < 0.4 * sizes["full"] for method in ("lora", "bottleneck", "bitfit"))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("tuned_in", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_the_bundle_of_a_bfloat16_model(model_type: str, tuned_in: torch.dtype, method: Method, tmp_path: Path) -> None:
    plan = SplitPlan(bottom=1, keep=2, top=2)
    full = tiny_model(model_type, DEPTH).to(torch.bfloat16)
    done = trip(full, plan, method, tmp_path, tuned_in)
    state, direct = done.state(), merged_adapter_state(done.tuned, plan)  # type: ignore[arg-type]
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}
    assert state.keys() == direct.keys()
    for name in state:
        if method == "lora":
            # Merged in float32 here, in the model's type by PEFT: apart by one rounding.
            torch.testing.assert_close(state[name].float(), direct[name].float(), rtol=2**-7, atol=2**-9)
        else:
            assert torch.equal(state[name], direct[name].bfloat16()), name
    plugged = plug_in(full, plan, state)
    assert {parameter.dtype for parameter in plugged.parameters()} == {torch.bfloat16}
    assert logits(plugged).dtype == torch.bfloat16
    assert not torch.equal(logits(plugged), logits(full))


@pytest.mark.parametrize("method", METHODS)
def test_the_registry_keeps_whatever_plugs_in(method: Method, tmp_path: Path) -> None:
    plan = SplitPlan(bottom=1, keep=2, top=1)
    done = trip(tiny_model("llama", DEPTH), plan, method, tmp_path)
    registry = Registry(open_store(str(tmp_path / "registry")))
    record = registry.add(
        "t", "acme", method, done.state(), bundle_id=done.bundle.manifest.bundle_id, plan=plan, report={}
    )
    stored = registry.load_state(record.model_id)
    assert torch.equal(logits(plug_in(done.full, plan, stored)), logits(plug_in(done.full, plan, done.state())))
