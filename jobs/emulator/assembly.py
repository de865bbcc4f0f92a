"""The bundle of a distilled emulator: [A1 · E · A2] and its card, in a folder. The full model is never loaded."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta, timezone
from pathlib import Path

from jobs.emulator.config import MakeEmulatorConfig
from jobs.emulator.identity import Inputs
from ot_ray.artifacts import BundleManifest, load_emulated, write_bundle
from ot_ray.model import load_emulator
from ot_ray.store import Store
from ot_ray.training import distilled_state, kept_layers


def assemble(
    folder: Path, config: MakeEmulatorConfig, inputs: Inputs, store: Store, perplexity: Mapping[str, float | None]
) -> BundleManifest:
    """Write the bundle of a run that has ended.

    Args:
        folder: not yet there.
        store: where the run left the emulator's weights.
        perplexity: for the card.

    Raises:
        NotFoundError: the run has not ended.
    """
    kept = kept_layers(inputs.depth, config.split)
    emulated = load_emulated(inputs.model, config.split, kept, patience_s=config.training.store_patience_s)
    load_emulator(emulated, config.split, distilled_state(store, inputs.run))
    days = config.expires_days
    return write_bundle(
        folder,
        emulated,
        inputs.tokenizer,
        config.split,
        name=config.model.name,
        version=inputs.version,
        methods=config.methods,
        recommended=config.recommended,
        card=_card(config, inputs.version, perplexity),
        expires=datetime.now(timezone.utc) + timedelta(days=days) if days is not None else None,
        private_key=Path(config.private_key) if config.private_key else None,
    )


def _card(config: MakeEmulatorConfig, version: str, perplexity: Mapping[str, float | None]) -> str:
    lines = [
        f"# {config.model.name}, version {version}: a bundle for offsite tuning",
        "",
        f"The first {config.split.bottom} and the last {config.split.top} layers are the adapter: tune them. The "
        f"{config.split.keep} layers between them stand in for the owner's model and stay as they are.",
        "",
        f"Tuning methods that are taken back: {', '.join(config.methods)}.",
    ]
    full, emulated = perplexity.get("full"), perplexity.get("emulated")
    if full is not None and emulated is not None:
        lines += [
            "",
            "## Emulator gap",
            "",
            "| perplexity on held-out public text | |",
            "|---|---|",
            f"| the owner's full model | {full:.2f} |",
            f"| this bundle, untuned | {emulated:.2f} |",
        ]
    return "\n".join(lines) + "\n"
