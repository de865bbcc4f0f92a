"""Auxiliaries of gradient learning as folders: their tensors, and what they stand beside; low-rank ones as LoRA.

PEFT's own files are artifacts' affair."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ot_ray.artifacts.folder import check_files, describe_files, staged_folder
from ot_ray.artifacts.lora_files import LowRank
from ot_ray.artifacts.manifest import MANIFEST, FileEntry, FileName, to_text
from ot_ray.artifacts.strict_json import read_json
from ot_ray.cola import Auxiliary, AuxiliaryConfig, Site
from ot_ray.config import Config
from ot_ray.errors import ArtifactError, GradientLearningError

AUXILIARY = "auxiliary.safetensors"


class AuxiliaryManifest(Config):
    """What an auxiliary in a folder is: `manifest.json` beside its tensors."""

    schema_version: Literal[1] = 1
    """Format of this document."""
    model: str = Field(max_length=64)
    """The owner's name of the base model."""
    model_version: str = Field(max_length=64)
    """What stands for the base model's bytes (`ModelSource.version`)."""
    customer: str = Field(max_length=64)
    """Whose it is; `joint` where it is everybody's."""
    auxiliary: AuxiliaryConfig
    """Kind, rank, scale and seed."""
    sites: tuple[Site, ...]
    """Where it stands, in the base model's order."""
    fits: int = Field(ge=0)
    """Steps of its optimiser."""
    files: dict[FileName, FileEntry]
    """The file of tensors."""


def write_auxiliary(
    folder: str | Path, auxiliary: Auxiliary, *, model: str, model_version: str, customer: str, fits: int
) -> AuxiliaryManifest:
    """Write an auxiliary; the folder appears when it is complete.

    Args:
        model, model_version, customer, fits: as in `AuxiliaryManifest`.

    Raises:
        AlreadyExistsError: the folder is there and not empty.
    """
    with staged_folder(Path(folder)) as staging:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in auxiliary.tensors.items()}
        save_file(tensors, staging / AUXILIARY, metadata={"format": "pt"})
        manifest = AuxiliaryManifest(
            model=model,
            model_version=model_version,
            customer=customer,
            auxiliary=auxiliary.config,
            sites=tuple(auxiliary.sites.values()),
            fits=fits,
            files=describe_files(staging, [AUXILIARY]),
        )
        (staging / MANIFEST).write_bytes(to_text(manifest))
    return manifest


def read_auxiliary(folder: str | Path) -> tuple[Auxiliary, AuxiliaryManifest]:
    """Open what `write_auxiliary` wrote; other folders in it are not looked at.

    Raises:
        ArtifactError: the manifest or the tensors are missing, changed, or do not belong together.
    """
    place = Path(folder)
    if not (place / MANIFEST).is_file():
        raise ArtifactError(f"{place} has no {MANIFEST}; name a folder that holds an auxiliary")
    manifest = read_json(AuxiliaryManifest, place / MANIFEST)
    wrong = [line for line in check_files(place, manifest.files, [MANIFEST]) if line.startswith(AUXILIARY)]
    if wrong or AUXILIARY not in manifest.files:
        raise ArtifactError(f"{place}: {wrong[0] if wrong else f'{MANIFEST} does not list {AUXILIARY}'}")
    auxiliary = Auxiliary({site.name: site for site in manifest.sites}, manifest.auxiliary)
    try:
        auxiliary.load(load_file(place / AUXILIARY))
    except (SafetensorError, GradientLearningError) as error:
        raise ArtifactError(f"{place / AUXILIARY}: {error}") from None
    return auxiliary, manifest


def low_rank_sum(summands: Sequence[tuple[float, Auxiliary]]) -> LowRank | None:
    """Auxiliaries, each with its share, as one low-rank update; None where one is of another kind.

    The factors of several stand side by side: the rank is the sum of theirs, and nothing is rounded but by the shares.
    """
    if any(auxiliary.config.kind != "low_rank" for _, auxiliary in summands):
        return None
    sites = {name: site for _, auxiliary in summands for name, site in auxiliary.sites.items()}
    transposed = any(site.transposed and site.layout == "linear" for site in sites.values())
    ranks = [auxiliary.config.rank for _, auxiliary in summands]
    if len(summands) == 1 and summands[0][0] == 1.0:
        only = summands[0][1]
        return LowRank(dict(only.tensors), ranks[0], only.config.alpha, transposed)
    tensors: dict[str, Tensor] = {}
    for name in sites:
        like = next(auxiliary for _, auxiliary in summands if name in auxiliary.sites)
        inner, outer = like.parts(name)
        parts = [_factors(share, auxiliary, name, like.parts(name)) for share, auxiliary in summands]
        tensors[f"{name}.{inner}"] = torch.cat([down for down, _ in parts])
        tensors[f"{name}.{outer}"] = torch.cat([up for _, up in parts], dim=1)
    return LowRank(tensors, sum(ranks), float(sum(ranks)), transposed)


def _factors(share: float, auxiliary: Auxiliary, site: str, like: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Both factors with the share and the scale in the second; zeros where the auxiliary has no such site."""
    inner, outer = like.values()
    rank = auxiliary.config.rank
    if site not in auxiliary.sites:
        return inner.new_zeros(rank, *inner.shape[1:]), outer.new_zeros(outer.shape[0], rank, *outer.shape[2:])
    own_inner, own_outer = auxiliary.parts(site).values()
    return own_inner.detach(), own_outer.detach() * (share * auxiliary.config.scale)
