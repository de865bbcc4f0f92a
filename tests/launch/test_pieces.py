"""Independent pieces side by side on Ray: what fails takes nothing else with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ot_ray.launch.cluster import ClusterAddress
from ot_ray.launch.pieces import Piece, run_pieces
from tests.launch.piece_functions import after_note, note, refuse, stumble, vanish

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
ONE = {"CPU": 1.0}


def test_each_is_done_and_an_earlier_one_is_waited_for(local_ray: ClusterAddress, tmp_path: Path) -> None:
    place = {"place": str(tmp_path)}
    pieces = [Piece(name, note, {**place, "name": name}) for name in "abc"]
    pieces += [Piece(f"after {name}", after_note, {**place, "earlier": name}, after=(name,)) for name in "abc"]
    found: dict[str, Any] = {}
    failed = run_pieces(pieces, ONE, lambda piece, outcome: found.update({piece.name: outcome}), {"OT_RAY_TEST": "x"})
    assert failed == {}
    assert found == {**{name: name for name in "abc"}, **{f"after {name}": True for name in "abc"}}
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == dict.fromkeys("abc", "x")


def test_a_failure_says_why_and_takes_only_those_that_wait_for_it(local_ray: ClusterAddress, tmp_path: Path) -> None:
    place = {"place": str(tmp_path)}
    pieces = [
        Piece("wrong", refuse, {"name": "wrong"}),
        Piece("later", note, {**place, "name": "later"}, after=("wrong",)),
        Piece("broken", stumble, {}),
        Piece("gone", vanish, {}),
        Piece("well", note, {**place, "name": "well"}),
    ]
    found: list[str] = []
    failed = run_pieces(pieces, ONE, lambda piece, outcome: found.append(outcome))
    assert found == ["well"]
    assert failed.keys() == {"wrong", "later", "broken", "gone"}
    assert failed["wrong"] == failed["later"] == "wrong is no text; write text"
    assert failed["broken"] == "ZeroDivisionError: nothing to share"
    assert failed["gone"]
    assert [path.name for path in tmp_path.iterdir()] == ["well"]
