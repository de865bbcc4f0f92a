"""Full and emulated models streamed from their files: against Transformers' own loading, and what is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from ot_ray.artifacts import load_emulated, load_full, load_shape, model_files, open_model_source
from ot_ray.errors import (
    ArtifactError,
    ConfigError,
    OTRayError,
    SplitError,
    StoreUnavailableError,
    UnsupportedModelError,
)
from ot_ray.model import TEXT_FAMILIES, ModelConfig, SplitPlan, check_tokenizer, emulate
from ot_ray.store import LocalStore, open_store, upload_folder
from tests.artifacts.samples import tiny_tokenizer
from tests.artifacts.test_weights import Recording
from tests.fixtures.models import VOCAB, tiny_model, tokens

BASE = Path(__file__).parents[2] / "jobs" / "base"
PLAN, KEPT = SplitPlan(bottom=1, keep=2, top=1), [0, 2]
PREFIXES = {"bloom": "transformer.", "gpt2": "transformer."}
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def of(source: str | Path, dtype: str = "float32") -> ModelConfig:
    return ModelConfig(name="tiny", source=str(source), dtype=dtype)  # type: ignore[arg-type]


@lru_cache
def bytes_of(family: str) -> dict[str, bytes]:
    """The files of a tiny checkpoint in several shards."""
    with tempfile.TemporaryDirectory() as temporary:
        tiny_model(family).save_pretrained(temporary, max_shard_size="40KB")
        tiny_tokenizer().save_pretrained(temporary)
        return {path.name: path.read_bytes() for path in Path(temporary).iterdir()}


def write(folder: Path, family: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in bytes_of(family).items():
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture
def opt(tmp_path: Path) -> Path:
    return write(tmp_path / "opt", "opt")


def reference(folder: Path, dtype: str = "float32") -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=TYPES[dtype], local_files_only=True)


def assert_same(ours: PreTrainedModel, theirs: PreTrainedModel) -> None:
    """Bit for bit, to the last buffer and setting."""
    assert type(ours) is type(theirs)
    assert not ours.training
    for one, other in (
        (ours.state_dict(), theirs.state_dict()),
        (dict(ours.named_buffers()), dict(theirs.named_buffers())),
        (dict(ours.named_parameters()), dict(theirs.named_parameters())),
    ):
        assert list(one) == list(other)
        for name, tensor in one.items():
            assert tensor.dtype == other[name].dtype
            assert torch.equal(tensor, other[name]), name
            assert tensor.requires_grad == other[name].requires_grad
    assert ours.config.to_dict() == theirs.config.to_dict()
    assert ours.generation_config is not None and theirs.generation_config is not None
    assert ours.generation_config.to_dict() == theirs.generation_config.to_dict()
    assert torch.equal(ours(tokens()).logits, theirs(tokens()).logits)


@pytest.mark.parametrize("dtype", sorted(TYPES))
@pytest.mark.parametrize("family", sorted(TEXT_FAMILIES))
def test_equals_from_pretrained(tmp_path: Path, family: str, dtype: str) -> None:
    folder = write(tmp_path, family)
    assert_same(load_full(of(folder, dtype)), reference(folder, dtype))


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    """Put other tensors in the place of a checkpoint's, in one file."""
    tensors: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
        path.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    save_file(change(tensors), folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("family", sorted(TEXT_FAMILIES))
def test_names_as_the_hub_has_them(tmp_path: Path, family: str) -> None:
    """Without the base model's prefix, and with tensors that the model does not know."""
    folder, prefix = write(tmp_path, family), PREFIXES.get(family, "model.")
    rewrite(
        folder,
        lambda tensors: (
            {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
            | {"h.0.attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.bool)}
        ),
    )
    assert_same(load_full(of(folder)), reference(folder))


@pytest.mark.parametrize("stored", ["head", "both"])
def test_tied_heads(opt: Path, stored: str) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        embedding = tensors["model.decoder.embed_tokens.weight"]
        if stored == "head":
            del tensors["model.decoder.embed_tokens.weight"]
        return {**tensors, "lm_head.weight": embedding.clone()}

    rewrite(opt, change)
    model = load_full(of(opt))
    assert_same(model, reference(opt))
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight  # type: ignore[union-attr]


def test_tied_in_words_only(opt: Path) -> None:
    rewrite(opt, lambda tensors: {**tensors, "lm_head.weight": tensors["model.decoder.embed_tokens.weight"] + 1})
    with pytest.raises(ArtifactError, match=r"differ, but config\.json ties them; set tie_word_embeddings to false"):
        load_full(of(opt))


def test_generation_config(opt: Path) -> None:
    GenerationConfig(max_new_tokens=7, do_sample=True, temperature=0.3, eos_token_id=[1, 5]).save_pretrained(opt)
    model = load_full(of(opt))
    assert_same(model, reference(opt))
    assert model.generation_config is not None and model.generation_config.max_new_tokens == 7


def test_without_a_generation_config(opt: Path) -> None:
    (opt / "generation_config.json").unlink()
    assert_same(load_full(of(opt)), reference(opt))


@pytest.mark.parametrize("dtype", sorted(TYPES))
@pytest.mark.parametrize("family", sorted(TEXT_FAMILIES))
def test_emulated_equals_emulate(tmp_path: Path, family: str, dtype: str) -> None:
    folder = write(tmp_path, family)
    emulated = load_emulated(of(folder, dtype), PLAN, KEPT)
    assert_same(emulated, emulate(load_full(of(folder, dtype)), PLAN, KEPT))
    assert not any(parameter.is_meta for parameter in emulated.parameters())


@pytest.mark.parametrize("kept", [[0], [0, 4], [2, 0]])
def test_emulated_checks_its_layers(opt: Path, kept: list[int]) -> None:
    with pytest.raises(SplitError, match=r"kept is \["):
        load_emulated(of(opt), PLAN, kept)


def test_emulated_reads_its_layers_only(opt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stores: list[Recording] = []

    def recording(folder: Path) -> Recording:
        stores.append(Recording(folder))
        return stores[-1]

    monkeypatch.setattr(model_files, "LocalStore", recording)
    open_model_source(of(opt))
    emulated = load_emulated(of(opt), PLAN, KEPT)
    headers, read = (sum(size for _, size in store.ranges) for store in stores)
    assert read - headers == sum(parameter.nbytes for parameter in emulated.parameters())


def test_from_s3(opt: Path, s3_url: str) -> None:
    store = open_store(s3_url)
    upload_folder(store, opt, "models/opt", "config.json")
    store.write("models/opt/logs/tokenizer.json", b"of another folder")
    address, _, query = s3_url.partition("?")
    config = of(f"{address}/models/opt?{query}")
    assert_same_but_for_its_name(load_full(config), reference(opt))
    assert torch.equal(
        load_emulated(config, PLAN, KEPT)(tokens()).logits, load_emulated(of(opt), PLAN, KEPT)(tokens()).logits
    )
    assert load_shape(config).num_hidden_layers == 6
    assert open_model_source(config).tokenizer()("w5 w9")["input_ids"] == [5, 9]
    # What our own uploads record makes the two places agree.
    assert open_model_source(config).version == open_model_source(of(opt)).version


class Away(LocalStore):
    """A store on which each call fails for the first time."""

    def __init__(self, root: str | Path) -> None:
        super().__init__(root)
        self.failed: set[str] = set()

    def _fail_once(self, call: str) -> None:
        if call not in self.failed:
            self.failed.add(call)
            raise StoreUnavailableError("away")

    def download(self, key: str, path: str | Path, *rest: Any, **more: Any) -> None:
        self._fail_once(f"download {key}")
        super().download(key, path, *rest, **more)

    def read_range(self, key: str, start: int, end: int) -> bytes:
        self._fail_once(f"read {key}")
        return super().read_range(key, start, end)


def test_s3_that_is_away_for_a_while_is_waited_for(opt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = of("s3://bucket/models/opt")
    monkeypatch.setattr(model_files, "open_store", lambda address: Away(opt))
    with pytest.raises(StoreUnavailableError):
        open_model_source(config)
    emulated = load_emulated(config, PLAN, KEPT, patience_s=300.0)
    assert torch.equal(emulated(tokens()).logits, load_emulated(of(opt), PLAN, KEPT)(tokens()).logits)
    assert_same_but_for_its_name(load_full(config, patience_s=300.0), reference(opt))


def assert_same_but_for_its_name(ours: PreTrainedModel, theirs: PreTrainedModel) -> None:
    ours.config.name_or_path = theirs.config.name_or_path
    assert_same(ours, theirs)


def test_copies_from_s3_are_removed(opt: Path, s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    upload_folder(open_store(s3_url), opt, "", "config.json")
    place = tmp_path / "temporary"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    load_full(of(s3_url))
    load_shape(of(s3_url))
    assert not list(place.iterdir())
    source = open_model_source(of(s3_url))
    copied = {path.name for path in source.files.folder.iterdir()}
    assert {"config.json", "tokenizer.json"} <= copied
    assert not any("safetensors" in name for name in copied)
    source.close()
    assert not list(place.iterdir())
    assert source.weights.read("model.decoder.final_layer_norm.bias").numel() == 32
    source.close()


def test_objects_that_others_put_on_s3(opt: Path, s3_url: str) -> None:
    """They carry no sha256, so that their entity tags stand for them."""
    store = open_store(s3_url)
    rewrite(opt, lambda tensors: tensors)
    upload_folder(store, opt, "", "config.json")
    versions = []
    for _ in range(2):
        data = store.read("model.safetensors")
        client = store._connect()  # type: ignore[attr-defined]
        address = store.address  # type: ignore[attr-defined]
        client.put_object(Bucket=address.bucket, Key=f"{address.prefix}/model.safetensors", Body=data)
        versions.append(open_model_source(of(s3_url)).version)
        assert open_model_source(of(s3_url)).version == versions[-1]
        store.write("model.safetensors", flipped(data))
    assert versions[0] != versions[1]


def test_nothing_on_s3(s3_url: str) -> None:
    for function in (open_model_source, load_shape):
        with pytest.raises(
            ConfigError, match=r"model\.source is 's3://bucket-[^?]*/root': no config\.json stands there"
        ):
            function(of(s3_url))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub's cache with one model, as a download leaves it; its snapshot."""
    cache, commit = tmp_path / "hub", "0123456789abcdef0123456789abcdef01234567"
    (cache / "models--owner--tiny" / "refs").mkdir(parents=True)
    (cache / "models--owner--tiny" / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    return write(cache / "models--owner--tiny" / "snapshots" / commit, "opt")


def test_from_a_hub(hub: Path) -> None:
    assert_same(load_full(of("owner/tiny")), reference(hub))
    source = open_model_source(of("owner/tiny"))
    assert source.files.commit == hub.name
    assert source.version == open_model_source(of("owner/tiny")).version != open_model_source(of(hub)).version
    assert load_shape(of("owner/tiny")).num_hidden_layers == 6


def test_of_a_hub_the_shards_are_fetched_that_the_index_names(
    opt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"

    def download(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        """As the hub's client, which needs a hub: the files of `opt` that match, in a snapshot's folder."""
        assert name == "owner/tiny" and revision in (None, commit)
        target = tmp_path / "cache" / commit
        target.mkdir(parents=True, exist_ok=True)
        for file in filter_repo_objects([path.name for path in opt.iterdir()], allow_patterns=allow_patterns):
            shutil.copy(opt / file, target / file)
        return str(target)

    index = json.loads((opt / "model.safetensors.index.json").read_text())
    for shard in set(index["weight_map"].values()):
        (opt / shard).rename(opt / shard.replace("model", "pytorch_model"))
    table = {name: shard.replace("model", "pytorch_model") for name, shard in index["weight_map"].items()}
    edit(opt / "model.safetensors.index.json", weight_map=table)
    (opt / "consolidated.safetensors").write_bytes(b"the same weights again, in another layout")
    monkeypatch.setattr(model_files, "snapshot_download", download)
    config = of("owner/tiny")
    load_shape(config)
    assert [path.name for path in (tmp_path / "cache" / commit).iterdir()] == ["config.json"]
    fetched = open_model_source(config)
    assert torch.equal(load_full(config)(tokens()).logits, load_full(of(opt))(tokens()).logits)
    assert not (fetched.files.folder / "consolidated.safetensors").exists()


@pytest.mark.parametrize("name", ["owner/unknown", "no such name!"])
def test_not_on_the_hub(hub: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=rf"model\.source is '{name}': .*name a folder or s3:// address"):
        open_model_source(of(name))


def test_no_such_folder(tmp_path: Path) -> None:
    for function in (open_model_source, load_shape):
        with pytest.raises(ConfigError, match="no such folder; name a folder with a checkpoint"):
            function(of(tmp_path / "nowhere"))


def flipped(data: bytes) -> bytes:
    """The same but for one bit of the last byte."""
    return data[:-1] + bytes([data[-1] ^ 1])


def test_version_stands_for_the_bytes(opt: Path, tmp_path: Path) -> None:
    version = open_model_source(of(opt)).version
    assert len(version) == 64
    assert open_model_source(of(write(tmp_path / "elsewhere", "opt"), "bfloat16")).version == version
    (opt / "README.md").write_text("words")
    assert open_model_source(of(opt)).version == version
    weights = max(path.name for path in opt.glob("*.safetensors"))
    versions = {version}
    for name in (weights, "tokenizer.json", "config.json"):
        path = write(tmp_path / f"other-{name}", "opt") / name
        path.write_bytes(flipped(path.read_bytes()) if name == weights else path.read_bytes() + b" ")
        versions.add(open_model_source(of(path.parent)).version)
    assert len(versions) == 4


def edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    ("values", "kind", "reason"),
    [
        ({"model_type": "bert"}, UnsupportedModelError, "'bert'"),
        ({"model_type": "nonsense"}, ConfigError, "nonsense"),
        ({"vocab_size": "many"}, ConfigError, "vocab_size"),
        ({"vocab_size": VOCAB + 1}, ArtifactError, r"embed_tokens\.weight has shape \(96, 32\), .*makes it \(97, 32\)"),
        ({"ffn_dim": 32}, ArtifactError, "; and 13 more$"),
        ({"num_hidden_layers": 7}, ArtifactError, r"tensor model\.decoder\.layers\.6\.\S+ is not among"),
        ({"quantization_config": {"quant_method": "gptq"}}, UnsupportedModelError, "quantization_config is set"),
    ],
)
def test_a_configuration_that_does_not_fit(opt: Path, values: dict, kind: type[OTRayError], reason: str) -> None:
    edit(opt / "config.json", **values)
    with pytest.raises(kind, match=reason):
        load_full(of(opt))


def test_integers_are_refused(opt: Path) -> None:
    name = "model.decoder.layers.0.fc1.weight"
    rewrite(opt, lambda tensors: {**tensors, name: tensors[name].to(torch.int8)})
    with pytest.raises(ArtifactError, match=r"fc1\.weight is of torch\.int8"):
        load_full(of(opt))


@pytest.mark.parametrize("content", ["{", "", "[]", None])
def test_no_configuration(opt: Path, content: str | None) -> None:
    (opt / "config.json").unlink()
    if content is not None:
        (opt / "config.json").write_text(content)
    for function in (open_model_source, load_shape):
        with pytest.raises(ConfigError, match=r"model\.source is .*/opt"):
            function(of(opt))


def test_code_that_comes_with_a_model_is_not_run(opt: Path) -> None:
    (opt / "evil.py").write_text("raise SystemExit('ran')")
    edit(opt / "config.json", model_type="evil", auto_map={"AutoConfig": "evil.Config"})
    with pytest.raises(ConfigError):
        load_full(of(opt))


def test_the_wrong_tokenizer(opt: Path) -> None:
    for path in BASE.glob("tokenizer*"):
        shutil.copy(path, opt)
    with pytest.raises(
        ConfigError,
        match=rf"model\.source is .*/opt.*, but the model has {VOCAB} embeddings: it belongs to another model",
    ):
        open_model_source(of(opt)).tokenizer()


def test_an_end_token_beyond_the_embeddings() -> None:
    tokenizer, shape = tiny_tokenizer(), tiny_model("opt").config
    check_tokenizer(tokenizer, shape)
    tokenizer.add_tokens([f"more{i}" for i in range(VOCAB - len(tokenizer))])
    check_tokenizer(tokenizer, shape)
    tokenizer.add_special_tokens({"eos_token": "<end>"})
    with pytest.raises(ConfigError, match=f"ids up to {VOCAB}, but the model has {VOCAB} embeddings"):
        check_tokenizer(tokenizer, shape)


@pytest.mark.parametrize("content", [None, "{", "{}"])
def test_no_tokenizer(opt: Path, content: str | None) -> None:
    for path in opt.glob("tokenizer*"):
        path.unlink()
    if content is not None:
        (opt / "tokenizer.json").write_text(content)
    with pytest.raises(ConfigError):
        open_model_source(of(opt)).tokenizer()


_PEAK = """
import re, sys
from pathlib import Path
from ot_ray.artifacts import load_full
from ot_ray.model import ModelConfig
load_full(ModelConfig(name="warm", source=sys.argv[1]))
bytes_of = lambda field: 1024 * int(re.search(field + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
before = bytes_of("VmRSS")
model = load_full(ModelConfig(name="large", source=sys.argv[2]))
print((bytes_of("VmHWM") - before) / sum(p.nbytes for p in model.parameters()))
"""


@pytest.mark.slow
def test_one_tensor_beside_the_model(opt: Path, tmp_path: Path) -> None:
    """Peak memory of loading 320 MB in a process of its own, over the model's."""
    config = reference(opt).config
    config.hidden_size = config.word_embed_proj_dim = 1024
    config.ffn_dim = 4096
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "large")
    command = [sys.executable, "-c", _PEAK, str(opt), str(tmp_path / "large")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=200)
    ratio = float(done.stdout.split()[-1])
    assert ratio < 1.25
    assert ratio > 0.9  # the model itself was seen
