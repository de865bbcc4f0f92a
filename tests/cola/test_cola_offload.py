"""The plan of where to fit: by hand from rates that are given, and from a real calibration."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ot_ray.cola import Alone, Auxiliary, AuxiliaryConfig, BasePass, CustomerRows, FitConfig, find_sites
from ot_ray.cola.codings import CODINGS
from ot_ray.cola.offload import (
    CUSTOMER,
    HERE,
    HOST,
    WORKER,
    Elsewhere,
    Measured,
    OffloadPlan,
    Option,
    calibrate,
    plan_offload,
)
from tests.fixtures.models import tiny_model, tokens


def measured(device: str = "cuda", **changed: object) -> Measured:
    """Eight customers: a pass of 100 ms, 100 MB of pairs, 8 MB of auxiliaries."""
    found = {
        "pass_s": 0.1,
        "pair_bytes": {"none": 100_000_000, "bfloat16": 50_000_000, "int8": 26_000_000, "fp8": 26_000_000},
        "auxiliary_bytes": 8_000_000,
        "owners": 8,
        "device": device,
        "fit_s": {"cpu": 0.08, device: 0.02} if device != "cpu" else {"cpu": 0.08},
        "step_s": {"cpu": 0.04, device: 0.01} if device != "cpu" else {"cpu": 0.04},
    }
    return Measured.model_validate({**found, **changed})


def at(plan: OffloadPlan, place: str, coding: str = "none") -> Option:
    (found,) = [option for option in plan.options if (option.place, option.coding) == (place, coding)]
    return found


def test_costs_are_what_the_rates_say() -> None:
    workers = Elsewhere(bandwidth=1e9, speed=2.0, latency_s=0.001, count=3)
    customers = Elsewhere(bandwidth=10e6)
    plan = plan_offload(measured(), interval=4, workers=workers, customers=customers)
    assert [(option.place, option.coding) for option in plan.options] == [
        (HERE, "none"),
        (HOST, "none"),
        *[(WORKER, coding) for coding in CODINGS],
        *[(CUSTOMER, coding) for coding in CODINGS],
    ]
    here, host = at(plan, HERE), at(plan, HOST)
    assert (here.fit_s, here.batch_s, here.server_s) == pytest.approx((0.0225, 0.1225, 0.0225))
    assert (host.fit_s, host.batch_s, host.server_s) == pytest.approx((0.09, 0.19, 0.0))
    # One of three workers has three of the eight customers.
    worker = at(plan, WORKER)
    assert worker.bytes == 102_000_000
    assert worker.transfer_s == pytest.approx(3 / 8 * 0.102 + 0.001 * 1.25)
    assert worker.fit_s == pytest.approx(3 / 8 * 0.09 / 2)
    assert worker.batch_s == pytest.approx(0.1 + worker.transfer_s + worker.fit_s)
    # Each customer's own device has an eighth of it all.
    customer = at(plan, CUSTOMER, "int8")
    assert customer.transfer_s == pytest.approx(28e6 / 8 / 10e6)
    assert customer.fit_s == pytest.approx(0.09 / 8)


def test_staleness_hides_what_a_pass_is_long_enough_for() -> None:
    workers = Elsewhere(bandwidth=1e9, count=2)
    exact = plan_offload(measured(), workers=workers)
    assert exact.recommended == at(exact, HERE)
    # Beside the next pass, a worker costs nothing; bits are not spared for nothing.
    stale = plan_offload(measured(), staleness=1, workers=workers)
    assert at(stale, WORKER).batch_s == pytest.approx(0.114, abs=1e-3)
    assert at(stale, WORKER, "bfloat16").batch_s == pytest.approx(0.1)
    assert stale.recommended == at(stale, WORKER, "bfloat16")
    assert at(stale, HERE).batch_s == at(exact, HERE).batch_s
    # A slow link is chosen by nobody.
    slow = plan_offload(measured(), staleness=1, workers=Elsewhere(bandwidth=1e6, count=1))
    assert slow.recommended == at(slow, HOST) and slow.recommended.batch_s == pytest.approx(0.12)
    # With machines enough that nothing has to be rounded, nothing is.
    many = plan_offload(measured(), staleness=1, workers=Elsewhere(bandwidth=1e9, count=8))
    assert many.recommended == at(many, WORKER) and many.recommended.batch_s == pytest.approx(0.1)


def test_a_base_on_the_cpu_has_no_cpu_beside_it() -> None:
    plan = plan_offload(measured("cpu"), staleness=3)
    assert [option.place for option in plan.options] == [HERE]
    assert plan.recommended.batch_s == pytest.approx(0.22)


def test_a_measured_link_stands_in_for_a_given_one() -> None:
    plan = plan_offload(measured(send_s=0.05))
    assert at(plan, WORKER).transfer_s == pytest.approx(108e6 / 2e9)
    assert CUSTOMER not in {option.place for option in plan.options}


def test_a_table_marks_what_is_recommended() -> None:
    plan = plan_offload(measured(), workers=Elsewhere(bandwidth=1e9))
    lines = plan.table().splitlines()
    assert len(lines) == 1 + len(plan.options)
    assert [line for line in lines if line.startswith("*")] == [lines[1 + plan.options.index(plan.recommended)]]
    assert "server's device" in lines[1] and "  0.000" in lines[1] and "122." not in lines[1]


def test_a_calibration_measures_this_base_and_batch() -> None:
    model = tiny_model("llama", depth=2)
    sites = find_sites(model, ["*.q_proj", "*.v_proj", "*.down_proj"])
    own = {name: Auxiliary(sites, AuxiliaryConfig(rank=2, seed=seed)) for seed, name in enumerate(("ada", "bob"))}
    before = {name: {n: t.clone() for n, t in auxiliary.tensors.items()} for name, auxiliary in own.items()}
    ids = tokens(4)
    rows = CustomerRows(ids, ("ada", "ada", "bob", "bob"), ids)
    sent: list[dict[str, Tensor]] = []
    found = calibrate(
        BasePass(model, sites), Alone(own), rows, FitConfig(), lambda tensors: sent.append(dict(tensors)), repeats=2
    )
    positions = ids.numel()
    # Query and value see one x, [N, 32]; down_proj's has 48 columns.
    values = positions * 2 * (32 + 48 + sum(site.outputs for site in sites.values()) // 2)
    scaled = values + 4 * positions * 2 * 5
    assert found.pair_bytes == {"none": 4 * values, "bfloat16": 2 * values, "int8": scaled, "fp8": scaled}
    assert found.auxiliary_bytes == 4 * sum(t.numel() for auxiliary in own.values() for t in auxiliary.tensors.values())
    assert (found.owners, found.device, [*found.fit_s]) == (2, "cpu", ["cpu"])
    assert min(found.pass_s, *found.fit_s.values(), *found.step_s.values()) > 0 and found.send_s is not None
    assert len(sent) == 3 and sum(tensor.nbytes for tensor in sent[0].values()) == 4 * values
    plan = plan_offload(found, staleness=1, customers=Elsewhere(bandwidth=1e12, speed=1e6))
    # With a link and a device that take no time at all, nothing is left here.
    assert plan.recommended.place in (CUSTOMER, WORKER) and plan.recommended.coding == "none"
    assert all(torch.equal(t, before[name][n]) for name, a in own.items() for n, t in a.tensors.items())
    assert not any(t.requires_grad for a in own.values() for t in a.tensors.values())
