"""Auxiliaries fitted by Ray actors: the same bits as in one process, whoever dies; memory that stays flat; errors."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import ot_ray.launch
from ot_ray.cola import Auxiliary, AuxiliaryConfig, BasePass, FitConfig, Pair, Site
from ot_ray.errors import GradientLearningError, LaunchError
from ot_ray.launch import AuxiliaryPool, AuxiliaryWorkers
from ot_ray.launch.cluster import ClusterAddress
from ot_ray.launch.shared_tensors import SharedBatch, SharedState, SharedTensor
from tests.launch.customers import (
    FITS,
    FITTINGS,
    assert_same,
    auxiliaries,
    base_pass,
    fitting_here,
    outcome,
    run,
)

EVERY = 2
ROOT = Path(__file__).parents[2]
SITE = {"map": Site("map", "linear", 5, 4)}


# What Ray needs to start workers on a busy machine.
slow = [pytest.mark.slow, pytest.mark.timeout(560)]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As the workers have; products are added up in another order by several."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def base() -> BasePass:
    return base_pass()


@pytest.fixture(scope="module")
def undisturbed(base: BasePass) -> dict[int, dict[str, Any]]:
    """What becomes of a run in one process, by staleness."""
    found = {}
    for staleness in range(3):
        fitting = fitting_here(base)
        found[staleness] = outcome(*run(base, fitting, staleness), fitting)
    return found


@pytest.fixture(scope="module")
def one_pool(local_ray: ClusterAddress, base: BasePass) -> Iterator[AuxiliaryPool]:
    workers = AuxiliaryWorkers(count=2, snapshot_every=EVERY, max_failures=3)
    with AuxiliaryPool(auxiliaries(base), FITTINGS, workers) as pool:
        yield pool


@pytest.fixture
def pool(one_pool: AuxiliaryPool, base: BasePass) -> AuxiliaryPool:
    """Two workers at a new start, whatever they did before."""
    one_pool.load(fitting_here(base).states())
    return one_pool


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.float8_e4m3fn]
)
def test_a_tensor_is_the_same_after_its_way_through_an_array(dtype: torch.dtype) -> None:
    for tensor in (torch.randn(3, 4).mT, torch.tensor(1.5), torch.empty(0, 7)):
        sent = tensor.to(dtype)
        for copy in (False, True):
            found = SharedTensor.of(sent).tensor(copy)
            assert found.dtype == dtype and found.shape == sent.shape
            assert torch.equal(found.double(), sent.double())
            assert found.data_ptr() % 64 == 0


def test_a_state_comes_out_as_it_went_in(base: BasePass) -> None:
    for state in fitting_here(base).states().values():
        shared = SharedState.of(state)
        assert_same(shared.owned().state(), state)
        # What it was made of may change afterwards.
        owned = shared.owned()
        for tensor in state["fitter"]["auxiliary"].values():
            tensor.fill_(7)
        assert not any((tensor == 7).any() for tensor in owned.state()["fitter"]["auxiliary"].values())


def test_owners_are_dealt_out_by_size_and_fittings_by_name() -> None:
    from ot_ray.launch.auxiliary_pool import _dealt, _each

    ranks = {"a": 1, "b": 5, "c": 2, "d": 2}
    given = {name: Auxiliary(SITE, AuxiliaryConfig(rank=rank)) for name, rank in ranks.items()}
    assert _dealt(given, 2) == [["b"], ["c", "d", "a"]]
    assert _dealt(given, 9) == [["b"], ["c"], ["d"], ["a"]]
    assert _each(given, FitConfig(lr=2.0)) == dict.fromkeys("abcd", FitConfig(lr=2.0))
    with pytest.raises(
        GradientLearningError, match=r"fitting is of \['a'\], auxiliaries are of \['a', 'b', 'c', 'd'\]"
    ):
        _each(given, {"a": FitConfig()})


def test_who_does_not_fit_loads_no_torch() -> None:
    code = "import sys, ot_ray.launch; sys.exit(int('torch' in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
    assert not hasattr(ot_ray.launch, "AuxiliaryPools")


class TestOnRay:
    pytestmark = slow

    @pytest.mark.parametrize("staleness", range(3))
    def test_a_run_is_the_one_of_a_single_process_bit_for_bit(
        self, pool: AuxiliaryPool, base: BasePass, undisturbed: dict[int, dict[str, Any]], staleness: int
    ) -> None:
        result, mode = run(base, pool, staleness)
        assert_same(outcome(result, mode, pool), undisturbed[staleness])
        assert result.history[-1]["fits"] == sum(FITS.values())

    def test_staleness_makes_another_run(self, undisturbed: dict[int, dict[str, Any]]) -> None:
        losses = [[step["loss"] for step in seen["figures"]] for seen in undisturbed.values()]
        assert losses[0] != losses[1] != losses[2]

    def test_a_batch_is_handed_over_while_the_worker_is_busy(
        self, pool: AuxiliaryPool, base: BasePass, tmp_path: Path
    ) -> None:
        import ray

        may_go_on = str(tmp_path / "go on")

        def busy(worker: Any) -> bool:
            deadline = time.monotonic() + 300
            while not Path(may_go_on).exists() and time.monotonic() < deadline:
                time.sleep(0.02)
            return Path(may_go_on).exists()

        waited = [seat._actor.__ray_call__.remote(busy) for seat in pool._seats]
        pool.submit(0, {owner: _pairs_of(one) for owner, one in auxiliaries(base).items()})
        assert ray.wait([seat._answers[0] for seat in pool._seats], timeout=0)[0] == []
        Path(may_go_on).touch()
        assert [taken.number for taken in pool.taken(0).values()] == [0, 0, 0]
        assert ray.get(waited) == [True, True]

    def test_workers_that_are_killed_change_nothing(
        self, pool: AuxiliaryPool, base: BasePass, undisturbed: dict[int, dict[str, Any]]
    ) -> None:
        """At random moments while batches 2 and 5 are fitted, one worker each time."""
        killing = _Killing(pool, {2: 0, 5: 1}, random.Random(7))
        result, mode = run(base, killing, 1)
        assert killing.killed == 2
        assert_same(outcome(result, mode, pool), undisturbed[1])

    def test_a_fit_whose_worker_dies_before_it_answers_is_made_once(
        self, pool: AuxiliaryPool, base: BasePass, undisturbed: dict[int, dict[str, Any]]
    ) -> None:
        """Its optimiser has stepped, and nobody knows."""

        def dies_after_its_third_step(worker: Any) -> int:
            fitter = worker._fits._fitters["bob"]
            step = fitter.optimizer.step

            def last_step() -> None:
                step()
                if fitter.steps == 2:
                    os.kill(os.getpid(), signal.SIGKILL)

            fitter.optimizer.step = last_step
            return os.getpid()

        before = _asked(pool, _seat_of(pool, "bob"), dies_after_its_third_step)
        result, mode = run(base, pool, 2)
        assert before != _pid(pool, _seat_of(pool, "bob"))
        assert_same(outcome(result, mode, pool), undisturbed[2])
        steps = {owner: state["fitter"]["steps"] for owner, state in pool.states().items()}
        assert steps == FITS

    def test_what_is_kept_does_not_grow(self, pool: AuxiliaryPool, base: BasePass) -> None:
        from ray._private.worker import global_worker

        def references() -> int:
            return len(global_worker.core_worker.get_all_reference_counts())

        pairs = {owner: _pairs_of(one) for owner, one in auxiliaries(base).items()}
        before, kept, held = references(), [], []
        for number in range(10 * EVERY):
            pool.submit(number, pairs)
            pool.taken(number)
            kept += [len(numbers) for numbers in pool.kept]
            held.append(references() - before)
        assert EVERY <= max(kept) <= 2 * EVERY
        # The batches of each of two workers, and a few answers; in all there were 20 of each.
        assert max(held) <= 2 * (2 * EVERY + 3)
        pool.states()
        assert pool.kept == [[], []]

    def test_answers_outlive_their_worker_s_snapshot(self, pool: AuxiliaryPool, base: BasePass) -> None:
        """Nobody asks for them until the batches that they are of have been let go."""
        here, pairs = fitting_here(base), {owner: _pairs_of(one) for owner, one in auxiliaries(base).items()}
        for number in range(2 * EVERY):
            pool.submit(number, pairs)
            here.submit(number, pairs)
        pool.states()
        _kill(_pid(pool, 0))
        for number in range(2 * EVERY):
            found, expected = pool.taken(number), here.taken(number)
            for owner in expected:
                assert (found[owner].number, found[owner].steps) == (number, expected[owner].steps)
                assert_same(found[owner].tensors, expected[owner].tensors)
        assert any(expected[owner].tensors is None for owner in expected)
        with pytest.raises(GradientLearningError, match="batch 1 was not submitted, or asked for already"):
            pool.taken(1)
        assert_same(pool.states(), here.states())

    def test_a_shared_input_travels_once_and_is_not_copied_out(self, local_ray: ClusterAddress) -> None:
        import ray

        x, g = torch.randn(64, 512), torch.randn(64, 512).bfloat16()
        batch = {"ann": {"q": Pair(x, g), "k": Pair(x, g + 1), "v": Pair(x, g + 2)}, "bob": None}
        got = ray.get(ray.put(SharedBatch.of(batch)))
        arrays = [tensor.array for tensor in got.tensors]
        assert sum(array.nbytes for array in arrays) == (4 + 3 * 2) * 64 * 512
        # The store's own memory, which nobody may write to.
        assert not any(array.flags.writeable or array.flags.owndata for array in arrays)
        found = got.pairs()
        assert found["bob"] is None
        for site, pair in found["ann"].items():
            assert torch.equal(pair.x, x) and torch.equal(pair.g, batch["ann"][site].g)
            assert pair.x.data_ptr() == arrays[0].ctypes.data

    def test_what_is_not_finite_is_refused_and_the_rest_goes_on(self, pool: AuxiliaryPool, base: BasePass) -> None:
        pairs = {owner: _pairs_of(one) for owner, one in auxiliaries(base).items()}
        site, pair = next(iter(pairs["bob"].items()))
        spoilt = {**pairs, "bob": {**pairs["bob"], site: Pair(pair.x, pair.g * torch.inf)}}
        for number, batch in enumerate((pairs, spoilt, pairs)):
            pool.submit(number, batch)
        taken = [pool.taken(number) for number in range(3)]
        assert "holds NaN or infinity" in str(taken[1]["bob"].refused) and taken[1]["bob"].tensors is None
        assert [told["bob"].steps for told in taken] == [1, 1, 2]
        assert [told["ann"].refused for told in taken] == [None] * 3

    def test_errors_of_ours_arrive_as_themselves(self, pool: AuxiliaryPool, base: BasePass) -> None:
        pairs = {owner: _pairs_of(one) for owner, one in auxiliaries(base).items()}
        with pytest.raises(GradientLearningError, match="'dan' is not fitted here; "):
            pool.submit(0, {**pairs, "dan": None})
        del pairs["ann"][next(iter(pairs["ann"]))]
        pool.submit(0, pairs)
        with pytest.raises(GradientLearningError, match="no pair came for site") as caught:
            pool.taken(0)
        assert type(caught.value) is GradientLearningError

    def test_a_worker_that_is_lost_too_often_ends_the_run(self, local_ray: ClusterAddress) -> None:
        told: list[str] = []
        workers = AuxiliaryWorkers(max_failures=1)
        with AuxiliaryPool({"ann": Auxiliary(SITE)}, FitConfig(), workers, told.append) as pool:
            _kill(_pid(pool, 0))
            pool.submit(0, {"ann": {"map": Pair(torch.ones(2, 5), torch.ones(2, 4))}})
            assert pool.taken(0)["ann"].steps == 1
            _kill(_pid(pool, 0))
            pool.submit(1, {"ann": None})
            expected = r"auxiliary worker 0 was lost 2 times .* raise auxiliary_workers.max_failures \(1\)"
            with pytest.raises(LaunchError, match=expected):
                pool.taken(1)
        assert len(told) == 1
        assert told[0].startswith("auxiliary worker 0 was lost (")
        assert told[0].endswith("another takes its place and fits the last 1 batches again")

    def test_a_label_that_no_machine_has_is_said_and_not_waited_for(self, local_ray: ClusterAddress) -> None:
        workers = AuxiliaryWorkers(resources={"auxiliary": 0.001}, start_timeout_s=1)
        expected = r"has not started within 1 s: it needs 0.001 auxiliary, and no machine of the cluster has any; start"
        with pytest.raises(LaunchError, match=expected):
            AuxiliaryPool({"ann": Auxiliary(SITE)}, FitConfig(), workers)


class _Killing:
    """A pool, one of whose workers is killed at a random moment after some batches were handed over."""

    def __init__(self, pool: AuxiliaryPool, places: Mapping[int, int], moments: random.Random) -> None:
        self._pool, self._places, self._moments = pool, dict(places), moments
        self.killed = 0
        self.taken, self.states, self.load, self.close = pool.taken, pool.states, pool.load, pool.close

    def submit(self, number: int, pairs: Mapping[str, Mapping[str, Pair] | None], flush: bool = False) -> None:
        pid = _pid(self._pool, self._places[number]) if number in self._places else None
        self._pool.submit(number, pairs, flush)
        if pid is not None:
            time.sleep(self._moments.random() * 0.02)
            os.kill(pid, signal.SIGKILL)
            self.killed += 1


def _seat_of(pool: AuxiliaryPool, owner: str) -> int:
    return next(place for place, seat in enumerate(pool._seats) if owner in seat.owners)


def _asked(pool: AuxiliaryPool, place: int, function: Any) -> Any:
    """What a function makes of the worker, where that is."""
    import ray

    return ray.get(pool._seats[place]._actor.__ray_call__.remote(function))


def _pid(pool: AuxiliaryPool, place: int) -> int:
    return _asked(pool, place, lambda worker: os.getpid())


def _kill(pid: int) -> None:
    """Returns when Ray has noticed."""
    os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 120
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < deadline, f"{pid} is not taken away"
        time.sleep(0.05)


def _pairs_of(auxiliary: Auxiliary) -> dict[str, Pair]:
    generator = torch.Generator().manual_seed(3)
    return {
        name: Pair(torch.randn(6, site.inputs, generator=generator), torch.randn(6, site.outputs, generator=generator))
        for name, site in auxiliary.sites.items()
    }
