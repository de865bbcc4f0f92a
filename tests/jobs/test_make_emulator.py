"""A night is made once: identity, verdict, release, and what is left of it when it is killed at any write."""

from __future__ import annotations

import json
import shutil
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from jobs.emulator import night, reading
from jobs.emulator.config import MakeEmulatorConfig
from jobs.emulator.identity import for_workers, look_up
from jobs.emulator.night import run_night
from jobs.emulator.records import Record, Records
from ot_ray.artifacts import BundleSource, Releases, generate_key, hold_lease, publish_bundle
from ot_ray.errors import ConfigError, EmulatorRejectedError, LeaseHeldError, LeaseLostError
from ot_ray.store import LocalStore
from tests.jobs.nights import Distilling, Mortal, emulator_state, kept_files, night_config, run_mortal
from tests.jobs.scene import PLAN, line

LEASE = {"ttl_s": 300.0, "renew_every_s": 0.05, "tell": lambda _: None}


def never(payload: dict[str, Any], run: str) -> dict[str, Any]:
    raise AssertionError("nothing is to be distilled")


def current(scene: Path) -> str | None:
    return Releases(LocalStore(scene / "bundles"), "tiny").current()


def test_a_night_releases_a_bundle_of_what_was_distilled(scene: Path, tmp_path: Path) -> None:
    answer = run_night(night_config(scene), Distilling())
    assert answer["emulator_gap"] == {"full": 10.0, "dropped": 40.0, "emulated": 20.0}
    assert answer["version"] == current(scene)
    assert answer["version"].startswith("e-") and answer["run"].startswith("r-")
    source = BundleSource(store=str(scene / "bundles"), model="tiny", public_key=str(scene / "keys/public.pem"))
    bundle = source.open(tmp_path / "bundle")
    assert bundle.manifest.bundle_id == answer["bundle_id"]
    state = bundle.load_model().state_dict()
    for name, tensor in emulator_state().items():
        place, _, rest = name.partition(".")
        assert torch.equal(state[f"model.decoder.layers.{int(place) + PLAN.bottom}.{rest}"], tensor)
    assert "| the owner's full model | 10.00 |" in (bundle.folder / "README.md").read_text()


def test_the_owner_keeps_a_record_and_a_report(scene: Path) -> None:
    answer = run_night(night_config(scene, price_per_worker_hour=3.0), Distilling())
    owner = LocalStore(scene / "owner")
    record = json.loads(owner.read(f"records/tiny/{answer['version']}.json"))
    assert (record["depth"], record["kept"], record["bundle_id"]) == (6, [0, 3], answer["bundle_id"])
    assert record["outcome"] == "accepted"
    report = f"runs/{answer['run']}/report-{answer['version']}"
    page = owner.read(f"{report}.html").decode()
    assert answer["version"] in page and "Passed the gate" in page and "3 a worker hour" in page
    assert owner.read(f"{report}.png").startswith(b"\x89PNG")


def test_the_same_inputs_do_nothing_the_second_time(scene: Path) -> None:
    first = run_night(night_config(scene), Distilling())
    before = kept_files(scene)
    again = run_night(night_config(scene), never)
    assert again == {name: first[name] for name in again if name != "already"} | {"already": True}
    assert kept_files(scene) == before


ELSEWHERE = {
    "how it is computed": {"training": {"steps": 3, "batch_size": 2, "lr": 1e-3, "zero_stage": 2, "compile": True}},
    "who computes it": {"workers": {"count": [1, 2]}},
    "how it is shown": {"log": "json", "price_per_worker_hour": 1.0},
}  # fmt: skip


@pytest.mark.parametrize("name", ELSEWHERE)
def test_what_decides_nothing_changes_no_version(name: str, scene: Path) -> None:
    run_night(night_config(scene), Distilling())
    assert run_night(night_config(scene, **ELSEWHERE[name]), never)["already"] is True


def test_workers_read_the_commit_that_was_found(scene: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub's branch may point elsewhere by the time a worker starts."""
    place, commit = tmp_path / "hub" / "models--owner--tiny", "0123456789abcdef0123456789abcdef01234567"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(commit)
    shutil.copytree(scene / "full", place / "snapshots" / commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    inner = Distilling()

    def moving(payload: dict[str, Any], run: str) -> dict[str, Any]:
        assert payload["distill"]["model"]["revision"] == commit
        # Who asks for the branch from here on, to assemble the bundle say, finds nothing.
        (place / "refs" / "main").write_text("f" * 40)
        return inner(payload, run)

    run_night(night_config(scene, model={"name": "tiny", "source": "owner/tiny"}), moving)


def test_workers_read_the_held_out_text_at_the_commit_that_was_found(
    scene: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # No hub can be reached from here; which commit is asked for is what counts.
    monkeypatch.setattr(reading, "resolved_revision", lambda data: {"hub:o/a": "1", "hub:o/b": "2"}[data.source])
    monkeypatch.setattr(reading, "read_documents", lambda data, files: iter(()))
    monkeypatch.setattr(reading, "source_digest", lambda data, files: f"digest of {data.revision}")
    config = night_config(scene, data={"source": "hub:o/a", "workers": 0}, validation={"source": "hub:o/b", "limit": 8})
    inputs = look_up(config)
    handed = for_workers(config, inputs)["distill"]
    assert (handed["data"]["revision"], handed["validation"]["revision"]) == ("1", "2")
    assert handed["validation"]["limit"] == 8
    assert (inputs.reading.digest, inputs.reading.held_out) == ("digest of 1", "digest of 2-16")


def test_the_data_may_lie_elsewhere(scene: Path) -> None:
    run_night(night_config(scene), Distilling())
    (scene / "train.jsonl").rename(scene / "moved.jsonl")
    moved = night_config(scene, data={"source": str(scene / "moved.jsonl")}, validation=None)
    assert run_night(moved, never)["already"] is True


OTHERS = {
    "another rate": {"training": {"steps": 3, "batch_size": 2, "lr": 2e-3}},
    "another split": {"split": {"bottom": 2, "keep": 2, "top": 1}},
    "another length": {"sequence_length": 8},
    "another loss": {"loss": {"kd_weight": 5.0}},
    "another type of weights": {"model": {"name": "tiny", "source": "{place}/full", "dtype": "bfloat16"}},
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_inputs_make_another_version(name: str, scene: Path) -> None:
    changes = json.loads(json.dumps(OTHERS[name]).replace("{place}", str(scene)))
    with pytest.raises(Asked) as first:
        run_night(night_config(scene), ask)
    with pytest.raises(Asked) as second:
        run_night(night_config(scene, **changes), ask)
    assert first.value.args != second.value.args


def test_another_text_makes_another_version(scene: Path) -> None:
    with pytest.raises(Asked) as first:
        run_night(night_config(scene), ask)
    line(1, '{"text": "w2 w3 w4 w5 w6"}')(scene)
    with pytest.raises(Asked) as second:
        run_night(night_config(scene), ask)
    assert first.value.args != second.value.args


class Asked(Exception):  # noqa: N818 - not an error
    """What was asked to be distilled."""


def ask(payload: dict[str, Any], run: str) -> dict[str, Any]:
    raise Asked(run)


def test_another_offer_of_the_same_weights_is_not_distilled_again(scene: Path) -> None:
    first = run_night(night_config(scene), Distilling())
    second = run_night(night_config(scene, recommended={"learning_rate": 1e-4}), never)
    assert second["run"] == first["run"]
    assert second["version"] != first["version"]
    assert second["version"] == current(scene)
    for version in (first["version"], second["version"]):
        page = LocalStore(scene / "owner").read(f"runs/{first['run']}/report-{version}.html").decode()
        assert version in page


def test_another_held_out_text_is_measured_anew(scene: Path) -> None:
    distil = Distilling()
    run_night(night_config(scene), distil)
    other = night_config(scene, version="2", validation={"source": str(scene / "train.jsonl"), "limit": 9})
    run_night(other, distil)
    assert len(distil.runs) == 2 and len(set(distil.runs)) == 1


def test_a_named_version_is_made_of_one_set_of_inputs(scene: Path) -> None:
    run_night(night_config(scene, version="1"), Distilling())
    before = kept_files(scene)
    other = night_config(scene, version="1", sequence_length=8, recommended={"steps": 5})
    with pytest.raises(
        ConfigError, match=r"version 1 of tiny was made from other inputs: bundle\.recommended.*run\.sequence_length"
    ):
        run_night(other, never)
    assert kept_files(scene) == before


def test_a_version_of_unknown_making_is_refused(scene: Path) -> None:
    run_night(night_config(scene, version="1"), Distilling())
    with pytest.raises(ConfigError, match=r"version 1 of tiny is published.*does not know what it was made from"):
        run_night(night_config(scene, version="1", store=str(scene / "other-owner")), never)


def test_an_emulator_too_good_is_kept_and_not_published(scene: Path) -> None:
    first = run_night(night_config(scene, version="1"), Distilling())
    other = night_config(scene, version="2", sequence_length=8, gate={"min_gap": 0.5})
    with pytest.raises(EmulatorRejectedError, match=r"perplexity is 11.*at least 15.*gate.min_gap.*1 stays current"):
        run_night(other, Distilling(emulated=11.0))
    assert current(scene) == first["version"] == "1"
    owner = LocalStore(scene / "owner")
    assert json.loads(owner.read("candidates/tiny/2/manifest.json"))["version"] == "2"
    assert json.loads(owner.read("candidates/tiny/2.verdict.json"))["passed"] is False
    assert not list(LocalStore(scene / "bundles").list("bundles/tiny/2"))
    assert (
        "Rejected" in owner.read(next(key for key in _pages(owner) if "Rejected" in owner.read(key).decode())).decode()
    )


def _pages(owner: LocalStore) -> list[str]:
    return [key for key in owner.list("runs") if key.endswith(".html")]


def test_a_rejected_one_is_not_run_again_unless_asked(scene: Path) -> None:
    config = night_config(scene, gate={"min_gap": 0.5})
    with pytest.raises(EmulatorRejectedError, match="nothing is released yet"):
        run_night(config, Distilling(emulated=11.0))
    before = kept_files(scene)
    with pytest.raises(EmulatorRejectedError, match=r"nothing was run.*retry=true"):
        run_night(config, never)
    with pytest.raises(EmulatorRejectedError, match="nothing is released yet"):
        run_night(night_config(scene, gate={"min_gap": 0.5}, retry=True), never)
    assert kept_files(scene) == before
    answer = run_night(night_config(scene, gate={"min_gap": 0.05}, retry=True), never)
    assert answer["version"] == current(scene)


def test_an_emulator_worse_than_the_release_is_kept(scene: Path) -> None:
    run_night(night_config(scene, version="1"), Distilling(emulated=20.0))
    worse = {"version": "2", "gate": {"max_regression": 0.1}, "training": {"steps": 2, "batch_size": 2}}
    with pytest.raises(EmulatorRejectedError, match=r"release 1 20: it may be at most 22 \(gate.max_regression 0.1\)"):
        run_night(night_config(scene, **worse), Distilling(emulated=22.5))
    assert current(scene) == "1"


def test_a_release_that_was_cut_off_is_judged_against_what_is_current_by_now(scene: Path, tmp_path: Path) -> None:
    """A was accepted and its release cut off; B, which is better, was released meanwhile."""
    gate = {"max_regression": 0.1}
    writes = Mortal()
    run_mortal(stores(scene, tmp_path / "whole", version="a", gate=gate).config, Distilling(emulated=20.0), writes)
    kinds_of = [key.split("/")[0] for key in writes.writes]
    for last, published in ((kinds_of.index("bundles"), False), (kinds_of.index("releases"), True)):
        place = stores(scene, tmp_path / str(last), version="a", gate=gate)
        assert run_mortal(place.config, Distilling(emulated=20.0), Mortal(last)) is None
        training = {"steps": 2, "batch_size": 2, "lr": 1e-3}
        better = stores(scene, place.folder, version="b", training=training, gate=gate)
        run_night(better.config, Distilling(emulated=15.0))
        with pytest.raises(EmulatorRejectedError, match=r"release b 15: it may be at most 16\.5.*b stays current"):
            run_night(place.config, never)
        assert current(place.folder) == "b"
        owner, bundles = LocalStore(place.folder / "owner"), LocalStore(place.folder / "bundles")
        assert bundles.exists("bundles/tiny/a/manifest.json") is published
        assert owner.exists("candidates/tiny/a/manifest.json") is not published
        # A gate that takes it releases it.
        taken = stores(scene, place.folder, version="a", gate={"max_regression": 0.5}, retry=True)
        assert run_night(taken.config, never)["version"] == current(place.folder) == "a"


def test_without_text_there_is_no_gate(scene: Path) -> None:
    answer = run_night(night_config(scene, validation=None), Distilling())
    assert answer["emulator_gap"] == {}
    with pytest.raises(ValidationError, match=r"gate.min_gap is 0.1, but validation is not set"):
        night_config(scene, validation=None, gate={"min_gap": 0.1})
    # Not at all worse than the release.
    with pytest.raises(ValidationError, match=r"gate.max_regression is 0.0, but validation is not set"):
        night_config(scene, validation=None, gate={"max_regression": 0})


def test_a_version_that_was_rolled_back_stays_so(scene: Path) -> None:
    run_night(night_config(scene, version="1"), Distilling())
    run_night(night_config(scene, version="2", sequence_length=8), Distilling())
    Releases(LocalStore(scene / "bundles"), "tiny").rollback()
    assert run_night(night_config(scene, version="2", sequence_length=8), never)["already"] is True
    assert current(scene) == "1"


def test_a_new_key_makes_a_new_bundle(scene: Path) -> None:
    first = run_night(night_config(scene), Distilling())
    private, _ = generate_key(scene / "new-keys")
    assert run_night(night_config(scene, private_key=str(private)), never)["version"] != first["version"]


# Killed anywhere.


@dataclass(frozen=True)
class Place:
    """The two stores of a test of its own, and the night in them."""

    folder: Path
    config: MakeEmulatorConfig

    def released(self) -> list[str]:
        return list(LocalStore(self.folder / "bundles").list("releases"))

    def published(self) -> bool:
        return any(key.endswith("/manifest.json") for key in LocalStore(self.folder / "bundles").list())


def stores(scene: Path, folder: Path, **changes: Any) -> Place:
    return Place(folder, night_config(scene, store=str(folder / "owner"), bundles=str(folder / "bundles"), **changes))


def kinds(writes: list[str]) -> list[int]:
    """The first write into each folder, and each that makes a folder visible."""
    folders = [key.rpartition("/")[0] for key in writes]
    return [
        i
        for i, key in enumerate(writes)
        if i == 0 or folders[i] != folders[i - 1] or key.endswith(("manifest.json", ".html"))
    ]


def test_killed_before_any_kind_of_write_the_next_night_finishes_it(scene: Path, tmp_path: Path) -> None:
    whole, alive = stores(scene, tmp_path / "whole"), Mortal()
    run_mortal(whole.config, Distilling(), alive)
    order = [key.split("/")[0] for key in alive.writes if not key.startswith("leases/")]
    assert order.index("records") < order.index("bundles") < order.index("releases")
    assert len(kinds(alive.writes)) >= 8
    for last in kinds(alive.writes):
        place, distil = stores(scene, tmp_path / str(last)), Distilling()
        assert run_mortal(place.config, distil, Mortal(last)) is None
        assert place.published() or not place.released()
        answer = run_mortal(place.config, distil, Mortal())
        assert answer is not None
        assert kept_files(place.folder) == kept_files(whole.folder)
        assert len(place.released()) == 1
        # Only what was distilled and not yet written down is distilled again, from its last checkpoint.
        assert len(distil.runs) == (2 if alive.writes[last].endswith("result.json") else 1)


def test_a_rejected_night_killed_before_any_kind_of_write_publishes_nothing(scene: Path, tmp_path: Path) -> None:
    gate = {"gate": {"min_gap": 5.0}}
    whole, alive = stores(scene, tmp_path / "whole", **gate), Mortal()
    with pytest.raises(EmulatorRejectedError):
        run_mortal(whole.config, Distilling(), alive)
    assert any(key.startswith("candidates/") for key in alive.writes)
    for last in kinds(alive.writes):
        place = stores(scene, tmp_path / str(last), **gate)
        assert run_mortal(place.config, Distilling(), Mortal(last)) is None
        with pytest.raises(EmulatorRejectedError):
            run_mortal(place.config, Distilling(), Mortal())
        assert kept_files(place.folder) == kept_files(whole.folder)
        assert not (place.folder / "bundles").exists()


# Two at once.


def test_a_second_night_leaves_while_one_is_going(scene: Path) -> None:
    store = LocalStore(scene / "owner")
    with hold_lease(store, "tiny", **LEASE), pytest.raises(LeaseHeldError, match="another run of tiny is going"):
        run_night(night_config(scene), never)
    assert kept_files(scene) == set()


def test_one_that_waits_finds_the_work_done(scene: Path) -> None:
    answers: list[dict[str, Any]] = []
    begun, go = threading.Event(), threading.Event()
    inner = Distilling()

    def slowly(payload: dict[str, Any], run: str) -> dict[str, Any]:
        begun.set()
        assert go.wait(120)
        return inner(payload, run)

    first = threading.Thread(target=lambda: answers.append(run_night(night_config(scene), slowly)))
    first.start()
    assert begun.wait(120)
    waiting = night_config(scene, on_busy="wait")
    second = threading.Thread(target=lambda: answers.append(run_night(waiting, never)))
    second.start()
    go.set()
    first.join(120)
    second.join(120)
    assert {answer.get("already") for answer in answers} == {None, True}
    assert inner.runs == [answers[0]["run"]]


def overtake(scene: Path) -> None:
    """Take the lease, as a run on another machine would."""
    store = LocalStore(scene / "owner")
    (holder,) = [key for key in store.list("leases/tiny") if key.endswith("holder.json")]
    store.create("leases/tiny/00000002/holder.json", store.read(holder))


def test_another_night_may_publish_while_this_one_looks(scene: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, get = night_config(scene), Records.get

    def just_before(self: Records, version: str) -> Record | None:
        monkeypatch.setattr(Records, "get", get)
        found = self.get(version)
        run_night(config, Distilling())
        return found

    monkeypatch.setattr(Records, "get", just_before)
    assert run_night(config, never)["already"] is True


def test_an_upload_stops_once_the_lease_is_lost(scene: Path) -> None:
    owner, bundles = LocalStore(scene / "owner"), LocalStore(scene / "bundles")
    with hold_lease(owner, "tiny", **LEASE) as lease:
        overtake(scene)
        deadline = time.monotonic() + 120
        while not lease.lost:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        with pytest.raises(LeaseLostError):
            publish_bundle(bundles, scene / "bundle", night._while_held(lease))
    assert not any(key.endswith("manifest.json") for key in bundles.list())


def test_whoever_lost_the_lease_stops_distilling(scene: Path) -> None:
    def overtaken(payload: dict[str, Any], run: str) -> dict[str, Any]:
        overtake(scene)
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            time.sleep(0.01)
        raise AssertionError("it distilled on")

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(LeaseLostError, match="nothing more is published here"):
            run_night(night_config(scene, lease_ttl_s=1.0), overtaken)
    finally:
        signal.signal(signal.SIGINT, before)
    assert not list(LocalStore(scene / "owner").list("runs"))


def test_whoever_lost_the_lease_publishes_nothing(scene: Path) -> None:
    inner = Distilling()

    def overtaken(payload: dict[str, Any], run: str) -> dict[str, Any]:
        overtake(scene)
        return inner(payload, run)

    with pytest.raises(LeaseLostError, match="nothing more is published here"):
        run_night(night_config(scene), overtaken)
    assert current(scene) is None
    assert not (scene / "bundles").exists()
    assert not list(LocalStore(scene / "owner").list("records"))
