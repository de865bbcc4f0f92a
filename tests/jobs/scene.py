"""A small offsite-tuning scene on disk, sound in every part, and the ways in which the tests spoil it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ot_ray.artifacts import Bundle, generate_key, open_bundle, write_adapter, write_bundle
from ot_ray.model import SplitPlan, emulate, prepare_tuning
from tests.artifacts.samples import tiny_tokenizer
from tests.fixtures.models import VOCAB, tiny_model

DEPTH, PLAN, KEPT = 6, SplitPlan(bottom=1, keep=2, top=1), [0, 3]
POSITIONS = 128

Spoil = Callable[[Path], None]


def build(place: Path) -> None:
    """The owner's model and key, two bundles of it, an adapter of each, and a data set."""
    full = tiny_model("opt", DEPTH)
    full.save_pretrained(place / "full")
    tiny_tokenizer().save_pretrained(place / "full")
    private, _ = generate_key(place / "keys")
    generate_key(place / "other-keys")
    write_data(place / "train.jsonl")
    for name, methods in (("bundle", ("full", "lora")), ("full-only", ("full",))):
        write_bundle(
            place / name,
            emulate(full, PLAN, KEPT),
            tiny_tokenizer(),
            PLAN,
            name="tiny",
            version=name,
            methods=methods,
            recommended={},
            card="# Tiny\n",
            private_key=private,
        )
    _tuned(open_bundle(place / "bundle"), place / "adapter")
    _tuned(open_bundle(place / "full-only"), place / "adapter-of-another")


def _tuned(bundle: Bundle, folder: Path) -> None:
    model = prepare_tuning(bundle.load_model(), PLAN, "full")
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.01)
    write_adapter(folder, model, bundle.manifest, method="full", steps=1, learning_rate=1e-4)


def write_data(path: Path, rows: int = 24) -> None:
    generator = torch.Generator().manual_seed(7)
    words = torch.randint(2, VOCAB, (rows, 20), generator=generator).tolist()
    path.write_text("".join(json.dumps({"text": " ".join(f"w{i}" for i in row)}) + "\n" for row in words))


def line(number: int, text: str) -> Spoil:
    """Put `text` in the place of a line of the training data."""

    def spoil(place: Path) -> None:
        lines = (place / "train.jsonl").read_text().splitlines()
        lines[number - 1] = text
        (place / "train.jsonl").write_text("\n".join(lines) + "\n")

    return spoil


def written(name: str, content: str | bytes) -> Spoil:
    """Put a file there, in place of any other."""

    def spoil(place: Path) -> None:
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return spoil


def removed(name: str) -> Spoil:
    def spoil(place: Path) -> None:
        path = place / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return spoil


def flipped(name: str) -> Spoil:
    """Change one bit in the middle of a file."""

    def spoil(place: Path) -> None:
        data = bytearray((place / name).read_bytes())
        data[len(data) // 2] ^= 1
        (place / name).write_bytes(data)

    return spoil


def cut(name: str) -> Spoil:
    """Leave the first half of a file."""

    def spoil(place: Path) -> None:
        data = (place / name).read_bytes()
        (place / name).write_bytes(data[: len(data) // 2])

    return spoil


def edited(name: str, **changes: object) -> Spoil:
    """Change fields of a JSON file."""

    def spoil(place: Path) -> None:
        values = json.loads((place / name).read_text())
        (place / name).write_text(json.dumps({**values, **changes}))

    return spoil


def tensors(change: Callable[[dict[str, torch.Tensor]], None]) -> Spoil:
    """Change the adapter's tensors, with a manifest that agrees."""

    def spoil(place: Path) -> None:
        path = place / "adapter/adapter.safetensors"
        state = load_file(path)
        change(state)
        save_file(state, path, metadata={"format": "pt"})
        content = path.read_bytes()
        entry = {"bytes": len(content), "sha256": sha256(content).hexdigest()}
        edited("adapter/manifest.json", files={"adapter.safetensors": entry})(place)

    return spoil


def pickled(place: Path) -> None:
    """The adapter as torch.save writes it."""
    state = load_file(place / "adapter/adapter.safetensors")
    (place / "adapter/adapter.safetensors").unlink()
    torch.save(state, place / "adapter/adapter.bin")


def listing(place: Path) -> dict[str, str]:
    """Every file and empty folder below a place, with the files' hashes."""
    found = {}
    for folder, folders, files in os.walk(place):
        for name in files:
            path = Path(folder, name)
            found[str(path.relative_to(place))] = sha256(path.read_bytes()).hexdigest()
        if not folders and not files:
            found[str(Path(folder).relative_to(place))] = "an empty folder"
    return found
