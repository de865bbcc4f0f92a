"""A base whose weights lie in parts on two ranks yields what one process yields, and a run on it learns the same."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from ot_ray.cola import Alone, BasePass
from ot_ray.store import open_store
from ot_ray.training import GradientCheckpoints
from ot_ray.training.gradient_parts import join_parts, pack_pairs, unpack_pairs
from tests.training.gradient_groups import (
    KINDS,
    PATTERNS,
    SAVED_AT,
    STEPS,
    fitting_of,
    learnt,
    modes,
    parts,
    rows,
    run_pair,
    seen,
)
from tests.training.samples import PATIENCE, run_group

slow = [pytest.mark.slow, pytest.mark.timeout(2 * PATIENCE)]

# The same float32 products, of fewer rows at a time, and sums of them in another order.
ROUNDING = {"rtol": 1e-4, "atol": 1e-6}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sharded")


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[Any, Any]]:
    run_group(run_pair, 2, folder)
    return [torch.load(folder / f"pair-{rank}.pt", weights_only=True) for rank in range(2)]


def _whole(ranks: list[dict[str, Any]]) -> dict[str, dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """The pairs of a pass, of both ranks' rows."""
    found: dict[str, dict[str, Any]] = {}
    for rank in ranks:
        for owner, sites in rank["pairs"].items():
            for site, pair in sites.items():
                found.setdefault(owner, {}).setdefault(site, []).append(pair)
    return {
        owner: {site: tuple(torch.cat(own) for own in zip(*pairs, strict=True)) for site, pairs in sites.items()}
        for owner, sites in found.items()
    }


def _check(found: list[dict[str, Any]], expected: dict[str, Any], limits: Mapping[str, float] = ROUNDING) -> None:
    pairs = _whole(found)
    assert pairs.keys() == expected["pairs"].keys()
    for owner, sites in expected["pairs"].items():
        assert pairs[owner].keys() == sites.keys()
        for site, (x, g) in sites.items():
            torch.testing.assert_close(pairs[owner][site][0], x, **limits)
            torch.testing.assert_close(pairs[owner][site][1], g, **limits)
            assert g.any()
    for rank in found:
        assert rank["losses"] == pytest.approx(expected["losses"], rel=limits["rtol"])
        assert rank["tokens"] == expected["tokens"]


class TestTwoRanks:
    pytestmark = slow

    @pytest.mark.parametrize("mode", ["alone", "joint"])
    @pytest.mark.parametrize("family", PATTERNS)
    def test_yield_the_pairs_and_losses_of_one_process(self, family: str, mode: str, ranks: list[Any]) -> None:
        model, sites, auxiliaries = parts(family)
        base, chosen = BasePass(model, sites), modes(auxiliaries)[mode]
        for number in (0, 1):
            _check([rank[family, mode][number] for rank in ranks], seen(base(rows(number), chosen)))
        losses, tokens = base.losses(rows(1), chosen)
        for rank in ranks:
            for when in ("losses", "losses again"):
                assert rank[family, mode, when][0] == pytest.approx(losses, rel=1e-5)
                assert rank[family, mode, when][1] == tokens

    @pytest.mark.parametrize("family", PATTERNS)
    def test_serve_fewer_rows_than_there_are_ranks(self, family: str, ranks: list[Any]) -> None:
        model, sites, auxiliaries = parts(family)
        _check(
            [rank[family, "few"] for rank in ranks], seen(BasePass(model, sites)(rows(0, ("bob",)), Alone(auxiliaries)))
        )
        assert ranks[1][family, "few"]["pairs"] == {}

    @pytest.mark.parametrize("family", PATTERNS)
    def test_hold_no_whole_weight_between_passes(self, family: str, ranks: list[Any]) -> None:
        whole = sum(parameter.numel() for parameter in parts(family)[0].parameters())
        for rank in ranks:
            assert rank[family, "held"] == [0, 0]
            assert rank[family, "own"] == -(-whole // 2)

    @pytest.mark.parametrize("family", PATTERNS)
    def test_refuse_what_they_cannot_do(self, family: str, ranks: list[Any]) -> None:
        for rank in ranks:
            assert "sharded over ranks, none of which has a whole one" in rank[family, "refused"]
            assert "is sharded over processes (ZeRO-3)" in rank[family, "unmergeable"]
            assert rank[family, "unknown"].startswith("GradientLearningError: rows name dan; the customers are ann, ")

    def test_read_their_own_part_of_the_weights_alone(self, ranks: list[Any]) -> None:
        model, sites, auxiliaries = parts("gpt2")
        sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
        asked: dict[str, list[tuple[int, int]]] = {}
        for rank in ranks:
            for name, start, end in rank["filled"]["asked"]:
                asked.setdefault(name, []).append((start, end))
        for name, size in sizes.items():
            half = -(-size // 2)
            assert sorted(asked[name]) == [(0, half), (half, size)]
        # bfloat16 keeps 8 bits, of which some are lost from layer to layer.
        plain = BasePass(model.to(torch.bfloat16), sites)
        _check(
            [rank["filled"] for rank in ranks], seen(plain(rows(0), Alone(auxiliaries))), {"rtol": 0.1, "atol": 0.05}
        )

    def test_learn_what_one_process_learns(self, ranks: list[Any], tmp_path: Path) -> None:
        model, sites, auxiliaries = parts("llama")
        checkpoints = GradientCheckpoints(open_store(str(tmp_path)), "alone", {})
        told, tensors = learnt(BasePass(model, sites), auxiliaries, fitting_of(auxiliaries), STEPS, checkpoints)
        for rank in ranks:
            figures, found = rank["runs"]["whole"]
            assert [step["fits"] for step in figures] == [step["fits"] for step in told]
            for ours, theirs in zip(figures, told, strict=True):
                assert ours == pytest.approx(theirs, rel=1e-4)
            for owner in tensors:
                for name, tensor in tensors[owner].items():
                    torch.testing.assert_close(found[owner][name], tensor, rtol=1e-3, atol=1e-5)

    def test_all_have_the_same_auxiliaries_and_a_stopped_run_goes_on(self, ranks: list[Any]) -> None:
        for run in ("whole", "half", "torn"):
            (figures, tensors), (other, others) = (rank["runs"][run] for rank in ranks)
            assert figures == other
            assert len(figures) == (SAVED_AT if run == "half" else STEPS)
            for owner in tensors:
                assert all(torch.equal(tensors[owner][name], others[owner][name]) for name in tensors[owner])
        (figures, tensors), (whole, expected) = ranks[0]["runs"]["torn"], ranks[0]["runs"]["whole"]
        assert figures == whole
        for owner in expected:
            assert all(torch.equal(tensors[owner][name], expected[owner][name]) for name in expected[owner])

    def test_tell_each_other_tensors_of_any_type(self, ranks: list[Any]) -> None:
        def message(rank: int) -> tuple[dict[str, Any], list[torch.Tensor]]:
            tensors = [torch.tensor(1.5 + rank).bfloat16(), torch.empty(0, 3), torch.arange(6).view(2, 3).mT + rank]
            return {"rank": rank, "text": "ü" * rank}, tensors

        def same(found: Any, expected: Any) -> bool:
            pairs = list(zip(found[1], expected[1], strict=True))
            return found[0] == expected[0] and all(
                one.dtype == other.dtype and torch.equal(one, other) for one, other in pairs
            )

        gathered = ranks[0]["messages"][0]
        assert [same(gathered[rank], message(rank)) for rank in range(2)] == [True, True]
        assert ranks[1]["messages"][0] is None
        for rank in ranks:
            assert same(rank["messages"][1], message(0))
            assert rank["messages"][2] == [2.0, 1.0]


def test_a_batch_is_the_same_after_it_was_taken_apart() -> None:
    model, sites, auxiliaries = parts("llama")
    batch = {**BasePass(model, sites)(rows(0), Alone(auxiliaries)).pairs, "dan": None}
    tensors, table = pack_pairs(batch)
    # Query, key and value have one x; there are two layers, and down_proj has its own.
    assert len(tensors) == len(KINDS) * 2 * (4 + 2)
    again = unpack_pairs(tensors, table)
    for owner, pairs in batch.items():
        for site in pairs or ():
            assert again[owner][site].x is not None and torch.equal(again[owner][site].x, pairs[site].x)
            assert torch.equal(again[owner][site].g, pairs[site].g)
    assert again["dan"] is None
    joined = join_parts([batch, {**again, "ann": None, "dan": None}])
    assert torch.equal(joined["bob"][site].g, torch.cat([batch["bob"][site].g] * 2))
    assert joined["ann"] is batch["ann"] and joined["dan"] is None
    # What was one tensor is one again.
    assert len(pack_pairs(joined)[0]) == len(tensors)
