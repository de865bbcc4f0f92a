"""One side of the gradient learning benchmark in a process of its own: builds the base, trains, prints JSON.

Which sides run when, and the comparison, are cola.py's; what the server's memory holds is cola_memory.py's."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel

from jobs.benchmarks.shapes import Shape
from jobs.benchmarks.sides import now, peak_bytes, random_batches, random_model, resident_bytes
from ot_ray.cola import (
    Alone,
    Auxiliary,
    AuxiliaryConfig,
    BasePass,
    Collaboration,
    CustomerRows,
    FitConfig,
    Fits,
    Mode,
    Site,
    find_sites,
    make_fitter,
)
from ot_ray.config import Config
from ot_ray.launch import AuxiliaryPool, AuxiliaryWorkers, ray_cluster
from ot_ray.training import Fitting, FittingHere, GradientRun, learn

Side = Literal["LoRA", "merged", "unmerged", "offloaded"]
FIT = FitConfig(lr=1e-4)
C = TypeVar("C", bound=Config)


class SideConfig(Config):
    """What one process measures."""

    side: Side
    """`LoRA`: a PEFT run for each customer, taking turns on one base. The others are one pass for all customers:
    `unmerged`, each through its own auxiliary; `offloaded`, the same with auxiliaries in the host's memory; `merged`,
    all through the mean, which the weights hold."""
    shape: Shape
    """The model and its sequences."""
    device: Literal["cpu", "cuda"]
    """Where the base is."""
    precision: Literal["float32", "bfloat16"]
    """Type of the base's weights; LoRA's and the auxiliaries' are float32."""
    customers: int = Field(ge=1)
    """Who train at once."""
    rows: int = Field(ge=1)
    """Sequences of each in a step."""
    rank: int = Field(ge=1)
    """Of every factor."""
    sites: tuple[str, ...]
    """Patterns of the maps that are tuned."""
    workers: int = Field(ge=0)
    """Ray actors that fit, with one CPU each; 0 fits in this process."""
    staleness: int = Field(ge=0)
    """As the training loop has it."""
    steps: int = Field(ge=1)
    """Steps of every customer that are timed."""
    warmup: int = Field(ge=1)
    """Steps before those."""

    @property
    def names(self) -> list[str]:
        """The customers."""
        return [f"c{number}" for number in range(self.customers)]


def measure(config: SideConfig) -> dict[str, Any]:
    """Run one side.

    Returns:
        tokens a second, seconds of a step of all customers, the process's peak bytes, mean losses of all steps, and
        the share of the time that the base waited for fits (None where these are made by the same process).
    """
    device = torch.device(config.device)
    before = resident_bytes()
    model = base_of(config, device)
    batches = random_batches(
        config.shape.config().vocab_size,
        config.customers * config.rows,
        config.shape.sequence_length,
        config.warmup + config.steps,
        device,
    )
    ids = [batch["input_ids"] for batch in batches]
    seconds, losses, waits = (_lora if config.side == "LoRA" else _gradient_learning)(config, model, ids)
    return {
        "tokens_per_s": ids[0].numel() * config.steps / seconds,
        "step_s": seconds / config.steps,
        "fit_wait_share": waits,
        "peak_bytes": peak_bytes(device, before),
        "losses": losses,
    }


def base_of(config: SideConfig, device: torch.device) -> PreTrainedModel:
    """The frozen base, the same in every process."""
    model = random_model(config.shape.config(), device)
    return model.float() if config.precision == "float32" else model


def auxiliaries_of(config: SideConfig, sites: Mapping[str, Site], device: torch.device) -> dict[str, Auxiliary]:
    """Every customer's, as it begins on each side."""
    return {
        name: Auxiliary(sites, AuxiliaryConfig(rank=config.rank, alpha=config.rank, seed=seed), device)
        for seed, name in enumerate(config.names)
    }


def mode_of(config: SideConfig, sites: Mapping[str, Site], device: torch.device) -> Mode:
    """How the rows go through the server's auxiliaries, and where those are."""
    own = auxiliaries_of(config, sites, device if config.side == "unmerged" else torch.device("cpu"))
    return Collaboration(own) if config.side == "merged" else Alone(own)


def rows_of(config: SideConfig, ids: Tensor) -> CustomerRows:
    """A batch, each customer's rows together."""
    each = len(ids) // config.customers
    return CustomerRows(ids, tuple(name for name in config.names for _ in range(each)), ids)


def _gradient_learning(
    config: SideConfig, model: PreTrainedModel, ids: list[Tensor]
) -> tuple[float, list[float], float | None]:
    sites = find_sites(model, config.sites)
    base = BasePass(model, sites, device="cpu" if config.workers else None)
    mode = mode_of(config, sites, model.device)
    run = GradientRun(steps=len(ids), rows=config.rows, staleness=config.staleness, merged=config.side == "merged")
    started: list[float] = []

    def report(figures: Mapping[str, float]) -> None:
        if figures["step"] == config.warmup:
            started.append(now(model.device))

    with _fitting(config, sites, model.device) as fitting:
        history = learn(base, mode, [rows_of(config, part) for part in ids], fitting, run, report=report).history
        # The last fits are waited for, too.
        seconds = now(model.device) - started[0]
    waits = sum(figures["fit_wait"] for figures in history[config.warmup :]) / seconds
    return seconds, [figures["loss"] for figures in history], waits if config.workers else None


@contextmanager
def _fitting(config: SideConfig, sites: Mapping[str, Site], device: torch.device) -> Iterator[Fitting]:
    if not config.workers:
        own = auxiliaries_of(config, sites, device)
        yield FittingHere(Fits({name: make_fitter(auxiliary, FIT) for name, auxiliary in own.items()}))
        return
    own = auxiliaries_of(config, sites, torch.device("cpu"))
    with (
        ray_cluster(num_cpus=config.workers, dashboard=False, show_logs=False),
        AuxiliaryPool(own, FIT, AuxiliaryWorkers(count=config.workers)) as pool,
    ):
        yield pool


def _lora(config: SideConfig, model: PreTrainedModel, ids: list[Tensor]) -> tuple[float, list[float], float | None]:
    """A run for each customer, one step after another; changing from one to the next costs nothing here."""
    peft = _adapters(config, model)
    optimizers = {}
    for name in config.names:
        parameters = [p for n, p in peft.named_parameters() if f".{name}." in n]
        optimizers[name] = torch.optim.AdamW(parameters, lr=FIT.lr, betas=FIT.betas, weight_decay=FIT.weight_decay)
    seconds, losses = 0.0, []
    for step, batch in enumerate(ids):
        total = 0.0
        for name, own in zip(config.names, batch.split(config.rows), strict=True):
            peft.set_adapter(name)
            start = now(model.device)
            loss = peft(input_ids=own, labels=own).loss
            loss.backward()
            optimizers[name].step()
            optimizers[name].zero_grad(set_to_none=True)
            total += loss.item()
            seconds += now(model.device) - start if step >= config.warmup else 0.0
        losses.append(total / config.customers)
    return seconds, losses, None


def _adapters(config: SideConfig, model: PreTrainedModel) -> PeftModel:
    """A LoRA for each customer that starts where its auxiliary does."""
    sites = find_sites(model, config.sites)
    own = auxiliaries_of(config, sites, model.device)
    lora = LoraConfig(
        r=config.rank,
        lora_alpha=config.rank,
        target_modules=list(sites),
        fan_in_fan_out=any(site.transposed for site in sites.values()),
    )
    peft = get_peft_model(model, lora, adapter_name=config.names[0])
    assert isinstance(peft, PeftModel)
    for name in config.names[1:]:
        peft.add_adapter(name, lora)
    factors = dict(peft.named_parameters())
    with torch.no_grad():
        for name, auxiliary in own.items():
            for tensor_name, tensor in auxiliary.tensors.items():
                factors[f"base_model.model.{tensor_name.removesuffix('weight')}{name}.weight"].copy_(tensor)
    return peft


def print_alone(measure: Callable[[C], dict[str, Any]], config: C) -> None:
    """Print what a measurement found as the last line of standard output, where nothing else is printed."""
    figures = os.dup(1)
    # Ray and the tracer print where they like.
    os.dup2(2, 1)
    found = measure(config)
    with os.fdopen(figures, "w") as file:
        file.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    print_alone(measure, SideConfig.model_validate_json(sys.argv[1]))
