"""What every kind of operation works with: the base model, the auxiliaries, and the ways in which an operation ends.

The kinds themselves are in collecting, fitting, sampling and saving; whose turn it is in worker.py."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ot_ray.cola import Auxiliary, BasePass, PerCustomer
from ot_ray.errors import GradientLearningError, NotFiniteError, NotFoundError
from ot_ray.store import Store
from serve.catalogue import Catalogue
from serve.catalogue.records import GradientOperation
from serve.failures import ApiError, api_error
from serve.gradients.plans import SessionPlan, read_plan
from serve.gradients.residents import Resident, Residents, fitter_key
from serve.settings.gradients import GradientsConfig
from serve.stored_gradients import state_key

_log = logging.getLogger(__name__)


class ConflictError(Exception):
    """What an operation was carried out on is not the present version any more; it is to be done again."""


@dataclass(frozen=True)
class Desk:
    """What the kinds share. Every end of an operation is a compare-and-set in the catalogue, so that a worker that was
    taken for lost does no harm."""

    catalogue: Catalogue
    store: Store
    model_name: str
    """What customers call the base model."""
    base: BasePass
    tokenizer: PreTrainedTokenizerBase
    settings: GradientsConfig
    residents: Residents
    reached: frozenset[str]
    """Sites that a pass comes to."""
    ended: list[int] = field(default_factory=lambda: [0, 0])
    """Operations that succeeded here, and that failed."""

    @property
    def device(self) -> torch.device:
        """Where the base model is."""
        return self.base.model.device

    def plan(self, session_id: str) -> SessionPlan:
        """A session's settings. Raises NotFoundError."""
        return read_plan(self.catalogue.gradient_sessions.find(session_id))

    def resident(self, plan: SessionPlan) -> Resident:
        """A session's auxiliary as it is now.

        Raises:
            NotFoundError: the store lost it.
        """
        row = self.catalogue.gradient_sessions.auxiliary(plan.auxiliary_id)
        while True:
            try:
                return self.residents.get(plan, row)
            except NotFoundError:
                # Another worker may have made two versions meanwhile, with which the one before them went.
                version, row = row.version, self.catalogue.gradient_sessions.auxiliary(plan.auxiliary_id)
                if row.version == version:
                    raise

    def mode(self, plans: Mapping[str, SessionPlan]) -> tuple[PerCustomer, dict[str, int]]:
        """Through what the rows of some sessions go.

        Args:
            plans: by the names that the rows have.

        Returns:
            The mode, and the version of each auxiliary in it, by its id. None of them is in it at two versions.
        """
        taken: dict[str, Resident] = {}
        groups: dict[str, list[SessionPlan]] = {}

        def auxiliary(plan: SessionPlan) -> Auxiliary:
            if plan.auxiliary_id not in taken:
                taken[plan.auxiliary_id] = self.resident(plan)
            return taken[plan.auxiliary_id].auxiliary

        def through(plan: SessionPlan) -> list[tuple[float, Auxiliary]]:
            if plan.mode != "collaboration" or plan.group is None:
                return [(1.0, auxiliary(plan))]
            key = f"{plan.tenant_id} {plan.group}"
            if key not in groups:
                open_ones = self.catalogue.gradient_sessions.group(plan.tenant_id, plan.group)
                groups[key] = [read_plan(one) for one in open_ones]
            # One that was closed a moment ago is finished on its own terms.
            members = {one.auxiliary_id: auxiliary(one) for one in (*groups[key], plan)}
            return [(1 / len(members), member) for member in members.values()]

        own = {name: auxiliary(plan) for name, plan in plans.items()}
        sums = {name: through(plan) for name, plan in plans.items()}
        return PerCustomer(own, sums), {key: resident.version for key, resident in taken.items()}

    def require_sites(self, plan: SessionPlan) -> None:
        """Refuse a session of another model, and sites that no gradient comes to.

        Raises:
            ApiError: names the first of them.
        """
        if plan.model != self.model_name:
            raise ApiError(
                f"This session is of model {plan.model[:80]}, which is not served any more; open another one.",
                410,
                "model_gone",
            )
        for name, site in plan.sites.items():
            if self.base.sites.get(name) != site or name not in self.reached:
                raise ApiError(
                    f"No gradient comes to site {name[:200]} of this model; open a session without it.",
                    code="site_not_reached",
                    param="sites",
                )

    def succeed(
        self, operation: GradientOperation, result: dict[str, Any], version: int, keys: Collection[str] = ()
    ) -> None:
        """End an operation that leaves the auxiliary as it is; no more is done where it is not this worker's any more.

        Args:
            version: of the auxiliary that it worked with.
            keys: of what it wrote.
        """
        ended = self.catalogue.gradient_operations.succeed(operation, result, expected_version=version)
        self.ended[0] += ended
        if not ended:
            self._tidy(operation, keys)

    def succeed_moved(
        self, operation: GradientOperation, result: dict[str, Any], resident: Resident, key: str | None = None
    ) -> None:
        """End an operation that changed an auxiliary in memory: what is there becomes the next version.

        Args:
            key: where the store has that state already; None writes it.

        Raises:
            ConflictError: another one did so first, or the operation is not this worker's any more. Then, as after any
                other error, nothing has changed but what is in memory, which is let go of.
            NotFiniteError: the auxiliary holds NaN or infinity.
        """
        version = resident.version + 1
        try:
            for name, tensor in resident.auxiliary.tensors.items():
                if not tensor.isfinite().all():
                    raise NotFiniteError(f"the fit made {name} infinite, and is undone; lower the learning rate")
            if key is None:
                key = state_key(operation, version)
                self.residents.write(resident, key)
            if not self.catalogue.gradient_operations.succeed(
                operation, result, version=version, auxiliary_key=key, expected_version=resident.version
            ):
                self._tidy(operation, [key, fitter_key(key)])
                raise ConflictError(operation.id)
        except BaseException:
            self.residents.forget(resident.id)
            raise
        self.ended[0] += 1
        self.residents.moved(resident, version, key)

    def _tidy(self, operation: GradientOperation, keys: Collection[str]) -> None:
        """Remove what was written for a session that was closed, and perhaps cleaned up, meanwhile. Of an open one it
        stays until then: an answer of the database's that was lost may have been that it counts."""
        closed = self.catalogue.gradient_sessions.find(operation.session_id).status == "closed"
        present = self.catalogue.gradient_sessions.auxiliary(operation.auxiliary_id).key
        if closed and present not in keys:
            for key in keys:
                self.store.delete(key)

    def fail(self, operation: GradientOperation, error: Exception) -> None:
        """End an operation with what went wrong, as its client reads it."""
        told = error_of(error)
        if told["type"] == "server_error":
            _log.error("%s %s failed", operation.kind, operation.id, exc_info=error)
        self.ended[1] += self.catalogue.gradient_operations.fail(operation, told)


def error_of(error: Exception) -> dict[str, Any]:
    """What a client is told: `{message, type, param, code}`."""
    if isinstance(error, NotFoundError):
        error = ApiError("The service lost a file of this session; open another one.", 500)
    elif isinstance(error, GradientLearningError):
        code = "not_finite" if isinstance(error, NotFiniteError) else None
        error = ApiError(str(error), 400, code)
    return api_error(error).body["error"]
