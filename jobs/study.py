"""Measure offsite tuning's configurations on one model, and write the paper's tables and figures from it.

Rows run side by side on Ray and are kept by content: a study that is stopped, or changed, computes what is missing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jobs.command import config_file, run_command
from jobs.evaluation.places import reachable_model
from jobs.limits import require_folder, require_text
from jobs.studies.config import StudyConfig
from jobs.studies.gathering import read_other, study_of
from jobs.studies.keeping import kept_result
from jobs.studies.parts import Parts, RowParts
from jobs.studies.running import run_rows
from jobs.studies.texts import read_texts
from jobs.studies.work import Result, Texts
from ot_ray.artifacts import open_model_source
from ot_ray.errors import StudyError
from ot_ray.evaluation.study import Measured, Study, write_report
from ot_ray.launch import ray_cluster
from ot_ray.model import ModelConfig, layer_config
from ot_ray.model.loading import require_length
from ot_ray.store import LocalStore, Store, open_store

BASE = Path(__file__).parent / "base"

Rows = Sequence[tuple[str, RowParts]]


def run(config: StudyConfig) -> dict[str, Any]:
    """Measure the five settings of every row of a study with every seed, and write its report."""
    store = open_store(config.output)
    if isinstance(store, LocalStore):
        require_folder("output", str(store.root))
    elsewhere = read_other(config.other)
    model = reachable_model(config.model or ModelConfig(name="docs", source=str(BASE)))
    source = open_model_source(model)
    require_text(source.config.model_type, "jobs.study")
    depth = layer_config(source.config).num_hidden_layers
    config.check(depth)
    require_length(config.sequence_length, source.config)
    texts, contents = read_texts(config, source)
    rows = list(Parts(config, model, depth, contents, store.url).rows())
    results = _kept(rows, store) if config.report_only else _computed(config, rows, texts, store)
    title = f"Offsite tuning of {model.name}: a study"
    study = study_of(config, title, _about(config, depth, texts), depth, rows, results, elsewhere)
    written = write_report(study, store)
    _require_all(config, study)
    return _summary(config, study, written)


def _computed(config: StudyConfig, rows: Rows, texts: Texts, store: Store) -> dict[str, Result]:
    with ray_cluster(config.address, num_cpus=config.num_cpus, dashboard=False):
        return run_rows([row for _, row in rows], texts, store, config.workers)


def _kept(rows: Rows, store: Store) -> dict[str, Result]:
    keys = {row.tuned.key for _, row in rows}
    return {key: found for key in keys if (found := kept_result(store, key)) is not None}


def _about(config: StudyConfig, depth: int, texts: Texts) -> list[str]:
    length = config.sequence_length
    return [
        f"The full model has {depth} layers. Emulators are distilled over {config.distil.steps} steps of "
        f"{config.distil.batch_size} sequences of {length} tokens out of {len(texts.public)}, at {config.distil.lr:g}; "
        f"adapters are tuned, and the full model fine-tuned, on {len(texts.train)} sequences, and everything is "
        f"measured as perplexity on {len(texts.test)} others. Seeds: {', '.join(map(str, config.seeds))}."
    ]


def _require_all(config: StudyConfig, study: Study) -> None:
    failed = [f"{row.label}, seed {seed}: {why}" for row in study.rows for seed, why in row.failures.items()]
    if failed and not config.report_only:
        raise StudyError(
            f"{len(failed)} rows failed; {config.output}/study.md shows the others, and the same command tries these "
            "again:\n" + "\n".join(failed)
        )


def _summary(config: StudyConfig, study: Study, written: Sequence[str]) -> dict[str, Any]:
    best = study.best
    distilled = [row for row in study.rows if row.distilled and row.settings]
    return {
        "report": f"{config.output}/{written[-1]}",
        "configurations": len(study.rows),
        "measured": sum(len(row.settings) for row in study.rows),
        "missing": sum(len(row.failures) for row in study.rows),
        "distilled_rows_with_broken_promises": [row.label for row in distilled if row.broken()],
        "best": best and {"row": best.label, "reaches_the_aim": best.score(study.aim) >= 1, **_two(best)},
    }


def _two(row: Measured) -> dict[str, float]:
    closed, worse = row.spread("gap_closed"), row.spread("emulator_worse_by")
    assert closed is not None and worse is not None
    return {"gap_closed": closed.mean, "emulator_worse_by": worse.mean}


if __name__ == "__main__":
    run_command("study", StudyConfig, run, default_config=config_file("study.yaml"))
