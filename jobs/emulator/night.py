"""One night's work, in an order that may be cut off anywhere: distil, judge, record, publish, release, report.

Every step finds by the store whether it is done, so that the same inputs finish what is missing and then do nothing."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jobs.emulator.assembly import assemble
from jobs.emulator.choosing import Choose, choose_on_worker, layers_of_run
from jobs.emulator.config import MakeEmulatorConfig
from jobs.emulator.identity import Inputs, for_workers, look_up
from jobs.emulator.records import Record, Records, finite
from jobs.emulator.reporting import report_key, write_report
from ot_ray.artifacts import Lease, Releases, hold_lease, list_versions, publish_bundle
from ot_ray.artifacts.manifest import MANIFEST, now
from ot_ray.errors import ConfigError, EmulatorRejectedError, NotFoundError
from ot_ray.evaluation import Measured, Verdict, judge
from ot_ray.store import PatientStore, Store, open_store, upload_folder
from ot_ray.training.identity import differences, identity_digest

Distil = Callable[[dict[str, Any], str], dict[str, Any]]
"""Distils as `distill` does, given what workers are handed and the run's name."""


def run_night(config: MakeEmulatorConfig, distil: Distil, choose: Choose | None = None) -> dict[str, Any]:
    """Make, judge and release the emulator that follows from the inputs, unless that is done.

    Args:
        choose: chooses the layers that stay, where `emulator.layers` looks at text; unset, in this process.

    Returns:
        `published`, `version`, `run`, `bundle_id` and `emulator_gap`; and `already`, or what distilling returned.

    Raises:
        ConfigError: the version is published and was made from other inputs; names what differs.
        EmulatorRejectedError: the emulator failed the gate, now or earlier; the current release stays.
        LeaseHeldError: another run of the model is going (only with `on_busy: leave`).
        LeaseLostError: another run took over; nothing was published.
    """
    store = open_store(config.store)
    night = _Night(config, look_up(config), store)
    done = night.settled()
    if done is not None:
        return done
    patience = config.training.store_patience_s
    with hold_lease(
        store, config.model.name, ttl_s=config.lease_ttl_s, wait=config.on_busy == "wait", patience_s=patience
    ) as lease:
        # Whoever held the lease before may have made just this version.
        return night.settled() or night.make(lease, distil, choose or _choose_here)


class _Night:
    def __init__(self, config: MakeEmulatorConfig, inputs: Inputs, store: Store) -> None:
        patience = config.training.store_patience_s
        self._config, self._inputs = config, inputs
        self._store = PatientStore(store, patience)
        self._bundles = PatientStore(open_store(config.bundles or config.store), patience)
        self._records = Records(self._store, config.model.name)
        self._releases = Releases(self._bundles, config.model.name)

    def settled(self) -> dict[str, Any] | None:
        """What to answer where nothing is left to do; None where something is."""
        # In this order: a version's record is written before the version is published.
        published = self._is_published()
        record = self._records.get(self._inputs.version)
        if record is None:
            if published:
                self._refuse_unknown()
            return None
        self._refuse_other(record)
        if record.outcome == "rejected":
            if self._config.retry:
                return None
            raise EmulatorRejectedError(
                f"{_rejected(record)}; nothing was run. Change the inputs, or set retry=true to judge it again"
            )
        if published and self._releases.released(record.version) and self._store.exists(report_key(record)):
            return {**_answer(record), "already": True}
        return None

    def make(self, lease: Lease, distil: Distil, choose: Choose) -> dict[str, Any]:
        """Do what is missing."""
        record = self._records.get(self._inputs.version)
        if record is None or record.outcome == "rejected":
            kept = layers_of_run(self._config, self._inputs, self._store, lease, choose)
            summary = self._distilled(lease, distil, kept)
            record = self._judged(summary, kept)
        elif not self._releases.released(record.version):
            record = self._judged_again(record)
        if record.outcome == "rejected":
            self._keep(lease, record)
        record = self._publish(lease, record)
        return {**_answer(record), **record.summary}

    def _distilled(self, lease: Lease, distil: Distil, kept: tuple[int, ...]) -> dict[str, Any]:
        """What distilling returned, now or before this job was cut off."""
        key = f"runs/{self._inputs.run}/result.json"
        made_from = {"identity": identity_digest(self._inputs.identity["run"]), "text": self._inputs.reading.held_out}
        try:
            before = json.loads(self._store.read(key))
        except NotFoundError:
            before = {}
        if {name: before.get(name) for name in made_from} == made_from:
            return before["summary"]
        with lease.ending_with_it():
            summary = distil(for_workers(self._config, self._inputs, kept), self._inputs.run)
        lease.require()
        self._store.write(key, json.dumps({**made_from, "summary": summary}).encode())
        return summary

    def _judged(self, summary: dict[str, Any], kept: tuple[int, ...]) -> Record:
        config, inputs = self._config, self._inputs
        found = summary["perplexity"]
        verdict = _warned(config, inputs.depth, judge(config.gate, found, inputs.reading.held_out, self._current()))
        return Record(
            model=config.model.name,
            version=inputs.version,
            run=inputs.run,
            outcome="accepted" if verdict.passed else "rejected",
            identity=inputs.identity,
            bundle_id="",
            depth=inputs.depth,
            kept=kept,
            perplexity=finite(found),
            text=inputs.reading.held_out,
            verdict=verdict,
            summary={name: value for name, value in summary.items() if name != "perplexity"},
            config=config.model_dump(mode="json"),
            created=now(),
        )

    def _judged_again(self, record: Record) -> Record:
        """The record of a version that was accepted and not released, held against what is current by now.

        Raises:
            EmulatorRejectedError: it fails and is published, so that it is a candidate no more.
        """
        found = {name: float("nan") if value is None else value for name, value in record.perplexity.items()}
        verdict = judge(self._config.gate, found, record.text, self._current())
        verdict = _warned(self._config, record.depth, verdict)
        record = record.model_copy(update={"verdict": verdict, "outcome": "accepted" if verdict.passed else "rejected"})
        if not verdict.passed and self._is_published():
            raise EmulatorRejectedError(
                f"{_rejected(record)}; it was published before and is not released now, and {self._stays()}"
            )
        return record

    def _current(self) -> Measured | None:
        """The figures of the current release, where this store has them."""
        version = self._releases.current()
        record = self._records.get(version) if version is not None else None
        return record.measured() if record is not None else None

    def _keep(self, lease: Lease, record: Record) -> None:
        """Keep a rejected bundle where no customer looks. Raises EmulatorRejectedError."""
        prefix = f"candidates/{record.model}/{record.version}"
        with tempfile.TemporaryDirectory() as temporary:
            record = self._assembled(Path(temporary) / "bundle", record)
            lease.require()
            if not self._store.exists(f"{prefix}/{MANIFEST}"):
                upload_folder(self._store, Path(temporary) / "bundle", prefix, last=MANIFEST)
        self._store.write(f"{prefix}.verdict.json", record.verdict.model_dump_json(indent=2).encode())
        write_report(self._store, self._config, record)
        # Last: what is recorded is not made again.
        self._records.put(record)
        raise EmulatorRejectedError(
            f"{_rejected(record)}; it is kept under {prefix} in {self._store.url}, and {self._stays()}"
        )

    def _stays(self) -> str:
        current = self._releases.current()
        return f"{current} stays current" if current else "nothing is released yet"

    def _publish(self, lease: Lease, record: Record) -> Record:
        if not self._is_published():
            with tempfile.TemporaryDirectory() as temporary:
                record = self._assembled(Path(temporary) / "bundle", record)
                lease.require()
                # The owner's own record holds what a bundle must not tell. It comes first, because a version that
                # is published is never made again, and its record would be missing for ever.
                self._records.put(record)
                publish_bundle(self._bundles, Path(temporary) / "bundle", _while_held(lease))
        if not self._releases.released(record.version):
            lease.require()
            self._releases.release(record.version)
        write_report(self._store, self._config, record)
        return record

    def _assembled(self, folder: Path, record: Record) -> Record:
        """Write the bundle; the record with its id."""
        manifest = assemble(folder, self._config, self._inputs, self._store, record)
        return record.model_copy(update={"bundle_id": manifest.bundle_id})

    def _is_published(self) -> bool:
        return self._inputs.version in list_versions(self._bundles, self._config.model.name)

    def _refuse_unknown(self) -> None:
        raise ConfigError(
            f"version {self._inputs.version} of {self._config.model.name} is published in {self._bundles.url}, but "
            f"{self._store.url} does not know what it was made from; choose another version, or name the store in "
            "which it was made"
        )

    def _refuse_other(self, record: Record) -> None:
        others = differences(self._inputs.identity, record.identity)
        if others:
            raise ConfigError(
                f"version {record.version} of {record.model} was made from other inputs: {', '.join(others)} "
                f"{'differs' if len(others) == 1 else 'differ'}, and a version never changes; choose another version, "
                "or leave it unset"
            )


def _choose_here(payload: dict[str, Any], run: str) -> dict[str, Any]:
    return choose_on_worker(payload)


def _while_held(lease: Lease) -> Callable[[int], None]:
    """Stops an upload once the lease is known to be lost."""

    def check(moved: int) -> None:
        if lease.lost:
            lease.require()

    return check


def _rejected(record: Record) -> str:
    return f"version {record.version} of {record.model} was rejected: {'; '.join(record.verdict.reasons)}"


def _warned(config: MakeEmulatorConfig, depth: int, verdict: Verdict) -> Verdict:
    """A verdict that says what a bundle tells of the full model where it holds every layer of the middle."""
    warning = _tells_depth(config, depth)
    return verdict.model_copy(update={"notes": (*verdict.notes, warning)}) if warning else verdict


def _tells_depth(config: MakeEmulatorConfig, depth: int) -> str | None:
    if config.split.keep < len(config.split.middle(depth)):
        return None
    return (
        f"warning: split.keep is {config.split.keep}, every layer of the middle, so that the bundle tells how deep the "
        "full model is and holds a smaller copy of each of its layers; keep fewer where that is a secret, and set "
        "gate.min_gap so that the copy cannot replace the model"
    )


def _answer(record: Record) -> dict[str, Any]:
    warnings = [note for note in record.verdict.notes if note.startswith("warning: ")]
    return {
        **({"warnings": warnings} if warnings else {}),
        "published": f"bundles/{record.model}/{record.version}",
        "version": record.version,
        "run": record.run,
        "bundle_id": record.bundle_id,
        "emulator_gap": record.perplexity,
    }
