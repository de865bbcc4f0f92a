"""save: the auxiliary as files that other tools open, or that a session elsewhere goes on from."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from pathlib import Path

from safetensors.torch import save_file

from ot_ray.artifacts.lora_files import LowRank, write_peft_lora
from ot_ray.cola import Auxiliary
from serve.catalogue.records import GradientOperation
from serve.gradients.desk import Desk
from serve.stored_gradients import saved_prefix


def save(desk: Desk, operation: GradientOperation) -> None:
    """Write the session's auxiliary: `low_rank` as PEFT's LoRA, any other kind as its tensors and a description."""
    plan = desk.plan(operation.session_id)
    resident = desk.resident(plan)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "saved"
        if plan.auxiliary.kind == "low_rank":
            write_peft_lora(folder, low_rank(resident.auxiliary), plan.model)
        else:
            write_plain(folder, resident.auxiliary)
        files = []
        for path in sorted(folder.iterdir()):
            stored = desk.store.upload(path, f"{saved_prefix(operation)}/{path.name}")
            files.append({"name": path.name, "bytes": stored.size, "sha256": stored.sha256})
    keys = [f"{saved_prefix(operation)}/{file['name']}" for file in files]
    desk.succeed(operation, {"files": files}, resident.version, keys)


def low_rank(auxiliary: Auxiliary) -> LowRank:
    """The factors of an auxiliary of kind `low_rank`, which has PEFT's names and shapes."""
    config, sites = auxiliary.config, auxiliary.sites.values()
    transposed = any(site.transposed for site in sites if site.layout == "linear")
    return LowRank(auxiliary.tensors, config.rank, config.alpha, transposed)


def write_plain(folder: Path, auxiliary: Auxiliary) -> None:
    """Write `auxiliary.safetensors`, and in `auxiliary.json` what `Auxiliary` is made from."""
    folder.mkdir()
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in auxiliary.tensors.items()}
    save_file(tensors, folder / "auxiliary.safetensors")
    sites = [dataclasses.asdict(site) for site in auxiliary.sites.values()]
    about = {"auxiliary": auxiliary.config.model_dump(), "sites": sites}
    (folder / "auxiliary.json").write_text(json.dumps(about, indent=2) + "\n")
