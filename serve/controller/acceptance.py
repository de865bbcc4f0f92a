"""From an adapter in the store to a plug-in in the registry, or to every reason why not; and offsite uploads' states.

`accept` is plain, and picklable in and out, so that it runs wherever there is a core to spare. Adapters of hosted jobs
take the same way; their states are in finishing.py. Generating for the canary run is the engine's."""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

from ot_ray.artifacts import (
    InspectionLimits,
    Registry,
    inspect_adapter,
    plain_state,
    published_adapter,
    published_manifest,
    require_sane_changes,
)
from ot_ray.artifacts.changes import rejected
from ot_ray.artifacts.offsite import ADAPTER_NAMES
from ot_ray.errors import AdapterRejectedError, OTRayError, StoreError
from ot_ray.store import Store, open_store
from serve.catalogue import Catalogue
from serve.catalogue.records import Adapter
from serve.controller.patience import Patience, is_known, kind_of
from serve.engine.canary import CanaryReport
from serve.routes.pieces import adapter_prefix, upload_prefix
from serve.wire.offsite import OffsiteConfig

_log = logging.getLogger(__name__)
_ROOT = upload_prefix("").rstrip("/")
_AT_ONCE = 4
_LOOK_S = 1.0
_BROKEN = "the adapter could not be inspected; write it anew with ot_ray or PEFT and send it again, or ask the operator"


@dataclass(frozen=True)
class AcceptanceWork:
    """One adapter to inspect, and whose it becomes."""

    store: str
    """URL of the service's store: bundles, adapters and the registry are in it."""
    prefix: str
    """Where the adapter's files lie."""
    model: str
    version: str
    bundle_id: str
    """The bundle that was tuned."""
    tenant: str
    """The tenant's name, part of the model's id."""
    suffix: str
    limits: InspectionLimits = field(default_factory=InspectionLimits)


@dataclass(frozen=True)
class Outcome:
    """A plug-in in the registry, not promoted yet, or why there is none."""

    model_id: str | None
    reasons: list[str] = field(default_factory=list)
    report: dict[str, float] = field(default_factory=dict)
    """Figures of the inspection."""

    @property
    def accepted(self) -> bool:
        """Whether there is a plug-in."""
        return self.model_id is not None


def accept(work: AcceptanceWork) -> Outcome:
    """Inspect an adapter against the bundle it was tuned from, and enter it into the registry.

    May be repeated: the plug-in's id follows from its bytes.

    Raises:
        StoreError: the store failed or has lost a file; nothing is known of the adapter.
    """
    store = open_store(work.store)
    bundle = published_manifest(store, work.model, work.version)
    if bundle.bundle_id != work.bundle_id:
        raise StoreError(f"version {work.version} of {work.model} is bundle {bundle.bundle_id}, not {work.bundle_id}")
    try:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary, "adapter")
            _fetch(store, work, folder)
            inspected = inspect_adapter(folder, bundle, work.limits)
        original = published_adapter(store, bundle)
        state = plain_state(inspected, original)
        report = require_sane_changes(bundle, state, original, work.limits.changes)
        record = Registry(store).add(
            work.model,
            work.tenant,
            work.suffix,
            state,
            bundle_id=bundle.bundle_id,
            plan=bundle.plan,
            report=report,
            classes=inspected.manifest.classes,
        )
    except AdapterRejectedError as error:
        return Outcome(None, list(error.reasons))
    return Outcome(record.model_id, report=report)


def judged(canary: Callable[[str], CanaryReport], max_perplexity_ratio: float) -> Callable[[str], CanaryReport]:
    """A canary run with a verdict: it raises AdapterRejectedError for a model that computes values that are not finite,
    or whose perplexity on the canary text is more than `max_perplexity_ratio` times the base model's.

    Args:
        canary: takes a model's id, and runs it against the base model on an engine.
    """

    def judge(model_id: str) -> CanaryReport:
        report = canary(model_id)
        if not report.finite:
            raise rejected(["the plug-in model computes values that are not finite; tune at a lower learning rate"])
        if not report.ratio <= max_perplexity_ratio:
            raise rejected(
                [
                    f"the plug-in model's perplexity on plain text is {report.perplexity:.4g}, {report.ratio:.4g} "
                    f"times the base model's; at most {max_perplexity_ratio:g} is taken: tune at a lower learning rate"
                ]
            )
        return report

    return judge


def _fetch(store: Store, work: AcceptanceWork, folder: Path) -> None:
    """Download the adapter's files, once their names and sizes are known to be those of one."""
    keys = {key.removeprefix(f"{work.prefix}/"): key for key in store.list(work.prefix)}
    foreign = [f"{name[:80]!r} is no file of an adapter; leave it out" for name in keys.keys() - ADAPTER_NAMES]
    size = sum(store.info(key).size for key in keys.values()) if not foreign else 0
    if size > work.limits.max_bytes:
        foreign = [f"the files have {size} bytes together; at most {work.limits.max_bytes} are taken"]
    if not keys:
        foreign = ["there are no files"]
    if foreign:
        raise rejected(sorted(foreign)[:20])
    folder.mkdir()
    for name, key in keys.items():
        store.download(key, folder / name)


class OffsiteReturns:
    """Takes received uploads to a verdict, and sweeps those that nobody finished.

    Any number may work at once: every change is a compare-and-set, and all work may be repeated.

    Args:
        accept: `accept`, wherever it is run.
        canary: runs a plug-in against the base model on an engine, as `judged` has it; raises AdapterRejectedError,
            and its result's fields that are numbers go into the report.
        clock: seconds, by which the pauses between tries are counted.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        store: Store,
        settings: OffsiteConfig,
        *,
        accept: Callable[[AcceptanceWork], Outcome] = accept,
        canary: Callable[[str], object],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._catalogue, self._store, self._settings = catalogue, store, settings
        self._accept, self._canary = accept, canary
        self._patience = Patience(clock)

    def step(self) -> int:
        """Take every upload that waits for a verdict to one, those that come meanwhile too; those that the
        infrastructure fails stay for a later step, after pauses that grow. Returns how many got one."""
        begun: dict[str, Future[bool]] = {}
        with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="offsite") as pool:
            while True:
                for adapter in self._catalogue.adapters.in_state("received", "inspecting"):
                    if adapter.id not in begun and self._patience.ready(adapter.id):
                        begun[adapter.id] = pool.submit(self.judge, adapter)
                if not wait(begun.values(), _LOOK_S).not_done:
                    return sum(future.result() for future in begun.values())

    def judge(self, adapter: Adapter) -> bool:
        """Take one upload to its verdict; False if it stays where it is."""
        if self._catalogue.adapters.move(adapter.id, {"received", "inspecting"}, "inspecting") is None:
            return False
        try:
            outcome = self._outcome(adapter)
        except Exception as error:
            if is_known(error):
                _log.warning("adapter %s has to wait for its inspection: %s", adapter.id, error)
            else:
                _log.error("adapter %s could not be inspected", adapter.id, exc_info=error)
            # Whatever is in the files, it is not tried for ever.
            if not self._patience.failed(adapter.id, kind_of(error)):
                return False
            outcome = Outcome(None, [_BROKEN])
        self._patience.went_well(adapter.id)
        return self._settle(adapter, outcome)

    def sweep(self) -> None:
        """Delete uploads of which nothing came for too long, and bytes of those that have a verdict or are gone."""
        before = self._catalogue.now() - self._settings.abandoned_s
        for adapter in self._catalogue.adapters.abandoned(before):
            self._catalogue.adapters.delete(adapter.id, {"receiving"})
        # The bytes first: what had a row when it was listed, and has none now, is over.
        places = {"/".join(key.split("/")[:2]) for key in self._store.list(_ROOT)}
        going_on = self._catalogue.adapters.in_state("receiving", "received", "inspecting")
        for place in sorted(places - {upload_prefix(adapter.id) for adapter in going_on}):
            self._remove_bytes(place)

    def _outcome(self, adapter: Adapter) -> Outcome:
        outcome = self._accept(self._work(adapter))
        if outcome.model_id is None:
            return outcome
        registry = Registry(self._store)
        try:
            figures = self._canary(outcome.model_id)
        except AdapterRejectedError as error:
            registry.remove(outcome.model_id)
            return Outcome(None, list(error.reasons), outcome.report)
        registry.promote(outcome.model_id)
        return Outcome(outcome.model_id, [], {**outcome.report, **_numbers(figures)})

    def _work(self, adapter: Adapter) -> AcceptanceWork:
        return AcceptanceWork(
            store=self._store.url,
            prefix=adapter_prefix(adapter.id),
            tenant=self._catalogue.tenants.get(adapter.tenant_id).name,
            suffix=adapter.suffix,
            limits=self._settings.limits,
            **{name: adapter.bundle[name] for name in ("model", "version", "bundle_id")},
        )

    def _settle(self, adapter: Adapter, outcome: Outcome) -> bool:
        moved = self._catalogue.adapters.move(
            adapter.id,
            {"inspecting"},
            "accepted" if outcome.accepted else "rejected",
            reasons=outcome.reasons,
            report=outcome.report or None,
            model_id=outcome.model_id,
        )
        self._remove_bytes(upload_prefix(adapter.id))
        return moved is not None

    def _remove_bytes(self, place: str) -> None:
        try:
            self._store.delete_prefix(place)
        except (OTRayError, OSError) as error:
            _log.warning("%s stays until it is swept: %s", place, error)


def _numbers(figures: object) -> dict[str, float]:
    """The fields of a report that are numbers, by name."""
    values = getattr(figures, "__dict__", None) or {}
    return {
        f"canary_{name}": float(value)
        for name, value in values.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }
