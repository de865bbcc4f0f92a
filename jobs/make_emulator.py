"""Make an emulator of a full model: split, distil on a group of workers, publish a signed bundle."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

from pydantic import Field
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from jobs.command import config_file, quiet_libraries, run_command
from jobs.limits import require_model_length
from ot_ray.artifacts import key_id, list_versions, publish_bundle, write_bundle
from ot_ray.data import DataConfig, PackedSequence, load_sequences, read_documents
from ot_ray.evaluation import perplexity
from ot_ray.launch import WorkerGroup, ray_cluster, run_workers
from ot_ray.model import (
    METHODS,
    Method,
    check_fits,
    depth_of,
    emulate,
    load_emulator,
    load_model,
    load_tokenizer,
)
from ot_ray.progress import Progress
from ot_ray.store import open_store
from ot_ray.training import DistillConfig, distill, distilled_state, kept_layers


class MakeEmulatorConfig(DistillConfig):
    """A distillation, the workers it runs on, and the bundle that comes of it."""

    version: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    """Version of the bundle; a published version never changes."""
    validation: DataConfig | None = None
    """Held-out public text on which the emulator gap is measured; unset, the card states none."""
    bundles: str | None = None
    """Folder or address where bundles are published for customers; unset, `store`."""
    workers: WorkerGroup = WorkerGroup()
    """Worker processes of the distillation."""
    address: str | None = None
    """Ray cluster; unset, the one this runs in, or else a local one."""
    methods: tuple[Method, ...] = METHODS
    """Tuning methods that the owner accepts back."""
    recommended: dict[str, float | int | str | bool] = {}  # noqa: RUF012 - pydantic copies defaults
    """Hyperparameters recommended to customers."""
    private_key: str | None = None
    """PEM file that signs the bundle; unset, it stays unsigned."""
    expires_days: int | None = Field(default=None, ge=1)
    """Days until customers' tools refuse the bundle; unset, never."""


def run(config: MakeEmulatorConfig) -> dict[str, Any]:
    """Distil an emulator under Ray Train with DeepSpeed and publish it as a bundle.

    A version that is published already is left as it is, and nothing runs.
    """
    store, bundles = open_store(config.store), open_store(config.bundles or config.store)
    if config.version in list_versions(bundles, config.model.name):
        return {"published": f"bundles/{config.model.name}/{config.version}", "already": True}
    tokenizer, held_out = _check(config)
    with ray_cluster(config.address):
        summary = run_workers(distill_on_worker, _for_workers(config), config.workers, config.run)
    model = load_model(config.model)
    kept = kept_layers(depth_of(model), config.split)
    emulated, gap = _emulated(config, model, kept, held_out)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "bundle"
        manifest = write_bundle(
            folder,
            emulated,
            tokenizer,
            config.split,
            name=config.model.name,
            version=config.version,
            methods=config.methods,
            recommended=config.recommended,
            card=_card(config, gap),
            expires=_expiry(config.expires_days),
            private_key=Path(config.private_key) if config.private_key else None,
        )
        published = f"bundles/{config.model.name}/{config.version}"
        result = {"published": published, "bundle_id": manifest.bundle_id, "emulator_gap": gap, **summary}
        # The owner's own record holds what a bundle must not tell. It comes first, because a version that is
        # published is never made again, and its record would be missing for ever.
        record = {**result, "depth": depth_of(model), "kept": kept, "config": config.model_dump(mode="json")}
        store.write(f"records/{config.model.name}/{config.version}.json", json.dumps(record, indent=2).encode())
        publish_bundle(bundles, folder)
    return result


def _emulated(
    config: MakeEmulatorConfig, model: PreTrainedModel, kept: list[int], held_out: list[PackedSequence]
) -> tuple[PreTrainedModel, dict[str, float]]:
    """The emulated model with its distilled weights, and the emulator gap: perplexities on held-out text."""
    emulated = emulate(model, config.split, kept)
    gap = {"full": perplexity(model, held_out), "dropped": perplexity(emulated, held_out)} if held_out else {}
    load_emulator(emulated, config.split, distilled_state(open_store(config.store), config.run))
    if held_out:
        gap["distilled"] = perplexity(emulated, held_out)
    return emulated, gap


def _check(config: MakeEmulatorConfig) -> tuple[PreTrainedTokenizerBase, list[PackedSequence]]:
    """Meet now whatever would stop the job after hours of distilling.

    Returns:
        The tokenizer, and the held-out sequences if there are any.
    """
    check_fits(config.model, config.split)
    require_model_length(config.sequence_length, config.model)
    if config.private_key is not None:
        key_id(Path(config.private_key))
    tokenizer = load_tokenizer(config.model)
    # Every worker reads the training data whole; here, the first document shows that it is there.
    next(read_documents(config.data), None)
    if config.validation is None:
        return tokenizer, []
    return tokenizer, load_sequences(config.validation, tokenizer, config.sequence_length).sequences


def distill_on_worker(payload: dict[str, Any]) -> dict[str, Any]:
    """What each worker runs: the distillation, with a progress bar on rank 0."""
    quiet_libraries()
    config = DistillConfig.model_validate(payload)
    if os.environ.get("RANK", "0") != "0":
        return distill(config)
    with Progress("distil", config.training.steps) as bar:
        return distill(
            config,
            lambda figures: bar.at(
                int(figures["step"]),
                lm=figures["lm_loss"],
                kd=figures["kd_loss"],
                tokens_per_s=figures["tokens_per_s"],
            ),
        )


def _for_workers(config: MakeEmulatorConfig) -> dict[str, Any]:
    return config.model_dump(mode="json", include=set(DistillConfig.model_fields))


def _expiry(days: int | None) -> datetime | None:
    return datetime.now(timezone.utc) + timedelta(days=days) if days is not None else None


def _card(config: MakeEmulatorConfig, gap: Mapping[str, float]) -> str:
    lines = [
        f"# {config.model.name}, version {config.version}: a bundle for offsite tuning",
        "",
        f"The first {config.split.bottom} and the last {config.split.top} layers are the adapter: tune them. The "
        f"{config.split.keep} layers between them stand in for the owner's model and stay as they are.",
        "",
        f"Tuning methods that are taken back: {', '.join(config.methods)}.",
    ]
    if gap:
        lines += [
            "",
            "## Emulator gap",
            "",
            "| perplexity on held-out public text | |",
            "|---|---|",
            f"| the owner's full model | {gap['full']:.2f} |",
            f"| this bundle, untuned | {gap['distilled']:.2f} |",
        ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run_command("make_emulator", MakeEmulatorConfig, run, default_config=config_file("make_emulator.yaml"))
