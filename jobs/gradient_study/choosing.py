"""Which runs a study needs: a search for each row's learning rate on validation text, then every seed at that rate.

What a run computes is work.py's; where runs run is running.py's."""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from jobs.gradient_study.config import GradientStudyConfig, Row
from jobs.gradient_study.work import Adapted, Result, ZeroShot
from ot_ray.model import ModelConfig

SCHEMA = 1
"""Of what a run leaves behind; results of another one are computed anew."""


@dataclass(frozen=True)
class Run:
    """Something to compute, and the key that its result has."""

    key: str
    work: ZeroShot | Adapted


Compute = Callable[[str, Sequence[Run]], Mapping[str, Result]]
"""Takes what to call them all and runs; gives their results by key, `failed` in those of runs that failed."""


@dataclass
class Found:
    """What was measured of a row."""

    tried: dict[float, float] = field(default_factory=dict)
    """Mean perplexity over customers on validation text with the first seed, by rate; infinite where it failed."""
    lr: float | None = None
    """The best of them."""
    results: dict[int, Result] = field(default_factory=dict)
    """By seed, at that rate."""
    failures: dict[int, str] = field(default_factory=dict)
    """By seed, why there is none."""


class Runs:
    """Names a study's runs by all that decides their results.

    Args:
        version: of the base model.
        texts: key of the packed texts, which names their content.
    """

    def __init__(self, config: GradientStudyConfig, model: ModelConfig, version: str, texts: str) -> None:
        self._config, self._model = config, model
        self._contents = {"schema": SCHEMA, "model": version, "dtype": model.dtype, "texts": texts}

    def zero(self) -> Run:
        """Of the base as it is."""
        return self._run("zero", ZeroShot(model=self._model))

    def of(self, row: Row, lr: float, seed: int) -> Run:
        """Of a row at a rate."""
        training = self._config.training
        return self._run("runs", Adapted(model=self._model, row=row, training=training, lr=lr, seed=seed))

    def _run(self, folder: str, work: ZeroShot | Adapted) -> Run:
        values = {**self._contents, **work.model_dump(mode="json", exclude={"model"})}
        digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:20]
        return Run(f"{folder}/{digest}.json", work)


def measure(config: GradientStudyConfig, runs: Runs, compute: Compute) -> dict[Row, Found]:
    """Search the rate of every row, then measure it with every seed.

    Merged rows have the rates of their unmerged ones: they are the same function, so that a search would only find
    differences of rounding.
    """
    found = {row: Found() for row in config.rows()}
    searched = [row for row in found if not row.merged]
    _search(config, runs, compute, {row: found[row] for row in searched})
    for row, one in found.items():
        one.lr = found[row.unmerged].lr
    wanted = {
        (row, seed): runs.of(row, one.lr, seed)
        for row, one in found.items()
        if one.lr is not None
        for seed in config.seeds
    }
    results = compute("seeds", list(wanted.values()))
    for (row, seed), run in wanted.items():
        _take(found[row], seed, results.get(run.key))
    for one in found.values():
        if one.lr is None:
            one.failures = dict.fromkeys(config.seeds, "no rate was measured")
    return found


def next_rates(ladder: Sequence[float], tried: Mapping[float, float]) -> list[float]:
    """The rates to try next: the middle and its neighbours, then on beside the best until it has both beside it.

    Args:
        ladder: all rates, rising.
        tried: what they gave; less is better.
    """
    if not tried:
        middle = len(ladder) // 2
        return list(ladder[max(0, middle - 1) : middle + 2])
    best = ladder.index(min(tried, key=lambda rate: tried[rate]))
    return [rate for rate in ladder[max(0, best - 1) : best + 2] if rate not in tried]


def _search(config: GradientStudyConfig, runs: Runs, compute: Compute, found: Mapping[Row, Found]) -> None:
    seed = config.seeds[0]
    while True:
        wanted = {
            (row, lr): runs.of(row, lr, seed)
            for row, one in found.items()
            for lr in next_rates(config.rates.of(row), one.tried)
        }
        if not wanted:
            break
        results = compute("rates", list(wanted.values()))
        for (row, lr), run in wanted.items():
            found[row].tried[lr] = _validation(results.get(run.key))
    for one in found.values():
        best = min(one.tried, key=lambda lr: one.tried[lr])
        one.lr = best if math.isfinite(one.tried[best]) else None


def _validation(result: Result | None) -> float:
    if result is None or "failed" in result:
        return math.inf
    return statistics.fmean(result["validation"].values())


def _take(found: Found, seed: int, result: Result | None) -> None:
    if result is None or "failed" in result:
        found.failures[seed] = "not measured yet" if result is None else str(result["failed"])
    else:
        found.results[seed] = result
