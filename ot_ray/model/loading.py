"""Opening a model and its tokenizer from a folder or, by name, from a model hub. No code from outside runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ot_ray.config import Config
from ot_ray.errors import ConfigError
from ot_ray.model.families import check_supported, family_of
from ot_ray.model.split import SplitPlan

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class ModelConfig(Config):
    """An owner's full model."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    """What customers call it, in bundle and model ids."""
    source: str
    """A folder with a Transformers checkpoint, or a model's name on the hub (`facebook/opt-6.7b`)."""
    revision: str | None = None
    """Commit or tag on the hub."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights in memory."""


def check_fits(config: ModelConfig, plan: SplitPlan) -> None:
    """Refuse a plan that the model cannot be split by, before any weight is read.

    Raises:
        ConfigError: there is no model at `config.source`.
        UnsupportedModelError: its architecture cannot be split.
        SplitError: the adapters and the emulator do not fit into its layers.
    """
    plan.middle(_load_shape(config).num_hidden_layers)


def load_model(config: ModelConfig) -> PreTrainedModel:
    """Load a full model, in evaluation mode.

    Raises:
        ConfigError: there is no model at `config.source`.
        UnsupportedModelError: its architecture cannot be split.
    """
    _load_shape(config)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            _existing(config),
            revision=config.revision,
            dtype=DTYPES[config.dtype],
            trust_remote_code=False,
            use_safetensors=True,
        )
    except (OSError, SafetensorError) as error:
        raise _unreadable(config, error) from None
    family_of(model)
    return model.eval()


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """Load the tokenizer beside a model.

    Raises:
        ConfigError: there is none at `config.source`.
    """
    source = _existing(config)
    try:
        return AutoTokenizer.from_pretrained(source, revision=config.revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise _unreadable(config, error) from None


def _load_shape(config: ModelConfig) -> Any:
    try:
        shape = AutoConfig.from_pretrained(_existing(config), revision=config.revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise _unreadable(config, error) from None
    check_supported(shape.model_type)
    return shape


def _existing(config: ModelConfig) -> str:
    looks_like_a_folder = config.source.startswith(("/", ".", "~")) or config.source.count("/") > 1
    if looks_like_a_folder and not Path(config.source).expanduser().is_dir():
        raise ConfigError(
            f"model.source is {config.source!r}: no such folder; name a folder with a checkpoint or a model on the hub"
        )
    return str(Path(config.source).expanduser()) if looks_like_a_folder else config.source


def _unreadable(config: ModelConfig, error: Exception) -> ConfigError:
    first_line = str(error).strip().split("\n", 1)[0]
    return ConfigError(
        f"model.source is {config.source!r}: {first_line}; name a folder with config.json, safetensors weights and a "
        "tokenizer, or a model on the hub"
    )
