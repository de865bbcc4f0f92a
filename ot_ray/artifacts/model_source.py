"""An owner's full model: its shape, its tokenizer or processor, and its weights, streamed into a model.

Finding its files is left to model_files.py, splitting the weights over ranks to training."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import (
    BaseImageProcessor,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ot_ray.artifacts.model_files import DESCRIPTION, SHAPE, WEIGHTS, ModelFiles
from ot_ray.artifacts.weights import Weights
from ot_ray.errors import ArtifactError, ConfigError
from ot_ray.model import (
    FAMILIES,
    ModelConfig,
    SplitPlan,
    check_tokenizer,
    checkpoint_name,
    classes_in,
    depth_of,
    empty_model,
    emulate,
    emulated_layers,
    family_of,
    fill,
    layer_config,
)
from ot_ray.model.loading import DTYPES, processor_in, shape_in, tokenizer_in, unreadable
from ot_ray.store.partial import chunks_of

_COMPARED = 16 * 1024 * 1024  # elements of each of two tensors that are held at once while they are compared
_GENERATION = "generation_config.json"


@dataclass(frozen=True)
class ModelSource:
    """A full model that has been found: its description is read, its weights stay where they are."""

    config: PreTrainedConfig
    """The architecture."""
    weights: Weights
    """The tensors, read as they are asked for."""
    files: ModelFiles
    """Where everything lies."""
    head_is_stand_in: bool = False
    """Whether the checkpoint is of a tower alone, whose head is read as zeros: every class is as likely."""

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer beside the weights.

        Raises:
            ConfigError: there is none, or it does not match the model.
        """
        tokenizer = tokenizer_in(self.files.folder, self.files.where)
        try:
            check_tokenizer(tokenizer, self.config)
        except ConfigError as error:
            raise ConfigError(f"model.source is {self.files.where!r}: {error}") from None
        return tokenizer

    def processor(self) -> BaseImageProcessor:
        """What prepares images for the model, beside its weights. Raises ConfigError where there is none."""
        whose = f"model.source is {self.files.where!r}"
        return processor_in(self.files.folder, whose, "put the model's own beside its weights")

    def generation_config(self) -> GenerationConfig:
        """How the model generates, from its own file or else from `config.json`. Raises ConfigError."""
        own = (self.files.folder / _GENERATION).is_file()
        # A file of its own says itself whether it was made from the model's configuration.
        file = _GENERATION if own else "config.json"
        origin: dict[str, Any] = {} if own else {"_from_model_config": True}
        try:
            return GenerationConfig.from_pretrained(self.files.folder, file, local_files_only=True, **origin)
        except (OSError, ValueError, TypeError) as error:
            raise unreadable(self.files.where, error) from None

    @cached_property
    def version(self) -> str:
        """What stands for the model's bytes, in hexadecimal; equal bytes may have two in two places.

        It follows from the commit on a hub and, on S3, from what the store records of each object. In a folder
        the weights are read whole: a second or so for each GB.

        Raises:
            StoreError: a file cannot be read.
        """
        if self.files.commit is not None:
            return _digest({"commit": self.files.commit})
        folder = self.files.folder
        digests = {name: _sha256(folder / name) for name in self.files.described_by()}
        for shard in self.weights.shards:
            digests[shard.key] = shard.sha256 or shard.etag or _sha256(folder / shard.key)
        return _digest(digests)

    def stored_names(self, model: PreTrainedModel) -> dict[str, str]:
        """Where the weights of the whole model stand.

        Args:
            model: the full model; it may be empty.

        Returns:
            The name in `weights` for each name in `model.state_dict()`.

        Raises:
            ArtifactError: tensors are missing, of another shape or not of floating-point type, or tied ones are
                stored with different values.
        """
        names, problems = {}, []
        for name, tensor in model.state_dict().items():
            try:
                stored = names[name] = checkpoint_name(name, model, self.weights.names)
            except ArtifactError as error:
                problems.append(str(error))
                continue
            dtype, shape = self.weights.names[stored]
            if shape != tuple(tensor.shape):
                problems.append(
                    f"tensor {stored} has shape {shape}, but config.json makes it {tuple(tensor.shape)}; the two "
                    "belong to different models"
                )
            elif not dtype.is_floating_point:
                problems.append(f"tensor {stored} is of {dtype}; use a checkpoint in floating point")
        problems = problems or self._wrongly_tied(names, model.all_tied_weights_keys)
        if problems:
            more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
            raise ArtifactError(f"{self.files.where}: " + "; ".join(problems[:5]) + more)
        return names

    def tensor(self, stored: str) -> torch.Tensor:
        """A whole tensor in its shape and stored type, by its name in `weights`."""
        return self.weights.read(stored).view(self.weights.names[stored].shape)

    def close(self) -> None:
        """Remove what was copied from S3; the weights can be read on, the rest cannot."""
        self.files.close()

    def _wrongly_tied(self, names: Mapping[str, str], tied: Mapping[str, str]) -> list[str]:
        return [
            f"tensors {names[one]} and {names[other]} differ, but config.json ties them; set tie_word_embeddings to "
            "false there"
            for one, other in tied.items()
            if names[one] != names[other] and not self._equal(names[one], names[other])
        ]

    def _equal(self, one: str, other: str) -> bool:
        size = math.prod(self.weights.names[one].shape)
        return all(
            torch.equal(
                self.weights.read(one, start, min(start + _COMPARED, size)),
                self.weights.read(other, start, min(start + _COMPARED, size)),
            )
            for start in range(0, size, _COMPARED)
        )


def open_model_source(config: ModelConfig, patience_s: float = 0.0) -> ModelSource:
    """Find a full model and read its description and the headers of its weights.

    Args:
        patience_s: seconds that every read from S3, now and later, waits for it to come back.

    Raises:
        ConfigError: there is no model at `config.source`, or it has no safetensors weights.
        UnsupportedModelError: its architecture cannot be split.
        ArtifactError: a file of weights is missing, truncated or corrupt.
        StoreError: S3 does not hand it out.
    """
    files = ModelFiles(config, (*DESCRIPTION, *WEIGHTS), patience_s)
    shape, weights = shape_in(files.folder, files.where), Weights(files.store, files.where)
    return ModelSource(shape, weights, files, head_is_stand_in=_stand_in_for_head(shape, weights))


def _stand_in_for_head(config: PreTrainedConfig, weights: Weights) -> bool:
    """Give a checkpoint of a tower alone a head of zeros; whether it was one."""
    path = FAMILIES[config.model_type].head
    if path is None or {f"{path}.weight", f"{path}.bias"} & weights.names.keys():
        return False
    classes, width = len(classes_in(config)), layer_config(config).hidden_size
    weights.read_as_zeros(f"{path}.weight", (classes, width))
    weights.read_as_zeros(f"{path}.bias", (classes,))
    return True


def load_shape(config: ModelConfig) -> PreTrainedConfig:
    """The architecture of a full model; of all its files only `config.json` is read.

    Raises:
        ConfigError: there is no model at `config.source`.
        UnsupportedModelError: its architecture cannot be split.
    """
    files = ModelFiles(config, SHAPE)
    return shape_in(files.folder, files.where)


def load_full(config: ModelConfig, *, patience_s: float = 0.0, source: ModelSource | None = None) -> PreTrainedModel:
    """Load a full model of type `config.dtype`, in evaluation mode; one tensor is in memory beside it.

    Args:
        patience_s: as for `open_model_source`.
        source: the model, where it has been found already.

    Raises:
        ConfigError, UnsupportedModelError, ArtifactError, StoreError: as `open_model_source` and
            `ModelSource.stored_names` do.
    """
    source = source or open_model_source(config, patience_s)
    model = _skeleton(source, config)
    names = source.stored_names(model)
    fill(model, lambda name: source.tensor(names[name]))
    return model


def load_emulated(
    config: ModelConfig, plan: SplitPlan, kept: Sequence[int], *, patience_s: float = 0.0
) -> PreTrainedModel:
    """Load [A1 · E · A2] alone; of the middle only the layers in `kept` are read.

    Args:
        kept: as for `emulate`.
        patience_s: as for `open_model_source`.

    Returns:
        What `emulate(load_full(config), plan, kept)` gives.

    Raises:
        SplitError: the plan or `kept` does not fit the model; and as `load_full` does.
    """
    source = open_model_source(config, patience_s)
    full = _skeleton(source, config)
    names = source.stored_names(full)
    emulated = emulate(full, plan, kept)
    origins = _origins(emulated, emulated_layers(depth_of(full), plan, kept))
    fill(emulated, lambda name: source.tensor(names[origins[name]]))
    return emulated


def _skeleton(source: ModelSource, config: ModelConfig) -> PreTrainedModel:
    model = empty_model(source.config, DTYPES[config.dtype])
    if family_of(model).task == "text":
        model.generation_config = source.generation_config()
    return model


def _origins(emulated: PreTrainedModel, layers: Sequence[int]) -> dict[str, str]:
    """The name in the full model of each tensor of an emulated one."""
    prefix = f"{family_of(emulated).layers}."
    origins = {}
    for name in emulated.state_dict():
        origins[name] = name
        if name.startswith(prefix):
            place, _, rest = name.removeprefix(prefix).partition(".")
            origins[name] = f"{prefix}{layers[int(place)]}.{rest}"
    return origins


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    for chunk in chunks_of(path):
        digest.update(chunk)
    return digest.hexdigest()


def _digest(values: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
