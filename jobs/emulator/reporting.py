"""The report of a version in the owner's store: a page and its chart beside the history of its run."""

from __future__ import annotations

import json

from jobs.emulator.config import MakeEmulatorConfig
from jobs.emulator.records import Record
from ot_ray.errors import NotFoundError
from ot_ray.evaluation import RunReport
from ot_ray.store import Store


def report_key(record: Record) -> str:
    """Where the page lies."""
    return f"{_stem(record)}.html"


def write_report(store: Store, config: MakeEmulatorConfig, record: Record) -> None:
    """Write the curves and, after them, the page."""
    full = record.perplexity.get("full")
    report = RunReport(
        model=record.model,
        version=record.version,
        run=record.run,
        history=_history(store, record.run),
        perplexity={name: float("nan") if value is None else value for name, value in record.perplexity.items()},
        verdict=record.verdict,
        bound=config.gate.least(full) if full is not None else None,
        workers=config.workers.most,
        price_per_worker_hour=config.price_per_worker_hour,
        config=record.config,
    )
    chart = report.chart()
    store.write(f"{_stem(record)}.png", chart)
    store.write(report_key(record), report.page(chart).encode())


def _stem(record: Record) -> str:
    # Several versions may come of one run.
    return f"runs/{record.run}/report-{record.version}"


def _history(store: Store, run: str) -> list[dict[str, float]]:
    try:
        text = store.read(f"runs/{run}/history.jsonl").decode()
    except NotFoundError:
        return []
    return [json.loads(line) for line in text.splitlines()]
