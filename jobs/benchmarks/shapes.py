"""The shapes of published models, with the split that each is distilled by. No weights: those are drawn."""

from __future__ import annotations

from typing import Any

from pydantic import Field
from transformers import AutoConfig, PretrainedConfig

from ot_ray.config import Config
from ot_ray.errors import ConfigError
from ot_ray.model import SplitPlan


class Shape(Config):
    """A model without weights, how it is split, and the batch that fills a device with it."""

    model_type: str
    """Architecture, as Transformers names it."""
    values: dict[str, Any]
    """Fields of the architecture's configuration."""
    split: SplitPlan
    """Adapter and emulator sizes."""
    batch_size: int = Field(ge=1)
    """Sequences a step, unless the command says otherwise."""
    sequence_length: int = Field(ge=2)
    """Tokens of a sequence, unless the command says otherwise."""

    def config(self) -> PretrainedConfig:
        """The Transformers configuration."""
        return AutoConfig.for_model(self.model_type, **self.values)


def _split(bottom: int, keep: int, top: int) -> SplitPlan:
    return SplitPlan(bottom=bottom, keep=keep, top=top)


def _opt(width: int, depth: int, heads: int, vocabulary: int = 50272) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "word_embed_proj_dim": width,
        "ffn_dim": 4 * width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": 2048,
        # Two sides that draw differently would not have equal losses.
        "dropout": 0.0,
    }


_GPT2_XL = {
    "n_embd": 1600,
    "n_layer": 48,
    "n_head": 25,
    "n_positions": 1024,
    "attn_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "resid_pdrop": 0.0,
}
_BLOOM_7B = {"hidden_size": 4096, "n_layer": 30, "n_head": 32, "vocab_size": 250880}
_LLAMA_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}

_QUICKSTART = {**_opt(128, 10, 4, 2048), "max_position_embeddings": 512}
_GPT2 = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}

SHAPES: dict[str, Shape] = {
    "tiny": Shape(
        model_type="opt", values=_opt(32, 6, 4, 500), split=_split(1, 2, 1), batch_size=2, sequence_length=16
    ),
    "quickstart": Shape(
        model_type="opt", values=_QUICKSTART, split=_split(2, 2, 2), batch_size=4, sequence_length=128
    ),
    "gpt2": Shape(
        model_type="gpt2", values=_GPT2, split=_split(2, 4, 2), batch_size=16, sequence_length=512
    ),
    "opt-small": Shape(
        model_type="opt", values=_opt(512, 12, 8), split=_split(2, 4, 2), batch_size=8, sequence_length=256
    ),
    "gpt2-xl": Shape(
        model_type="gpt2", values=_GPT2_XL, split=_split(2, 16, 2), batch_size=16, sequence_length=512
    ),
    "opt-1.3b": Shape(
        model_type="opt", values=_opt(2048, 24, 32), split=_split(2, 8, 2), batch_size=16, sequence_length=512
    ),
    "opt-6.7b": Shape(
        model_type="opt", values=_opt(4096, 32, 32), split=_split(2, 18, 2), batch_size=16, sequence_length=512
    ),
    "bloom-7.1b": Shape(
        model_type="bloom", values=_BLOOM_7B, split=_split(2, 12, 2), batch_size=16, sequence_length=512
    ),
    "llama-7b": Shape(
        model_type="llama", values=_LLAMA_7B, split=_split(2, 18, 2), batch_size=16, sequence_length=512
    ),
}  # fmt: skip


def shape_of(name: str) -> Shape:
    """Look up a shape.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in SHAPES:
        raise ConfigError(f"shapes names {name!r}; use some of: {', '.join(SHAPES)}")
    return SHAPES[name]
