"""Low-rank factors as a standard PEFT folder: of a plain model, or as the adapter of a bundle.

What a model that PEFT itself wrapped leaves behind is adapter.py's; checking what came back is inspection.py's."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor

from ot_ray.artifacts.folder import describe_files, list_files, staged_folder
from ot_ray.artifacts.lora import LORA_CONFIG, LORA_WEIGHTS, PEFT_PREFIX
from ot_ray.artifacts.manifest import MANIFEST, AdapterManifest, BundleManifest, now, schema_version, to_text
from ot_ray.errors import ArtifactError, ConfigError
from ot_ray.model import FAMILIES


@dataclass(frozen=True)
class LowRank:
    """An update of some maps of a model, ``alpha / rank * B A`` each, named and shaped as PEFT does."""

    tensors: Mapping[str, Tensor]
    """`<module>.lora_A.weight` [r, I] and `<module>.lora_B.weight` [O, r]; `lora_embedding_A` [r, V] and
    `lora_embedding_B` [O, r] at embeddings."""
    rank: int
    """r, of all."""
    alpha: float
    """See above."""
    transposed: bool
    """The maps' weights are [I, O]."""

    @property
    def modules(self) -> list[str]:
        """Names of the maps, sorted."""
        return sorted({name.partition(".lora_")[0] for name in self.tensors})


def write_peft_lora(folder: str | Path, lora: LowRank, base: str | None = None) -> None:
    """Write a folder that `PeftModel.from_pretrained` opens on the model whose maps these are.

    Args:
        base: what the folder calls that model; PEFT does not need it.

    Raises:
        AlreadyExistsError: the folder is there and not empty.
    """
    with staged_folder(Path(folder)) as staging:
        _write(staging, lora, LoraConfig(target_modules=lora.modules, base_model_name_or_path=base))


def write_lora_adapter(
    folder: str | Path, lora: LowRank, depth: int, bundle: BundleManifest, *, steps: int, learning_rate: float
) -> AdapterManifest:
    """Write factors that were learnt on the full model as an adapter of its bundle, which can be plugged in.

    Args:
        depth: layers of the full model, by whose positions the factors are named.
        steps, learning_rate: as in `AdapterManifest`.

    Raises:
        ConfigError: as `adapter_places` does.
        AlreadyExistsError: the folder is there and not empty.
    """
    places = adapter_places(lora.modules, depth, bundle)
    if "lora" not in bundle.methods:
        raise ArtifactError(f"bundle {bundle.bundle_id} takes {', '.join(bundle.methods)}, not lora")
    renamed = {_renamed(name, places): tensor for name, tensor in lora.tensors.items()}
    layers = FAMILIES[bundle.model_type].layers
    config = LoraConfig(
        target_modules=sorted({_inside(place, layers)[1] for place in places.values()}),
        layers_to_transform=bundle.plan.adapter_positions(bundle.plan.depth),
        layers_pattern=layers.rpartition(".")[2],
        base_model_name_or_path=bundle.bundle_id,
    )
    with staged_folder(Path(folder)) as staging:
        _write(staging, LowRank(renamed, lora.rank, lora.alpha, lora.transposed), config)
        manifest = AdapterManifest(
            schema_version=schema_version(["lora"]),
            bundle_id=bundle.bundle_id,
            model=bundle.model,
            version=bundle.version,
            method="lora",
            files=describe_files(staging, list_files(staging)[0]),
            steps=steps,
            learning_rate=learning_rate,
            created=now(),
        )
        (staging / MANIFEST).write_bytes(to_text(manifest))
    return manifest


def adapter_places(modules: Collection[str], depth: int, bundle: BundleManifest) -> dict[str, str]:
    """Where maps of the full model stand in its bundle.

    Args:
        modules: names in a full model of `depth` layers.

    Returns:
        The name in the bundle by that in the full model.

    Raises:
        ConfigError: a map is outside the adapter layers, is no map that LoRA tunes there, or the adapter layers do not
            all have the same maps, which one PEFT folder of a bundle cannot say.
    """
    layers, plan = FAMILIES[bundle.model_type].layers, bundle.plan
    positions = dict(zip(plan.adapter_positions(depth), plan.adapter_positions(plan.depth), strict=True))
    matrices = {entry.name for entry in bundle.adapter if len(entry.shape) == 2}
    places: dict[str, str] = {}
    chosen: dict[int, set[str]] = defaultdict(set)
    for name in modules:
        position, inner = _inside(name, layers)
        if position not in positions:
            raise ConfigError(
                f"site {name} is outside the adapter layers of bundle {bundle.bundle_id}, which are "
                f"{', '.join(f'{layers}.{place}' for place in positions)}; choose sites in these, or leave bundle out"
            )
        places[name] = f"{layers}.{positions[position]}.{inner}"
        chosen[position].add(inner)
        if f"{places[name]}.weight" not in matrices:
            raise ConfigError(f"site {name} is no linear map of bundle {bundle.bundle_id}'s adapter; choose others")
    everywhere = set().union(*chosen.values())
    for position in positions:
        if missing := sorted(everywhere - chosen[position]):
            raise ConfigError(
                f"{layers}.{position}.{missing[0]} is no site, but {missing[0]} of other adapter layers is; an adapter "
                f"of bundle {bundle.bundle_id} has the same maps in all its layers ({', '.join(map(str, positions))}): "
                "choose the same sites in each, or leave bundle out"
            )
    return places


def _inside(name: str, layers: str) -> tuple[int | None, str]:
    """Position of the layer that a map is in, and its name there; None where it is in none."""
    place, _, inner = name.removeprefix(f"{layers}.").partition(".")
    return (int(place) if name.startswith(f"{layers}.") and place.isdecimal() else None), inner


def _renamed(name: str, places: Mapping[str, str]) -> str:
    module, _, part = name.partition(".lora_")
    return f"{places[module]}.lora_{part}"


def _write(folder: Path, lora: LowRank, config: LoraConfig) -> None:
    config.r, config.lora_alpha = lora.rank, lora.alpha  # type: ignore[assignment] - any number serves
    config.fan_in_fan_out, config.task_type, config.inference_mode = lora.transposed, "CAUSAL_LM", True
    fields = config.to_dict()
    # PEFT keeps a set, whose order differs from run to run.
    fields["target_modules"] = sorted(fields["target_modules"])
    (folder / LORA_CONFIG).write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")
    tensors = {f"{PEFT_PREFIX}{name}": tensor.detach().cpu().contiguous() for name, tensor in lora.tensors.items()}
    save_file(tensors, folder / LORA_WEIGHTS, metadata={"format": "pt"})
