"""Where fits cost least: a short calibration of a base and a batch, and the plan that follows from it.

How tensors get to another machine is the caller's: it hands in what sends them. A batch is one pass of the base."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor

from ot_ray.cola.codings import CODINGS, encode
from ot_ray.cola.fits import FitConfig, make_fitter
from ot_ray.cola.modes import Mode
from ot_ray.cola.pairs import Pair
from ot_ray.cola.passes import BasePass, CustomerRows
from ot_ray.config import Config

HERE, HOST, WORKER, CUSTOMER = "server's device", "server's CPU", "remote worker", "customer's device"
"""The places where fits can be made, the base's own device first."""
_AS_GOOD = 1.01
"""How much longer a batch may take where something dearer is spared."""

Send = Callable[[Mapping[str, Tensor]], None]
"""Brings tensors to a worker; returns when they are there."""


class Measured(Config):
    """What a calibration found, of one batch of all customers."""

    pass_s: float = Field(gt=0)
    """Seconds of a forward and backward pass, until the pairs are where the base's pass leaves them."""
    pair_bytes: dict[str, int]
    """Of x and g, by coding; an x that several sites have counts once."""
    auxiliary_bytes: int = Field(gt=0)
    """Of all auxiliaries' tensors, which come back after a fit."""
    owners: int = Field(ge=1)
    """Auxiliaries."""
    device: str
    """Type of the device that the base is on."""
    fit_s: dict[str, float]
    """Seconds to collect the batch for all of them, by device type."""
    step_s: dict[str, float]
    """Seconds of their optimisers' steps, by device type."""
    send_s: float | None = None
    """Seconds that the uncoded pairs took to a worker; None where none was tried."""


class Elsewhere(Config):
    """The rates of machines that fit for the server."""

    speed: float = Field(default=1.0, gt=0)
    """Of one's fits, as a multiple of the server's CPU."""
    bandwidth: float = Field(gt=0)
    """Bytes a second between the server and one of them."""
    latency_s: float = Field(default=0.0, ge=0)
    """Seconds before the first byte, each way."""
    count: int | None = Field(default=None, ge=1)
    """Machines; unset, one for each customer."""


@dataclass(frozen=True)
class Option:
    """One place to fit, and what a batch costs there."""

    place: str
    coding: str
    """Of what travels; `none` where nothing does."""
    bytes: int
    """That travel in a batch, both ways."""
    transfer_s: float
    fit_s: float
    batch_s: float
    """Seconds from a batch to the next."""
    server_s: float
    """Of these, seconds of the base's device that are the fit's."""


@dataclass(frozen=True)
class OffloadPlan:
    """All places with their costs, and which to take."""

    options: tuple[Option, ...]
    recommended: Option

    def table(self) -> str:
        """As aligned text, the recommended one marked."""
        lines = [f"  {'place':18s} {'coding':9s} {'MB/batch':>9s} {'transfer':>9s} {'fit':>9s} {'batch':>9s}"]
        for option in self.options:
            seconds = (option.transfer_s, option.fit_s, option.batch_s)
            lines.append(
                f"{'*' if option is self.recommended else ' '} {option.place:18s} {option.coding:9s} "
                f"{option.bytes / 1e6:9.3f} {' '.join(f'{1e3 * value:6.1f} ms' for value in seconds)}"
            )
        return "\n".join(lines)


def calibrate(
    base: BasePass, mode: Mode, rows: CustomerRows, config: FitConfig, send: Send | None = None, repeats: int = 3
) -> Measured:
    """Time passes and fits of one batch on this machine; the base and the auxiliaries are left as they are.

    Args:
        rows: a batch as those that are to come.
        send: brings tensors to a worker and returns when they are there.
        repeats: of each timing, after one that does not count; the median counts.
    """
    device = base.model.device
    pass_s = _median(lambda: base(rows, mode), device, repeats)
    pairs = base(rows, mode).pairs
    owners = [name for name in mode.names if name in pairs]
    fits = {kind: _fit_seconds(mode, pairs, config, kind, repeats) for kind in dict.fromkeys((device.type, "cpu"))}
    plain = {name: tensor.cpu() for name, tensor in _distinct(pairs).items()}
    return Measured(
        pass_s=pass_s,
        pair_bytes={coding: _bytes_of(plain.values(), coding) for coding in CODINGS},
        auxiliary_bytes=sum(t.nbytes for name in owners for t in mode.auxiliaries[name].tensors.values()),
        owners=len(owners),
        device=device.type,
        fit_s={kind: collect for kind, (collect, _) in fits.items()},
        step_s={kind: step for kind, (_, step) in fits.items()},
        send_s=None if send is None else _median(lambda: send(plain), device, repeats),
    )


def plan_offload(
    measured: Measured,
    interval: int = 1,
    staleness: int = 0,
    workers: Elsewhere | None = None,
    customers: Elsewhere | None = None,
) -> OffloadPlan:
    """Hold the places against each other.

    The quickest wins; of those that are as quick to a hundredth, the one that leaves most to the base's device, then
    the one whose coding loses least. Fits off the base's device take their time beside the next passes where
    `staleness` allows it, else between two passes.

    Args:
        interval: batches of a fit.
        staleness: as the training loop has it.
        workers: machines of the owner's; the bandwidth that was measured stands in for one that is unset here.
        customers: one device for each customer, or `count` of them.
    """
    elsewhere = {WORKER: workers or _measured_workers(measured), CUSTOMER: customers}
    options = [_option(measured, HERE, measured.device, interval, 0)]
    if measured.device != "cpu":
        options.append(_option(measured, HOST, "cpu", interval, staleness))
    for place, rates in elsewhere.items():
        if rates is not None:
            options += [_far(measured, place, coding, rates, interval, staleness) for coding in CODINGS]
    quickest = min(option.batch_s for option in options)
    near = [option for option in options if option.batch_s <= quickest * _AS_GOOD]
    best = min(near, key=lambda option: (option.server_s, CODINGS.index(option.coding), option.batch_s))
    return OffloadPlan(tuple(options), best)


def _measured_workers(measured: Measured) -> Elsewhere | None:
    if measured.send_s is None:
        return None
    return Elsewhere(bandwidth=measured.pair_bytes["none"] / max(measured.send_s, 1e-9), count=1)


def _option(measured: Measured, place: str, kind: str, interval: int, staleness: int) -> Option:
    fit_s = measured.fit_s[kind] + measured.step_s[kind] / interval
    batch_s = _together(measured.pass_s, fit_s, staleness)
    return Option(place, "none", 0, 0.0, fit_s, batch_s, fit_s if place == HERE else 0.0)


def _far(measured: Measured, place: str, coding: str, rates: Elsewhere, interval: int, staleness: int) -> Option:
    machines = measured.owners if rates.count is None else min(rates.count, measured.owners)
    total = measured.pair_bytes[coding] + measured.auxiliary_bytes // interval
    # Machines have links and CPUs of their own; the one with most auxiliaries is the last to be done.
    most = -(-measured.owners // machines) / measured.owners
    transfer_s = most * total / rates.bandwidth + rates.latency_s * (1 + 1 / interval)
    fit_s = most * (measured.fit_s["cpu"] + measured.step_s["cpu"] / interval) / rates.speed
    batch_s = _together(measured.pass_s, transfer_s + fit_s, staleness)
    return Option(place, coding, total, transfer_s, fit_s, batch_s, 0.0)


def _together(pass_s: float, fit_s: float, staleness: int) -> float:
    """Seconds from a batch to the next; with staleness s, s + 1 passes may be under way before a fit is waited for."""
    return pass_s + fit_s if staleness == 0 else max(pass_s, fit_s, (pass_s + fit_s) / (staleness + 1))


def _fit_seconds(
    mode: Mode, pairs: Mapping[str, Mapping[str, Pair]], config: FitConfig, kind: str, repeats: int
) -> tuple[float, float]:
    """Seconds to collect a batch for all owners, and of their steps."""
    device = torch.device(kind)
    here = {
        owner: {site: Pair(pair.x.to(device), pair.g.to(device)) for site, pair in own.items()}
        for owner, own in pairs.items()
    }
    fitters = {
        owner: make_fitter(mode.auxiliaries[owner].copy(device), config.model_copy(update={"interval": 2**31}))
        for owner in here
    }
    collects, steps = [], []
    for _ in range(repeats + 1):
        collects.append(_seconds(lambda: [fitters[owner].collect(own) for owner, own in here.items()], device))
        steps.append(_seconds(lambda: [fitter.flush() for fitter in fitters.values()], device))
    return statistics.median(collects[1:]), statistics.median(steps[1:])


def _distinct(pairs: Mapping[str, Mapping[str, Pair]]) -> dict[str, Tensor]:
    tensors = [tensor for own in pairs.values() for pair in own.values() for tensor in (pair.x, pair.g)]
    return {str(number): tensor for number, tensor in enumerate({id(tensor): tensor for tensor in tensors}.values())}


def _bytes_of(tensors: Iterable[Tensor], coding: str) -> int:
    coded = [encode(tensor, coding) for tensor in tensors]
    return sum(values.nbytes + (0 if scales is None else scales.nbytes) for values, scales in coded)


def _median(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    return statistics.median([_seconds(call, device) for _ in range(repeats + 1)][1:])


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    start = _now(device)
    call()
    return _now(device) - start


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
