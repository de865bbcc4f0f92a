"""`jobs.cola_study` for real on a tiny model: its parities, what it chooses by, what it keeps, what may go wrong."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import AutoTokenizer, OPTConfig, OPTForCausalLM

from jobs.cola_study import BASE, run
from jobs.command import config_file
from jobs.gradient_study.choosing import Run, Runs, measure, next_rates
from jobs.gradient_study.config import Customer, GradientStudyConfig, Row, Training
from jobs.gradient_study.running import Computed, Place
from jobs.gradient_study.texts import CustomerTexts, keep_texts, kept_texts, read_customers
from jobs.gradient_study.work import Adapted, Result, ZeroShot
from ot_ray.config import load, parse
from ot_ray.data.cpython import LONGEST_ECHO, PARTS
from ot_ray.errors import ConfigError, DataError, SiteError, StudyError
from ot_ray.model import ModelConfig
from ot_ray.store import LocalStore
from tests.jobs.conftest import Command

DEADLINE_S = 240
TRAINING = Training(steps=4, rows=2, rank=2, alpha=4.0, sites=("*.v_proj", "*.fc2"))
CUSTOMERS = ({"name": "lines", "packages": ["json", "logging"]}, {"name": "mail", "packages": ["email"]})


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model with the shipped base's tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    shape = OPTConfig(
        vocab_size=2048, hidden_size=16, word_embed_proj_dim=16, ffn_dim=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=128, dropout=0.0, pad_token_id=0, bos_token_id=1, eos_token_id=1, init_std=0.3,
    )  # fmt: skip
    OPTForCausalLM(shape).save_pretrained(folder)
    AutoTokenizer.from_pretrained(BASE).save_pretrained(folder)
    return folder


def study(base: Path, output: Path, **settings: Any) -> GradientStudyConfig:
    values: dict[str, Any] = {
        "model": {"name": "tiny", "source": str(base)},
        "customers": CUSTOMERS,
        "characters": 12_000,
        "sequence_length": 32,
        "limit": 6,
        "training": TRAINING.model_dump(mode="json"),
        "rates": {"low_rank": [1e-2, 5e-2], "linear": [1e-2], "mlp": [5e-2], "full": [1e-2]},
        "kinds": ["low_rank", "mlp"],
        "intervals": [1, 3],
        "seeds": [0, 1],
        "output": str(output),
        "processes": 1,
        **settings,
    }
    return parse(GradientStudyConfig, values, "the test")


@pytest.fixture(scope="module")
def texts(base: Path, tmp_path_factory: pytest.TempPathFactory) -> CustomerTexts:
    return read_customers(study(base, tmp_path_factory.mktemp("unused")), AutoTokenizer.from_pretrained(base))


@pytest.fixture(scope="module")
def made(base: Path, tmp_path_factory: pytest.TempPathFactory) -> GradientStudyConfig:
    """A study that was run to its end."""
    config = study(base, tmp_path_factory.mktemp("study"))
    run(config)
    return config


def kept(config: GradientStudyConfig) -> dict[str, Any]:
    return json.loads(Path(config.output, "study.json").read_text())


def adapted(base: Path, row: Row, lr: float = 5e-2, training: Training = TRAINING) -> Adapted:
    return Adapted(model=ModelConfig(name="tiny", source=str(base)), row=row, training=training, lr=lr, seed=3)


def gradient(mode: str, **settings: Any) -> Row:
    return Row.model_validate({"method": "gradient", "mode": mode, **settings})


@pytest.mark.parametrize("mode", ["joint", "alone"])
def test_low_rank_with_interval_1_is_lora_by_back_propagation(base: Path, texts: CustomerTexts, mode: str) -> None:
    fitted = adapted(base, gradient(mode)).compute(texts)
    propagated = adapted(base, Row.model_validate({"method": "lora", "mode": mode})).compute(texts)
    untouched = ZeroShot(model=ModelConfig(name="tiny", source=str(base))).compute(texts)
    for part in ("validation", "test"):
        # Back-propagation and fits add up float32 products in another order.
        assert fitted[part] == pytest.approx(propagated[part], rel=1e-5)
        assert all(abs(fitted[part][name] / untouched[part][name] - 1) > 1e-2 for name in texts.train)
    assert fitted["trained"] == propagated["trained"] > 0 and fitted["fits"] == propagated["fits"] == TRAINING.steps


@pytest.mark.parametrize("kind", ["low_rank", "linear", "mlp"])
@pytest.mark.parametrize("mode", ["joint", "alone", "collaboration"])
def test_what_learns_nothing_measures_the_base(base: Path, texts: CustomerTexts, mode: str, kind: str) -> None:
    found = adapted(base, gradient(mode, kind=kind), lr=1e-30).compute(texts)
    untouched = ZeroShot(model=ModelConfig(name="tiny", source=str(base))).compute(texts)
    for part in ("validation", "test"):
        assert found[part] == pytest.approx(untouched[part], rel=1e-6)


@pytest.mark.parametrize("kind", ["low_rank", "linear"])
@pytest.mark.parametrize("mode", ["joint", "collaboration"])
def test_merged_measures_what_unmerged_does(base: Path, texts: CustomerTexts, mode: str, kind: str) -> None:
    plain = adapted(base, gradient(mode, kind=kind)).compute(texts)
    merged = adapted(base, gradient(mode, kind=kind, merged=True)).compute(texts)
    # Weights that hold a delta are rounded once more.
    assert merged["test"] == pytest.approx(plain["test"], rel=1e-5)


def test_modes_intervals_and_seeds_are_different_runs(base: Path, texts: CustomerTexts) -> None:
    rows = [gradient(mode, interval=interval) for mode in ("joint", "alone", "collaboration") for interval in (1, 3)]
    works = [adapted(base, row) for row in rows]
    works.append(works[0].model_copy(update={"seed": 4}))
    found = [work.compute(texts) for work in works]
    assert len({statistics.fmean(one["test"].values()) for one in found}) == len(works)
    # What an interval has left after 4 batches is one fit more.
    assert [one["fits"] for one in found[:2]] == [4, 2]


@pytest.mark.parametrize("method", ["lora", "full"])
def test_alone_is_joint_with_nobody_else(base: Path, texts: CustomerTexts, method: str) -> None:
    alone = adapted(base, Row.model_validate({"method": method, "mode": "alone"})).compute(texts)
    first = next(iter(texts.train))
    only = CustomerTexts(*({first: getattr(texts, part)[first]} for part in PARTS))
    joint = adapted(base, Row.model_validate({"method": method, "mode": "joint"})).compute(only)
    assert joint["test"] == {first: alone["test"][first]}
    together = adapted(base, Row.model_validate({"method": method, "mode": "joint"})).compute(texts)
    assert together["test"][first] != alone["test"][first]


def test_no_paragraph_stands_in_two_parts(base: Path, tmp_path: Path) -> None:
    config = study(base, tmp_path, characters=30_000, limit=10_000)
    # Their text is whole only while sequences are not spread.
    tokenizer = AutoTokenizer.from_pretrained(base)
    found = read_customers(config, tokenizer)
    runs: dict[str, set[str]] = {}
    for part in PARTS:
        for customer in (one.name for one in config.customers):
            ids = torch.cat([own.input_ids[own.real] for own in getattr(found, part)[customer]])
            for document in tokenizer.decode(ids).split("<eos>"):
                for paragraph in document.split("\n\n"):
                    words = paragraph.split()
                    for start in range(len(words) - LONGEST_ECHO + 1):
                        run_of_words = " ".join(words[start : start + LONGEST_ECHO])
                        runs.setdefault(run_of_words, set()).add(part)
    assert len(runs) > 1000
    assert [text for text, parts in runs.items() if len(parts) > 1] == []


def test_kept_texts_are_the_texts(texts: CustomerTexts, tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    key = keep_texts(texts, store)
    found = kept_texts(store, key, list(texts.train))
    assert keep_texts(found, store) == key and list(found.test) == list(texts.test)
    for part in PARTS:
        for customer, own in getattr(texts, part).items():
            for one, other in zip(own, getattr(found, part)[customer], strict=True):
                for field in ("input_ids", "position_ids", "labels", "real"):
                    assert torch.equal(getattr(one, field), getattr(other, field))


def test_texts_that_are_not_there(base: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    absent = study(base, tmp_path, customers=[CUSTOMERS[0], {"name": "x", "packages": ["no_such.package"]}])
    with pytest.raises(DataError, match=r"customer x wants package 'no_such.package', which is not installed here"):
        read_customers(absent, tokenizer)
    little = study(base, tmp_path, customers=[CUSTOMERS[0], {"name": "x", "packages": ["wsgiref"]}], characters=1000)
    with pytest.raises(DataError, match=r"customer x has \d documents, which leaves none for test"):
        read_customers(little, tokenizer)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"customers": [CUSTOMERS[0], CUSTOMERS[0]]}, "customers has lines, lines; give each once"),
        ({"customers": [CUSTOMERS[0], {"name": "joint"}]}, "what they all together are called"),
        ({"customers": [CUSTOMERS[0], {"name": "x", "packages": ["../etc"]}]}, "write it as in an import"),
        ({"intervals": [1, 5]}, "give 1 to training.steps 4"),
        ({"seeds": [0, -1]}, "give numbers of 0 or more"),
        ({"rates": {"full": [1e-3, 1e-4]}}, "each larger than the one before"),
    ],
)
def test_settings_that_are_refused(base: Path, tmp_path: Path, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        study(base, tmp_path, **settings)


def test_the_search_goes_on_beside_the_best() -> None:
    ladder = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
    assert next_rates(ladder, {}) == [4.0, 8.0, 16.0]
    assert next_rates(ladder, {4.0: 3.0, 8.0: 2.0, 16.0: 2.5}) == []
    assert next_rates(ladder, {4.0: 1.0, 8.0: 2.0, 16.0: 2.5}) == [2.0]
    assert next_rates(ladder, {2.0: 0.5, 4.0: 1.0, 8.0: 2.0, 16.0: 2.5}) == [1.0]
    assert next_rates(ladder, {1.0: 0.1, 2.0: 0.5, 4.0: 1.0, 8.0: 2.0, 16.0: 2.5}) == []
    assert next_rates(ladder, {4.0: 3.0, 8.0: 2.0, 16.0: 1.0}) == [32.0]
    assert next_rates(ladder, {4.0: math.inf, 8.0: math.inf, 16.0: math.inf}) == [2.0]
    assert next_rates((5.0,), {}) == [5.0] and next_rates((5.0,), {5.0: 1.0}) == []


def test_rates_are_chosen_by_validation_text_and_the_first_seed(base: Path, tmp_path: Path) -> None:
    config = study(base, tmp_path, seeds=[7, 8], modes=["joint"], kinds=["low_rank"], intervals=[1])
    runs = Runs(config, ModelConfig(name="tiny", source=str(base)), "version", "texts")
    asked: list[tuple[str, Row, float, int]] = []

    def compute(name: str, wanted: Sequence[Run]) -> dict[str, Result]:
        found = {}
        for one in wanted:
            assert isinstance(one.work, Adapted)
            asked.append((name, one.work.row, one.work.lr, one.work.seed))
            # The higher rate is better on validation text and worse on test text.
            high = one.work.lr == 5e-2
            found[one.key] = {"validation": {"a": 1.0 if high else 2.0}, "test": {"a": 2.0 if high else 1.0}}
        return found

    found = measure(config, runs, compute)
    rows = {row.label: one for row, one in found.items()}
    assert rows["joint, low_rank, interval 1"].tried == {1e-2: 2.0, 5e-2: 1.0}
    assert {one.lr for row, one in found.items() if row.method != "full"} == {5e-2}
    assert {seed for name, _, _, seed in asked if name == "rates"} == {7}
    # A merged row is measured at its unmerged one's rate, and searches none.
    assert [entry for entry in asked if entry[1].merged] == [
        ("seeds", gradient("joint", merged=True), 5e-2, seed) for seed in (7, 8)
    ]
    assert all(sorted(one.results) == [7, 8] and not one.failures for one in found.values())


@pytest.mark.slow
def test_every_row_is_measured_with_every_seed(made: GradientStudyConfig) -> None:
    rows = kept(made)["rows"]
    # Four of back-propagation; three modes, two kinds, two intervals; merged: two modes, low rank, two intervals.
    assert len(rows) == 4 + 12 + 4
    for row in rows:
        assert sorted(row["seeds"]) == ["0", "1"] and not row["failures"], row
        for result in row["seeds"].values():
            values = [*result["test"].values(), *result["validation"].values()]
            assert len(values) == 4 and all(math.isfinite(value) and value > 1 for value in values)
    fitted = {(row["mode"], row["kind"], row["interval"], row["merged"]): row for row in rows[4:]}
    for (mode, kind, interval, merged), row in fitted.items():
        if merged:
            plain = fitted[mode, kind, interval, False]
            assert row["lr"] == plain["lr"] and row["validation_by_lr"] == {}
            for seed, result in row["seeds"].items():
                assert result["test"] == pytest.approx(plain["seeds"][seed]["test"], rel=1e-5)


@pytest.mark.slow
def test_the_report_shows_what_was_measured(made: GradientStudyConfig) -> None:
    folder, found = Path(made.output), kept(made)
    table = {row[0]: row[1:] for row in csv.reader(io.StringIO((folder / "intervals.csv").read_text()))}
    row = next(row for row in found["rows"] if row["mode"] == "alone" and row["interval"] == 3 and row["kind"] == "mlp")
    means = [statistics.fmean(result["test"].values()) for result in row["seeds"].values()]
    assert table["alone, mlp"][1] == f"{statistics.fmean(means):.2f} ({min(means):.2f} to {max(means):.2f})"
    zero = found["zero_shot"]["test"]
    assert table["the base as it is"][0] == f"{statistics.fmean(zero.values()):.2f}"
    lora = next(row for row in found["rows"] if row["method"] == "lora" and row["mode"] == "alone")
    base = statistics.fmean(zero.values())
    wanted = [base - statistics.fmean(lora["seeds"][seed]["test"].values()) for seed in ("0", "1")]
    gained = [base - mean for mean in means]
    shares = [one / other for one, other in zip(gained, wanted, strict=True)]
    assert min(wanted) > 0
    share = {row[0]: row[1:] for row in csv.reader(io.StringIO((folder / "shares.csv").read_text()))}
    assert share["alone, mlp"][1] == f"{statistics.fmean(shares):.0%} ({min(shares):.0%} to {max(shares):.0%})"
    whole = {row[0]: row[1:] for row in csv.reader(io.StringIO((folder / "rows.csv").read_text()))}
    assert len(whole) == 1 + 1 + 20 and len(whole[""]) == 3
    mail = statistics.fmean(result["test"]["mail"] for result in row["seeds"].values())
    assert whole["alone, mlp, interval 3"][1:] == [f"{mail:.2f}", f"{statistics.fmean(means):.2f}"]
    page = (folder / "study.md").read_text()
    assert table["alone, mlp"][1] in page and "not measured" not in page
    assert (folder / "chart.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.slow
def test_what_is_kept_is_not_computed_again(made: GradientStudyConfig) -> None:
    folder = Path(made.output)
    before = {path: path.stat().st_mtime_ns for path in (folder / "runs").iterdir()}
    page = (folder / "study.md").read_bytes()
    lost = min(before)
    result = json.loads(lost.read_text())
    lost.unlink()
    again = run(made)
    assert again["missing"] == 0 and (folder / "study.md").read_bytes() == page
    after = {path: path.stat().st_mtime_ns for path in (folder / "runs").iterdir()}
    assert after.keys() == before.keys()
    assert [path for path in before if after[path] != before[path]] == [lost]
    assert json.loads(lost.read_text()) | {"seconds": 0} == result | {"seconds": 0}


@pytest.mark.slow
def test_the_report_alone_of_a_part(made: GradientStudyConfig) -> None:
    page = Path(made.output, "study.md").read_bytes()
    more = made.model_copy(update={"report_only": True, "seeds": (0, 1, 2)})
    try:
        found = run(more)
        assert found["missing"] == found["rows"] == 20 and found["measured"] == 40
        said = Path(made.output, "study.md").read_text()
        assert "- not measured: alone, mlp, interval 3, seed 2: not measured yet" in said
    finally:
        run(made.model_copy(update={"report_only": True}))
    assert Path(made.output, "study.md").read_bytes() == page


@pytest.mark.slow
def test_a_rate_that_destroys_is_not_chosen(base: Path, tmp_path: Path, command: Command) -> None:
    few = {"modes": ["joint"], "kinds": ["low_rank"], "intervals": [1], "seeds": [0], "merged": False}
    config = study(base, tmp_path / "out", **few, rates={"low_rank": [1e-3, 1e30], "full": [1e30]})
    path = tmp_path / "study.json"
    path.write_text(config.model_dump_json())
    ended = command("cola_study", "--config", str(path))
    assert ended.code == 2 and "2 runs failed" in ended.err and "Traceback" not in ended.err
    rows = {row["method"]: row for row in kept(config)["rows"]}
    assert rows["gradient"]["lr"] == rows["lora"]["lr"] == 1e-3 and rows["lora"]["seeds"]
    assert rows["full"]["lr"] is None and rows["full"]["failures"] == {"0": "no rate was measured"}
    assert rows["gradient"]["validation_by_lr"]["1e+30"] is None


def test_sites_that_the_model_has_not(base: Path, tmp_path: Path) -> None:
    with pytest.raises(SiteError, match=r"'\*\.query_key_value' matches no module"):
        run(study(base, tmp_path, training={**TRAINING.model_dump(mode="json"), "sites": ["*.query_key_value"]}))


class Dying(ZeroShot):
    """What takes its process with it."""

    def compute(self, texts: CustomerTexts) -> Result:
        os._exit(9)


@pytest.mark.slow
def test_a_process_that_dies_is_said(base: Path, texts: CustomerTexts, tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    place = Place(store.url, keep_texts(texts, store), tuple(texts.train))
    model = ModelConfig(name="tiny", source=str(base))
    with Computed(place, 1, 1) as computed:
        fine = Run("zero/a.json", ZeroShot(model=model))
        assert computed("base", [fine])[fine.key]["test"].keys() == texts.test.keys()
        with pytest.raises(StudyError, match="a process of the study died"):
            computed("base", [Run("zero/b.json", Dying(model=model))])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_study_leaves_nobody_behind_and_goes_on(base: Path, tmp_path: Path, command: Command) -> None:
    few = {"modes": ["joint"], "kinds": ["low_rank"], "intervals": [1], "merged": False}
    # So many seeds that it is still at work when it is looked at; fewer of them are a part of the same study.
    endless = study(base, tmp_path / "out", **few, seeds=list(range(500)))
    path, runs = tmp_path / "study.json", Path(endless.output, "runs")
    path.write_text(endless.model_dump_json())
    started = subprocess.Popen(
        [sys.executable, "-m", "jobs.cola_study", "--config", str(path)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for(lambda: runs.is_dir() and any(runs.glob("*.json")), started)
        children = psutil.Process(started.pid).children(recursive=True)
    finally:
        started.send_signal(signal.SIGKILL)
        started.wait(DEADLINE_S)
    assert children
    _, alive = psutil.wait_procs(children, DEADLINE_S)
    assert not alive
    kept_before = {one: one.read_bytes() for one in runs.glob("*.json")}
    path.write_text(study(base, tmp_path / "out", **few).model_dump_json())
    ended = command("cola_study", "--config", str(path))
    assert ended.code == 0, ended.err
    assert json.loads(ended.out)["missing"] == 0
    assert all(one.read_bytes() == content for one, content in kept_before.items())


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert process.poll() is None, "the study ended before it was looked at"
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_config_that_ships() -> None:
    config = load(GradientStudyConfig, config_file("cola_study.yaml"))
    assert len(config.customers) == 8 and len(config.seeds) == 3
    rows = config.rows()
    assert len(rows) == len(set(rows)) == 4 + 3 * 3 * 4 + 2 * 2 * 4
    assert {row.interval for row in rows} == {1, 2, 4, 8} and Customer(name="language") in config.customers
