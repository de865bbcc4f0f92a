"""forward_backward: one pass for operations of many sessions, whose pairs go into files or to the server's fitters."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from ot_ray.cola import Auxiliary, Mode
from ot_ray.cola.gradient_files import write_gradients
from ot_ray.errors import OTRayError
from serve.catalogue.records import GradientOperation
from serve.engine.checks import context_length
from serve.gradients.desk import ConflictError, Desk
from serve.gradients.packing import Wanted, packed, read_wanted
from serve.gradients.passes import Yielded, run_pass
from serve.stored_gradients import gradients_key

_log = logging.getLogger(__name__)


class Guard(Protocol):
    """Does something of one operation; what goes wrong with it is its own affair."""

    def __call__(self, operation: GradientOperation, work: Callable[[], None], *, last: bool = True) -> None: ...


def collect(desk: Desk, operations: Sequence[GradientOperation], guard: Guard) -> None:
    """Carry out forward_backward operations, of different sessions."""
    wanted: list[Wanted] = []
    for operation in operations:
        guard(operation, partial(_read, desk, operation, wanted), last=False)
    while wanted:
        now = _together(desk, wanted)
        done = {one.operation.id for one in now}
        wanted = [one for one in wanted if one.operation.id not in done]
        for some in packed(now, desk.settings.max_rows, desk.settings.max_tokens):
            _pass(desk, some, guard)


def _read(desk: Desk, operation: GradientOperation, into: list[Wanted]) -> None:
    plan = desk.plan(operation.session_id)
    desk.require_sites(plan)
    model = desk.base.model
    wanted = read_wanted(operation, plan, model.config.get_text_config().vocab_size, context_length(model))
    # One whose auxiliary cannot be had fails here, and not in everybody's pass.
    desk.mode({operation.id: plan})
    into.append(wanted)


def _together(desk: Desk, wanted: Iterable[Wanted]) -> list[Wanted]:
    """Those that may have their passes before the next fit: sessions that share an auxiliary which the server fits go
    together only within an interval."""
    room: dict[str, int] = {}
    found = []
    for one in wanted:
        plan = one.plan
        if plan.fit == "server" and plan.interval is not None:
            if plan.auxiliary_id not in room:
                fitter = desk.resident(plan).fitter
                room[plan.auxiliary_id] = plan.interval - (fitter.collected if fitter is not None else 0)
            if room[plan.auxiliary_id] < 1:
                continue
            room[plan.auxiliary_id] -= 1
        found.append(one)
    return found


def _pass(desk: Desk, wanted: Sequence[Wanted], guard: Guard) -> None:
    went: dict[str, tuple[Auxiliary, int]] = {}

    def mode_of(some: Sequence[Wanted]) -> Mode:
        mode, versions = desk.mode({one.operation.id: one.plan for one in some})
        for one in some:
            went[one.operation.id] = mode.auxiliaries[one.operation.id], versions[one.plan.auxiliary_id]
        return mode

    yielded = run_pass(desk.base, wanted, mode_of)
    for one in wanted:
        found = yielded.pop(one.operation.id)
        guard(one.operation, partial(_finish, desk, one, found, went))


def _finish(desk: Desk, wanted: Wanted, found: Yielded | Exception, went: dict[str, tuple[Auxiliary, int]]) -> None:
    if isinstance(found, Exception):
        raise found
    auxiliary, version = went[wanted.operation.id]
    if wanted.plan.fit == "server":
        _fit(desk, wanted, found, auxiliary)
    else:
        _write(desk, wanted, found, version)


def _fit(desk: Desk, wanted: Wanted, found: Yielded, auxiliary: Auxiliary) -> None:
    resident = desk.resident(wanted.plan)
    assert resident.fitter is not None
    if resident.auxiliary is not auxiliary:
        raise ConflictError(wanted.operation.id)
    resident.fitter.collect(found.pairs)
    desk.succeed_moved(wanted.operation, _result(wanted, found) | {"fits": resident.fitter.steps}, resident)


def _write(desk: Desk, wanted: Wanted, found: Yielded, version: int) -> None:
    operation = wanted.operation
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "gradients.safetensors"
        errors = write_gradients(
            path,
            found.pairs,
            session=operation.session_id,
            number=operation.number,
            version=version,
            coding=operation.request["coding"],
        )
        size = path.stat().st_size
        sha256 = desk.store.upload(path, gradients_key(operation)).sha256
    told = {"bytes": size, "sha256": sha256, "errors": errors or None}
    desk.succeed(operation, _result(wanted, found) | told, version, [gradients_key(operation)])
    try:
        for old in desk.catalogue.gradient_operations.old_gradients(operation.session_id, operation.number):
            desk.store.delete(gradients_key(old))
    except OTRayError as error:
        _log.warning("old gradients of %s stay until it is cleaned up: %s", operation.session_id, error)


def _result(wanted: Wanted, found: Yielded) -> dict[str, Any]:
    """What is told of every pass; who makes a file, or a fit, tells of that instead of nothing."""
    return {
        "loss": found.loss,
        "tokens": found.tokens,
        "rows": len(wanted.tokens),
        "coding": wanted.operation.request["coding"],
        "bytes": 0,
        "sha256": None,
        "errors": None,
        "fits": None,
    }
