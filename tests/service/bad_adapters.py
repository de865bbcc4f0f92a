"""Malformed adapters and announcements of adapters, made by hand: how each is spoilt, and what is said of it."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.artifacts.hostile import Change, change_config, change_tensors, put, relist, spoil

FULL = "model.decoder.layers.0.fc1.weight"
LORA = "base_model.model.model.decoder.layers.0.self_attn.q_proj.lora_B.weight"
DOWN = "model.decoder.layers.0.fc2.bottleneck.down.weight"
BIAS = "model.decoder.layers.0.fc1.bias"
WEIGHTS = {"full": "adapter.safetensors", "lora": "adapter_model.safetensors"}


@dataclass(frozen=True)
class Bad:
    """One malformed adapter."""

    method: str
    spoil: Callable[[Path], None]
    reason: str
    id: str = field(default="")


def tensors(method: str, change: Change, reason: str, name: str) -> Bad:
    return Bad(method, lambda folder: change_tensors(folder, change), reason, name)


def config(reason: str, **changes: Any) -> Bad:
    return Bad("lora", lambda folder: change_config(folder, **changes), reason, f"config {', '.join(changes)}")


def manifest(reason: str, name: str, **changes: Any) -> Bad:
    def change(folder: Path) -> None:
        path = folder / "manifest.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return Bad("full", change, reason, f"manifest {name}")


def text(data: bytes, reason: str, name: str) -> Bad:
    return Bad("full", lambda folder: (folder / "manifest.json").write_bytes(data) and None, reason, f"manifest {name}")


def header(change: Callable[[dict[str, Any]], Any], reason: str, name: str) -> Bad:
    """A file whose header is what no library writes."""

    def rewrite(folder: Path) -> None:
        path = folder / "adapter.safetensors"
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        values = json.loads(data[8 : 8 + length])
        changed = change(values)
        new = changed if isinstance(changed, bytes) else json.dumps(values).encode()
        path.write_bytes(len(new).to_bytes(8, "little") + new + data[8 + length :])
        relist(folder)

    return Bad("full", rewrite, reason, f"header {name}")


def raw(data: Callable[[bytes], bytes], reason: str, name: str) -> Bad:
    def rewrite(folder: Path) -> None:
        path = folder / "adapter.safetensors"
        path.write_bytes(data(path.read_bytes()))
        relist(folder)

    return Bad("full", rewrite, reason, f"file {name}")


def twice(values: dict[str, Any]) -> bytes:
    name = next(name for name in values if name != "__metadata__")
    return f"{json.dumps(values)[:-1]}, {json.dumps(name)}: {json.dumps(values[name])}}}".encode()


def renamed(new: str) -> Callable[[dict[str, Any]], None]:
    return lambda values: values.update({new: values.pop(FULL)})


def entry(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda values: values[FULL].update(changes)


def pickled(folder: Path) -> None:
    torch.save({"x": torch.ones(2)}, folder / "adapter.safetensors")
    relist(folder)


def untuned(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    save_file({n: torch.zeros_like(t) if "lora_B" in n else t for n, t in load_file(path).items()}, path)
    relist(folder)


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("exploded"),))


SPIKE = torch.outer(torch.linspace(-1, 1, 48), torch.linspace(1, -1, 32))
BAD = [
    tensors("full", spoil(FULL, float("nan"), 3), "holds 3 values that are not finite", "nan"),
    tensors("full", spoil(FULL, float("inf")), "holds 1 values that are not finite", "inf"),
    tensors("bitfit", spoil(BIAS, float("-inf")), "not finite", "a bias of -inf"),
    tensors("lora", spoil(LORA, float("nan")), "not finite", "nan in lora"),
    tensors("bottleneck", spoil(DOWN, float("nan")), "not finite", "nan in a bottleneck"),
    tensors("full", put(FULL, lambda t: t.T.contiguous()), "has shape (32, 48), not (48, 32)", "transposed"),
    tensors("full", put(FULL, lambda t: t[:1].clone()), "has shape (1, 32)", "cut"),
    tensors("full", put(FULL, lambda t: t.double()), "has dtype F64", "float64"),
    tensors("full", put(FULL, lambda t: t.to(torch.int32)), "has dtype I32", "integers"),
    tensors("full", put(FULL, lambda t: t.to(torch.float8_e4m3fn)), "has dtype F8_E4M3", "float8"),
    tensors("full", lambda all_: all_.pop(FULL), f"tensor {FULL} is missing", "a tensor less"),
    tensors("full", lambda all_: all_.clear(), "is missing", "no tensors"),
    tensors("full", put("lm_head.weight", torch.ones(1)), "lm_head.weight is not part", "the head"),
    tensors("full", put("model.decoder.layers.2.fc1.weight", torch.ones(1)), "is not part", "the emulator's layer"),
    tensors("full", put("../../x", torch.ones(1)), "has a name that no model uses", "a path"),
    tensors("full", put("x", torch.ones(0, 5)), "has shape [0, 5]", "an empty tensor"),
    tensors("full", put("x" * 300, torch.ones(1)), "has a name that no model uses", "a long name"),
    tensors("full", put("модель", torch.ones(1)), "has a name that no model uses", "a name in other letters"),
    tensors("full", spoil(FULL, 1e3), "an entry of tensor layers.0.fc1.weight moved by", "a poked weight"),
    tensors("full", put(FULL, lambda t: t * 20), "moved by 19", "a scaled tensor"),
    tensors("full", put(FULL, lambda t: t + 6 * t.norm() * SPIKE / SPIKE.norm()), "along one direction", "a spike"),
    tensors("full", lambda all_: all_.update({n: -50 * t for n, t in all_.items()}), "moved by 51", "all scaled"),
    tensors("bitfit", put(BIAS, lambda t: t + 1e4), "layers.0.fc1.bias moved by", "a large bias"),
    tensors("lora", put(LORA, lambda t: t * 1e6), "moved by", "large lora"),
    tensors("lora", put(LORA, lambda t: torch.full_like(t, 3e38)), "not finite once merged", "lora that overflows"),
    tensors("bottleneck", put(DOWN, lambda t: t + 1e6), "moved by", "a large bottleneck"),
    Bad("lora", untuned, "it is unchanged", "an untuned one"),
    Bad("full", pickled, "no safetensors file", "a pickle in disguise"),
    raw(lambda data: b"", "x", "empty"),
    raw(lambda data: pickle.dumps(Bomb()), "no safetensors file", "a bomb"),
    raw(lambda data: data[:100], "no safetensors file", "cut in the header"),
    raw(lambda data: data[:-1], "of the data, which has", "cut at the end"),
    raw(lambda data: data + b"x", "of the data, which has", "with more at the end"),
    raw(lambda data: b"\xff" * 8 + data[8:], "no safetensors file", "a header of 2**64 bytes"),
    raw(lambda data: bytes(8) + data[8:], "no safetensors file", "a header of 0 bytes"),
    header(twice, "stands twice", "duplicate key"),
    header(lambda values: b"[" * 10_000 + b"]" * 10_000, "not strict JSON", "10,000 deep"),
    header(lambda values: b"\xff\xfe{}", "not strict JSON", "no UTF-8"),
    header(lambda values: b"[]", "holds a list", "a list"),
    header(renamed("a/../b"), "has a name that no model uses", "a path"),
    header(renamed("a\u0000b"), "has a name that no model uses", "NUL"),
    header(entry(data_offsets=[0, 2**62]), "takes", "huge offsets"),
    header(entry(data_offsets=[-8, -4]), "takes", "negative offsets"),
    header(entry(data_offsets="all"), "use two integers", "offsets of text"),
    header(entry(shape=[2**40, 2**40]), "takes", "a huge shape"),
    header(entry(shape=[48, -32]), "dimensions of at least 1", "a negative shape"),
    header(entry(shape=[True, 1]), "use up to 8", "a shape of booleans"),
    header(entry(dtype="F128"), "has dtype 'F128'", "unknown type"),
    header(entry(more=1), "needs exactly", "an extra field"),
    header(lambda v: v.update(__metadata__={"x": "y" * 1000}), "__metadata__ holds", "large metadata"),
    header(lambda v: v.update(__metadata__={str(i): "" for i in range(99)}), "__metadata__ is no", "much metadata"),
    config("use_dora", use_dora=True),
    config("auto_mapping", auto_mapping={"base_model_class": "os.system"}),
    config("r is 100000", r=100_000),
    config("layers_to_transform", layers_to_transform=[0, 1, 2]),
    config("target_modules names", target_modules=["lm_head"]),
    config("target_modules", target_modules=["../x"]),
    config("unknown key", trust_remote_code=True),
    config("peft_type", peft_type="PROMPT_TUNING"),
    config("lora_alpha", lora_alpha=-1),
    config("modules_to_save", modules_to_save=["lm_head"]),
    config("base_model_name_or_path", base_model_name_or_path="x" * 1000),
    manifest("belongs to bundle other-1-000000000000", "other bundle", bundle_id="other-1-000000000000"),
    manifest("model and version are other", "other model", model="other"),
    manifest("method is 'pickle'", "unknown method", method="pickle"),
    manifest("the files of lora are", "other method", method="lora"),
    manifest("bottleneck is 5", "size without bottlenecks", bottleneck=5),
    manifest("unknown key run", "unknown key", run="os.system"),
    manifest("steps", "negative steps", steps=-1),
    manifest("learning_rate", "text for a number", learning_rate="1e-4"),
    manifest("files", "no files", files={}),
    manifest("files", "path in files", files={"../x.json": {"bytes": 1, "sha256": "0" * 64}}),
    manifest("classes are named", "classes", classes=["a", "b"]),
    manifest("created", "no time", created="yesterday"),
    text(b"{", "not strict JSON", "half"),
    text(b"[]", "holds a list", "list"),
    text(b"null", "holds a NoneType", "null"),
    text(b'{"steps": NaN}', "NaN is no JSON number", "NaN"),
    text(b'{"a":' * 10_000 + b"1" + b"}" * 10_000, "not strict JSON", "10,000 deep"),
    text(b'{"steps": 1, "steps": 2}', "stands twice", "duplicate key"),
    text(b"\xef\xbb\xbf{}", "not strict JSON", "BOM"),
    text(b'{"steps": ' + b"9" * 10_000 + b"}", "not strict JSON", "huge number"),
    text(b"\x80\x04.", "not strict JSON", "pickle"),
    text(b'{"model": "\\ud800"}', "manifest.json", "lone surrogate"),
]


SHA = "0" * 64
FILES = [
    {"name": "manifest.json", "bytes": 10, "sha256": SHA},
    {"name": "adapter.safetensors", "bytes": 10, "sha256": SHA},
]


def named(name: Any) -> dict[str, Any]:
    return {"files": [FILES[0], {"name": name, "bytes": 10, "sha256": SHA}]}


ANNOUNCEMENTS: list[tuple[dict[str, Any], str]] = [
    *[
        (named(name), "files")
        for name in (
            "x.pkl",
            "adapter_model.bin",
            "modeling.py",
            "../adapter.safetensors",
            "/etc/passwd",
            "a\\b",
            "",
            "x" * 300,
            "adapter.safetensors\u0000",
            "adapter\u202e.safetensors",
            "..",
            ".",
            "manifest.json/",
            5,
            None,
            ["x"],
            "ADAPTER.SAFETENSORS",
            "adapter.safetensors ",
            "pieces/x",
            "\ud800",
        )
    ],
    *[
        ({"suffix": suffix}, "suffix")
        for suffix in (
            "",
            "a/b",
            "..",
            "a:b",
            "a b",
            "-a",
            "x" * 65,
            "ｓｕｐｐｏｒｔ",
            "a\u200bb",
            "a\u202eb",
            "é",
            "a\n",
            "\u0000",
            "%2e%2e",
            "a\\b",
            "№1",
            7,
            ["a"],
            {"a": 1},
            "\ud800",
        )
    ],
    ({"files": []}, "files"),
    ({"files": FILES[:1]}, "files"),
    ({"files": FILES * 5}, "files"),
    ({"files": [*FILES, FILES[1]]}, "files"),
    ({"files": [FILES[1], {**FILES[1], "name": "head.safetensors"}]}, "files"),
    ({"files": [FILES[0], {**FILES[1], "bytes": 0}]}, "files"),
    ({"files": [FILES[0], {**FILES[1], "bytes": -1}]}, "files"),
    ({"files": [FILES[0], {**FILES[1], "bytes": 10**30}]}, "files"),
    ({"files": [FILES[0], {**FILES[1], "bytes": 1.5}]}, "files"),
    ({"files": [FILES[0], {**FILES[1], "bytes": True}]}, "files"),
    ({"files": [FILES[0], {**FILES[1], "sha256": "x"}]}, "files"),
    ({"files": [FILES[0], {**FILES[1], "sha256": SHA + "\n"}]}, "files"),
    ({"files": [FILES[0], {**FILES[1], "url": "http://x"}]}, "files"),
    ({"files": [{**FILES[0], "bytes": 10**9}, FILES[1]]}, "files"),
    ({"files": "all"}, "files"),
    ({"files": {"a": 1}}, "files"),
    ({"bundle_id": ""}, "bundle_id"),
    ({"bundle_id": "x" * 1000}, "bundle_id"),
    ({"bundle_id": 5}, "bundle_id"),
    ({"tenant": "bert"}, "tenant"),
    ({"model_id": "ft:x"}, "model_id"),
]
