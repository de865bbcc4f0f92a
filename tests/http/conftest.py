"""One tiny model and tokenizer for all tests of the service."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from tiny_service import BASE, Shelf, byte_model, byte_tokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from serve.engine.generation import GenerationEngine
from serve.engine.residency import PlugInCache


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Several threads for so small a model only wait for each other."""
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture(scope="session")
def base() -> PreTrainedModel:
    return byte_model()


@pytest.fixture
def shelf(base: PreTrainedModel) -> Shelf:
    return Shelf(base, ["anna", "ben"])


@pytest.fixture
def engine(base: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, shelf: Shelf) -> GenerationEngine:
    cache = PlugInCache(BASE, base, shelf, refresh_s=0)
    return GenerationEngine(tokenizer, cache, max_choices=8)


@pytest.fixture(scope="session")
def checkpoint(
    base: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The tiny model as a folder that Transformers opens."""
    folder = tmp_path_factory.mktemp("checkpoint")
    base.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
