"""Running the parts of a study's rows side by side on Ray, and keeping their results.

What a part is and when two are the same is parts.py's."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import torch

from jobs.command import quiet_libraries
from jobs.studies.config import PartWorkers
from jobs.studies.keeping import keep_result, kept_result
from jobs.studies.parts import Part, RowParts
from jobs.studies.work import Result, Texts
from ot_ray.launch.pieces import Piece, run_pieces
from ot_ray.progress import Progress
from ot_ray.store import Store, open_store


def run_rows(rows: Iterable[RowParts], texts: Texts, store: Store, workers: PartWorkers) -> dict[str, Result]:
    """Compute what is missing, each part once, with what `workers` gives it; results are kept as they come.

    Must be called inside `ray_cluster`. An interruption cancels what runs; what was done is kept.

    Returns:
        The result of every part that was needed, by its key; of one that failed, why, under `failed`.
    """
    import ray

    shared = {"texts": ray.put(texts), "store": store.url, "threads": max(1, int(workers.cpus))}
    results: dict[str, Result] = {}
    pieces = _missing(rows, shared, store, results)
    with Progress("study", len(pieces), "part") as bar:

        def take(piece: Piece, result: Result) -> None:
            results[piece.name] = result
            bar.advance(last=piece.name.partition("/")[0])

        failed = run_pieces(pieces, workers.resources, take)
    return results | {key: {"failed": reason} for key, reason in failed.items()}


def compute_part(part: Part, texts: Texts, store: Store, needed: RowParts | None = None, threads: int = 1) -> Result:
    """Compute a part in this process and keep its result.

    Args:
        needed: for a tuned adapter, its row, whose other parts are kept already.
        threads: of PyTorch's own.

    Raises:
        TrainingError: a loss or a perplexity is not finite.
    """
    torch.set_num_threads(threads)
    start = time.monotonic()
    inputs: list[Any] = []
    if needed is not None:
        inputs = [kept_result(store, other.key) for other in (needed.zero, needed.reference, needed.emulator)]
        inputs.append(needed.emulator.work)
    result = part.work.compute(texts, *inputs)
    result["seconds"] = round(time.monotonic() - start, 1)
    keep_result(store, part.key, result)
    return result


def _missing(rows: Iterable[RowParts], shared: dict[str, Any], store: Store, results: dict[str, Result]) -> list[Piece]:
    """What is to be computed, in an order in which each comes after what it needs; what is kept goes to `results`."""
    pieces: dict[str, Piece] = {}

    def wanted(part: Part) -> bool:
        found = results.get(part.key) or kept_result(store, part.key)
        if found is not None:
            results[part.key] = found
        return found is None and part.key not in pieces

    for row in rows:
        if not wanted(row.tuned):
            continue
        others = (row.zero, row.reference, row.emulator)
        for part in others:
            if wanted(part):
                pieces[part.key] = Piece(part.key, _on_worker, {**shared, "part": part, "row": None})
        after = tuple(part.key for part in others if part.key in pieces)
        pieces[row.tuned.key] = Piece(row.tuned.key, _on_worker, {**shared, "part": row.tuned, "row": row}, after)
    return list(pieces.values())


def _on_worker(payload: dict[str, Any]) -> Result:
    import ray

    quiet_libraries()
    store = open_store(payload["store"])
    return compute_part(payload["part"], ray.get(payload["texts"]), store, payload["row"], payload["threads"])
