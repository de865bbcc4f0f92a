"""A tiny model that reads bytes, plug-ins for it, and a catalogue in memory: what the service's tests share."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from ot_ray.errors import NotFoundError
from ot_ray.model import (
    BottleneckSettings,
    LoraSettings,
    Method,
    SplitPlan,
    adapter_state,
    emulate,
    merged_adapter_state,
    prepare_tuning,
)
from serve.config import ServeConfig
from serve.engine.backend import Backend
from serve.engine.plug_ins import PlugIn
from serve.service import Service
from tests.fixtures.models import SHAPES

BASE = "tiny"
CONTEXT = 128
PLAN = SplitPlan(bottom=1, keep=2, top=1)
END, FIRST_BYTE = 1, 2
VOCABULARY = 256 + FIRST_BYTE


def service_over(backend: Backend, max_body_bytes: int = 50_000) -> Service:
    """An open service: no tenants, no store."""
    return Service(
        backend, ServeConfig.model_validate({"model": {"name": BASE, "source": "."}, "max_body_bytes": max_body_bytes})
    )


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, so that most characters beyond ASCII take several."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet(), key=_byte_of)
    vocabulary = {"<pad>": 0, "<end>": END, **{letter: FIRST_BYTE + i for i, letter in enumerate(letters)}}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>")


def _byte_of(letter: str) -> int:
    # GPT-2's alphabet: printable bytes stand for themselves, the others for U+0100 and on, in order.
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in own]
    return ord(letter) if ord(letter) < 0x100 else others[ord(letter) - 0x100]


def tokens_of(text: str | bytes) -> list[int]:
    data = text.encode() if isinstance(text, str) else text
    return [FIRST_BYTE + byte for byte in data]


# Keeps a random model to letters, digits and spaces, and from ending by itself.
PLAIN_TEXT = {
    str(token): -100.0
    for token in range(VOCABULARY)
    if token < FIRST_BYTE or not (chr(token - FIRST_BYTE).isalnum() and token - FIRST_BYTE < 128)
}


def byte_model(seed: int = 0, depth: int = 6) -> PreTrainedModel:
    """A random OPT over bytes, in evaluation mode, whose layers all matter."""
    torch.manual_seed(seed)
    shape = {**SHAPES["opt"], "max_position_embeddings": CONTEXT}
    config = AutoConfig.for_model(
        "opt",
        **shape,
        vocab_size=VOCABULARY,
        bos_token_id=END,
        eos_token_id=END,
        pad_token_id=0,
        num_hidden_layers=depth,
    )
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4.0)
    return model.eval()


def tuned_state(model: PreTrainedModel, seed: int) -> dict[str, torch.Tensor]:
    """An adapter that differs from the model's own by noise."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: tensor + 0.3 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in adapter_state(model, PLAN).items()
    }


def tuned_by(model: PreTrainedModel, method: Method, seed: int) -> dict[str, torch.Tensor]:
    """An adapter of a tuning method, with noise on whatever that method tunes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tuned = prepare_tuning(emulate(model, PLAN, [0, 1]), PLAN, method, LoraSettings(), BottleneckSettings(size=4))
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    return merged_adapter_state(tuned, PLAN)


class Shelf:
    """A catalogue of plug-ins `ft:tiny:<tenant>` in memory that counts loads, and can be slow."""

    def __init__(self, model: PreTrainedModel, tenants: Sequence[str], load_s: float = 0.0) -> None:
        self.states = {f"ft:tiny:{tenant}": tuned_state(model, seed) for seed, tenant in enumerate(tenants)}
        self.loads: Counter[str] = Counter()
        self.load_s = load_s
        self.readings = self.loading = self.most_loading = 0
        self.error: Exception | None = None
        self._lock = threading.Lock()

    def served(self, tenant: str | None) -> Sequence[PlugIn]:
        self._read()
        return [self._plug_in(key) for key in self.states if tenant in (None, key.split(":")[2])]

    def find(self, name: str) -> PlugIn:
        self._read()
        return self.candidate(name)

    def candidate(self, model_id: str) -> PlugIn:
        if model_id not in self.states:
            raise NotFoundError(model_id)
        return self._plug_in(model_id)

    def _read(self) -> None:
        self.readings += 1
        if self.error is not None:
            raise self.error

    def _plug_in(self, model_id: str) -> PlugIn:
        return PlugIn(model_id, PLAN, 1700000000, model_id.split(":")[2])

    def load_state(self, model_id: str) -> Mapping[str, torch.Tensor]:
        with self._lock:
            self.loads[model_id] += 1
            self.loading += 1
            self.most_loading = max(self.most_loading, self.loading)
        time.sleep(self.load_s)
        with self._lock:
            self.loading -= 1
        if model_id not in self.states:
            raise NotFoundError(model_id)
        return self.states[model_id]
