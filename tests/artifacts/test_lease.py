"""A lease has one holder: others leave or wait, take over from the dead, and the one who lost it knows."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ot_ray.artifacts import Lease, hold_lease
from ot_ray.artifacts import lease as lease_module
from ot_ray.errors import LeaseHeldError, LeaseLostError, StoreUnavailableError
from ot_ray.store import LocalStore, Store, open_store

ROOT = Path(__file__).parents[2]
# Long enough that a holder on a busy machine is never taken for dead.
ALIVE = {"ttl_s": 300.0, "renew_every_s": 0.05}


@pytest.fixture(params=["folder", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "folder":
        return LocalStore(tmp_path / "store")
    return open_store(request.getfixturevalue("s3_url"))


@pytest.fixture
def folder(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "store")


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def dead_holder(store: LocalStore, ttl_s: float = 0.5) -> None:
    """A process that takes the lease and is gone without a word."""
    code = (
        "import os\nfrom ot_ray.artifacts import hold_lease\nfrom ot_ray.store import open_store\n"
        f"lease = hold_lease(open_store({store.url!r}), 'm', ttl_s={ttl_s})\nlease.__enter__()\nos._exit(9)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=200).returncode == 9


def test_a_second_run_leaves_and_says_who_is_going(store: Store) -> None:
    with hold_lease(store, "m", **ALIVE) as lease:
        told: list[str] = []
        with pytest.raises(LeaseHeldError, match=r"another run of m is going \(process \d+ on .* set on_busy=wait"):
            hold_lease(store, "m", tell=told.append).__enter__()
        assert str(lease.holder) in told[0]
        lease.require()


def test_once_it_is_given_back_it_can_be_taken_at_once(store: Store) -> None:
    told: list[str] = []
    for _ in range(3):
        with hold_lease(store, "m", ttl_s=3600, tell=told.append) as lease:
            lease.require()
    assert told == []
    # What earlier holders left is cleared away.
    assert len({key.split("/")[2] for key in store.list("leases/m")}) == 1


def test_leases_of_other_names_do_not_meet(folder: LocalStore) -> None:
    with hold_lease(folder, "m", **ALIVE), hold_lease(folder, "m2", **ALIVE) as other:
        other.require()


def test_a_run_that_waits_starts_when_the_other_ends(folder: LocalStore) -> None:
    told: list[str] = []
    order: list[str] = []

    def second() -> None:
        with hold_lease(folder, "m", wait=True, tell=told.append) as lease:
            lease.require()
            order.append("second")

    with hold_lease(folder, "m", **ALIVE):
        thread = threading.Thread(target=second)
        thread.start()
        until(lambda: bool(told))
        order.append("first")
    thread.join(120)
    assert order == ["first", "second"]
    assert "waiting for it to end" in told[0]


def test_a_dead_holder_is_replaced(folder: LocalStore) -> None:
    dead_holder(folder)
    told: list[str] = []
    with hold_lease(folder, "m", ttl_s=300, tell=told.append) as lease:
        lease.require()
    assert "watching whether it is alive" in told[0]


def test_of_many_that_find_a_dead_holder_one_takes_over(folder: LocalStore) -> None:
    dead_holder(folder)
    holding, most, held = [0], [0], [0]
    lock, done = threading.Lock(), threading.Event()

    def run() -> None:
        try:
            with hold_lease(folder, "m", tell=lambda _: None, **ALIVE) as lease:
                with lock:
                    holding[0] += 1
                    held[0] += 1
                    most[0] = max(most[0], holding[0])
                lease.require()
                done.wait(60)
                with lock:
                    holding[0] -= 1
        except LeaseHeldError:
            with lock:
                left.append(1)
                if len(left) == len(threads) - 1:
                    done.set()

    left: list[int] = []
    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert (most[0], held[0], len(left)) == (1, 1, 3)


def test_whoever_lost_it_is_told(folder: LocalStore) -> None:
    with hold_lease(folder, "m", **ALIVE) as lease:
        # As another machine would after it had seen no heartbeat for long enough.
        other = {**json.loads(lease.holder.model_dump_json()), "holder": "other"}
        folder.create("leases/m/00000002/holder.json", json.dumps(other).encode())
        with pytest.raises(LeaseLostError, match=r"taken over by another run.*raise lease_ttl_s"):
            lease.require()
    assert not folder.exists("leases/m/00000002/end.json")


def test_whoever_lost_it_is_interrupted(folder: LocalStore, sigint: None) -> None:
    def work(lease: Lease) -> None:
        with lease.ending_with_it():
            lease.require()
        with lease.ending_with_it():
            folder.create("leases/m/00000002/holder.json", folder.read("leases/m/00000001/holder.json"))
            until(lambda: False)

    with hold_lease(folder, "m", **ALIVE) as lease:
        with pytest.raises(LeaseLostError, match="taken over by another run"):
            work(lease)
        assert lease.lost


def test_a_loss_ends_a_later_block_too(folder: LocalStore, sigint: None) -> None:
    with hold_lease(folder, "m", **ALIVE) as lease:
        folder.create("leases/m/00000002/holder.json", folder.read("leases/m/00000001/holder.json"))
        until(lambda: lease.lost)
        with pytest.raises(LeaseLostError), lease.ending_with_it():
            until(lambda: False)


def test_other_errors_and_ctrl_c_stay_what_they_are(folder: LocalStore) -> None:
    with hold_lease(folder, "m", **ALIVE) as lease:
        for kind in (ValueError, KeyboardInterrupt):
            with pytest.raises(kind), lease.ending_with_it():
                raise kind


@pytest.fixture
def sigint() -> Iterator[None]:
    """Ctrl-C as a terminal's process takes it, however the tests were started."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Away(LocalStore):
    """A store that does not answer for a while."""

    away = False

    def list(self, prefix: str = ""):  # type: ignore[no-untyped-def]
        if self.away:
            raise StoreUnavailableError("away")
        return super().list(prefix)


def test_a_store_that_is_away_for_a_while_loses_no_lease(tmp_path: Path) -> None:
    store = Away(tmp_path)
    beat = tmp_path / "leases/m/00000001/beat.json"
    with hold_lease(store, "m", **ALIVE) as lease:
        until(beat.exists)
        store.away = True
        time.sleep(0.2)
        store.away = False
        seen = beat.read_bytes()
        until(lambda: beat.read_bytes() != seen)
        lease.require()


def test_the_heartbeat_is_back_soon_after_the_store_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not only after another whole period, by which time others may have taken over."""
    monkeypatch.setattr(lease_module, "_AGAIN_S", 0.01)
    store = Away(tmp_path)
    tries: list[float] = []

    def listing(prefix: str = "") -> Iterator[str]:
        tries.append(time.monotonic())
        return Away.list(store, prefix)

    with hold_lease(store, "m", ttl_s=300.0, renew_every_s=1.0):
        store.away = True
        store.list = listing  # type: ignore[method-assign]
        until(lambda: len(tries) > 10)
        store.away = False
    # Ten whole periods are 10 s.
    assert tries[10] - tries[0] < 10.0


class Clock:
    """Time as a test says it."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


def test_time_without_an_answer_from_the_store_says_nothing_of_the_holder(
    folder: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    with hold_lease(folder, "m", ttl_s=60.0, renew_every_s=3600.0):
        clock = Clock()
        monkeypatch.setattr(lease_module, "time", clock)
        watch = lease_module._Watch(folder, "m", True, lambda _: None)

        def look(after: float) -> bool:
            clock.now += after
            return watch.is_over(1)

        assert not any(look(1.0) for _ in range(50))
        # The look itself took that long, as it does while a store is away.
        assert not look(300.0)
        assert not any(look(1.0) for _ in range(59))
        assert look(1.0)


def test_what_slow_holders_left_behind_is_cleared_away(folder: LocalStore) -> None:
    with hold_lease(folder, "m"):
        pass
    with hold_lease(folder, "m"):
        folder.write("leases/m/00000001/beat.json", b"{}")  # its holder.json is gone
    with hold_lease(folder, "m"):
        assert {key.split("/")[2] for key in folder.list("leases/m")} == {"00000003"}


def test_no_thread_is_left(folder: LocalStore) -> None:
    with hold_lease(folder, "m", **ALIVE):
        assert any(thread.name == "lease-m" for thread in threading.enumerate())
    assert not any(thread.name == "lease-m" for thread in threading.enumerate())
