"""Scores on tasks of the lm-evaluation-harness: its own numbers, what identifies them, and the table of them."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval", reason="the lm-eval extra is not installed")

from ot_ray.artifacts import load_full, open_bundle, open_model_source, write_bundle
from ot_ray.data.tasks import load_task
from ot_ray.errors import ArtifactError, ConfigError, DataError
from ot_ray.evaluation.harness import PAPER_TASKS, HarnessConfig, ScoreCache, TaskScore, TaskTable, score, task_identity
from ot_ray.evaluation.harness.scoring import read_score
from ot_ray.model import ModelConfig, SplitPlan, emulate
from ot_ray.model.emulator import EmulatorConfig
from ot_ray.model.packed import compress
from ot_ray.store import LocalStore, open_store
from tests.fixtures.local_tasks import TASKS, document, write_split, write_tasks

BASE = Path(__file__).parents[2] / "jobs/base"
BATCH = 4


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Sums are then added in one order, here and in the harness's own process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("tasks")
    write_tasks(place)
    return place


@pytest.fixture(scope="module")
def base() -> tuple[Any, Any]:
    config = ModelConfig(name="base", source=str(BASE))
    source = open_model_source(config)
    return load_full(config, source=source), source.tokenizer()


# The harness's own command reads all of its tasks, and looks the machine over.
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_numbers_are_the_harness_s_own(place: Path, base: tuple[Any, Any]) -> None:
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--device", "cpu"]
    command += ["--model_args", f"pretrained={BASE},dtype=float32", "--batch_size", str(BATCH)]
    tasks = [f"small_{name}" for name in (*PAPER_TASKS, "wikitext")]
    command += ["--tasks", ",".join(tasks), "--include_path", str(place / "tasks"), "--output_path", str(place / "out")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-2000:]
    (file,) = (place / "out").rglob("results*.json")
    theirs = json.loads(file.read_text())

    for name in tasks:
        ours = score(*base, load_task(name, place / "tasks"), batch_size=BATCH)
        assert ours == read_score(theirs, name)
        # What is compared is not a row of zeroes.
        assert ours.documents == 10
    perplexities = theirs["results"]["small_wikitext"]
    assert 1 < perplexities["byte_perplexity,none"] < perplexities["word_perplexity,none"]


def test_few_shots_are_the_harness_s_own(place: Path, base: tuple[Any, Any]) -> None:
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_defaults=False, include_path=place / "tasks")
    model = HFLM(pretrained=str(BASE), dtype="float32", device="cpu", batch_size=BATCH)
    # Another state of the random numbers than ours, where seeds were forgotten.
    torch.manual_seed(5)
    theirs = simple_evaluate(
        model, tasks=["local_race"], num_fewshot=2, limit=6, task_manager=manager, log_samples=False
    )
    task = load_task("local_race", place / "tasks")
    ours = score(*base, task, batch_size=BATCH, num_fewshot=2, limit=6)
    assert theirs is not None
    assert ours == read_score(dict(theirs), "local_race")
    assert ours.documents == 6


def test_a_model_is_scored_where_it_was_changed(place: Path, base: tuple[Any, Any]) -> None:
    model, tokenizer = base
    before = score(model, tokenizer, load_task("local_wikitext", place / "tasks"), limit=2)
    weight = model.model.decoder.layers[0].fc2.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.mul_(-1)
        after = score(model, tokenizer, load_task("local_wikitext", place / "tasks"), limit=2)
        weight.copy_(kept)
    assert after.metrics["word_perplexity"] > before.metrics["word_perplexity"]
    assert score(model, tokenizer, load_task("local_wikitext", place / "tasks"), limit=2) == before


def word_perplexity(model: Any, tokenizer: Any, texts: list[str]) -> float:
    """Of texts shorter than the model's length, each on its own after the end-of-sequence token, by hand."""
    total, words = 0.0, 0
    for text in texts:
        ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer.encode(text)]])
        with torch.inference_mode():
            scores = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        total += scores.gather(1, ids[0, 1:, None]).double().sum().item()
        words += len(text.split(" "))
    return math.exp(-total / words)


@pytest.mark.parametrize("emulator", [EmulatorConfig(), EmulatorConfig(sparsity=0.3, bits=4)], ids=["plain", "packed"])
def test_an_emulator_is_scored_as_it_comes_out_of_its_bundle(
    emulator: EmulatorConfig, place: Path, base: tuple[Any, Any], tmp_path: Path
) -> None:
    plan = SplitPlan(bottom=2, keep=3, top=2)
    emulated = compress(emulate(base[0], plan, [0, 2, 5]), plan, emulator)
    write_bundle(tmp_path / "b", emulated, base[1], plan, name="base", version="1", card="# Base\n", recommended={})
    bundle = open_bundle(tmp_path / "b")
    found = score(bundle.load_model(), base[1], load_task("local_wikitext", place / "tasks"), batch_size=1)
    texts = [document(number)["page"] for number in range(10)]
    by_hand = word_perplexity(bundle.load_model(), base[1], texts)
    assert found.metrics["word_perplexity"] == pytest.approx(by_hand, rel=1e-5)
    assert by_hand != pytest.approx(word_perplexity(base[0], base[1], texts), rel=1e-3)


def identity(folder: Path, name: str = "local_race", **settings: Any) -> str:
    return json.dumps(task_identity(load_task(name, folder), **settings), sort_keys=True)


def test_equal_tasks_have_equal_identities(place: Path, tmp_path: Path) -> None:
    assert identity(place / "tasks") == identity(write_tasks(tmp_path / "elsewhere"))


def test_what_decides_a_score_is_in_its_identity(tmp_path: Path) -> None:
    folder = write_tasks(tmp_path)
    seen = [identity(folder), identity(folder, limit=3), identity(folder, num_fewshot=2)]
    seen += [identity(folder, name) for name in TASKS if name != "local_race"]

    # Training documents count where they are shown, and only there.
    write_split(tmp_path, "train", [document(number) for number in range(200, 212)])
    assert identity(folder) == seen[0]
    seen.append(identity(folder, num_fewshot=2))

    write_split(tmp_path, "test", [document(number) for number in range(1, 11)])
    seen.append(identity(folder))
    # A function that no setting names, but one of those that they name calls.
    functions = folder / "local_functions.py"
    functions.write_text(functions.read_text().replace('"A": 0, "B": 1', '"A": 1, "B": 0'))
    seen.append(identity(folder))
    settings = folder / "local_race.yaml"
    settings.write_text(settings.read_text().replace("metadata: {version: 3.0}", "metadata: {version: 4.0}"))
    seen.append(identity(folder))
    assert len(set(seen)) == len(seen)


def made(task: str, value: float, metric: str = "acc", better: bool = True) -> TaskScore:
    return TaskScore(
        task=task,
        version="1.0",
        documents=10,
        metrics={metric: value},
        stderr={metric: None if metric == "word_perplexity" else 0.01},
        higher_is_better={metric: better},
    )


@pytest.mark.parametrize("kind", ["folder", "bucket"])
def test_a_score_is_kept_once(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    address = str(tmp_path) if kind == "folder" else request.getfixturevalue("s3_url")
    cache = ScoreCache(open_store(address))
    first, second = made("piqa", 0.1 + 0.2), made("piqa", 0.5)
    assert cache.get({"model": 1}) is None
    cache.put({"model": 1}, first)
    cache.put({"model": 1}, second)
    assert cache.get({"model": 1}) == first
    assert cache.get({"model": 2}) is None
    broken = made("wikitext", math.inf, "word_perplexity", better=False)
    cache.put({"model": 2}, broken)
    assert cache.get({"model": 2}) == broken


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b'{"score": {"task": "piqa"}}', b"\xff"])
def test_a_damaged_score_is_named(tmp_path: Path, content: bytes) -> None:
    cache = ScoreCache(LocalStore(tmp_path))
    cache.put({}, made("piqa", 0.5))
    (file,) = (tmp_path / "scores").iterdir()
    file.write_bytes(content)
    with pytest.raises(ArtifactError, match=file.name):
        cache.get({})


def test_the_table_is_the_paper_s() -> None:
    # OPT-1.3B, zero-shot and OT plug-in, as in the paper's Table 1.
    zero_shot = (0.234, 0.716, 0.569, 0.235, 0.415, 0.844, 0.046, 0.342)
    rows = {
        "full_zero_shot": {name: made(name, value) for name, value in zip(PAPER_TASKS, zero_shot, strict=True)},
        "ot_plug_in": {"piqa": made("piqa", 0.745)},
    }
    rows["full_zero_shot"]["wikitext"] = made("wikitext", 31.48, "word_perplexity", better=False)
    table = TaskTable(rows)
    assert table.mean("full_zero_shot") == pytest.approx(42.5125)
    assert table.mean("ot_plug_in") == pytest.approx(74.5)
    head, _, first, second = table.text().splitlines()
    assert head.split()[-3:] == ["mean", "of", "8"]
    assert "71.6 ± 1.0" in first and "31.48" in first and first.endswith("42.5")
    assert second.split()[-1] == "74.5" and second.count("-  ") >= 7
    figures = table.as_dict()
    assert figures["full_zero_shot"]["tasks"]["piqa"]["metrics"] == {"acc": 0.716}
    assert figures["ot_plug_in"]["mean_of"] == ["piqa"]


def test_tasks_of_one_s_own_have_a_mean_without_perplexities() -> None:
    row = {"mine": made("mine", 0.5), "text": made("text", 12.0, "word_perplexity", better=False)}
    assert TaskTable({"full_zero_shot": row}).mean("full_zero_shot") == pytest.approx(50.0)
    del row["mine"]
    assert TaskTable({"full_zero_shot": row}).mean("full_zero_shot") is None
    assert "mean" not in TaskTable({"full_zero_shot": row}).text()


def test_a_task_stands_there_once() -> None:
    with pytest.raises(ValueError, match="piqa stands there more than once"):
        HarnessConfig(tasks=("piqa", "sciq", "piqa"))


@pytest.mark.parametrize(
    ("name", "error", "said"),
    [
        ("opnbookqa", ConfigError, "did you mean openbookqa"),
        ("local_wikitxt", ConfigError, "did you mean local_wikitext"),
        ("openbookqa", DataError, "allenai/openbookqa cannot be loaded"),
    ],
)
def test_a_task_that_is_not_there_is_named(place: Path, name: str, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said) as raised:
        load_task(name, place / "tasks")
    assert name in str(raised.value)
