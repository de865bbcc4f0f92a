"""`python -m jobs.cola` from text to results: what it writes, how it goes on where it was killed, what it refuses."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from ot_ray.artifacts import Registry, open_bundle
from ot_ray.cola import CustomerRows, Merging
from ot_ray.data import DataConfig, load_sequences
from ot_ray.evaluation import perplexity
from ot_ray.model import plug_in
from ot_ray.store import download_folder, open_store
from ot_ray.training import CustomerBatches
from ot_ray.training.auxiliary_files import read_auxiliary
from tests.artifacts.samples import tiny_tokenizer
from tests.fixtures.models import tokens
from tests.fixtures.s3 import new_bucket
from tests.jobs.conftest import Command
from tests.jobs.scene import listing

ROOT = Path(__file__).parents[2]
LAYERS = "model.decoder.layers"
INSIDE = '["*.layers.0.self_attn.q_proj", "*.layers.5.self_attn.q_proj", "*.layers.[05].fc1"]'
KINDS = {"ann": "{rank: 3, alpha: 6, seed: 1}", "bob": "{kind: linear}", "cid": "{kind: mlp, rank: 2, seed: 2}"}


def customers(place: Path, **own: str) -> str:
    """A list of customers, each with more settings of its own."""
    given = [f"{{name: {name}, data: {{source: {place}/{name}.jsonl}}{more}}}" for name, more in own.items()]
    return f"customers=[{', '.join(given)}]"


THREE = {name: f", auxiliary: {auxiliary}" for name, auxiliary in KINDS.items()}
TWO = {"ann": ", auxiliary: {rank: 3, alpha: 6, seed: 1}", "bob": ", auxiliary: {rank: 2, seed: 2}"}


def arguments(place: Path, *more: str, out: str = "out") -> list[str]:
    """A small run on the scene's model; later settings count more."""
    return [
        "model.name=tiny",
        f"model.source={place}/full",
        "sequence_length=16",
        'sites=["*.q_proj", "*.fc1"]',
        "fitting={lr: 0.02}",
        "run={steps: 6, rows: 2}",
        f"output={place}/{out}",
        *more,
    ]


@pytest.fixture(scope="module")
def texts(sound_scene: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scene's model and bundles beside the text of three customers, for runs that write elsewhere in it."""
    place = tmp_path_factory.mktemp("cola")
    for name in ("full", "bundle", "full-only"):
        (place / name).symlink_to(sound_scene / name)
    for seed, (name, rows) in enumerate({"ann": 24, "bob": 32, "cid": 28}.items()):
        # Each writes in few words of its own, so that there is something to learn.
        low = 2 + 15 * seed
        words = torch.randint(low, low + 15, (rows, 20), generator=torch.Generator().manual_seed(seed)).tolist()
        texts = (" ".join(f"w{i}" for i in row) for row in words)
        (place / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return place


def model_at(place: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(place / "full").eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tokens()).logits


def result_of(command: Command, *arguments: str) -> dict[str, Any]:
    ended = command("cola", *arguments)
    assert ended.code == 0, ended.err
    return json.loads(ended.out)


def tensors_in(place: Path) -> Mapping[str, Tensor]:
    return load_file(place / "auxiliary.safetensors")


def test_three_kinds_at_once_are_learnt_and_written(texts: Path, command: Command, tmp_path: Path) -> None:
    settings = arguments(
        texts, customers(texts, **THREE), "run.evaluate_every=3", f"report={tmp_path / 'report'}", out="three"
    )
    told = result_of(command, *settings)

    out = texts / "three"
    assert {name: row["folders"] for name, row in told["owners"].items()} == {
        "ann": ["ann", "ann/lora"],
        "bob": ["bob"],
        "cid": ["cid"],
    }
    assert all(row["fits"] == 6 for row in told["owners"].values())
    for name in KINDS:
        auxiliary, manifest = read_auxiliary(out / name)
        assert manifest.fits == 6
        assert len(auxiliary.sites) == 12
        row = told["customers"][name]
        assert row["perplexity"] < 0.9 * row["perplexity_before"]
    held_out = load_sequences(DataConfig(source=f"{texts}/ann.jsonl"), tiny_tokenizer(), 16).sequences[-3:]
    tuned = PeftModel.from_pretrained(model_at(texts), str(out / "ann" / "lora"))
    assert told["customers"]["ann"]["perplexity_before"] == pytest.approx(perplexity(model_at(texts), held_out), 1e-4)
    assert told["customers"]["ann"]["perplexity"] == pytest.approx(perplexity(tuned, held_out), rel=1e-4)
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["customers"] == told["customers"]
    assert set(manifest["files"]) == set(listing(out)) - {"manifest.json"}
    _assert_report(tmp_path / "report", told)


def _assert_report(folder: Path, told: Mapping[str, Any]) -> None:
    assert (folder / "chart.png").read_bytes().startswith(b"\x89PNG")
    history = [json.loads(text) for text in (folder / "history.jsonl").read_text().splitlines()]
    assert [row["step"] for row in history] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in history if "validation_loss" in row] == [3, 6]
    assert math.exp(history[-1]["validation_loss/bob"]) == told["customers"]["bob"]["perplexity"]
    page = (folder / "report.html").read_text()
    for name in KINDS:
        row = told["customers"][name]
        assert f"{row['perplexity_before']:.4g}" in page
        assert f"{row['perplexity']:.4g}" in page
    assert "<td>fits, of all auxiliaries</td><td" in page


def test_customers_in_one_pass_learn_what_they_would_alone(texts: Path, command: Command) -> None:
    result_of(command, *arguments(texts, customers(texts, **TWO), "fitting={optimizer: sgd, lr: 0.2}", out="two"))
    for name in TWO:
        own = arguments(
            texts, customers(texts, **{name: TWO[name]}), "fitting={optimizer: sgd, lr: 0.2}", out=f"only-{name}"
        )
        result_of(command, *own)
        together, alone = tensors_in(texts / "two" / name), tensors_in(texts / f"only-{name}" / name)
        assert together.keys() == alone.keys()
        for tensor in together:
            torch.testing.assert_close(together[tensor], alone[tensor], rtol=1e-4, atol=1e-6)


def test_one_data_set_needs_no_list_of_customers(texts: Path, command: Command) -> None:
    told = result_of(
        command,
        *arguments(
            texts,
            f"data.source={texts}/ann.jsonl",
            f"validation.source={texts}/bob.jsonl",
            "fitting={lr: 0.02, schedule: cosine, interval: 2, reduction: mean}",
            out="one",
        ),
    )
    assert list(told["owners"]) == ["customer"]
    assert told["owners"]["customer"]["fits"] == 3
    assert told["customers"]["customer"]["perplexity"] > 1
    identity = json.loads((texts / "one" / "manifest.json").read_text())["identity"]
    assert identity["owners"]["customer"]["fitting"]["fits"] == 3


@pytest.mark.parametrize("merged", [False, True])
def test_collaboration_leaves_the_model_that_everybodys_rows_went_through(
    texts: Path, command: Command, merged: bool
) -> None:
    out = f"collaboration-{merged}"
    told = result_of(
        command,
        *arguments(
            texts,
            customers(texts, **TWO),
            "mode=collaboration",
            "weights={ann: 0.75, bob: 0.5}",
            f"run.merged={merged}",
            out=out,
        ),
    )
    assert told["owners"]["collaboration"]["folders"] == ["collaboration/lora"]
    base = model_at(texts)
    learnt = [(share, read_auxiliary(texts / out / name)[0]) for name, share in (("ann", 0.75), ("bob", 0.5))]
    with Merging(base, learnt[0][1].sites) as merging:
        merging.merge(learnt)
        expected = logits(base)
    opened = PeftModel.from_pretrained(model_at(texts), str(texts / out / "collaboration" / "lora")).eval()
    torch.testing.assert_close(logits(opened), expected, rtol=1e-4, atol=1e-4)
    assert (expected - logits(base)).abs().max() > 0.05


def test_joint_has_one_auxiliary_for_all(texts: Path, command: Command) -> None:
    settings = arguments(texts, customers(texts, ann="", bob=""), "mode=joint", "fit_on=base", out="joint")
    told = result_of(command, *settings)
    assert list(told["owners"]) == ["joint"]
    assert list(told["customers"]) == ["ann", "bob"]
    assert all(row["perplexity"] < row["perplexity_before"] for row in told["customers"].values())
    assert read_auxiliary(texts / "joint" / "joint")[1].customer == "joint"


DIES = """
import os, signal, sys
from ot_ray.training import CustomerBatches
from jobs import cola
from jobs.command import run_command

there = CustomerBatches.__getitem__

def dies(self, number):
    if number == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return there(self, number)

CustomerBatches.__getitem__ = dies
run_command("cola", cola.ColaConfig, cola.run, sys.argv[1:])
"""


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on_to_the_same_end(texts: Path, command: Command, tmp_path: Path) -> None:
    def settings(name: str) -> list[str]:
        return arguments(
            texts,
            customers(texts, **THREE),
            "run={steps: 7, rows: 2, checkpoint_every: 2, evaluate_every: 3, staleness: 1}",
            f"checkpoints={tmp_path / name}",
            f"report={tmp_path / f'report-{name}'}",
            out=name,
        )

    whole = result_of(command, *settings("whole"))
    with (tmp_path / "said").open("wb") as said:
        killed = subprocess.run(
            [sys.executable, "-c", DIES, *settings("killed")],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
            stdout=said,
            stderr=subprocess.STDOUT,
            timeout=300,
        )
    assert killed.returncode == -signal.SIGKILL, (tmp_path / "said").read_text()
    assert not (texts / "killed").exists()
    assert (tmp_path / "killed/cola/step-00000004/commit.json").exists()

    again = result_of(command, *settings("killed"))

    for name in KINDS:
        assert (texts / "whole" / name / "auxiliary.safetensors").read_bytes() == (
            texts / "killed" / name / "auxiliary.safetensors"
        ).read_bytes()
    assert again["customers"] == whole["customers"]
    histories = [
        [json.loads(text) for text in (tmp_path / f"report-{name}/history.jsonl").read_text().splitlines()]
        for name in ("whole", "killed")
    ]
    assert [{**row, **UNTIMED} for row in histories[0]] == [{**row, **UNTIMED} for row in histories[1]]
    changed = command("cola", *settings("killed"), f"output={texts}/changed", "fitting.lr=0.5")
    assert changed.code == 2
    assert "belongs to another run: owners." in changed.err


UNTIMED = dict.fromkeys(("seconds", "tokens_per_s", "fit_wait", "fit_wait_share"), 0.0)


def test_ctrl_c_leaves_a_run_that_goes_on(
    texts: Path, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = [
        *arguments(texts, customers(texts, ann=""), "run.checkpoint_every=2", out="stopped"),
        f"checkpoints={tmp_path / 'kept'}",
    ]
    there = CustomerBatches.__getitem__
    asked: list[int] = []

    def stops(self: CustomerBatches, number: int) -> CustomerRows:
        asked.append(number)
        if number == 3:
            raise KeyboardInterrupt
        return there(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(CustomerBatches, "__getitem__", stops)
        ended = command("cola", *settings)
        assert (ended.code, ended.out) == (130, "")
        assert ended.err.endswith("interrupted\n")
        assert not (texts / "stopped").exists()
        asked.clear()
        patch.setattr(CustomerBatches, "__getitem__", lambda self, number: asked.append(number) or there(self, number))
        assert result_of(command, *settings)["steps"] == 6
    assert asked == [2, 3, 4, 5]


def test_what_a_stopped_upload_left_is_replaced_and_other_things_are_not(
    texts: Path, command: Command, tmp_path: Path
) -> None:
    settings = [*arguments(texts, customers(texts, ann=""), out="left"), f"checkpoints={tmp_path / 'kept'}"]
    (texts / "left/ann").mkdir(parents=True)
    (texts / "left/ann/auxiliary.safetensors").write_bytes(b"half")
    told = result_of(command, *settings)
    assert told["owners"]["ann"]["fits"] == 6
    read_auxiliary(texts / "left/ann")
    again = command("cola", *settings)
    assert again.code == 2
    assert "holds ann/auxiliary.safetensors already" in again.err
    (texts / "mine").mkdir()
    (texts / "mine/notes.txt").write_text("mine")
    other = command("cola", *settings, f"output={texts}/mine")
    assert other.code == 2
    assert "holds notes.txt already" in other.err


def test_results_and_checkpoints_may_be_in_buckets(
    texts: Path, command: Command, s3_server: str, tmp_path: Path
) -> None:
    settings = [
        *arguments(texts, customers(texts, **THREE)),
        "run.checkpoint_every=4",
        f"checkpoints={new_bucket(s3_server)}",
    ]
    output = new_bucket(s3_server)
    told = result_of(command, *settings, f"output={output}")
    download_folder(open_store(output), "", tmp_path / "out")
    assert read_auxiliary(tmp_path / "out" / "cid")[1].fits == 6
    used = command("cola", *settings, f"output={output}")
    assert used.code == 2
    assert "already; name an empty one" in used.err
    # All passes are in the checkpoint.
    again = result_of(command, *settings, f"output={tmp_path / 'again'}")
    assert {**again, "output": output} == told
    for name in KINDS:
        assert (tmp_path / "out" / name / "auxiliary.safetensors").read_bytes() == (
            tmp_path / "again" / name / "auxiliary.safetensors"
        ).read_bytes()


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_workers_fit_the_same(texts: Path, command: Command) -> None:
    for name, more in (("here", ()), ("there", ("workers={count: 2, cpus: 0.5}",))):
        result_of(
            command,
            *arguments(texts, customers(texts, **THREE), "run={steps: 5, rows: 1, staleness: 1}", *more, out=name),
        )
    for name in KINDS:
        here, there = tensors_in(texts / "here" / name), tensors_in(texts / "there" / name)
        assert all(torch.equal(here[tensor], there[tensor]) for tensor in {*here, *there})


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_a_group_of_workers_shares_the_base(texts: Path, command: Command, tmp_path: Path) -> None:
    for name, more in (("own", ""), ("shared", "base_workers={count: 2, cpus: 1}")):
        settings = arguments(
            texts,
            customers(texts, **THREE),
            # Its steps are as large as the gradient says, so that what differs by rounding stays so small.
            "fitting={optimizer: sgd, lr: 0.2, interval: 2}",
            "run={steps: 5, rows: 1, checkpoint_every: 2}",
            f"checkpoints={tmp_path / name}",
            *filter(None, [more]),
            out=name,
        )
        told = result_of(command, *settings)
        assert told["steps"] == 5
        assert [row["fits"] for row in told["owners"].values()] == [3, 3, 3]
    for name in KINDS:
        own, shared = tensors_in(texts / "own" / name), tensors_in(texts / "shared" / name)
        assert own.keys() == shared.keys()
        for tensor in own:
            torch.testing.assert_close(shared[tensor], own[tensor], rtol=1e-3, atol=1e-6)


def test_what_is_learnt_in_a_bundles_adapter_is_plugged_in(texts: Path, command: Command) -> None:
    settings = arguments(
        texts, customers(texts, **TWO), f"sites={INSIDE}", f"bundle.folder={texts}/bundle", out="offsite"
    )
    told = result_of(command, *settings)
    assert told["owners"]["ann"]["folders"] == ["ann", "ann/lora", "ann/adapter"]
    out = texts / "offsite" / "ann"
    ended = command(
        "plug_in",
        "model.name=tiny",
        f"model.source={texts}/full",
        f"bundle.folder={texts}/bundle",
        f"adapter={out}/adapter",
        "tenant=acme",
        f"store={texts}/registry",
    )
    assert ended.code == 0, ended.err
    model_id = json.loads(ended.out)["model_id"]

    bundle = open_bundle(texts / "bundle")
    state = Registry(open_store(f"{texts}/registry")).load_state(model_id)
    plugged = plug_in(model_at(texts), bundle.manifest.plan, state)
    base, auxiliary = model_at(texts), read_auxiliary(out)[0]
    plain = logits(base)
    with Merging(base, auxiliary.sites) as merging:
        merging.merge([(1.0, auxiliary)])
        torch.testing.assert_close(logits(plugged), logits(base), rtol=1e-4, atol=1e-4)
        assert (logits(base) - plain).abs().max() > 0.05
    # The customer, too, can open it on the bundle, where the last layer has another number.
    emulated = PeftModel.from_pretrained(bundle.load_model(), str(out / "adapter"))
    assert any(f"{LAYERS}.3.self_attn.q_proj.lora_A" in name for name, _ in emulated.named_parameters())


@pytest.fixture
def untouched(texts: Path) -> Iterator[None]:
    before = listing(texts)
    yield
    assert listing(texts) == before


MISTAKES = {
    "a site that matches nothing": (['sites=["*.q_porj"]'], ["'*.q_porj' matches no module", "q_proj"]),
    "a site outside the adapter": (
        ['sites=["*.layers.[025].fc1"]', "bundle.folder={place}/bundle"],
        ["site model.decoder.layers.2.fc1 is outside the adapter layers", f"{LAYERS}.0, {LAYERS}.5"],
    ),
    "sites outside all layers": (
        ['sites=["lm_head"]', "bundle.folder={place}/bundle"],
        ["site lm_head is outside the adapter layers"],
    ),
    "other sites in other adapter layers": (
        ['sites=["*.layers.[05].fc1", "*.layers.0.fc2"]', "bundle.folder={place}/bundle"],
        [f"{LAYERS}.5.fc2 is no site", "choose the same sites in each"],
    ),
    "a kind that no bundle takes": (
        [f"sites={INSIDE}", "bundle.folder={place}/bundle", "auxiliary.kind=linear"],
        ["the auxiliary of ann is of kind 'linear'", "leave bundle out"],
    ),
    "a rank that no inspection takes": (
        [f"sites={INSIDE}", "bundle.folder={place}/bundle", "auxiliary.rank=257"],
        ["the rank of ann's auxiliary is 257", "at most 256"],
    ),
    "ranks that together are too many": (
        [f"sites={INSIDE}", "bundle.folder={place}/bundle", "auxiliary.rank=130", "mode=collaboration"],
        ["the ranks of all auxiliaries together are 260", "at most 256"],
    ),
    "a bundle that takes no lora": (
        [f"sites={INSIDE}", "bundle.folder={place}/full-only"],
        ["takes full back, not lora"],
    ),
    "another model's bundle": (
        [f"sites={INSIDE}", "bundle.folder={place}/bundle", "model.name=other"],
        ["the bundle is of model 'tiny', but model.name is 'other'"],
    ),
    "merged, but alone": (["run.merged=true"], ["run.merged is true in mode alone"]),
    "merged mlps": (["run.merged=true", "mode=collaboration", "auxiliary.kind=mlp"], ["auxiliary of ann is an mlp"]),
    "weights of others": (["mode=collaboration", "weights={ann: 1.0}"], ["weights are for ['ann']", "['ann', 'bob']"]),
    "weights in another mode": (["weights={ann: 1.0, bob: 1.0}"], ["weights are for mode collaboration"]),
    "customers and one data set": (["data.source={place}/ann.jsonl"], ["both are set"]),
    "nobody": (["customers=[]"], ["neither is set"]),
    "a name twice": (
        ["customers=[{{name: ann, data: {{source: x}}}}, {{name: ann, data: {{source: x}}}}]"],
        ["customers has 'ann', which stands there twice"],
    ),
    "a name of our own": (["customers=[{{name: joint, data: {{source: x}}}}]"], ["'joint'", "a name of our own"]),
    "joint, but each has its own": (
        ["mode=joint", "customers=[{{name: ann, data: {{source: x}}, auxiliary: {{rank: 2}}}}]"],
        ["mode is 'joint'", "ann has auxiliary, fitting or sites of its own"],
    ),
    "text that is not there": (["customers=[{{name: ann, data: {{source: '{place}/no.jsonl'}}}}]"], ["no.jsonl"]),
    "too little text": (
        ["customers=[{{name: ann, data: {{source: '{place}/ann.jsonl', limit: 1}}}}]", "sequence_length=64"],
        ["the text of ann fills 1 sequences", "validation_share"],
    ),
    "sequences that are too long": (["sequence_length=129"], ["sequence_length is 129", "use 2..128"]),
    "an output in use": (["output={place}/full"], ["holds ", "already; name an empty one"]),
    "checkpoints nowhere": (["run.checkpoint_every=2"], ["checkpoints is not"]),
    "a shared base that is merged": (
        ["base_workers={{}}", "checkpoints=x", "mode=collaboration", "run.merged=true"],
        ["base_workers is set, which needs checkpoints", "run.merged=false"],
    ),
    "a shared base without checkpoints": (["base_workers={{}}"], ["base_workers is set, which needs checkpoints"]),
    "an address without workers": (["address=127.0.0.1:1"], ["set workers={}"]),
    "no validation to evaluate on": (["run.evaluate_every=2", "validation_share=0"], ["validation_share is 0"]),
}


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named_before_anything_runs(name: str, texts: Path, command: Command) -> None:
    settings, says = MISTAKES[name]
    given = [setting.replace("{place}", str(texts)).replace("{{", "{").replace("}}", "}") for setting in settings]
    ended = command("cola", *arguments(texts, customers(texts, ann="", bob="")), *given)
    assert ended.code == 2, ended
    assert ended.out == ""
    assert ended.err.count("error: ") == 1
    for part in says:
        assert part in ended.err


def test_help_names_the_settings(command: Command) -> None:
    ended = command("cola", "--help")
    assert (ended.code, ended.err) == (0, "")
    for setting in ("customers[i].auxiliary", "run.staleness", "workers.count", "bundle.folder", "fitting.interval"):
        assert f"  {setting}  (" in ended.out
