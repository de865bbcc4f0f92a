"""The bundle of a distilled emulator: [A1 · E · A2] and its card, in a folder. The full model is never loaded."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta, timezone
from pathlib import Path

from jobs.emulator.config import MakeEmulatorConfig
from jobs.emulator.identity import Inputs
from jobs.emulator.records import Record
from ot_ray.artifacts import BundleManifest, load_emulated, write_bundle
from ot_ray.model import EmulatorConfig, compress, load_emulator
from ot_ray.model.packed import with_smaller_layers
from ot_ray.store import Store
from ot_ray.training import distilled_state


def assemble(folder: Path, config: MakeEmulatorConfig, inputs: Inputs, store: Store, record: Record) -> BundleManifest:
    """Write the bundle of a run that has ended.

    Args:
        folder: not yet there.
        store: where the run left the emulator's weights.
        record: which layers were kept, and the perplexities for the card.

    Raises:
        NotFoundError: the run has not ended.
    """
    patience = config.training.store_patience_s
    emulated = load_emulated(inputs.model, config.split, record.kept, patience_s=patience)
    emulated = with_smaller_layers(emulated, config.split, config.emulator)
    load_emulator(emulated, config.split, distilled_state(store, inputs.run))
    emulated = compress(emulated, config.split, config.emulator)
    days = config.expires_days
    return write_bundle(
        folder,
        emulated,
        inputs.reading.tokenizer,
        config.split,
        name=config.model.name,
        version=inputs.version,
        methods=config.methods,
        recommended=config.recommended,
        card=_card(
            config, inputs.version, record.perplexity, own_class=type(emulated).__module__.startswith("ot_ray.")
        ),
        expires=datetime.now(timezone.utc) + timedelta(days=days) if days is not None else None,
        private_key=Path(config.private_key) if config.private_key else None,
        processor=inputs.reading.processor,
    )


def _card(config: MakeEmulatorConfig, version: str, perplexity: Mapping[str, float | None], *, own_class: bool) -> str:
    head = ", and the classification head," if config.images else ""
    lines = [
        f"# {config.model.name}, version {version}: a bundle for offsite tuning",
        "",
        f"The first {config.split.bottom} and the last {config.split.top} layers{head} are the adapter: tune them. The "
        f"{config.split.keep} layers between them stand in for the owner's model and stay as they are.",
        "",
        f"Tuning methods that are taken back: {', '.join(config.methods)}.",
    ]
    if config.emulator.packed or config.emulator.factored:
        lines += [
            "",
            f"Those layers are stored {_how_packed(config.emulator)}: `import ot_ray.model` before Transformers' "
            "`from_pretrained` opens this folder. They stay packed in memory, and gradients pass through them.",
        ]
    elif own_class:
        lines += ["", "Transformers lacks this model's class: `import ot_ray.model` before its `from_pretrained`."]
    full, emulated = perplexity.get("full"), perplexity.get("emulated")
    if full is not None and emulated is not None:
        lines += [
            "",
            "## Emulator gap",
            "",
            f"| perplexity on held-out public {'images' if config.images else 'text'} | |",
            "|---|---|",
            f"| the owner's full model | {full:.2f} |",
            f"| this bundle, untuned | {emulated:.2f} |",
        ]
    return "\n".join(lines) + "\n"


def _how_packed(emulator: EmulatorConfig) -> str:
    ways = [f"with {emulator.sparsity:.0%} of their weights pruned"] if emulator.sparsity else []
    ways += [f"in {emulator.bits} bits a weight"] if emulator.bits else []
    ways += ["with attention of low rank"] if emulator.attention_rank is not None else []
    ways += ["with fewer channels in the MLP"] if emulator.mlp_channels is not None else []
    return " and ".join(ways)
