"""Auxiliary workers sit on the machines that are labelled for them, and a machine that is lost changes no bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.cluster.auxiliary_scene import STALENESS
from tests.cluster.stage import stage
from tests.launch.customers import assert_same, base_pass, fitting_here, outcome, run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(960)]


def test_fits_outlive_their_machine(tmp_path: Path) -> None:
    with stage("tests.cluster.auxiliary_scene", tmp_path) as play:
        seen = play("lose_machine")
    assert seen["before"] == [seen["lost"]] * 2
    assert len(set(seen["after"])) == 1 and seen["after"][0] != seen["lost"]
    assert sorted(text.partition(" was lost")[0] for text in seen["told"]) == [
        "auxiliary worker 0",
        "auxiliary worker 1",
    ]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        base = base_pass()
        fitting = fitting_here(base)
        expected = outcome(*run(base, fitting, STALENESS), fitting)
    finally:
        torch.set_num_threads(threads)
    assert_same(torch.load(tmp_path / "outcome.pt", weights_only=True), expected)
    assert seen["large"]
    assert seen["alone"] == "this process belongs to no Ray cluster; connect to one first, with ray_cluster()"
    assert "it needs 2 auxiliary, and no machine has more than 1; start machines with it" in seen["few"]
    assert "it needs 1 fitter, and no machine of the cluster has any; start machines with it" in seen["none"]
