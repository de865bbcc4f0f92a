"""How the emulator layers of a checkpoint are packed: what `config.json` says of them under `quantization_config`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ot_ray.config import Config

METHOD = "ot_ray"
"""Transformers' name for who opens such a checkpoint."""


class PackedFormat(Config):
    """Nothing in it tells of layers that a bundle does not hold."""

    quant_method: Literal["ot_ray"] = METHOD
    """Transformers asks for this name."""
    format_version: Literal[1] = 1
    """Layout of the packed tensors."""
    first_layer: int = Field(ge=0)
    """Position of the first packed layer in the checkpoint."""
    layers: int = Field(ge=1)
    """How many layers are packed, one after the other."""
    sparsity: float = Field(default=0.0, ge=0, lt=1)
    """Share of each linear map's weights that are pruned."""
    bits: int | None = Field(default=None, ge=2, le=8)
    """Bits of a weight's code; None where weights are not quantized."""
    group_size: int = Field(default=64, ge=8)
    """Weights along a map's input that share a scale."""
    attention_rank: float | None = Field(default=None, gt=0, le=1)
    """Rank of the attention's maps as a share of their full rank; None where they are whole."""
    mlp_channels: float | None = Field(default=None, gt=0, le=1)
    """Share of the MLP's channels that are there; None for all."""

    @property
    def packed(self) -> bool:
        """Whether linear maps are stored pruned or quantized."""
        return self.sparsity > 0 or self.bits is not None
