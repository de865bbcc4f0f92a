"""`jobs.tune` with a learning-rate search: the winner's adapter is what tuning at that rate makes, bit for bit."""

from __future__ import annotations

import json
import pickle
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from matplotlib import image

from jobs import tune
from jobs.tuning.search import tune_at_rate
from jobs.tuning.work import open_work, tune_adapter
from ot_ray.artifacts import BundleSource, inspect_adapter, open_bundle, write_bundle
from ot_ray.data import DataConfig
from ot_ray.errors import LaunchError
from ot_ray.launch import JobSpec, RayJobLauncher, SearchConfig, wait_for_job
from ot_ray.launch.cluster import ClusterAddress
from ot_ray.model import METHODS, emulate
from ot_ray.training import TrainingConfig
from tests.artifacts.samples import tiny_tokenizer
from tests.fixtures.models import tiny_model
from tests.jobs.conftest import Command
from tests.jobs.scene import DEPTH, KEPT, PLAN, write_data

pytestmark = pytest.mark.timeout(560)

RATES = (1e-5, 1e-3)
STEPS = 8


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As the trials have it: sums are then added in one order everywhere."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A customer's folder: a bundle that takes every method back, training data and validation data."""
    place = tmp_path_factory.mktemp("home")
    write_data(place / "train.jsonl")
    write_data(place / "validation.jsonl", rows=9)
    emulated = emulate(tiny_model("opt", DEPTH), PLAN, KEPT)
    write_bundle(place / "bundle", emulated, tiny_tokenizer(), PLAN, name="t", version="1", card="", recommended={})
    return place


def tuning(home: Path, output: Path | str, lr: float = 1e-4, **changes: Any) -> tune.TuneConfig:
    values: dict[str, Any] = {
        "bundle": BundleSource(folder=str(home / "bundle")),
        "data": DataConfig(source=str(home / "train.jsonl")),
        "validation": DataConfig(source=str(home / "validation.jsonl")),
        "sequence_length": 16,
        "training": TrainingConfig(steps=STEPS, batch_size=4, lr=lr, warmup_steps=1, evaluate_every=2),
        "output": str(output),
    }
    return tune.TuneConfig(**{**values, **changes})


@pytest.mark.slow
def test_the_winner_s_adapter_is_that_of_tuning_at_its_rate(
    local_ray: ClusterAddress, home: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    # Every trial is let go to its end, so that each can be compared.
    search = SearchConfig(rates=RATES, grace_steps=STEPS, report=str(tmp_path / "report"))
    found = tune.run(tuning(home, tmp_path / "found", search=search))
    assert "search" in capfd.readouterr().err

    alone = {rate: tune.run(tuning(home, tmp_path / f"{rate:g}", lr=rate)) for rate in RATES}
    losses = {rate: result["validation_losses"][-1]["validation_loss"] for rate, result in alone.items()}
    best = min(RATES, key=lambda rate: losses[rate])
    assert best != RATES[0]
    assert found["learning_rate"] == best
    assert found["search"]["winner"] == {"rate": best, "validation_loss": losses[best]}
    for trial in found["search"]["trials"]:
        seen = alone[trial["rate"]]["validation_losses"]
        assert trial["status"] == "completed"
        assert [(point["step"], point["validation_loss"]) for point in trial["curve"]] == [
            (point["step"], point["validation_loss"]) for point in seen
        ]
    same = {"bundle_id", "method", "trainable_parameters", "documents", "dropped", "tokens", "loss"}
    assert {name: found[name] for name in same} == {name: alone[best][name] for name in same}
    assert found["validation_losses"] == alone[best]["validation_losses"]

    weights = "adapter.safetensors"
    assert (tmp_path / "found" / weights).read_bytes() == (tmp_path / f"{best:g}" / weights).read_bytes()
    adapter = inspect_adapter(tmp_path / "found", open_bundle(home / "bundle").manifest)
    assert (adapter.manifest.learning_rate, adapter.manifest.validation_loss) == (best, losses[best])

    assert json.loads((tmp_path / "report/search.json").read_text()) == found["search"]
    assert image.imread(tmp_path / "report/search.png").shape[2] == 4
    assert {path.name for path in (tmp_path / "report").iterdir()} == {"search.json", "search.png"}


@pytest.mark.slow
def test_a_search_runs_inside_a_submitted_job(
    job_launcher: RayJobLauncher, local_ray: ClusterAddress, home: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "job"
    folder.mkdir()
    # Where several Rays run on one machine, Ray tells a job of any of them.
    config = tuning(home, tmp_path / "adapter", search=SearchConfig(rates=RATES, address=local_ray.ray))
    (folder / "tune.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    command = [sys.executable, "-m", "jobs.tune", "--config", "tune.yaml"]
    shown: list[str] = []
    spec = JobSpec(f"search-{tmp_path.name}", command, str(folder), {"OMP_NUM_THREADS": "1"}, cpus=1)
    try:
        wait_for_job(job_launcher, job_launcher.submit(spec), shown.append)
    except LaunchError:
        # The whole output says more than the error's last line.
        print("".join(shown))
        raise
    adapter = inspect_adapter(tmp_path / "adapter", open_bundle(home / "bundle").manifest)
    assert adapter.manifest.learning_rate == RATES[1]
    said = "\n".join(shown)
    result = json.loads(said[said.index("{\n") : said.rindex("}") + 1])
    assert [trial["rate"] for trial in result["search"]["trials"]] == list(RATES)


@pytest.mark.slow
def test_when_every_trial_diverges_it_says_so_and_nothing_is_written(
    local_ray: ClusterAddress, home: Path, tmp_path: Path, command: Command
) -> None:
    (tmp_path / "tune.yaml").write_text(yaml.safe_dump(tuning(home, tmp_path / "adapter").model_dump(mode="json")))
    ended = command("tune", "--config", str(tmp_path / "tune.yaml"), "search.rates=[1e38]")
    assert (ended.code, ended.out) == (2, "")
    message = ended.err.splitlines()[-1]
    assert message.startswith("error: every trial of the learning-rate search failed (1e+38: ")
    assert re.search(r"(loss|norm) became (nan|inf)", message)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tune.yaml"]


@pytest.mark.parametrize("method", METHODS)
def test_a_trial_s_work_survives_the_way_to_another_machine(home: Path, tmp_path: Path, method: str) -> None:
    config = tuning(home, tmp_path / "out", method=method)
    work = open_work(config, tmp_path / "cache")
    reports: list[Any] = []
    made = tune_at_rate(pickle.loads(pickle.dumps((work, config))), 1e-3, reports.append)
    assert [figures["step"] for figures in reports] == list(range(1, STEPS + 1))

    folder = tmp_path / "adapter"
    figures = tune_adapter(work, tuning(home, tmp_path / "out", lr=1e-3, method=method), folder)
    assert made["figures"] == figures
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    # The manifest says when it was made.
    assert made["files"].keys() == files.keys()
    assert {name for name in files if files[name] != made["files"][name]} <= {"manifest.json"}
    assert len(files) > 1


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["validation=null"], "search is set, but validation is not, by which rates are compared"),
        (["training.evaluate_every=0"], "training.evaluate_every is 0, but a search compares its trials"),
        (["training.evaluate_every=9"], "training.evaluate_every is 9, .* use 1..8"),
        (["search.grace_steps=9"], "search.grace_steps is 9, but there are 8 steps; use 1..8"),
        (["checkpoints=somewhere"], "search and checkpoints are both set"),
        (["search.rates=[1e-4, -1]"], "a learning rate must be above 0"),
        (["search.rate=[1e-4]"], "unknown key search.rate; did you mean rates?"),
    ],
)
def test_a_search_that_cannot_be_is_refused_before_anything_runs(
    home: Path, tmp_path: Path, command: Command, overrides: list[str], expected: str
) -> None:
    (tmp_path / "tune.yaml").write_text(yaml.safe_dump(tuning(home, tmp_path / "out").model_dump(mode="json")))
    ended = command("tune", "--config", str(tmp_path / "tune.yaml"), "search.rates=[1e-4, 2e-4]", *overrides)
    assert ended.code == 2
    assert len(ended.err.splitlines()) == 1
    assert re.search(expected, ended.err), ended.err
    assert not (tmp_path / "out").exists()


def test_a_report_that_would_lie_below_a_file_is_refused(home: Path, tmp_path: Path, command: Command) -> None:
    (tmp_path / "file").touch()
    config = tuning(home, tmp_path / "out", search=SearchConfig(report=str(tmp_path / "file/report")))
    (tmp_path / "tune.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    ended = command("tune", "--config", str(tmp_path / "tune.yaml"))
    assert (ended.code, ended.err.count("\n")) == (2, 1)
    assert "search.report is" in ended.err and "file is a file; name a folder" in ended.err
