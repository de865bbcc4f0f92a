"""Pre-train the small base model of the quickstart from docstrings: what made `jobs/base`.

It is a stand-in for an owner's model where no model hub is reachable; not part of offsite tuning."""

from __future__ import annotations

import json
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

from jobs.command import config_file, run_command
from ot_ray.config import Config
from ot_ray.data import BatchStream, DataConfig, docstrings, load_sequences
from ot_ray.errors import DataError
from ot_ray.model import LanguageModel
from ot_ray.progress import Progress
from ot_ray.store import open_store
from ot_ray.training import Checkpoints, TorchEngine, TrainingConfig, train


class MakeBaseConfig(Config):
    """Shape, text and training of a small OPT model."""

    output: str
    """Folder for the model and its tokenizer; checkpoints go to `checkpoints` in it."""
    packages: tuple[str, ...] = ()
    """Installed packages whose docstrings join those of the standard library."""
    vocabulary: int = 2048
    """Entries of the byte-level BPE tokenizer."""
    layers: int = 10
    """Transformer layers."""
    width: int = 128
    """Hidden size."""
    heads: int = 4
    """Attention heads."""
    mlp_width: int = 512
    """Inner size of the MLP."""
    positions: int = 512
    """Longest context in tokens."""
    sequence_length: int = 256
    """Tokens of a training sequence."""
    training: TrainingConfig


def run(config: MakeBaseConfig) -> dict[str, Any]:
    """Pre-train the quickstart's base model from docstrings; resumes where a run before it was stopped."""
    output = Path(config.output)
    tokenizer = _tokenizer(config, output)
    data = load_sequences(DataConfig(source=str(_text(config, output))), tokenizer, config.sequence_length)
    torch.manual_seed(config.training.seed)
    model = OPTForCausalLM(_shape(config))
    checkpoints = Checkpoints(
        open_store(str(output)),
        "checkpoints",
        {"digest": data.digest, **config.model_dump(mode="json")},
        keep=config.training.keep_checkpoints,
    )
    with Progress("pre-train", config.training.steps) as bar:
        result = train(
            TorchEngine(LanguageModel(model), config.training),
            BatchStream(data.sequences, config.training.batch_size, config.training.seed),
            config.training,
            checkpoints=checkpoints,
            report=lambda figures: bar.at(
                int(figures["step"]), loss=figures["loss"], tokens_per_s=figures["tokens_per_s"]
            ),
        )
    model.to(torch.bfloat16).save_pretrained(output)  # type: ignore[arg-type] - a wrapper's stub
    tokenizer.save_pretrained(output)
    last = [step["loss"] for step in result.history[-50:]]
    return {
        "parameters": model.num_parameters(),
        "tokens": data.counts.tokens,
        "loss": sum(last) / max(1, len(last)),
        "output": config.output,
    }


def _documents(config: MakeBaseConfig) -> Iterator[str]:
    yield from docstrings()
    for package in config.packages:
        folder = Path(sysconfig.get_paths()["purelib"]) / package
        if not folder.is_dir():
            raise DataError(f"packages names {package!r}, which is not installed here; install it or leave it out")
        yield from docstrings(folder)


def _text(config: MakeBaseConfig, output: Path) -> Path:
    path = output / "text.jsonl"
    if not path.exists():
        rows = list(_documents(config))
        random.Random(config.training.seed).shuffle(rows)
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in rows), encoding="utf-8")
    return path


def _tokenizer(config: MakeBaseConfig, output: Path) -> PreTrainedTokenizerFast:
    output.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment] - no setter in its stub
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment] - no setter in its stub
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocabulary,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    with _text(config, output).open(encoding="utf-8") as lines:
        tokenizer.train_from_iterator((json.loads(line)["text"] for line in lines), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", model_max_length=config.positions
    )


def _shape(config: MakeBaseConfig) -> OPTConfig:
    return OPTConfig(
        vocab_size=config.vocabulary,
        hidden_size=config.width,
        ffn_dim=config.mlp_width,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        max_position_embeddings=config.positions,
        word_embed_proj_dim=config.width,
        dropout=0.0,
        attention_dropout=0.0,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
        tie_word_embeddings=True,
    )


if __name__ == "__main__":
    run_command("make_base", MakeBaseConfig, run, default_config=config_file("base.yaml"))
