"""A tuning run that others watch: epochs, events, adapters, results; one that is stopped goes on and tells all once."""

from __future__ import annotations

import csv
import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from jobs import tune
from jobs.tuning.length import TrainedTokens, epoch_ends, with_steps
from ot_ray.artifacts import open_bundle
from ot_ray.config import parse
from ot_ray.data import BatchStream, DataConfig, PackedSequence, load_sequences
from ot_ray.errors import ConfigError, DataError, StoreUnavailableError, TrainingError
from ot_ray.store import LocalStore
from ot_ray.training.tuning import in_types, types_of
from tests.fixtures.models import tiny_model
from tests.jobs.scene import written

LENGTH = 24


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def settings(scene: Path, place: Path, **changes: Any) -> tune.TuneConfig:
    training = {"lr": 2e-3, "batch_size": 4, "checkpoint_every": 3, **changes.pop("training", {})}
    values: dict[str, Any] = {
        "bundle": {"folder": str(scene / "bundle")},
        "data": {"source": str(scene / "train.jsonl")},
        "validation": {"source": str(scene / "train.jsonl")},
        "sequence_length": LENGTH,
        "training": training,
        "epochs": 3,
        "events": str(place / "events"),
        "output": str(place / "output"),
        "checkpoints": str(place / "checkpoints"),
    }
    return parse(tune.TuneConfig, {**values, **changes}, "the test")


def events(place: Path) -> list[dict[str, Any]]:
    paths = sorted((place / "events").iterdir())
    assert [path.name for path in paths] == [f"{seq:08d}.json" for seq in range(1, len(paths) + 1)]
    return [json.loads(path.read_text()) for path in paths]


def of_type(place: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in events(place) if event["type"] == kind]


def sequences(scene: Path) -> list[PackedSequence]:
    tokenizer = open_bundle(scene / "bundle").load_tokenizer()
    return load_sequences(DataConfig(source=str(scene / "train.jsonl")), tokenizer, LENGTH).sequences


@pytest.fixture(scope="module")
def whole(sound_scene: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run from end to end."""
    place = tmp_path_factory.mktemp("whole")
    tune.run(settings(sound_scene, place))
    return place


def test_every_step_is_told_and_every_epoch_leaves_an_adapter(sound_scene: Path, whole: Path) -> None:
    rows = sequences(sound_scene)
    steps = math.ceil(len(rows) * 3 / 4)
    ends = [math.ceil(len(rows) * epoch / 4) for epoch in (1, 2, 3)]
    metrics = of_type(whole, "metrics")
    assert [event["step"] for event in metrics] == [*range(1, steps + 1)]
    stream, tokens = BatchStream(rows, 4, 0), 0
    for event in metrics:
        tokens += int(stream.next_batch()["real"].sum())
        assert event["tokens"] == tokens
        assert event["total_steps"] == steps
        assert event["epoch"] == pytest.approx(event["step"] * 4 / len(rows), abs=1e-5)
        assert 0 <= event["train_mean_token_accuracy"] <= 1
        assert ("valid_loss" in event) == (event["step"] in ends)
    assert metrics[-1]["train_loss"] < metrics[0]["train_loss"]
    made = of_type(whole, "checkpoint")
    assert [(event["step"], event["folder"]) for event in made] == [(end, f"step-{end}") for end in ends]
    for event in made:
        manifest = json.loads((whole / "output" / event["folder"] / "manifest.json").read_text())
        assert manifest["steps"] == event["step"]
        assert manifest["validation_loss"] == event["metrics"]["valid_loss"]
    assert {path.name for path in (whole / "output").iterdir()} == {
        *(f"step-{end}" for end in ends),
        "adapter",
        "result.csv",
        "result.json",
    }
    last = (whole / "output" / f"step-{steps}/adapter.safetensors").read_bytes()
    assert (whole / "output/adapter/adapter.safetensors").read_bytes() == last


def test_an_epochs_adapter_is_what_a_run_of_that_many_steps_makes(
    sound_scene: Path, whole: Path, tmp_path: Path
) -> None:
    first = of_type(whole, "checkpoint")[0]["step"]
    total = of_type(whole, "metrics")[-1]["total_steps"]
    # A rate that falls would fall faster in the shorter run.
    tune.run(settings(sound_scene, tmp_path, training={"schedule": "constant"}))
    plain = {"training": {"schedule": "constant", "steps": first}, "epochs": None, "events": None}
    tune.run(settings(sound_scene, tmp_path / "plain", **plain))
    ours = load_file(tmp_path / "output" / f"step-{first}/adapter.safetensors")
    theirs = load_file(tmp_path / "plain/output/adapter.safetensors")
    assert total > first
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_results_are_those_of_the_events(whole: Path) -> None:
    metrics = of_type(whole, "metrics")
    with (whole / "output/result.csv").open(newline="") as file:
        table = [*csv.DictReader(file)]
    columns = ["step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy"]
    assert [*table[0]] == columns
    keys = ["step", "train_loss", "train_mean_token_accuracy", "valid_loss", "valid_mean_token_accuracy"]
    for row, event in zip(table, metrics, strict=True):
        wanted = ["" if event.get(key) is None else str(event[key]) for key in keys]
        assert [*row.values()] == wanted
    result = json.loads((whole / "output/result.json").read_text())
    assert result == {
        "adapter": "adapter",
        "steps": metrics[-1]["step"],
        "tokens": metrics[-1]["tokens"],
        "metrics": {key: metrics[-1][key] for key in keys[1:]},
    }


def test_accuracies_and_losses_are_those_of_the_plain_model(sound_scene: Path, whole: Path) -> None:
    """Of the first step, whose weights are the bundle's; by the model's own logits, row by row."""
    rows = sequences(sound_scene)
    model = open_bundle(sound_scene / "bundle").load_model().float().eval()
    batch = BatchStream(rows, 4, 0).next_batch()
    losses, shares = [], []
    for ids, positions, labels in zip(batch["input_ids"], batch["position_ids"], batch["labels"], strict=True):
        learnt = labels[1:] != -100
        logits = _isolated_logits(model, ids, positions)[:-1][learnt]
        losses.append(F.cross_entropy(logits, labels[1:][learnt]))
        shares.append((logits.argmax(-1) == labels[1:][learnt]).float().mean())
    first = of_type(whole, "metrics")[0]
    assert first["train_loss"] == pytest.approx(torch.stack(losses).mean().item(), rel=1e-4)
    assert first["train_mean_token_accuracy"] == pytest.approx(torch.stack(shares).mean().item(), abs=1e-6)


def _isolated_logits(model: Any, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Each document of a row by itself, as if it were alone."""
    starts = [*(positions == 0).nonzero().flatten().tolist(), len(ids)]
    with torch.no_grad():
        parts = [model(ids[None, a:b], use_cache=False).logits[0] for a, b in itertools.pairwise(starts)]
    return torch.cat(parts)


class Killed(BaseException):
    """What no code of ours catches, as a process that is killed runs none."""


@pytest.mark.parametrize("at", [1, 2, 3, 6, 7, 8, 9, 14, 20, 25, 26, 27, 28, 29, 30])
def test_stopped_anywhere_it_goes_on_and_tells_everything_once(
    sound_scene: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """Killed at each of its writes to the store in turn, it comes to the results of a run that was not."""
    writes, inner = 0, {name: getattr(LocalStore, name) for name in ("create", "upload", "write")}

    def counted(name: str) -> Any:
        def write(self: LocalStore, *arguments: Any, **named: Any) -> Any:
            nonlocal writes
            # Training's own checkpoints are written by a thread of their own.
            if "checkpoints" not in str(self.root):
                writes += 1
                if writes == at:
                    raise Killed
            return inner[name](self, *arguments, **named)

        return write

    config = settings(sound_scene, tmp_path)
    with monkeypatch.context() as patch:
        for name in inner:
            patch.setattr(LocalStore, name, counted(name))
        with pytest.raises(Killed):
            tune.run(config)
    assert not (tmp_path / "output/result.json").exists()
    tune.run(config)
    steps = [event["step"] for event in of_type(whole, "metrics")]
    assert [event["step"] for event in of_type(tmp_path, "metrics")] == steps
    assert [event["step"] for event in of_type(tmp_path, "checkpoint")] == [
        event["step"] for event in of_type(whole, "checkpoint")
    ]
    for name in ("result.csv", "result.json", "adapter/adapter.safetensors"):
        assert (tmp_path / "output" / name).read_bytes() == (whole / "output" / name).read_bytes()
    told = len(events(tmp_path))
    tune.run(config)
    assert len(events(tmp_path)) == told


def test_parameters_that_learn_are_shown_in_their_own_types_for_a_while() -> None:
    model = tiny_model("opt").bfloat16()
    frozen = next(model.parameters()).requires_grad_(False)
    types, learning = types_of(model), [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in learning:
        parameter.data = parameter.data.float() + 1e-6
    before = [parameter.data.clone() for parameter in learning]
    with in_types(types):
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert frozen.dtype == torch.bfloat16
    assert all(torch.equal(parameter.data, kept) for parameter, kept in zip(learning, before, strict=True))


def test_what_is_wrong_with_the_data_is_told(scene: Path, tmp_path: Path) -> None:
    written("train.jsonl", '{"text": "w1 w2"}\n{"prompt": 1, "completion": "x"}\n')(scene)
    with pytest.raises(DataError):
        tune.run(settings(scene, tmp_path, validation=None))
    (event,) = events(tmp_path)
    assert event["type"] == "message"
    assert event["level"] == "error"
    assert "prompt is a number; write a string" in event["message"]
    assert not (tmp_path / "output").exists()


def test_what_is_wrong_with_the_machine_is_no_reason_to_give_up(
    scene: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*arguments: Any) -> None:
        raise StoreUnavailableError("the store is away")

    config = settings(scene, tmp_path, training={"store_patience_s": 0})
    monkeypatch.setattr(LocalStore, "upload", away)
    with pytest.raises(StoreUnavailableError):
        tune.run(config)
    assert not [event for event in of_type(tmp_path, "message") if event["level"] == "error"]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (torch.OutOfMemoryError("CUDA out of memory; /secret/place"), "ran out of memory; use a smaller batch"),
        (MemoryError(), "ran out of memory"),
        (KeyError("/secret/place"), "broke off with an unexpected error (KeyError)"),
        (OSError(28, "No space left", "/secret/place"), None),
    ],
)
def test_what_nobody_expected_is_told_without_its_particulars(
    sound_scene: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, said: str | None
) -> None:
    def fail(*arguments: Any, **named: Any) -> None:
        raise error

    monkeypatch.setattr(tune, "tune_adapter", fail)
    with pytest.raises(type(error)):
        tune.run(settings(sound_scene, tmp_path))
    told = [event["message"] for event in of_type(tmp_path, "message") if event["level"] == "error"]
    assert len(told) == (said is not None)
    assert all(said is not None and said in message and "secret" not in message for message in told)


def test_a_run_ends_at_its_time_limit_and_says_so(sound_scene: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"time limit of 1e-06 s is over after step 1 of \d+"):
        tune.run(settings(sound_scene, tmp_path, time_limit_s=1e-6))
    assert "time limit" in events(tmp_path)[-1]["message"]
    # What has come so far stays for whoever has more time.
    tune.run(settings(sound_scene, tmp_path))
    assert (tmp_path / "output/result.json").exists()


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"training": {"steps": 5}}, "training.steps is 5 and epochs is 3"),
        ({"epochs": None}, "training.steps is 0 and epochs is None"),
        ({"training": {"warmup_steps": 3, "warmup_share": 0.1}}, "both set"),
        ({"search": {"rates": [1e-3, 1e-4]}, "checkpoints": None}, "search is set beside epochs"),
        ({"data": None, "validation": None, "images": {"source": "x"}}, "progress is told of text only"),
        ({"epochs": 0}, "epochs"),
        ({"time_limit_s": 0}, "time_limit_s"),
    ],
)
def test_what_does_not_go_together_is_refused(sound_scene: Path, tmp_path: Path, values: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        settings(sound_scene, tmp_path, **values)


@pytest.mark.parametrize(
    ("rows", "examples", "asked", "batch", "steps"),
    [
        # Four examples share a row: eight of them are two rows.
        (30, 120, {"epochs": 3, "examples_per_step": 8}, 2, 45),
        # An example is three rows.
        (30, 10, {"epochs": 1, "examples_per_step": 1}, 3, 10),
        # Fewer than a row holds, and more than there are.
        (10, 100, {"epochs": 2, "examples_per_step": 1}, 1, 20),
        (10, 100, {"epochs": 2, "examples_per_step": 256}, 10, 2),
        # The last batch goes into a further epoch.
        (10, 10, {"epochs": 3, "training": {"batch_size": 4, "lr": 1}}, 4, 8),
        (10, 10, {"epochs": None, "training": {"batch_size": 4, "steps": 5}}, 4, 5),
    ],
)
def test_how_long_a_run_is(
    tmp_path: Path, rows: int, examples: int, asked: dict[str, Any], batch: int, steps: int
) -> None:
    config = with_steps(settings(tmp_path, tmp_path, **asked), rows, examples)
    assert (config.training.batch_size, config.training.steps) == (batch, steps)
    ends = epoch_ends(rows, batch, steps)
    assert ends[-1] == steps
    for epoch, end in enumerate(ends[:-1], 1):
        assert end * batch >= epoch * rows > (end - 1) * batch


def test_the_warm_up_is_a_share(tmp_path: Path) -> None:
    config = settings(tmp_path, tmp_path, training={"warmup_share": 0.1})
    assert with_steps(config, 40, 40).training.warmup_steps == 3
    assert with_steps(settings(tmp_path, tmp_path), 40, 40).training.warmup_steps == 0


def test_tokens_are_counted_over_epochs(sound_scene: Path) -> None:
    rows = sequences(sound_scene)
    total = sum(int(row.real.sum()) for row in rows)
    counted = TrainedTokens(rows, len(rows), 5)
    assert [counted.after(step) for step in (1, 1, 4)] == [total, total, 4 * total]
