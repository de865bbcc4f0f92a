"""From a configuration to an engine that has answered once: base model, tokenizer and registry.

Where the engine runs, in this process or in a Ray actor, is the caller's choice."""

from __future__ import annotations

from ot_ray.artifacts import Registry, load_full, open_model_source
from ot_ray.errors import UnsupportedModelError
from ot_ray.model import FAMILIES
from ot_ray.store import open_store
from serve.engine.admission import BatchLimits
from serve.engine.backend import LocalBackend
from serve.engine.generation import GenerationEngine
from serve.engine.plug_ins import NoPlugIns, PlugIns, RegistryPlugIns
from serve.engine.residency import PlugInCache
from serve.settings.engine import EngineConfig


def load_backend(config: EngineConfig) -> LocalBackend:
    """Load the base model, open the registry, and have the model make a token.

    Raises:
        ConfigError: there is no model at `model.source`, its tokenizer is another model's, or `store` is no
            store's URL.
        ArtifactError: a file of its weights is missing, truncated or corrupt.
        UnsupportedModelError: plug-ins do not exist for this architecture, or it takes images.
    """
    plug_ins: PlugIns = NoPlugIns()
    if config.store is not None:
        plug_ins = RegistryPlugIns(Registry(open_store(config.store)), config.model.name)
    source = open_model_source(config.model)
    if FAMILIES[source.config.model_type].task != "text":
        raise UnsupportedModelError(
            f"model.source is {source.files.where!r}, of type {source.config.model_type}, which takes images; this "
            "service answers with text, so serve a language model, and use image plug-ins where images are"
        )
    base = load_full(config.model, source=source)
    base.requires_grad_(False)
    cache = PlugInCache(
        config.model.name,
        base.to("cuda" if config.num_gpus else "cpu"),  # type: ignore[arg-type]
        plug_ins,
        max_plug_ins=config.max_plug_ins,
        max_host_plug_ins=config.max_host_plug_ins,
        wait_s=config.wait_s,
        refresh_s=config.refresh_s,
    )
    limits = BatchLimits(config.max_concurrent, config.max_batch_tokens, config.max_waiting)
    engine = GenerationEngine(source.tokenizer(), cache, config.max_choices, limits, config.wait_s)
    engine.probe().result()
    return LocalBackend(engine, config.wait_s)
