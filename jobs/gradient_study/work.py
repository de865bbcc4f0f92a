"""What one run of the study computes: a base adapted in one way, at one rate, with one seed, and its perplexities.

Which runs there are is choosing.py's, where they run running.py's."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Literal

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel

from jobs.gradient_study.config import Row, Training
from jobs.gradient_study.texts import CustomerTexts, Sequences
from ot_ray.artifacts import load_full
from ot_ray.cola import (
    Alone,
    Auxiliary,
    AuxiliaryConfig,
    BasePass,
    Collaboration,
    CustomerRows,
    FitConfig,
    Fits,
    Joint,
    Merging,
    Mode,
    Site,
    find_sites,
    make_fitter,
)
from ot_ray.config import Config
from ot_ray.data import PackedSequence
from ot_ray.errors import TrainingError
from ot_ray.evaluation import perplexity
from ot_ray.model import LanguageModel, ModelConfig
from ot_ray.model.distill import body_output
from ot_ray.training import CustomerBatches, FittingHere, GradientRun, customer_rows, learn

Result = dict[str, Any]
MEASURED: tuple[Literal["validation", "test"], ...] = ("validation", "test")
ROWS = 8
"""Sequences of a pass that only measures."""


class ZeroShot(Config):
    """The base as it is."""

    model: ModelConfig

    def compute(self, texts: CustomerTexts) -> Result:
        """Perplexity of each customer's `validation` and `test` text, and `trained` parameters: none."""
        model = load_full(self.model).float()
        return {**_perplexities(texts, texts.train, lambda _, own: perplexity(model, own)), "trained": 0}


class Adapted(Config):
    """The base adapted as a row says."""

    model: ModelConfig
    row: Row
    training: Training
    lr: float
    seed: int

    def compute(self, texts: CustomerTexts) -> Result:
        """Perplexity of each customer's `validation` and `test` text, `trained` parameters (of all customers), `fits`
        of each auxiliary or model, and batches that were `refused` because they were not finite.

        Raises:
            SiteError: a pattern matches nothing.
            TrainingError: a perplexity is not finite.
        """
        model = load_full(self.model).float()
        if self.row.method == "gradient":
            return self._gradient(model, texts)
        found: dict[str, dict[str, float]] = {part: {} for part in MEASURED}
        trained = 0
        groups = [list(texts.train)] if self.row.mode == "joint" else [[name] for name in texts.train]
        for group in groups:
            adapted, parameters = self._propagated(load_full(self.model).float(), group, texts)
            trained += sum(parameter.numel() for parameter in parameters)
            for part, values in _perplexities(texts, group, lambda _, own, of=adapted: perplexity(of, own)).items():
                found[part] |= values
        return {**found, "trained": trained, "fits": self.training.steps}

    def _gradient(self, model: PreTrainedModel, texts: CustomerTexts) -> Result:
        sites = find_sites(model, self.training.sites)
        base = BasePass(model, sites)
        mode = self._mode(sites, list(texts.train))
        fits = Fits({name: make_fitter(own.copy(), self._fitting()) for name, own in mode.auxiliaries.items()})
        run = GradientRun(steps=self.training.steps, rows=self.training.rows, seed=self.seed, merged=self.row.merged)
        learnt = learn(base, mode, self._batches(texts.train), FittingHere(fits), run)
        tensors = [tensor for own in mode.auxiliaries.values() for tensor in own.tensors.values()]
        with Merging(model, sites) if self.row.merged else nullcontext() as merging:
            if merging is not None:
                merging.merge(mode.summands())
            found = _perplexities(
                texts, texts.train, lambda name, own: _through(base, mode, name, own, self.row.merged)
            )
        return {
            **found,
            "trained": sum(map(Tensor.numel, tensors)),
            "fits": self._fitting().fits,
            "refused": int(learnt.history[-1]["refused"]),
        }

    def _mode(self, sites: Mapping[str, Site], customers: Sequence[str]) -> Mode:
        if self.row.mode == "joint":
            return Joint(self._auxiliary(sites, 0))
        own = {name: self._auxiliary(sites, number) for number, name in enumerate(customers)}
        return Alone(own) if self.row.mode == "alone" else Collaboration(own)

    def _auxiliary(self, sites: Mapping[str, Site], number: int) -> Auxiliary:
        """As that of customer `number`, or the joint one (0), starts."""
        rank, alpha = self.training.rank, self.training.alpha
        seed = self.seed * 1000 + number
        return Auxiliary(sites, AuxiliaryConfig(kind=self.row.kind, rank=rank, alpha=alpha, seed=seed))

    def _fitting(self) -> FitConfig:
        fits = math.ceil(self.training.steps / self.row.interval)
        return FitConfig(interval=self.row.interval, lr=self.lr, schedule="linear", fits=fits)

    def _batches(self, sequences: Sequences) -> CustomerBatches:
        return CustomerBatches(sequences, self.training.rows, self.seed)

    def _propagated(
        self, model: PreTrainedModel, group: list[str], texts: CustomerTexts
    ) -> tuple[PreTrainedModel, list[nn.Parameter]]:
        """A model that learnt from some customers' text by back-propagation, and its parameters that did."""
        if self.row.method == "lora":
            model.requires_grad_(False)
            parameters = self._lora(model, list(texts.train).index(group[0]))
        else:
            parameters = list(model.requires_grad_(True).parameters())
        batches = self._batches({name: texts.train[name] for name in group})
        back_propagate(
            model, parameters, (batches[n] for n in range(self.training.steps)), self.lr, self.training.steps
        )
        return model.requires_grad_(False), parameters

    def _lora(self, model: PreTrainedModel, number: int) -> list[nn.Parameter]:
        """Put PEFT's LoRA into a model; it starts as the auxiliary of the same customer does."""
        sites = find_sites(model, self.training.sites)
        start = self._auxiliary(sites, number).tensors
        rank, alpha = self.training.rank, self.training.alpha
        # PEFT's annotation says integer; it divides whatever it is given.
        settings = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(sites), lora_dropout=0.0)  # type: ignore[arg-type]
        wrapped = get_peft_model(model, settings)
        learning = {name: p for name, p in wrapped.get_base_model().named_parameters() if p.requires_grad}
        with torch.no_grad():
            for name, parameter in learning.items():
                parameter.copy_(start[name.replace(".default.", ".")])
        return list(learning.values())


def back_propagate(
    model: PreTrainedModel, parameters: Sequence[nn.Parameter], batches: Iterable[CustomerRows], lr: float, steps: int
) -> None:
    """Plain training on the loss that gradient learning has: the sum over customers of each one's mean.

    Args:
        batches: one a step.
        lr: falls linearly to 0 over `steps`.
    """
    language = LanguageModel(model)
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    schedule = LambdaLR(optimizer, lambda step: 1 - step / steps if step < steps else 0.0)
    for rows in batches:
        labels, shares = rows.weighed()
        hidden = body_output(language.model, rows.input_ids, rows.position_ids)
        loss, _ = language.head(hidden, labels, shares_BT=shares)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()


def _through(base: BasePass, mode: Mode, name: str, sequences: Sequence[PackedSequence], merged: bool) -> float:
    """Perplexity of a customer's text through what the mode has for it."""
    total, count = 0.0, 0
    for start in range(0, len(sequences), ROWS):
        chunk = sequences[start : start + ROWS]
        losses, tokens = base.losses(customer_rows(chunk, [name] * len(chunk)), mode, merged)
        total, count = total + losses[name] * tokens[name], count + tokens[name]
    return math.exp(total / count)


def _perplexities(
    texts: CustomerTexts, customers: Iterable[str], measure: Callable[[str, Sequence[PackedSequence]], float]
) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {part: {} for part in MEASURED}
    for name in customers:
        for part in MEASURED:
            try:
                found[part][name] = measure(name, getattr(texts, part)[name])
            except OverflowError:
                found[part][name] = math.inf
            if not math.isfinite(found[part][name]):
                raise TrainingError(f"the perplexity of {name} is {found[part][name]}; lower the learning rate")
    return found
