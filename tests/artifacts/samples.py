"""What the tests of this room start from: a split, a tokenizer, tuned models, changed files."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from ot_ray.artifacts import Bundle, write_adapter
from ot_ray.model import BottleneckSettings, LoraSettings, SplitPlan, prepare_tuning
from tests.fixtures.models import VOCAB

# Deep enough that its depth, and the layers that are kept, are numbers which stand nowhere else in a bundle.
DEPTH = 11
PLAN = SplitPlan(bottom=1, keep=2, top=1)
KEPT = [3, 7]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    words = {"<pad>": 0, "</s>": 1, **{f"w{i}": i for i in range(2, VOCAB)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>")


@dataclass(frozen=True)
class Sample:
    """A full model, its emulated model, and the bundle of the latter."""

    full: PreTrainedModel
    emulated: PreTrainedModel
    bundle: Bundle


def tuned_model(sample: Sample, method: str, seed: int = 5) -> torch.nn.Module:
    """The bundle's model with every trainable tensor moved, as after tuning."""
    model = prepare_tuning(
        sample.bundle.load_model(),
        PLAN,
        method,  # type: ignore[arg-type]
        LoraSettings(rank=3),
        BottleneckSettings(size=5),
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model.eval()


def returned(sample: Sample, folder: Path, method: str) -> tuple[Path, torch.nn.Module]:
    """A tuned adapter on its way back, and the model it was taken from."""
    model = tuned_model(sample, method)
    write_adapter(
        folder,
        model,  # type: ignore[arg-type]
        sample.bundle.manifest,
        method=method,  # type: ignore[arg-type]
        steps=7,
        learning_rate=1e-4,
        validation_loss=2.5,
    )
    return folder, model


def flip(path: Path, at: float = 0.5) -> None:
    """Change one bit of a file."""
    data = bytearray(path.read_bytes())
    place = min(int(len(data) * at), len(data) - 1)
    data[place] ^= 1
    os.chmod(path, 0o644)
    path.write_bytes(data)
