"""What a run of gradient learning works on: the base model, every customer's text, and the auxiliaries beside it.

Writing down what was learnt is exporting.py's."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from jobs.gradient_learning.config import ColaConfig, CustomerConfig
from jobs.limits import require_same_model, require_text
from ot_ray.artifacts import BundleManifest, InspectionLimits, ModelSource, load_full, open_model_source
from ot_ray.artifacts.lora_files import adapter_places
from ot_ray.cola import (
    JOINT,
    Alone,
    Auxiliary,
    AuxiliaryConfig,
    BasePass,
    Collaboration,
    FitConfig,
    Joint,
    Mode,
    Site,
    find_sites,
)
from ot_ray.data import PackedSequence, load_sequences
from ot_ray.errors import ConfigError, DataError
from ot_ray.model import empty_model
from ot_ray.model.loading import DTYPES, require_length
from ot_ray.training import CustomerBatches, customer_rows
from ot_ray.training.text_source import files_of

_EVALUATED = 8
"""Sequences of a customer in one pass of an evaluation."""


@dataclass(frozen=True)
class Text:
    """A customer's text, tokenised."""

    train: list[PackedSequence]
    """What it learns from."""
    held_out: list[PackedSequence]
    """What its perplexity is measured on; may be empty."""
    digest: str
    """Of both."""
    tokens: int
    """Of the training text."""


@dataclass(frozen=True)
class Owner:
    """Who has an auxiliary: a customer, or `joint`."""

    sites: dict[str, Site]
    auxiliary: AuxiliaryConfig
    fitting: FitConfig


@dataclass(frozen=True)
class Work:
    """All that a run starts from, but for the base model's weights; nothing is learnt."""

    source: ModelSource
    """The base model, found."""
    sites: dict[str, Site]
    """All that any owner has."""
    owners: dict[str, Owner]
    start: dict[str, Auxiliary]
    """Where each owner's fits begin; on the CPU."""
    text: dict[str, Text]
    """By customer."""
    batches: CustomerBatches
    bundle: BundleManifest | None
    """What results are adapters of."""

    @property
    def depth(self) -> int:
        """Layers of the base model."""
        return int(self.source.config.num_hidden_layers)

    @property
    def evaluated(self) -> bool:
        """Whether there is any text to evaluate on."""
        return any(text.held_out for text in self.text.values())

    def evaluate(self, base: BasePass, mode: Mode, merged: bool) -> dict[str, float]:
        """`validation_loss/<customer>` in nats a token under a mode's auxiliaries, and `validation_loss`, the mean
        over customers."""
        found: dict[str, float] = {}
        for name, text in self.text.items():
            if not text.held_out:
                continue
            total, tokens = 0.0, 0
            for place in range(0, len(text.held_out), _EVALUATED):
                part = text.held_out[place : place + _EVALUATED]
                losses, counts = base.losses(customer_rows(part, [name] * len(part)), mode, merged)
                total, tokens = total + losses[name] * counts[name], tokens + counts[name]
            if not tokens:
                raise DataError(f"the validation text of {name} has no token that counts; give it more")
            found[f"validation_loss/{name}"] = total / tokens
        return {"validation_loss": statistics.fmean(found.values()), **found}


def open_work(config: ColaConfig, temporary: Path) -> Work:
    """Check what can be checked without weights, and read the customers' text.

    Raises:
        ConfigError: the model takes images, or not so long sequences; a bundle that is not the model's, or that takes
            no such sites or auxiliaries.
        SiteError: a pattern matches nothing.
        DataError: a customer's text cannot be read, or is too short to keep some for validation.
    """
    source = open_model_source(config.model)
    require_text(source.config.model_type, "jobs.cola")
    require_length(config.sequence_length, source.config)
    skeleton = empty_model(source.config, DTYPES[config.model.dtype])
    found = {pattern: find_sites(skeleton, pattern) for pattern in _patterns(config)}
    owners = {name: _owner(config, own, found) for name, own in _owners(config).items()}
    bundle = _bundle(config, owners, int(source.config.num_hidden_layers), temporary)
    text = _texts(config, source)
    return Work(
        source,
        find_sites(skeleton, list(found)),
        owners,
        {name: Auxiliary(owner.sites, owner.auxiliary) for name, owner in owners.items()},
        text,
        CustomerBatches({name: own.train for name, own in text.items()}, config.run.rows, config.run.seed),
        bundle,
    )


def load_base(config: ColaConfig, work: Work) -> BasePass:
    """The base model in this process, on its device. Raises ConfigError where there is no such device."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is 'cuda', but PyTorch sees no GPU here; use device=cpu")
    on_gpu = config.device != "cpu" and torch.cuda.is_available()
    model = load_full(config.model, source=work.source)
    model.to("cuda" if on_gpu else "cpu")  # type: ignore[arg-type] - a wrapper's stub
    return BasePass(model, work.sites, device="cpu" if config.fit_on == "cpu" else None)


def make_mode(config: ColaConfig, work: Work, device: torch.device) -> Mode:
    """The server's auxiliaries, at their start, beside the base model."""
    auxiliaries = {name: auxiliary.copy(device) for name, auxiliary in work.start.items()}
    if config.mode == "joint":
        return Joint(auxiliaries[JOINT])
    if config.mode == "alone":
        return Alone(auxiliaries)
    return Collaboration(auxiliaries, config.weights)


def identity(config: ColaConfig, work: Work) -> dict[str, Any]:
    """What decides a run's auxiliaries and figures, as plain values; checkpoints of another are refused."""
    run = config.run.model_dump(mode="json")
    if not config.run.staleness:
        # Then waiting for all fits, as at a checkpoint or an evaluation, changes nothing.
        del run["checkpoint_every"]
    return {
        "model": {"version": work.source.version, "dtype": config.model.dtype},
        "mode": config.mode,
        "weights": config.weights,
        "sequence_length": config.sequence_length,
        "run": run,
        "text": {name: text.digest for name, text in work.text.items()},
        "owners": {
            name: {
                "sites": sorted(owner.sites),
                "auxiliary": owner.auxiliary.model_dump(mode="json"),
                "fitting": owner.fitting.model_dump(mode="json"),
            }
            for name, owner in work.owners.items()
        },
    }


def _patterns(config: ColaConfig) -> list[str]:
    """Every pattern once; those of all are looked up even where each customer has its own."""
    own = [pattern for customer in config.everybody for pattern in customer.sites or ()]
    everybodys = [] if all(customer.sites for customer in config.everybody) else config.sites
    return list(dict.fromkeys([*everybodys, *own]))


def _owners(config: ColaConfig) -> dict[str, CustomerConfig | None]:
    if config.mode == "joint":
        return {JOINT: None}
    return {customer.name: customer for customer in config.everybody}


def _owner(config: ColaConfig, own: CustomerConfig | None, found: Mapping[str, Mapping[str, Site]]) -> Owner:
    patterns = (own and own.sites) or config.sites
    fitting = (own and own.fitting) or config.fitting
    if fitting.schedule != "constant" and "fits" not in fitting.model_fields_set:
        fitting = fitting.model_copy(update={"fits": _fits(config, fitting.interval)})
    sites = {name: site for pattern in patterns for name, site in found[pattern].items()}
    return Owner(sites, (own and own.auxiliary) or config.auxiliary, fitting)


def _fits(config: ColaConfig, interval: int) -> int:
    """How many fits the whole run makes."""
    steps, between = config.run.steps, config.run.flush_every or config.run.steps
    whole, rest = divmod(steps, between)
    return whole * math.ceil(between / interval) + math.ceil(rest / interval)


def _bundle(config: ColaConfig, owners: Mapping[str, Owner], depth: int, temporary: Path) -> BundleManifest | None:
    """The bundle's manifest, if every result will be an adapter of it."""
    if config.bundle is None:
        return None
    manifest = config.bundle.open(temporary / "bundle").manifest
    require_same_model(manifest.model, config.model.name)
    if "lora" not in manifest.methods:
        raise ConfigError(
            f"bundle is set, but bundle {manifest.bundle_id} takes {', '.join(manifest.methods)} back, not lora; leave "
            "it out"
        )
    for name, owner in owners.items():
        if owner.auxiliary.kind != "low_rank":
            raise ConfigError(
                f"bundle is set, but the auxiliary of {name} is of kind {owner.auxiliary.kind!r}, which is no LoRA; "
                "use low_rank, or leave bundle out"
            )
        adapter_places(owner.sites, depth, manifest)
    _require_ranks(config, owners)
    return manifest


def _require_ranks(config: ColaConfig, owners: Mapping[str, Owner]) -> None:
    """Refuse what inspection would refuse at the end."""
    most, ranks = InspectionLimits().max_rank, {name: owner.auxiliary.rank for name, owner in owners.items()}
    told = {f"the rank of {name}'s auxiliary is": rank for name, rank in ranks.items()}
    if config.mode == "collaboration":
        told["the ranks of all auxiliaries together are"] = sum(ranks.values())
    for text, rank in told.items():
        if rank > most:
            raise ConfigError(f"bundle is set, but {text} {rank}, and its adapters have at most {most}; lower them")


def _texts(config: ColaConfig, source: ModelSource) -> dict[str, Text]:
    tokenizer = source.tokenizer()

    def read(data: Any) -> Any:
        return load_sequences(data, tokenizer, config.sequence_length, files_of(data))

    found: dict[str, Text] = {}
    for customer in config.everybody:
        data = read(customer.data)
        if customer.validation is not None:
            other = read(customer.validation)
            train, held_out, digest = data.sequences, other.sequences, f"{data.digest}+{other.digest}"
        else:
            train, held_out = _split(customer.name, data.sequences, config.validation_share)
            digest = f"{data.digest}+{len(held_out)}"
        found[customer.name] = Text(train, held_out, digest, sum(int(one.real.sum()) for one in train))
    return found


def _split(
    name: str, sequences: Sequence[PackedSequence], share: float
) -> tuple[list[PackedSequence], list[PackedSequence]]:
    """The last ones apart, so that no document but that across the border is in both."""
    if not share:
        return list(sequences), []
    kept = max(1, round(share * len(sequences)))
    if kept >= len(sequences):
        raise DataError(
            f"the text of {name} fills {len(sequences)} sequences, of which validation_share={share:g} leaves none to "
            "learn from; give it more, name its validation text, or use validation_share=0"
        )
    return list(sequences[:-kept]), list(sequences[-kept:])
