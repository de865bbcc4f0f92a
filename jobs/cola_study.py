"""Measure gradient learning for several customers beside LoRA and full fine-tuning by back-propagation.

Runs go side by side in plain processes and are kept by content: a study that is stopped, or changed, computes what is
missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jobs.command import config_file, run_command
from jobs.evaluation.places import reachable_model
from jobs.gradient_study.choosing import Compute, Runs, measure
from jobs.gradient_study.config import GradientStudyConfig
from jobs.gradient_study.outcome import Outcome
from jobs.gradient_study.report import write_report
from jobs.gradient_study.running import Computed, Kept, Place
from jobs.gradient_study.texts import keep_texts, read_customers
from jobs.limits import require_folder, require_text
from ot_ray.artifacts import ModelSource, load_full, open_model_source
from ot_ray.cola import find_sites
from ot_ray.errors import StudyError
from ot_ray.model import ModelConfig
from ot_ray.model.loading import require_length
from ot_ray.store import LocalStore, Store, open_store

BASE = Path(__file__).parent / "base"


def run(config: GradientStudyConfig) -> dict[str, Any]:
    """Measure every row of a study of gradient learning with every seed, and write its report."""
    store = open_store(config.output)
    if isinstance(store, LocalStore):
        require_folder("output", str(store.root))
    model = reachable_model(config.model or ModelConfig(name="docs", source=str(BASE)))
    source = open_model_source(model)
    require_text(source.config.model_type, "jobs.cola_study")
    require_length(config.sequence_length, source.config)
    find_sites(load_full(model, source=source), config.training.sites)
    outcome = _measured(config, model, source, store)
    page = write_report(outcome, store)
    _require_all(outcome)
    return _summary(outcome, page)


def _measured(config: GradientStudyConfig, model: ModelConfig, source: ModelSource, store: Store) -> Outcome:
    texts = read_customers(config, source.tokenizer())
    key = keep_texts(texts, store)
    runs = Runs(config, model, source.version, key)
    customers = tuple(customer.name for customer in config.customers)
    tokens = {name: texts.tokens(name) for name in customers}

    def outcome(compute: Compute) -> Outcome:
        base = runs.zero()
        zero = compute("base", [base]).get(base.key)
        zero = None if zero is None or "failed" in zero else zero
        return Outcome(config, model.name, tokens, zero, measure(config, runs, compute))

    if config.report_only:
        return outcome(Kept(store.url))
    with Computed(Place(store.url, key, customers), config.processes, config.threads) as computed:
        return outcome(computed)


def _require_all(outcome: Outcome) -> None:
    failed = [f"{row.label}, seed {seed}: {why}" for row, seed, why in outcome.failures()]
    if failed and not outcome.config.report_only:
        raise StudyError(
            f"{len(failed)} runs failed; {outcome.config.output}/study.md shows the others, and the same command tries "
            "these again:\n" + "\n".join(failed)
        )


def _summary(outcome: Outcome, page: str) -> dict[str, Any]:
    means = {row.label: spread.mean for row in outcome.found if (spread := outcome.mean(row)) is not None}
    return {
        "report": f"{outcome.config.output}/{page}",
        "rows": len(outcome.found),
        "measured": sum(len(one.results) for one in outcome.found.values()),
        "missing": sum(len(one.failures) for one in outcome.found.values()),
        "perplexity": {"the base as it is": outcome.untouched, **means},
        "merged_differ_by": outcome.merging_changes(),
        "low_rank_differs_from_lora_by": outcome.fitting_changes(),
    }


if __name__ == "__main__":
    run_command("cola_study", GradientStudyConfig, run, default_config=config_file("cola_study.yaml"))
