"""Auxiliaries that were written: read back bit for bit, and opened by PEFT with the logits that passes had."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from ot_ray.artifacts.lora_files import write_peft_lora
from ot_ray.cola import Auxiliary, AuxiliaryConfig, Collaboration, Joint, Mode, Site, Taps, find_sites
from ot_ray.errors import AlreadyExistsError, ArtifactError
from ot_ray.training.auxiliary_files import AUXILIARY, low_rank_sum, read_auxiliary, write_auxiliary
from tests.fixtures.models import tiny_model, tokens

WITH = {"model": "tiny", "model_version": "ab" * 32, "customer": "ann", "fits": 7}


def learnt(sites: Mapping[str, Site], seed: int = 1, **config: Any) -> Auxiliary:
    """An auxiliary with no tensor of zeros, as after some fits."""
    auxiliary = Auxiliary(sites, AuxiliaryConfig(seed=seed, **config))
    generator = torch.Generator().manual_seed(seed)
    for tensor in auxiliary.tensors.values():
        tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.1)
    return auxiliary


class Maps(nn.Module):
    """A site of each kind that an auxiliary follows."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 6)
        self.over_time = nn.Conv1d(6, 7, kernel_size=3, padding=2, dilation=2)
        self.plain = nn.Linear(7, 5)


@pytest.mark.parametrize("kind", ["low_rank", "linear", "mlp"])
def test_an_auxiliary_comes_back_as_it_was(kind: str, tmp_path: Path) -> None:
    auxiliary = learnt(find_sites(Maps(), "*"), kind=kind, rank=3, alpha=5.0)
    manifest = write_auxiliary(tmp_path / "ann", auxiliary, **WITH)  # type: ignore[arg-type]
    back, read = read_auxiliary(tmp_path / "ann")
    assert read == manifest
    assert (back.sites, back.config) == (auxiliary.sites, auxiliary.config)
    assert back.tensors.keys() == auxiliary.tensors.keys()
    assert all(torch.equal(back.tensors[name], tensor) for name, tensor in auxiliary.tensors.items())
    with pytest.raises(AlreadyExistsError):
        write_auxiliary(tmp_path / "ann", auxiliary, **WITH)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda place: (place / "manifest.json").unlink(), "has no manifest.json"),
        (lambda place: (place / AUXILIARY).unlink(), "auxiliary.safetensors is missing"),
        (lambda place: _flip(place / AUXILIARY), "auxiliary.safetensors was changed"),
    ],
)
def test_an_auxiliary_that_is_not_whole_is_refused(spoil: Callable[[Path], None], says: str, tmp_path: Path) -> None:
    write_auxiliary(tmp_path / "ann", learnt(find_sites(Maps(), "plain")), **WITH)  # type: ignore[arg-type]
    spoil(tmp_path / "ann")
    with pytest.raises(ArtifactError, match=says):
        read_auxiliary(tmp_path / "ann")


def test_a_manifest_of_another_rank_is_refused(tmp_path: Path) -> None:
    write_auxiliary(tmp_path / "ann", learnt(find_sites(Maps(), "plain"), rank=3), **WITH)  # type: ignore[arg-type]
    path = tmp_path / "ann" / "manifest.json"
    path.write_text(path.read_text().replace('"rank": 3', '"rank": 4'))
    with pytest.raises(ArtifactError, match=r"auxiliary\.safetensors: .*same kind and rank"):
        read_auxiliary(tmp_path / "ann")


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def passed(model: PreTrainedModel, mode: Mode, ids: Tensor) -> Tensor:
    """Logits of a pass through a mode's auxiliaries."""
    sites = {name: site for auxiliary in mode.auxiliaries.values() for name, site in auxiliary.sites.items()}
    with torch.no_grad(), Taps(model, sites, mode) as taps, taps.batch([mode.names[0]] * len(ids)):
        return model(input_ids=ids).logits


FAMILIES = {
    "opt": ["*.q_proj", "*.fc2"],
    "gpt2": ["*.c_attn", "transformer.h.1.mlp.c_fc"],
    "llama": ["*.o_proj", "*.0.mlp.gate_proj"],
    "table": ["model.decoder.embed_tokens", "*.1.self_attn.v_proj"],
}


@pytest.mark.parametrize("name", FAMILIES)
def test_peft_opens_it_on_the_plain_base_with_equal_logits(name: str, tmp_path: Path) -> None:
    family = "opt" if name == "table" else name
    model = tiny_model(family, depth=3)
    auxiliary = learnt(find_sites(model, FAMILIES[name]), rank=3, alpha=5.0)
    ids = tokens()
    with torch.no_grad():
        plain = model(input_ids=ids).logits
    expected = passed(model, Joint(auxiliary), ids)
    lora = low_rank_sum([(1.0, auxiliary)])
    assert lora is not None
    assert lora.transposed == (family == "gpt2")
    write_peft_lora(tmp_path / "lora", lora, "tiny")

    opened = PeftModel.from_pretrained(tiny_model(family, depth=3), str(tmp_path / "lora")).eval()

    with torch.no_grad():
        torch.testing.assert_close(opened(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert (expected - plain).abs().max() > 0.05
    assert sorted(path.name for path in (tmp_path / "lora").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_a_weighted_sum_of_several_is_one_lora(tmp_path: Path) -> None:
    model = tiny_model("gpt2", depth=3)
    both = {
        "ann": learnt(find_sites(model, "*.c_attn"), seed=1, rank=3, alpha=5.0),
        "bob": learnt(find_sites(model, ["*.c_attn", "*.c_fc"]), seed=2, rank=2, alpha=2.0),
    }
    mode = Collaboration(both, {"ann": 0.7, "bob": -0.4})
    ids = tokens()
    expected = passed(model, mode, ids)
    lora = low_rank_sum(mode.summands())
    assert lora is not None
    assert lora.rank == 5
    write_peft_lora(tmp_path / "lora", lora)
    opened = PeftModel.from_pretrained(tiny_model("gpt2", depth=3), str(tmp_path / "lora")).eval()
    with torch.no_grad():
        torch.testing.assert_close(opened(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_other_kinds_are_no_lora() -> None:
    sites = find_sites(Maps(), "plain")
    for kind in ("linear", "mlp"):
        assert low_rank_sum([(1.0, learnt(sites)), (1.0, learnt(sites, kind=kind))]) is None
