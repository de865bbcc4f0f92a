"""`jobs.study` for real on a tiny model: its numbers by hand, what it keeps, what it says of rows that fail."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import PreTrainedModel

from jobs.studies.config import Axes, Change, Row, StudyConfig
from jobs.studies.keeping import kept_result
from jobs.studies.parts import Contents, Parts, RowParts
from jobs.studies.running import compute_part
from jobs.studies.texts import read_texts, set_apart
from jobs.studies.work import Texts
from jobs.study import run
from ot_ray.artifacts import load_full, open_model_source
from ot_ray.config import parse
from ot_ray.data import BatchStream, collate, load_sequences
from ot_ray.errors import ConfigError, StudyError
from ot_ray.evaluation import perplexity
from ot_ray.launch.cluster import ClusterAddress
from ot_ray.model import (
    DistillLoss,
    DistillModel,
    ModelConfig,
    compress,
    emulate,
    load_emulator,
    merged_adapter_state,
    plug_in,
    prepare_tuning,
    uniform_layers,
)
from ot_ray.model.choice import smaller_layers
from ot_ray.model.packed import with_smaller_layers
from ot_ray.store import LocalStore
from ot_ray.training import TorchEngine, fit, train
from tests.fixtures.models import tiny_image_model
from tests.jobs.conftest import Command
from tests.jobs.scene import DEPTH, write_data

SMALL = {"steps": 2, "batch_size": 2, "lr": 1e-3}
FIGURES = {"figure3.png", "figure4.png", "frontier.png", "figure3.csv", "figure4.csv"}
TABLES = {f"{name}.{kind}" for name in ("table1", "table4", "table5", "layers", "rows") for kind in ("csv", "png")}


def study(scene: Path, **settings: Any) -> StudyConfig:
    text = {"source": str(scene / "train.jsonl")}
    write_data(scene / "test.jsonl", rows=6)
    values: dict[str, Any] = {
        "model": {"name": "tiny", "source": str(scene / "full")},
        "data": {"public": text, "train": text, "test": {"source": str(scene / "test.jsonl")}},
        "sequence_length": 16,
        "distil": SMALL,
        "tune": SMALL,
        "centre": {"bottom": 1, "keep": 2, "top": 1, "steps": 2, "lr": 1e-3},
        "output": str(scene / "study"),
        **settings,
    }
    return parse(StudyConfig, values, "the test")


def parts_of(config: StudyConfig) -> tuple[Texts, list[RowParts]]:
    assert config.model is not None
    source = open_model_source(config.model)
    texts, contents = read_texts(config, source)
    named = Parts(config, config.model, DEPTH, contents, LocalStore(config.output).url)
    return texts, [row for _, row in named.rows()]


def in_turn(config: StudyConfig) -> list[dict[str, Any]]:
    """The rows of a study, computed in this process."""
    texts, rows = parts_of(config)
    found = []
    for row in rows:
        store = LocalStore(config.output)
        for part in (row.zero, row.reference, row.emulator):
            compute_part(part, texts, store)
        found.append(compute_part(row.tuned, texts, store, row))
    return found


def layer_bytes(model: PreTrainedModel, place: int) -> int:
    state = model.model.decoder.layers[place].state_dict()  # type: ignore[union-attr,operator,index]
    return sum(tensor.numel() * tensor.element_size() for tensor in state.values())


@pytest.mark.parametrize(
    "row",
    [
        {},
        {"method": "lora", "lr": 2e-3, "reference_lr": 1e-3},
        {"method": "bottleneck", "bottleneck": {"size": 4}},
        {"keep": "all", "emulator": {"bits": 4, "group_size": 8}, "method": "bitfit"},
        {"keep": 3, "emulator": {"sparsity": 0.5}, "distilled": False},
        {"emulator": {"attention_rank": 0.25, "mlp_channels": 0.5}, "distilled": False},
    ],
    ids=["full", "lora", "bottleneck", "quantized", "pruned", "factored"],
)
def test_a_row_is_what_the_library_says_step_by_step(scene: Path, row: dict[str, Any]) -> None:
    config = study(scene, centre={"bottom": 1, "keep": 2, "top": 1, "steps": 2, "lr": 1e-3, **row}, seeds=[3])
    (found,) = in_turn(config)
    assert config.model is not None and config.data is not None
    tokenizer = open_model_source(config.model).tokenizer()
    public, learnt, test = (
        load_sequences(part, tokenizer, 16).sequences
        for part in (config.data.public, config.data.train, config.data.test)
    )
    centre, seed = config.centre, 3
    plan = centre.plan(DEPTH)
    kept = uniform_layers(DEPTH - 2, plan.keep)

    full = load_full(config.model)
    emulated = emulate(full, plan, kept)
    if centre.distilled:
        torch.manual_seed(seed)
        module = DistillModel(load_full(config.model), plan, kept, DistillLoss(), emulator=centre.emulator)
        distilling = config.distil.model_copy(update={"seed": seed})
        train(TorchEngine(module, distilling), BatchStream(public, 2, seed), distilling)
        load_emulator(emulated, plan, module.emulator_state())
    elif centre.emulator.factored:
        batches = [collate(public[i : i + 8]) for i in range(0, len(public), 8)]
        start = smaller_layers(full, plan, kept, centre.emulator, batches)
        load_emulator(with_smaller_layers(emulated, plan, centre.emulator), plan, start)
    compress(emulated, plan, centre.emulator)
    zero, emulator_zero = perplexity(full, test), perplexity(emulated, test)
    torch.manual_seed(seed)
    tuned = prepare_tuning(emulated, plan, centre.method, centre.lora, centre.bottleneck)
    fit(tuned, learnt, config.tune.model_copy(update={"seed": seed, "lr": centre.lr}))
    reference = load_full(config.model).requires_grad_(True)
    fit(reference, learnt, config.tune.model_copy(update={"seed": seed, "lr": 1e-3}))
    state = merged_adapter_state(tuned, plan)

    assert found["settings"] == {
        "full_zero_shot": zero,
        "emulator_zero_shot": emulator_zero,
        "full_fine_tuned": perplexity(reference, test),
        "ot_emulator": perplexity(tuned, test),
        "ot_plug_in": perplexity(plug_in(full, plan, state), test),
    }
    assert len(set(found["settings"].values())) == 5 or centre.emulator.bits is not None
    assert found["kept"] == kept
    whole = sum(layer_bytes(full, place) for place in range(1, DEPTH - 1))
    assert found["ratio"] == sum(layer_bytes(emulated, place) for place in range(1, 1 + plan.keep)) / whole
    plain = not centre.emulator.packed and not centre.emulator.factored
    assert found["ratio"] == 0.5 if plain else 0.05 < found["ratio"] < 0.7


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_command_measures_keeps_and_reports(scene: Path, local_ray: ClusterAddress, command: Command) -> None:
    config = study(
        scene,
        seeds=[0, 1],
        axes={
            "methods": [{"method": "full"}, {"method": "bitfit"}],
            "positions": [{"bottom": 2, "top": 0}],
            "compressions": [{"keep": "all", "emulator": {"sparsity": 0.5}}],
            "distilled": [{"distilled": False}],
        },
    )
    (scene / "study.yaml").write_text(json.dumps(config.model_dump(mode="json", exclude_none=True)))
    ended = command("study", "--config", str(scene / "study.yaml"))
    assert ended.code == 0, ended.err
    said = json.loads(ended.out)
    assert (said["configurations"], said["measured"], said["missing"]) == (5, 10, 0)
    output = scene / "study"
    assert {path.name for path in output.iterdir() if path.is_file()} == {"study.md"} | FIGURES | TABLES
    page = (output / "study.md").read_text()
    for part in ("Table 1", "Table 2", "Table 3", "Table 4", "Table 5", "Table 6", "Figure 3", "Figure 4"):
        assert f"## {part}" in page
    listed = list(csv.DictReader(io.StringIO((output / "rows.csv").read_text())))
    assert [row["configuration"] for row in listed] == [
        "1-2-1 full", "1-2-1 bitfit", "2-2-0 full", "1-4-1 full, 50% pruned", "1-2-1 full, not distilled",
    ]  # fmt: skip

    # Nothing is shared that differs, and nothing computed twice that is the same.
    counts = {place.name: len(list(place.glob("*.json"))) for place in output.iterdir() if place.is_dir()}
    assert counts == {"zero-shot": 1, "fine-tuned": 2, "emulators": 7, "rows": 10}
    before = {path: path.stat().st_mtime_ns for path in output.glob("*/*")}
    assert command("study", "--config", str(scene / "study.yaml")).code == 0
    assert {path: path.stat().st_mtime_ns for path in output.glob("*/*")} == before
    one = next(iter((output / "rows").glob("*.json")))
    one.unlink()
    partial = command("study", "--config", str(scene / "study.yaml"), "--report-only")
    assert partial.code == 0 and json.loads(partial.out)["missing"] == 1
    assert "was not computed" in (output / "study.md").read_text()
    assert command("study", "--config", str(scene / "study.yaml")).code == 0
    assert one.exists() and "was not computed" not in (output / "study.md").read_text()


@pytest.mark.slow
def test_rows_that_fail_are_named_and_the_others_kept(scene: Path, local_ray: ClusterAddress, command: Command) -> None:
    config = study(scene, extra=[{"lr": 1e30, "reference_lr": 1e-3}, {"label": "and its emulator", "lr": 5e-4}])
    (scene / "study.yaml").write_text(json.dumps(config.model_dump(mode="json", exclude_none=True)))
    ended = command("study", "--config", str(scene / "study.yaml"))
    assert ended.code == 2
    assert "1 rows failed" in ended.err and "1-2-1 full, lr 1e+30, seed 0: the loss became nan at step 2" in ended.err
    assert "Traceback" not in ended.err
    assert len(list((scene / "study/rows").glob("*.json"))) == 2, "a failure is not kept, so that it is tried again"
    assert "- failed: 1-2-1 full, lr 1e+30, seed 0" in (scene / "study/study.md").read_text()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_interrupted_study_leaves_what_was_done_and_no_process(scene: Path) -> None:
    config = study(scene, distil={**SMALL, "steps": 100_000}, num_cpus=2)
    (scene / "study.yaml").write_text(json.dumps(config.model_dump(mode="json", exclude_none=True)))
    environment = {name: value for name, value in os.environ.items() if name not in ("RAY_AUTH_MODE", "RAY_ADDRESS")}
    process = subprocess.Popen(
        [sys.executable, "-m", "jobs.study", "--config", str(scene / "study.yaml")],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,
    )
    family = [psutil.Process(process.pid)]
    try:
        deadline = time.monotonic() + 300
        while not list((scene / "study").glob("fine-tuned/*.json")) and process.poll() is None:
            assert time.monotonic() < deadline, "the reference did not come"
            time.sleep(0.2)
        family += family[0].children(recursive=True)
        os.killpg(process.pid, signal.SIGINT)
        said, _ = process.communicate(timeout=120)
        assert process.returncode == 130 and said.rstrip().endswith("interrupted"), said
        _, alive = psutil.wait_procs(family, timeout=60)
        assert [one for one in alive if one.status() != psutil.STATUS_ZOMBIE] == []
    finally:
        for one in family:
            with contextlib.suppress(psutil.Error):
                one.kill()
    assert not list((scene / "study").glob("emulators/*")), "what was not finished is not there"
    assert not (scene / "study/study.md").exists()


@pytest.mark.slow
def test_workers_find_a_model_that_is_named_from_here(
    scene: Path, local_ray: ClusterAddress, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Ray's workers run in the folder in which Ray was started.
    monkeypatch.chdir(scene)
    text = {"source": "train.jsonl"}
    data = {"public": text, "train": text, "test": {"source": "test.jsonl"}}
    found = run(study(scene, model={"name": "tiny", "source": "full"}, data=data, output="study"))
    assert (found["measured"], found["missing"]) == (1, 0)
    assert len(list((scene / "study/rows").glob("*.json"))) == 1


@pytest.mark.slow
def test_a_broken_reference_breaks_its_rows_alone(scene: Path, local_ray: ClusterAddress) -> None:
    with pytest.raises(StudyError, match=r"(?s)1 rows failed.*with a bad reference, seed 0: the loss became nan"):
        run(study(scene, extra=[{"label": "with a bad reference", "reference_lr": 1e30}]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"centre": {"bottom": 4, "top": 2}}, r"centre\[0\]: split.bottom \+ split.top is 6"),
        ({"centre": {"bottom": 0, "top": 0}}, r"centre\[0\]: bottom and top are both 0"),
        ({"axes": {"positions": [{"keep": 2}, {"keep": 5}]}}, r"axes.positions\[1\]: split.keep is 5, but only 4"),
        ({"extra": [{"top": 6}]}, r"extra\[0\]: split.bottom \+ split.top is 7"),
        ({"sequence_length": 4096}, "sequence_length is 4096"),
        ({"other": {"efficiency": "nowhere.json"}}, "other.efficiency names 'nowhere.json', which cannot be read"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_runs(scene: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(study(scene, **settings))
    assert not (scene / "study").exists()


def test_a_model_of_images_is_refused(scene: Path) -> None:
    tiny_image_model("clip", DEPTH).save_pretrained(scene / "images")
    with pytest.raises(ConfigError, match=r"type clip, which takes images, and jobs\.study is for language models"):
        run(study(scene, model={"name": "images", "source": str(scene / "images")}))
    assert not (scene / "study").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"axes": {"position": []}}, "unknown key axes.position; did you mean positions"),
        ({"extra": [{"bottom": None}]}, "bottom is null"),
        ({"extra": [{"methd": "full"}]}, "unknown key extra.0.methd; did you mean method"),
        ({"seeds": [1, 1]}, "seeds is .1, 1.; give different"),
        ({"seeds": []}, "seeds"),
        ({"style": "wikitext"}, "style is 'wikitext', but data names texts of its own"),
    ],
)
def test_settings_that_mean_nothing_are_refused(scene: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        study(scene, **settings)


def test_another_verbs_file_has_to_be_of_that_verb(scene: Path) -> None:
    (scene / "some.json").write_text('{"results": {}}')
    with pytest.raises(ConfigError, match=r"no result of jobs\.benchmark efficiency"):
        run(study(scene, other={"efficiency": str(scene / "some.json")}))
    with pytest.raises(ConfigError, match=r"no result of jobs\.evaluate"):
        run(study(scene, other={"evaluations": [str(scene / "some.json")]}))
    (scene / "some.json").write_text("{")
    with pytest.raises(ConfigError, match="which is no JSON"):
        run(study(scene, other={"efficiency": str(scene / "some.json")}))


def test_parts_are_named_by_what_decides_them() -> None:
    config = parse(StudyConfig, {"distil": SMALL, "tune": SMALL}, "the test")
    model, contents = ModelConfig(name="m", source="nowhere"), Contents("model", "public", "train", "test")

    def keys(change: Change, contents: Contents = contents, **settings: Any) -> RowParts:
        changed = config.model_copy(update={"centre": change.of(config.centre), **settings})
        return next(row for _, row in Parts(changed, model, 12, contents, "store").rows())

    plain = keys(Change())
    lora = keys(Change(method="lora"))
    assert lora.emulator.key == plain.emulator.key and lora.tuned.key != plain.tuned.key
    # The other methods' settings decide nothing.
    assert keys(parse(Change, {"lora": {"rank": 9}}, "")).tuned.key == plain.tuned.key
    assert keys(parse(Change, {"method": "lora", "lora": {"rank": 9}}, "")).tuned.key != lora.tuned.key
    slower = keys(Change(lr=1e-5))
    assert slower.reference.key != plain.reference.key and slower.emulator.key == plain.emulator.key
    assert keys(Change(lr=1e-5, reference_lr=5e-4)).reference.key == plain.reference.key
    assert keys(Change(distil_steps=9)).emulator.key != plain.emulator.key
    other = keys(Change(), seeds=(7,))
    assert other.emulator.key != plain.emulator.key and other.zero.key == plain.zero.key
    assert keys(Change(distilled=False), seeds=(7,)).emulator.key == keys(Change(distilled=False)).emulator.key
    for changed in (Contents("x", "public", "train", "test"), Contents("model", "x", "train", "test"),
                    Contents("model", "public", "x", "test"), Contents("model", "public", "train", "x")):  # fmt: skip
        assert keys(Change(), changed).tuned.key != plain.tuned.key
    # How it is computed is not among what is computed.
    quick = keys(Change(), tune=config.tune.model_copy(update={"micro_batch_size": 1}))
    assert quick.tuned.key == plain.tuned.key


def test_a_change_may_unset_what_the_centre_sets() -> None:
    centre = Row(distil_steps=9, reference_lr=1e-5, lr=1e-3)
    assert Change().of(centre) == centre
    assert parse(Change, {"distil_steps": None}, "").of(centre) == Row(reference_lr=1e-5, lr=1e-3)
    found = parse(Change, {"reference_lr": None, "distil_steps": None, "keep": "all"}, "").of(centre)
    assert found == Row(lr=1e-3, keep="all")
    with pytest.raises(ConfigError, match="lr is null, which is no value of it"):
        parse(Change, {"lr": None}, "")


def test_keep_all_follows_the_model() -> None:
    row = Row(bottom=3, keep="all", top=1)
    assert str(row.plan(12)) == "3-8-1" and str(row.plan(5)) == "3-1-1"


def test_a_result_that_cannot_be_read_counts_as_missing(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    assert kept_result(store, "rows/a.json") is None
    for text in ("{", "[]"):
        store.write("rows/a.json", text.encode())
        assert kept_result(store, "rows/a.json") is None
    store.write("rows/a.json", b'{"perplexity": 2.0}')
    assert kept_result(store, "rows/a.json") == {"perplexity": 2.0}


def test_text_in_wikitexts_style() -> None:
    text = "A well-known 1,000.5 thing's (x, y): \"don't\"\n\n  self.x = [1]"
    assert set_apart(text) == (
        " A well @-@ known 1 @,@ 000 @.@ 5 thing 's ( x , y ) : \" don 't \" \n  \n self . x = [ 1 ] "
    )
    assert set_apart("over - there") == " over - there "


def test_the_config_that_ships_fits_both_bases() -> None:
    from jobs.command import config_file
    from ot_ray.config import load

    config = load(StudyConfig, config_file("study.yaml"))
    for depth in (10, 12):
        config.check(depth)
    assert all(len(getattr(config.axes, name)) >= 2 for name in Axes.model_fields)
    methods = [change.of(config.centre).method for change in config.axes.methods]
    assert methods == ["full", "lora", "bottleneck", "bitfit"]
