"""What a run goes on from, what it will not touch, and what happens while a checkpoint is written. Kills are in
test_resume."""

from __future__ import annotations

import itertools
import json
import random
import shutil
import threading
import time
from pathlib import Path
from urllib.parse import quote

import pytest
import torch
from safetensors.torch import load_file

from ot_ray.errors import StoreFullError, StoreUnavailableError, TrainingError
from ot_ray.store import LocalStore, S3Address, open_store
from ot_ray.training import Checkpoints, TorchEngine, train
from ot_ray.training.checkpoint_files import RankRecord, SavedState, write_part
from ot_ray.training.shards import Piece
from tests.fixtures.tcp_proxy import TcpProxy
from tests.training.replicas import plain, run_ranks
from tests.training.samples import Dropped, stream, training

CONFIG = training(steps=8, checkpoint_every=2)
LONG = 120.0
"""Seconds of patience for what takes far less."""
A_WHILE = 3.0
"""Seconds that a test spends whole; a thread that is told to give up does so in far less."""


def checkpoints(store, keep=3, patience=LONG, **changes):
    place = open_store(str(store)) if isinstance(store, (str, Path)) else store
    return Checkpoints(place, "runs/a", {**CONFIG.decisive(), **changes}, keep, patience)


def run(store, config=CONFIG, stop_after=None, module=None, **options):
    """Steps, losses and the like of a run, and the weights it ended with."""

    def report(figures):
        if figures["step"] == stop_after:
            raise InterruptedError

    engine = TorchEngine(module or Dropped(), config, device="cpu")
    kept = checkpoints(store, **options) if store else None
    result = train(engine, stream(config), config, checkpoints=kept, report=report)
    return [figures_of(f) for f in result.history], engine.trainable_state()


def figures_of(figures):
    return tuple(figures[name] for name in ("step", "loss", "lr", "grad_norm"))


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def wait_for(condition):
    deadline = time.monotonic() + LONG
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def finished(store_folder):
    run(store_folder)
    return Path(store_folder) / "runs/a"


@pytest.fixture
def stopped(store_folder):
    """A run that broke off after step 5; checkpoints of steps 2 and 4 are there."""
    with pytest.raises(InterruptedError):
        run(store_folder, stop_after=5)
    return Path(store_folder) / "runs/a"


def folders(place):
    return sorted(path.name for path in place.iterdir() if any(file.is_file() for file in path.rglob("*")))


def attempt_of(step_folder):
    commit = json.loads((step_folder / "commit.json").read_text())
    return step_folder / commit["attempt"]


class Gated(LocalStore):
    """Uploads wait until the gate is open; `entered` counts those that came to it."""

    def __init__(self, root):
        super().__init__(root)
        self.gate, self.entered = threading.Event(), threading.Semaphore(0)

    def upload(self, path, key, progress=None):
        self.entered.release()
        assert self.gate.wait(LONG)
        return super().upload(path, key, progress)


class Full(LocalStore):
    """Takes no file of the ranks named."""

    full = ("rank-1.safetensors",)

    def upload(self, path, key, progress=None):
        if key.endswith(self.full):
            raise StoreFullError(f"{key}: no room; free some")
        return super().upload(path, key, progress)


class Away(LocalStore):
    """Takes no file and never answers; `asked` is set once it was asked."""

    def __init__(self, root):
        super().__init__(root)
        self.asked = threading.Event()

    def upload(self, path, key, progress=None):
        self.asked.set()
        raise StoreUnavailableError("the store is away")


def test_the_latest_are_kept_and_the_end_is_one(finished, store_folder):
    assert checkpoints(store_folder).committed() == [4, 6, 8]
    assert folders(finished) == ["step-00000004", "step-00000006", "step-00000008"]
    files = sorted(path.name for path in (finished / "step-00000008").rglob("*") if path.is_file())
    assert files == ["commit.json", "rank-0.json", "rank-0.safetensors"]
    shutil.rmtree(finished)
    run(store_folder, keep=1)
    assert folders(finished) == ["step-00000008"]


def test_a_run_without_checkpoints_takes_none_at_its_end(store_folder):
    run(store_folder, CONFIG.model_copy(update={"checkpoint_every": 0}))
    assert checkpoints(store_folder).committed() == []


def test_a_resumed_run_has_the_losses_and_weights_of_one_that_was_not(stopped, store_folder):
    whole, weights = run(None)
    assert checkpoints(store_folder).committed() == [2, 4]
    torch.rand(3)
    resumed, resumed_weights = run(store_folder)
    assert resumed == whole[4:]
    assert same(resumed_weights, weights)


def test_a_run_that_is_done_gives_its_weights_again(finished, store_folder):
    again, weights = run(store_folder)
    assert again == []
    assert same(weights, run(None)[1])


@pytest.mark.parametrize(("saving", "resuming"), [(3, 2), (2, 3), (1, 3), (3, 1), (2, 2)])
def test_any_number_of_ranks_goes_on_from_any_other(saving, resuming, store_folder):
    config = training(steps=8, checkpoint_every=2, batch_size=5)

    def whole(engine):
        result = train(engine, stream(config), config)
        return [figures_of(f) for f in result.history], engine.trainable_state()

    def stop(engine):
        def report(figures):
            if figures["step"] == 5:
                raise InterruptedError

        train(engine, stream(config), config, checkpoints=checkpoints(store_folder), report=report)

    def resume(engine):
        result = train(engine, stream(config), config, checkpoints=checkpoints(store_folder))
        return [figures_of(f) for f in result.history], engine.trainable_state()

    assert all(isinstance(answer, InterruptedError) for answer in run_ranks(saving, config, stop))
    # Ranks that broke off between two checkpoints have let the last one be committed.
    assert checkpoints(store_folder).committed() == [2, 4]
    [(history, weights)] = run_ranks(1, config, whole)
    for resumed, resumed_weights in run_ranks(resuming, config, resume):
        assert resumed == history[4:]
        assert same(resumed_weights, weights)
    assert checkpoints(store_folder).committed() == [4, 6, 8]
    commit = json.loads((Path(store_folder) / "runs/a/step-00000008/commit.json").read_text())
    assert commit["world_size"] == resuming


def test_every_saving_ranks_data_position_comes_back_in_order(store_folder):
    def save(engine):
        kept = checkpoints(store_folder)
        kept.save(engine, 1, {"of": engine.rank, "nested": {"ä": [1, None, 0.5]}})
        kept.finish(engine)

    run_ranks(3, CONFIG, save)
    answers = run_ranks(2, CONFIG, lambda engine: checkpoints(store_folder).resume(engine))
    for resumed in answers:
        assert resumed.step == 1 and not resumed.random
        assert resumed.streams == [{"of": rank, "nested": {"ä": [1, None, 0.5]}} for rank in range(3)]


def test_another_number_of_ranks_draws_anew_from_seed_step_and_rank(store_folder):
    def save(engine):
        kept = checkpoints(store_folder)
        kept.save(engine, 4, stream(CONFIG).state())
        kept.finish(engine)

    run_ranks(2, CONFIG, save)
    histories = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        copy = Path(f"{store_folder}-{seed}")
        shutil.copytree(store_folder, copy)
        histories.append(run(copy)[0])
    assert histories[0] == histories[1]
    other = CONFIG.model_copy(update={"seed": CONFIG.seed + 1})
    assert run(store_folder, other)[0] != histories[0]


@pytest.mark.parametrize("kind", ["folder", "s3"])
def test_any_range_of_any_cut_is_read_exactly(kind, request, tmp_path):
    store = open_store(str(tmp_path / "store") if kind == "folder" else request.getfixturevalue("s3_url"))
    chance = random.Random(5)
    whole = {
        (kind, name): torch.randn(size, generator=torch.Generator().manual_seed(size))
        for kind in ("weight", "exp_avg", "exp_avg_sq")
        for name, size in {"a.weight": 1000, "b": 1, "c": 37}.items()
    }
    whole["weight", "c"][:4] = torch.tensor([float("inf"), -0.0, 1e-45, 3.4e38])
    parts = [[], [], [], []]  # the last rank keeps nothing
    for (kind, name), tensor in whole.items():
        cuts = sorted(chance.randint(0, tensor.numel()) for _ in range(2))
        ends = [0, *cuts, tensor.numel()]
        for rank, (first, last) in enumerate(itertools.pairwise(ends)):
            if first < last:
                parts[rank].append(Piece(kind, name, first, tensor[first:last].clone()))
    for rank, part in enumerate(parts):
        write_part(store, "p", rank, part, {}, {})
    records = [RankRecord.model_validate_json(store.read(f"p/rank-{rank}.json")) for rank in range(4)]
    saved = SavedState(store, "p", records)
    saved.check_names({"a.weight": 1000, "b": 1, "c": 37})
    saved.check_files()
    for (kind, name), tensor in whole.items():
        for first, last in [(0, tensor.numel()), *(sorted(chance.choices(range(tensor.numel()), k=2)) for _ in "1234")]:
            read = saved.read(kind, name, first, last)
            assert read.dtype == torch.float32 and torch.equal(read, tensor[first:last])
    # The files are what the format's own reader reads.
    for rank, part in enumerate(parts[:3]):
        store.download(f"p/rank-{rank}.safetensors", tmp_path / "copy")
        tensors = load_file(tmp_path / "copy")
        assert len(tensors) == len(part)
        for piece in part:
            assert torch.equal(tensors[f"{piece.kind}/{piece.name}/{piece.start}"], piece.tensor)


def test_a_rank_reads_only_the_bytes_it_asks_for(store_folder, monkeypatch):
    store, asked = LocalStore(store_folder), []
    values = torch.arange(1000.0)
    write_part(store, "p", 0, [Piece("weight", "w", 0, values[:600])], {}, {})
    write_part(store, "p", 1, [Piece("weight", "w", 600, values[600:])], {}, {})
    records = [RankRecord.model_validate_json(store.read(f"p/rank-{rank}.json")) for rank in range(2)]

    class Recorded(LocalStore):
        def read_range(self, key, start, end):
            asked.append((key, end - start))
            return super().read_range(key, start, end)

        read = download = None

    saved = SavedState(Recorded(store_folder), "p", records)
    monkeypatch.setattr("ot_ray.training.checkpoint_files._CHUNK", 50)
    assert torch.equal(saved.read("weight", "w", 480, 620), values[480:620])
    first, second = "p/rank-0.safetensors", "p/rank-1.safetensors"
    assert asked == [(first, 200), (first, 200), (first, 80), (second, 80)]


def test_training_goes_on_while_a_checkpoint_is_written(store_folder):
    store, config = Gated(store_folder), CONFIG
    engine, kept, batches = TorchEngine(plain(), config, device="cpu"), checkpoints(store), stream(config)
    engine.step(batches.next_batch(), 1e-3)
    before = engine.trainable_state()
    kept.save(engine, 1, batches.state())
    assert store.entered.acquire(timeout=LONG)
    assert kept.committed() == []
    engine.step(batches.next_batch(), 1e-3)
    assert not same(engine.trainable_state(), before)
    store.gate.set()
    kept.wait()
    assert kept.committed() == [1]
    other = TorchEngine(plain(), config, device="cpu")
    resumed = checkpoints(store_folder).resume(other)
    assert resumed.step == 1 and resumed.streams == [{"position": config.batch_size}]
    assert same(other.trainable_state(), before)


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="files without a name need /proc")
def test_a_process_killed_while_it_writes_leaves_nothing_in_the_temporary_folder(store_folder, tmp_path, monkeypatch):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    store = Gated(store_folder)
    kept = checkpoints(store)
    kept.save(TorchEngine(plain(), CONFIG, device="cpu"), 1, {})
    assert store.entered.acquire(timeout=LONG)
    assert list(scratch.iterdir()) == []
    store.gate.set()
    kept.close()
    assert kept.committed() == [1]


def test_where_files_need_a_name_they_have_one_and_lose_it(store_folder, tmp_path, monkeypatch):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    monkeypatch.setattr("ot_ray.training.checkpoint_files._OPEN_FILES", tmp_path / "none")
    whole, weights = run(store_folder)
    assert whole == run(None)[0] and list(scratch.iterdir()) == []
    assert same(run(store_folder)[1], weights)


def test_a_checkpoint_waits_for_the_one_before(store_folder):
    store = Gated(store_folder)
    engine, kept = TorchEngine(plain(), CONFIG, device="cpu"), checkpoints(store)
    kept.save(engine, 2, {})
    second = threading.Thread(target=kept.save, args=(engine, 4, {}), daemon=True)
    second.start()
    second.join(0.3)
    assert second.is_alive()
    assert not list(Path(store_folder).glob("runs/a/step-00000004/**/*"))
    store.gate.set()
    second.join(LONG)
    kept.close()
    assert kept.committed() == [2, 4]


def test_without_its_commit_a_checkpoint_is_ignored(finished, store_folder):
    (finished / "step-00000008/commit.json").unlink()
    assert checkpoints(store_folder).committed() == [4, 6]
    assert run(store_folder)[0] == run(None)[0][6:]
    assert checkpoints(store_folder).committed() == [4, 6, 8]


def test_attempts_that_came_to_nothing_are_removed(stopped, store_folder):
    for step in (3, 6, 8, 9):
        half = stopped / f"step-{step:08d}" / ("0" * 32)
        half.mkdir(parents=True)
        (half / "rank-0.safetensors").write_bytes(b"half of it")
    assert run(store_folder)[0] == run(None)[0][4:]
    # What lies beyond the newest checkpoint may be somebody's who still writes.
    assert folders(stopped) == ["step-00000004", "step-00000006", "step-00000008", "step-00000009"]
    for step in (4, 6, 8):
        place = stopped / f"step-{step:08d}"
        assert {path.name for path in place.iterdir()} == {"commit.json", attempt_of(place).name}


def test_workers_thought_dead_who_committed_first_keep_their_files(stopped, store_folder):
    """Both computed the same numbers, so one of the two checkpoints is as good as the other."""
    late = TorchEngine(Dropped(), CONFIG, device="cpu")
    kept = checkpoints(store_folder)
    assert kept.resume(late).step == 4
    place = stopped / "step-00000004"
    winner = attempt_of(place)
    kept.save(late, 4, {"position": 16})
    kept.close()
    assert attempt_of(place) == winner and [path.name for path in place.iterdir() if path.is_dir()] == [winner.name]
    assert run(store_folder)[0] == run(None)[0][4:]


def test_a_checkpoint_of_another_run_is_refused(finished, store_folder):
    nested = {"model": {"version": "1", "dtype": "auto"}}
    shutil.rmtree(finished)
    run(store_folder, **nested)
    with pytest.raises(TrainingError) as caught:
        run(store_folder, lr=0.5, data_digest="other", model={"version": "2", "dtype": "auto"})
    message = str(caught.value)
    assert "runs/a/step-00000008 belongs to another run: data_digest, lr, model.version changed; give the" in message
    assert checkpoints(store_folder).committed() == [4, 6, 8]


def _without_tensors(attempt):
    (attempt / "rank-0.safetensors").unlink()


def _short(attempt):
    data = (attempt / "rank-0.safetensors").read_bytes()
    (attempt / "rank-0.safetensors").write_bytes(data[:-4])


def _changed(attempt):
    data = bytearray((attempt / "rank-0.safetensors").read_bytes())
    data[-1] ^= 1
    (attempt / "rank-0.safetensors").write_bytes(data)


def _without_table(attempt):
    (attempt / "rank-0.json").unlink()


def _table_is_none(attempt):
    (attempt / "rank-0.json").write_text("[1, 2]")


def _table_of_others(attempt):
    (attempt / "rank-0.json").write_text('{"pieces": [], "stream": {}, "random": {}, "module": "os"}')


def _commit_is_none(attempt):
    (attempt.parent / "commit.json").write_bytes(b"\xff{")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_without_tensors, r"rank-0\.safetensors: it is missing"),
        (_short, r"rank-0\.safetensors: it has \d+ bytes, \d+ were written"),
        (_changed, r"rank-0\.safetensors: the bytes of exp_avg_sq of net\.3\.bias are not those"),
        (_without_table, r"rank-0\.json: .*check the name"),
        (_table_is_none, r"rank-0\.json: "),
        (_table_of_others, r"rank-0\.json: .*unknown key module"),
        (_commit_is_none, r"commit\.json: "),
    ],
)
def test_a_damaged_checkpoint_is_named_with_the_way_out(damage, message, finished, store_folder):
    damage(attempt_of(finished / "step-00000008"))
    way_out = r"; restore it, or delete runs/a/step-00000008/commit\.json to resume from the checkpoint before"
    with pytest.raises(TrainingError, match=rf"(?s)checkpoint file runs/a/step-00000008/.*{message}.*{way_out}"):
        run(store_folder)
    (finished / "step-00000008/commit.json").unlink()
    assert run(store_folder)[0] == run(None)[0][6:]


def test_one_damaged_file_stops_every_rank(store_folder):
    def save(engine):
        kept = checkpoints(store_folder)
        kept.save(engine, 2, {})
        kept.finish(engine)

    run_ranks(2, CONFIG, save)
    attempt = attempt_of(Path(store_folder) / "runs/a/step-00000002")
    (attempt / "rank-1.safetensors").unlink()
    for error in run_ranks(2, CONFIG, lambda engine: checkpoints(store_folder).resume(engine)):
        assert isinstance(error, TrainingError) and "rank-1.safetensors: it is missing" in str(error)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda net: net.register_parameter("extra", torch.nn.Parameter(torch.zeros(2))), "extra is only in the model"),
        (lambda net: net.net[3].bias.requires_grad_(False), r"net\.3\.bias is only in the checkpoint"),
        (lambda net: setattr(net.net[3], "bias", torch.nn.Parameter(torch.zeros(5))), r"weight of net\.3\.bias has 96"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(change, message, finished, store_folder):
    module = Dropped()
    change(module)
    before = {name: tensor.detach().clone() for name, tensor in module.named_parameters()}
    with pytest.raises(TrainingError, match=rf"not the model's: {message}.*; resume with the configuration"):
        run(store_folder, module=module)
    assert same(dict(module.named_parameters()), before)


def test_a_hole_between_the_ranks_files_is_refused(store_folder):
    store = LocalStore(store_folder)
    write_part(
        store, "p", 0, [Piece("weight", "w", 0, torch.zeros(3)), Piece("weight", "w", 4, torch.zeros(2))], {}, {}
    )
    record = RankRecord.model_validate_json(store.read("p/rank-0.json"))
    with pytest.raises(TrainingError, match="weight of w has a hole or an overlap at element 3"):
        SavedState(store, "p", [record]).check_names({"w": 6})


def test_runs_do_not_see_each_other(finished, store_folder):
    assert Checkpoints(open_store(store_folder), "runs", {}).committed() == []
    assert Checkpoints(open_store(store_folder), "runs/ab", {}).committed() == []


def test_nothing_is_committed_when_a_ranks_part_failed(store_folder):
    def work(engine):
        kept = checkpoints(Full(store_folder), patience=1.0)
        kept.save(engine, 2, {})
        kept.save(engine, 4, {})

    errors = run_ranks(2, CONFIG, work)
    assert isinstance(errors[1], StoreFullError)
    assert isinstance(errors[0], TrainingError) and "rank-1.json did not come within" in str(errors[0])
    assert checkpoints(store_folder).committed() == []
    assert not list(Path(store_folder).glob("runs/a/step-00000004/**/*"))


def test_what_went_wrong_in_the_background_is_raised_once_at_the_next_call(store_folder):
    class NoneFits(Full):
        full = ("rank-0.safetensors",)

    for call in (
        lambda kept, engine: kept.save(engine, 4, {}),
        lambda kept, engine: kept.wait(),
        lambda kept, engine: kept.finish(engine),
        lambda kept, engine: kept.close(),
    ):
        engine, kept = TorchEngine(plain(), CONFIG, device="cpu"), checkpoints(NoneFits(store_folder))
        kept.save(engine, 2, {})
        with pytest.raises(StoreFullError, match="free some"):
            call(kept, engine)
        kept.close()
        assert kept.committed() == []


def test_a_fault_of_ours_in_the_background_is_typed(store_folder):
    class Broken(LocalStore):
        def upload(self, path, key, progress=None):
            raise KeyError("x")

    engine, kept = TorchEngine(plain(), CONFIG, device="cpu"), checkpoints(Broken(store_folder))
    kept.save(engine, 2, {})
    with pytest.raises(TrainingError, match=r"step 2 could not be written: KeyError\('x'\)"):
        kept.close()


def test_closing_does_not_wait_for_a_store_that_stays_away(store_folder):
    store = Away(store_folder)
    engine, kept = TorchEngine(plain(), CONFIG, device="cpu"), checkpoints(store, patience=3600)
    kept.save(engine, 2, {})
    assert store.asked.wait(LONG)
    with pytest.raises(StoreUnavailableError, match=r"away; gave up after \d+ s"):
        kept.close(A_WHILE)


def test_closing_does_not_wait_for_ranks_that_never_come(store_folder):
    def work(engine):
        kept = checkpoints(store_folder, patience=3600)
        if engine.rank == 1:
            kept._store.abandon()
            kept._start = lambda write, step: None  # as if killed before its first write
        kept.save(engine, 2, {})
        if engine.rank == 0:
            wait_for(lambda: any(Path(store_folder).rglob("rank-0.json")))
        kept.close(A_WHILE)

    error, _ = run_ranks(2, CONFIG, work)
    assert isinstance(error, TrainingError) and "is not committed: rank-1.json did not come" in str(error)


def test_closing_does_not_wait_for_an_upload_that_hangs(store_folder):
    store = Gated(store_folder)
    engine, kept = TorchEngine(plain(), CONFIG, device="cpu"), checkpoints(store)
    kept.save(engine, 2, {})
    thread = kept._writing
    with pytest.raises(TrainingError, match="checkpoint-2 is still being written and was given up"):
        kept.close(0.1)
    kept.close()  # it was given up once and for all
    store.gate.set()
    thread.join(LONG)
    assert not thread.is_alive()


class Wide(torch.nn.Module):
    """Enough weights that a checkpoint takes several parts of an upload."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.table = torch.nn.Embedding(96, 12_000)
        self.head = torch.nn.Linear(12_000, 96)

    def forward(self, input_ids, labels, **rest):
        logits = self.head(self.table(input_ids))
        return {"loss": torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())}


def test_a_store_that_is_cut_off_in_the_middle_of_an_upload(s3_url, capfd):
    """The network to a real S3 server goes for three seconds; the run goes on, and ends as if nothing had been."""
    address = S3Address.parse(s3_url)
    proxy = TcpProxy(int(str(address.endpoint_url).rpartition(":")[2]))
    proxy.cut_after = 8_000_000  # after one part of five MiB, of six
    endpoint = quote(f"http://127.0.0.1:{proxy.port}", safe="")
    behind = open_store(f"{address.place}?endpoint_url={endpoint}&attempts=1&part_size=5242880")
    config = training(steps=4, checkpoint_every=2, schedule="constant")
    restoring = threading.Timer(3.0, proxy.restore)

    def report(figures):
        if figures["step"] == 2:
            assert proxy.is_cut.wait(LONG)
            restoring.start()
            assert checkpoints(s3_url).committed() == []

    try:
        whole, weights = run(None, config, module=Wide())
        engine = TorchEngine(Wide(), config, device="cpu")
        result = train(engine, stream(config), config, checkpoints=checkpoints(behind), report=report)
    finally:
        restoring.cancel()
        proxy.close()
    said = capfd.readouterr().err
    assert "waiting for it" in said and "answers again after" in said
    assert [figures_of(f) for f in result.history] == whole
    assert checkpoints(s3_url).committed() == [2, 4]
    again, resumed_weights = run(open_store(s3_url), config, module=Wide())
    assert again == [] and same(resumed_weights, weights)
