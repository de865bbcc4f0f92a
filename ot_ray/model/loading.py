"""An owner's model as a configuration, and what lies beside its weights in a folder: shape, tokenizer, processor.

Fetching that folder and reading the weights are left to artifacts. No code from outside runs."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from pydantic import Field
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoTokenizer,
    BaseImageProcessor,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from ot_ray.config import Config
from ot_ray.errors import ConfigError
from ot_ray.model.families import check_supported

# Models of which one part can be split: BLIP-2's vision tower is EVA-CLIP ViT-g.
_WITHIN = {"blip-2": "vision_config"}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class ModelConfig(Config):
    """An owner's full model."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    """What customers call it, in bundle and model ids."""
    source: str = Field(min_length=1)
    """A folder with a Transformers checkpoint in safetensors, such a folder on S3
    (`s3://bucket/prefix?endpoint_url=...`), or a model's name on the hub (`facebook/opt-6.7b`)."""
    revision: str | None = None
    """Commit or tag on the hub."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights in memory."""


def shape_in(folder: Path, where: str) -> PreTrainedConfig:
    """Read the `config.json` of a model that can be split.

    Args:
        where: how messages name the model.

    Raises:
        ConfigError: there is none, or it is malformed.
        UnsupportedModelError: the architecture is not in the families' table.
    """
    try:
        shape = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, TypeError, StrictDataclassError) as error:
        raise unreadable(where, error) from None
    part = _WITHIN.get(shape.model_type)
    shape = getattr(shape, part) if part else shape
    check_supported(shape.model_type)
    return shape


def tokenizer_in(folder: Path, where: str) -> PreTrainedTokenizerBase:
    """Read the tokenizer in a folder.

    Raises:
        ConfigError: there is none, or it is malformed.
    """
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # a malformed tokenizer.json meets bare exceptions of the parser
        raise unreadable(where, error) from None


def processor_in(folder: Path, whose: str, way_out: str) -> BaseImageProcessor:
    """Read what prepares images for the model in a folder; it works on PIL's images, without torchvision.

    Args:
        whose: how messages name the model.
        way_out: what they tell the reader to do.

    Raises:
        ConfigError: there is none, or it is malformed.
    """
    try:
        return AutoImageProcessor.from_pretrained(folder, backend="pil", trust_remote_code=False, local_files_only=True)
    except Exception as error:  # a malformed file meets errors of any kind
        # Transformers names every model that it knows.
        reason = str(error).strip().split("\n", 1)[0][:200]
        raise ConfigError(f"{whose}: its preprocessor_config.json cannot be used: {reason}; {way_out}") from None


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> None:
    """Refuse a tokenizer with ids that the model has no embeddings for, or without any but special tokens.

    Raises:
        ConfigError: names the ids and the model's vocabulary.
    """
    ids, size = set(tokenizer.get_vocab().values()), config.get_text_config().vocab_size
    if ids <= set(tokenizer.all_special_ids):
        raise ConfigError(
            f"the tokenizer holds {len(ids)} special tokens and no others; put the model's own tokenizer "
            "(tokenizer.json or its vocabulary files) beside its weights"
        )
    if max(ids) >= size:
        raise ConfigError(
            f"the tokenizer has {len(ids)} tokens with ids up to {max(ids)}, but the model has {size} embeddings: it "
            "belongs to another model; put the model's own tokenizer beside its weights"
        )


def unreadable(where: str, error: Exception) -> ConfigError:
    """What to tell of a model whose files cannot be opened; `where` is its source."""
    first_line = str(error).strip().split("\n", 1)[0]
    return ConfigError(
        f"model.source is {where!r}: {first_line}; name a folder or s3:// address with config.json, safetensors "
        "weights and a tokenizer, or a model on the hub"
    )


def require_length(length: int, shape: PreTrainedConfig, field: str = "sequence_length") -> None:
    """Refuse sequences that a model has no positions for.

    Args:
        shape: the model's configuration.
        field: the setting that holds the length.

    Raises:
        ConfigError: names the longest sequence.
    """
    # Architectures without a table of positions, such as BLOOM, state none and take any length.
    positions = getattr(shape, "max_position_embeddings", None)
    if positions is not None and length > positions:
        raise ConfigError(f"{field} is {length}, but the model takes {positions} tokens; use 2..{positions}")
