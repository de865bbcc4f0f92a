"""Empty models: no memory for weights, real buffers, and the model they came from once they are filled."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from ot_ray.errors import ArtifactError, UnsupportedModelError
from ot_ray.model import checkpoint_name, empty_model, fill
from ot_ray.model.skeleton import settings_named
from tests.fixtures.models import SHAPES, tiny_image_model, tiny_model, tokens

BASE = {"gpt2": "transformer", "bloom": "transformer", "opt": "model", "llama": "model"}


def test_parameters_take_no_memory(family_model: PreTrainedModel) -> None:
    before, random = family_model.config.to_dict(), torch.get_rng_state()
    model = empty_model(family_model.config, torch.bfloat16)
    assert family_model.config.to_dict() == before
    assert torch.equal(torch.get_rng_state(), random)
    assert not model.training
    assert {name: parameter.shape for name, parameter in model.named_parameters()} == {
        name: parameter.shape for name, parameter in family_model.named_parameters()
    }
    assert all(parameter.is_meta and parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    assert model.config.dtype == torch.bfloat16


def test_buffers_are_real(family_model: PreTrainedModel) -> None:
    buffers = dict(empty_model(family_model.config, torch.float32).named_buffers())
    expected = dict(family_model.named_buffers())
    assert buffers.keys() == expected.keys()
    for name, buffer in expected.items():
        assert buffers[name].dtype == buffer.dtype
        assert torch.equal(buffers[name], buffer)


def test_scaled_rotary_frequencies() -> None:
    """Llama 3's frequencies are computed from the configuration, not the default's."""
    scaling = {
        "rope_type": "llama3",
        "rope_theta": 500.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }
    plain = AutoConfig.for_model("llama", **SHAPES["llama"], vocab_size=96, num_hidden_layers=2)
    config = copy.deepcopy(plain)
    config.rope_parameters = scaling
    config.rope_scaling = scaling
    loaded = type(tiny_model("llama"))(config)
    frequencies = empty_model(config, torch.float32).model.rotary_emb.inv_freq
    assert torch.equal(frequencies, loaded.model.rotary_emb.inv_freq)
    assert not torch.equal(frequencies, empty_model(plain, torch.float32).model.rotary_emb.inv_freq)


def test_filled_it_is_the_model(family_model: PreTrainedModel) -> None:
    state, read = family_model.state_dict(), []
    model = empty_model(family_model.config, torch.float32)

    def give(name: str) -> torch.Tensor:
        read.append(name)
        return state[name].clone()

    fill(model, give)
    assert read == [name for name, _ in family_model.named_parameters()]  # tied ones once
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(model(tokens()).logits, family_model(tokens()).logits)


def test_tied_stay_tied() -> None:
    source = tiny_model("opt").state_dict()
    model = empty_model(tiny_model("opt").config, torch.float32)
    fill(model, lambda name: source[name].clone())
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight  # type: ignore[union-attr]


class Small(nn.Module):
    """One of everything: frozen, tied, real already, and both kinds of buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Parameter(torch.zeros(2, device="meta"), requires_grad=False)
        self.a = nn.Linear(2, 3, bias=False, device="meta")
        self.b = nn.Linear(2, 3, bias=False, device="meta")
        self.b.weight = self.a.weight
        self.here = nn.Parameter(torch.ones(2))
        self.register_buffer("kept", torch.zeros(2, dtype=torch.float64))
        self.register_buffer("passing", torch.full((2,), 7.0), persistent=False)


def test_what_is_filled_and_what_is_left() -> None:
    module, read = Small(), []

    def give(name: str) -> torch.Tensor:
        read.append(name)
        return torch.full((3, 2) if name == "a.weight" else (2,), float(len(read)), dtype=torch.bfloat16)

    fill(module, give)
    assert read == ["frozen", "a.weight", "kept"]
    assert not module.frozen.requires_grad and module.a.weight.requires_grad
    assert module.a.weight is module.b.weight and module.a.weight.dtype == torch.float32
    assert torch.equal(module.a.weight, torch.full((3, 2), 2.0))
    assert torch.equal(module.here, torch.ones(2))
    assert torch.equal(module.kept, torch.full((2,), 3.0, dtype=torch.float64))  # type: ignore[arg-type]
    assert torch.equal(module.passing, torch.full((2,), 7.0))  # type: ignore[arg-type]


def test_another_shape_is_refused() -> None:
    with pytest.raises(ArtifactError, match=r"tensor frozen has shape \(3,\).*model's is \(2,\)"):
        fill(Small(), lambda name: torch.zeros(3))


@pytest.mark.parametrize("family", sorted(BASE))
def test_prefix_of_the_base_model_comes_and_goes(family: str) -> None:
    model, prefix = tiny_model(family), f"{BASE[family]}."
    name = next(name for name, _ in model.named_parameters() if name.startswith(prefix) and ".0." in name)
    shorter = name.removeprefix(prefix)
    assert checkpoint_name(name, model, {name, shorter}) == name
    assert checkpoint_name(name, model, {shorter}) == shorter
    assert checkpoint_name("lm_head.weight", model, {f"{prefix}lm_head.weight"}) == f"{prefix}lm_head.weight"


def test_tied_tensors_stand_under_either_name() -> None:
    model = tiny_model("gpt2")
    head, embedding = "lm_head.weight", "transformer.wte.weight"
    assert checkpoint_name(head, model, {"wte.weight"}) == "wte.weight"
    assert checkpoint_name(head, model, {embedding}) == embedding
    assert checkpoint_name(embedding, model, {head}) == head
    assert checkpoint_name(head, model, {head, embedding}) == head
    untied = tiny_model("llama")
    with pytest.raises(ArtifactError, match=r"tensor lm_head\.weight is not among the 1"):
        checkpoint_name(head, untied, {"model.embed_tokens.weight"})


def test_quantized_weights_are_refused() -> None:
    config = tiny_model("llama").config
    config.quantization_config = {"quant_method": "gptq", "bits": 4}
    with pytest.raises(UnsupportedModelError, match="quantization_config is set"):
        empty_model(config, torch.float32)


def test_quantized_weights_are_refused_wherever_the_configuration_says_so() -> None:
    config = copy.deepcopy(tiny_image_model("clip").config)
    config.text_config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    with pytest.raises(UnsupportedModelError, match=r"config\.text_config\.quantization_config is set"):
        empty_model(config, torch.float32)


def test_settings_are_found_at_any_depth_and_nulls_are_none() -> None:
    deep: dict = {"a": 1}
    for _ in range(3000):
        deep = {"part": [deep]}
    config = {"a": None, "b": {"a": 0, "c": [{"a": {"a": None}}]}}
    assert sorted(settings_named("a", config)) == ["b.a", "b.c.0.a"]
    (found,) = settings_named("a", deep)
    assert found.count("part.0.") == 3000


def test_unsupported_architectures_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="'bert'"):
        empty_model(AutoConfig.for_model("bert"), torch.float32)
    config = tiny_model("gpt2").config
    config.scale_attn_by_inverse_layer_idx = True
    with pytest.raises(UnsupportedModelError, match="scale_attn_by_inverse_layer_idx"):
        empty_model(config, torch.float32)
