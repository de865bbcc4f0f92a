"""One tiny model and tokenizer for all tests of the service."""

from __future__ import annotations

import pytest
from tiny_service import BASE, Shelf
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from serve.engine.generation import GenerationEngine
from serve.engine.residency import PlugInCache
from tests.fixtures.tiny_model import base, checkpoint, one_thread, tokenizer

__all__ = ["base", "checkpoint", "one_thread", "tokenizer"]


@pytest.fixture
def shelf(base: PreTrainedModel) -> Shelf:
    return Shelf(base, ["anna", "ben"])


@pytest.fixture
def engine(base: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, shelf: Shelf) -> GenerationEngine:
    cache = PlugInCache(BASE, base, shelf, refresh_s=0)
    return GenerationEngine(tokenizer, cache, max_choices=8)
