"""The search for a set of layers, on measurements that are plain arithmetic."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from ot_ray.model import uniform_layers
from ot_ray.model.choice.search import best_kept


class Measured:
    """What the left-out layers add, and `bent` of what none of them adds alone; counts how often it is asked."""

    def __init__(self, count: int, seed: int, bent: float = 0.0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._count, self._bent = count, bent
        self._alone = torch.randn(count, 30, generator=generator)
        self._pairs = torch.randn(count, count, 30, generator=generator)
        self.asked: list[tuple[int, ...]] = []

    def __call__(self, kept) -> torch.Tensor:
        self.asked.append(tuple(kept))
        return self._difference(kept)

    def _difference(self, kept) -> torch.Tensor:
        out = [i for i in range(self._count) if i not in kept]
        bends = [self._pairs[i, j] for i, j in itertools.combinations(out, 2)]
        return self._alone[out].sum(0) + self._bent * sum(bends, torch.zeros(30))

    def length(self, kept) -> float:
        return self._difference(kept).pow(2).sum().item()


@pytest.mark.parametrize("seed", range(5))
def test_where_layers_add_up_the_shortest_set_is_found(seed):
    measured = Measured(9, seed)
    best = min(itertools.combinations(range(9), 4), key=measured.length)
    assert tuple(best_kept(9, 4, measured)) == best


@pytest.mark.parametrize(("count", "keep"), [(6, 1), (6, 5), (4, 2)])
def test_few_sets_are_all_measured(count, keep):
    measured = Measured(count, seed=2, bent=3.0)
    chosen = best_kept(count, keep, measured)
    assert sorted(measured.asked) == list(itertools.combinations(range(count), keep))
    assert measured.length(chosen) == min(map(measured.length, itertools.combinations(range(count), keep)))


@pytest.mark.parametrize("seed", range(5))
def test_it_asks_a_bounded_number_of_times_and_never_does_worse_than_uniform(seed):
    measured = Measured(12, seed, bent=1.0)
    chosen = best_kept(12, 6, measured)
    assert len(measured.asked) == len(set(measured.asked)) == 3 * 12
    assert chosen == sorted(set(chosen)) and len(chosen) == 6
    assert measured.length(chosen) == min(measured.length(kept) for kept in measured.asked if len(kept) == 6)
    assert measured.length(chosen) <= measured.length(uniform_layers(12, 6))


def test_measuring_corrects_what_was_predicted():
    """Where layers bend each other, the climb ends below the set that adding up promises."""
    better = 0
    for seed in range(10):
        measured = Measured(9, seed, bent=0.4)
        adding_up = min(itertools.combinations(range(9), 4), key=Measured(9, seed).length)
        chosen = best_kept(9, 4, measured)
        assert measured.length(chosen) <= measured.length(adding_up)
        better += measured.length(chosen) < measured.length(adding_up)
    assert better >= 5


def test_sets_that_cannot_be_measured_are_passed_by():
    measured = Measured(9, seed=1)

    def measure(kept):
        return measured(kept) * (math.nan if tuple(kept) == tuple(uniform_layers(9, 4)) else 1.0)

    assert math.isfinite(measured.length(best_kept(9, 4, measure)))
    assert best_kept(9, 4, measure) != uniform_layers(9, 4)
