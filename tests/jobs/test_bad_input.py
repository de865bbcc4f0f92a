"""Whatever a user gets wrong: one message that names it, exit code 2, and nothing half-written.

Each row spoils one thing of a sound scene and runs a verb's real command line; the rows run in this
process, and a few again as processes of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from tests.fixtures.models import VOCAB
from tests.jobs.conftest import Command
from tests.jobs.scene import (
    POSITIONS,
    Spoil,
    cut,
    edited,
    flipped,
    line,
    listing,
    pickled,
    removed,
    tensors,
    written,
)

ROOT = Path(__file__).parents[2]
SHORT = "training={steps: 2, batch_size: 2, lr: 1e-3}"
MODEL = ("model.name=tiny", "model.source={place}/full")
SOUND = {
    "tune": ("bundle.folder={place}/bundle", "data.source={place}/train.jsonl", "sequence_length=16", SHORT,
             "output={place}/out"),
    "plug_in": (*MODEL, "bundle.folder={place}/bundle", "adapter={place}/adapter", "tenant=acme",
                "store={place}/registry"),
    "make_emulator": (*MODEL, "model.dtype=float32", "version=v1", "run=r1", "data={{source: {place}/train.jsonl}}",
                      "split={{bottom: 1, keep: 2, top: 1}}", "sequence_length=16", SHORT,
                      "workers={{count: 2, gpus: 0}}", "validation=null", "gate={{}}",
                      "store={place}/owner", "bundles={place}/bundles"),
    "evaluate": (*MODEL, "bundle.folder={place}/bundle", "adapter={place}/adapter", "train.source={place}/train.jsonl",
                 "test.source={place}/train.jsonl", "sequence_length=16", SHORT, "output={place}/report"),
}  # fmt: skip
UNREACHABLE = "s3://bucket/here?endpoint_url=http://127.0.0.1:9&attempts=3&base_delay=0.01"
NO_EMULATOR = "bundle/emulator.safetensors"
FIRST = "model.decoder.layers.0.fc1.bias"


@dataclass(frozen=True)
class Row:
    """One mistake: what it spoils, what is said on the command line, and what the message must hold."""

    verb: str
    says: tuple[str, ...]
    arguments: tuple[str, ...] = ()
    spoil: Spoil | None = None


def nan(state: dict[str, torch.Tensor]) -> None:
    state[FIRST][0] = float("nan")


def misshaped(state: dict[str, torch.Tensor]) -> None:
    state[FIRST] = state[FIRST][:-1].clone()


def extra(state: dict[str, torch.Tensor]) -> None:
    state["model.decoder.layers.9.fc1.bias"] = torch.zeros(2)


def sharded_without(missing: str) -> Spoil:
    """Weights in two shards, of which one is not there."""

    def spoil(place: Path) -> None:
        weights = load_file(place / "full/model.safetensors")
        (place / "full/model.safetensors").unlink()
        names = sorted(weights)
        held = {name: f"model-{1 + (i > len(names) // 2)}.safetensors" for i, name in enumerate(names)}
        for shard in sorted(set(held.values())):
            save_file({name: weights[name] for name in names if held[name] == shard}, place / "full" / shard)
        (place / "full/model.safetensors.index.json").write_text(json.dumps({"weight_map": held}))
        (place / missing).unlink()

    return spoil


def other_tokenizer(place: Path) -> None:
    words = {"<pad>": 0, "</s>": 1, **{f"w{i}": i for i in range(2, 2 * VOCAB)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="</s>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(place / "full")


def without_tokenizer(place: Path) -> None:
    for path in (place / "full").glob("tokenizer*"):
        path.unlink()


ROWS = {
    # The command line and the configuration.
    "an unknown switch": Row("tune", ("--faster", "--help"), ("--faster",)),
    "a word that is no setting": Row("tune", ("'fast'", "section.key=value"), ("fast",)),
    "a typo": Row("tune", ("unknown key training.stepz", "did you mean steps?"), ("training.stepz=3",)),
    "a typo in the file": Row(
        "tune", ("bad.yaml", "unknown key sequense_length", "did you mean sequence_length?"),
        ("--config", "{place}/bad.yaml"), written("bad.yaml", "sequense_length: 16\n")),
    "a file that is no YAML": Row("tune", ("bad.yaml", "not valid YAML"), ("--config", "{place}/bad.yaml"),
                                  written("bad.yaml", "a: [1\n")),
    "no such file of settings": Row("tune", ("nowhere.yaml", "no such"), ("--config", "{place}/nowhere.yaml")),
    "a folder for a file of settings": Row("tune", ("/full", "directory"), ("--config", "{place}/full")),
    "a wrong type": Row("tune", ("training.steps is 'many'", "integer"), ("training.steps=many",)),
    "a value out of range": Row("tune", ("training.steps is -1", "greater than or equal to 0"), ("training.steps=-1",)),
    "neither steps nor epochs": Row("tune", ("steps is 0 and epochs is None", "set one"), ("training.steps=0",)),
    "steps and epochs": Row("tune", ("training.steps is", "and epochs is 3; set one of them"), ("epochs=3",)),
    "an unknown method": Row("tune", ("method is 'bitfitt'", "did you mean bitfit?"), ("method=bitfitt",)),
    "two bundles named": Row("tune", ("bundle", "name a folder, or a store"), ("bundle.store={place}/bundles",)),
    "a version with a path in it": Row("make_emulator", ("version is '../1'",), ("version=../1",)),
    "a tenant with a path in it": Row("plug_in", ("tenant is 'a/b'",), ("tenant=a/b",)),
    "a ratio of nothing": Row("plug_in", ("max_perplexity_ratio is 1.1", "set data.source"),
                              ("max_perplexity_ratio=1.1",)),
    # Data.
    "no such data": Row("tune", ("trian.jsonl", "did you mean train.jsonl?"), ("data.source={place}/trian.jsonl",)),
    "a broken line": Row("tune", ("train.jsonl, line 3", "not valid JSON"), (), line(3, '{"text": "w2')),
    "a line of the wrong type": Row("tune", ("train.jsonl, line 5", "text is a number"), (), line(5, '{"text": 5}')),
    "a line without text": Row("tune", ("train.jsonl, line 2", "'words'"), (), line(2, '{"words": "w2"}')),
    "an unknown role": Row("tune", ("train.jsonl, line 4", "'robot'"), (),
                           line(4, '{"messages": [{"role": "robot", "content": "w2"}]}')),
    "no example left": Row("tune", ("train.jsonl", "nothing is left of"), (),
                           written("train.jsonl", '{"text": ""}\n{"text": " "}\n')),
    "an empty file": Row("tune", ("train.jsonl", "no documents"), (), written("train.jsonl", "")),
    "no UTF-8": Row("tune", ("train.jsonl, line 1", "UTF-8"), (), written("train.jsonl", b"\xff\xfe{}\n")),
    "no data for the owner": Row("make_emulator", ("nowhere.jsonl",), ("data.source={place}/nowhere.jsonl",)),
    "a broken line of the owner": Row("make_emulator", ("train.jsonl, line 1",), (), line(1, "{")),
    "a longer sequence than the model's": Row(
        "tune", (f"sequence_length is {POSITIONS + 1}", f"use 2..{POSITIONS}"), (f"sequence_length={POSITIONS + 1}",)),
    "a longer sequence to distil on": Row(
        "make_emulator", (f"sequence_length is {POSITIONS + 1}", f"use 2..{POSITIONS}"),
        (f"sequence_length={POSITIONS + 1}",)),
    # The owner's model.
    "k larger than M": Row("make_emulator", ("split.keep is 7", "only 4 layers", "use 1..4"), ("split.keep=7",)),
    "adapters of all layers": Row("make_emulator", ("split.bottom + split.top is 6", "use at most 5"),
                                  ("split.bottom=5",)),
    "an unsupported architecture": Row("make_emulator", ("model_type is 'gpt_neox'", "use one of: bloom"), (),
                                       edited("full/config.json", model_type="gpt_neox")),
    "no such model": Row("make_emulator", ("model.source is", "nowhere", "name a folder"),
                         ("model.source={place}/nowhere",)),
    "a model on a hub out of reach": Row("plug_in", ("model.source is 'nobody/nothing'", "name a folder"),
                                         ("model.source=nobody/nothing",)),
    "a model's configuration that is no JSON": Row("make_emulator", ("model.source is", "/full", "config.json"), (),
                                                   written("full/config.json", "{")),
    "weights cut off": Row("plug_in", ("model.safetensors", "/full"), (), cut("full/model.safetensors")),
    "no weights": Row("plug_in", ("neither model.safetensors nor", "/full"), (), removed("full/model.safetensors")),
    "no key": Row("make_emulator", ("nowhere.pem",), ("private_key={place}/nowhere.pem",)),
    "a shard that is missing": Row("make_emulator", ("model-2.safetensors", "/full"), (),
                                   sharded_without("full/model-2.safetensors")),
    "a shard cut off": Row("make_emulator", ("model.safetensors", "/full"), (), cut("full/model.safetensors")),
    "weights that are no safetensors": Row("make_emulator", ("model.safetensors", "/full"), (),
                                           written("full/model.safetensors", b"\x80\x04K\x01." * 99)),
    "a tokenizer of another model": Row("make_emulator", ("the tokenizer has", f"{VOCAB} embeddings"), (),
                                        other_tokenizer),
    "no tokenizer": Row("make_emulator", ("the tokenizer holds 1 special tokens and no others",), (),
                        without_tokenizer),
    "a gate without text": Row("make_emulator", ("gate.min_gap is 0.1", "set validation.source"),
                               ("gate={{min_gap: 0.1}}",)),
    "no held-out text": Row("make_emulator", ("nowhere.jsonl",), ("validation={{source: {place}/nowhere.jsonl}}",)),
    "a batch for fewer workers": Row("make_emulator", ("training.batch_size is 2", "up to 3 workers"),
                                     ("workers={{count: [1, 3]}}",)),
    "fewer workers at most than at least": Row("make_emulator", ("workers.count is [3, 2]",),
                                               ("workers={{count: [3, 2]}}",)),
    "an unknown kind of machine": Row("make_emulator", ("hardware is 'z9'", "h200"), ("plan=true", "hardware=z9")),
    "a plan for unnamed GPUs": Row("make_emulator", ("hardware is not set", "hardware=h200"),
                                   ("--plan", "workers={{count: 1, gpus: 1}}")),
    # Bundles.
    "no bundle": Row("tune", ("nowhere",), ("bundle.folder={place}/nowhere",)),
    "a folder that is no bundle": Row("tune", ("/full is no valid bundle", "manifest.json is missing"),
                                      ("bundle.folder={place}/full",)),
    "a changed byte": Row("tune", ("emulator.safetensors was changed", "fetch it again"), (), flipped(NO_EMULATOR)),
    "a missing file": Row("tune", ("emulator.safetensors is missing", "fetch it again"), (), removed(NO_EMULATOR)),
    "an extra file": Row("tune", ("extra.json is not in the manifest", "remove it"), (),
                         written("bundle/extra.json", "{}")),
    "code in a bundle": Row("tune", ("modeling.py", "never opened"), (), written("bundle/modeling.py", "print()")),
    "another owner's key": Row("tune", ("is signed with key", "ask the owner"),
                               ("bundle.public_key={place}/other-keys/public.pem",)),
    "a version that is not published": Row(
        "tune", ("version 9 of tiny is not published", "published versions: none"),
        ("bundle={{store: {place}/bundles, model: tiny, version: '9'}}",)),
    "a method that is not taken back": Row("tune", ("method is 'lora'", "use full"),
                                           ("bundle.folder={place}/full-only", "method=lora")),
    # Adapters.
    "no adapter": Row("plug_in", ("nowhere",), ("adapter={place}/nowhere",)),
    "an adapter of another bundle": Row("plug_in", ("the adapter belongs to bundle tiny-full-only",),
                                        ("adapter={place}/adapter-of-another",)),
    "a missing tensor": Row("plug_in", (f"tensor {FIRST} is missing",), (), tensors(lambda state: state.pop(FIRST))),
    "an extra tensor": Row("plug_in", ("layers.9.fc1.bias is not part of the adapter",), (), tensors(extra)),
    "a misshaped tensor": Row("plug_in", (f"tensor {FIRST} has shape (47,), not (48,)",), (), tensors(misshaped)),
    "a tensor that is not finite": Row("plug_in", (f"tensor {FIRST} holds 1 values that are not finite",), (),
                                       tensors(nan)),
    "a pickled adapter": Row("plug_in", ("adapter.bin", "never opened"), (), pickled),
    "an adapter too large": Row("plug_in", ("at most 1000 are taken",), ("limits.max_bytes=1000",)),
    "a plug-in that is worse": Row(
        "plug_in", ("max_perplexity_ratio is 0.01", "not promoted"),
        ("data.source={place}/train.jsonl", "sequence_length=16", "max_perplexity_ratio=0.01")),
    "an adapter of another bundle, evaluated": Row("evaluate", ("the adapter belongs to bundle tiny-full-only",),
                                                   ("adapter={place}/adapter-of-another",)),
    # Outputs and stores.
    "an output in use": Row("tune", ("output is", "/adapter'", "holds adapter.safetensors already"),
                            ("output={place}/adapter",)),
    "an output below a file": Row("tune", ("output is", "train.jsonl is a file"), ("output={place}/train.jsonl/out",)),
    "a report below a file": Row("evaluate", ("output is", "train.jsonl is a file"),
                                 ("output={place}/train.jsonl/out",)),
    "an output out of reach": Row("tune", ("s3://bucket/here", "attempt 3 of 3"), (f"output={UNREACHABLE}",)),
    "a bundle out of reach": Row(
        "tune", ("s3://bucket/here", "attempt 3 of 3"),
        (f"bundle={{{{store: '{UNREACHABLE}', model: tiny, version: '1'}}}}",)),
    "an unknown kind of store": Row("plug_in", ("gs://", "s3://bucket/prefix"), ("store=gs://bucket",)),
    # Training.
    "a loss that is not finite": Row("tune", ("the loss became", "lower training.lr"),
                                     ("training.lr=1e30", "training.steps=6")),
}  # fmt: skip


def arguments_of(row: Row, place: Path) -> list[str]:
    # A row that names a whole section replaces it.
    named = {argument.partition("=")[0] for argument in row.arguments}
    sound = [argument for argument in SOUND[row.verb] if argument.partition("=")[0].partition(".")[0] not in named]
    return [argument.replace("{place}", str(place)).replace("{{", "{").replace("}}", "}")
            for argument in (*sound, *row.arguments)]  # fmt: skip


def messages(err: str) -> list[str]:
    """What stands on standard error besides progress."""
    return [text for text in err.splitlines() if text and "it/s" not in text and "s/step" not in text
            and "step/s" not in text]  # fmt: skip


@pytest.fixture
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"ACCESS_KEY_ID": "key", "SECRET_ACCESS_KEY": "secret", "DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)


@pytest.mark.usefixtures("credentials")
@pytest.mark.parametrize("name", ROWS)
def test_a_mistake_is_named_and_nothing_is_left(name: str, scene: Path, command: Command) -> None:
    row = ROWS[name]
    if row.spoil is not None:
        row.spoil(scene)
    before = listing(scene)
    ended = command(row.verb, *arguments_of(row, scene))
    assert ended.code == 2, ended
    assert ended.out == ""
    assert ended.err.count("error: ") == 1
    (message,) = messages(ended.err)
    assert message.startswith("error: ")
    for part in row.says:
        assert part in message
    assert listing(scene) == before


@pytest.mark.parametrize("verb", ["tune", "plug_in"])
def test_without_a_mistake_the_same_command_works(verb: str, scene: Path, command: Command) -> None:
    before = listing(scene)
    ended = command(verb, *arguments_of(Row(verb, ()), scene))
    assert ended.code == 0, ended.err
    new = listing(scene).keys() - before.keys()
    assert new
    assert all(name.startswith(("out/", "registry/")) for name in new)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a typo", "a changed byte", "a tensor that is not finite"])
def test_the_same_as_a_process_of_its_own(name: str, scene: Path) -> None:
    row = ROWS[name]
    if row.spoil is not None:
        row.spoil(scene)
    before = listing(scene)
    command = [sys.executable, "-m", f"jobs.{row.verb}", *arguments_of(row, scene)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=ROOT)
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert messages(ended.stderr)[0].startswith("error: ")
    assert len(messages(ended.stderr)) == 1
    assert all(part in ended.stderr for part in row.says)
    assert listing(scene) == before
