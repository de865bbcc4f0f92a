"""sample: text from the base model as a session sees it, one token after the other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import DynamicCache

from ot_ray.cola import Mode, Taps
from ot_ray.errors import NotFiniteError
from serve.catalogue.records import GradientOperation
from serve.engine.checks import context_length, end_tokens, seed_of
from serve.engine.sampling import Sampler, Sampling
from serve.failures import ApiError
from serve.gradients.desk import Desk


def sample(desk: Desk, operation: GradientOperation) -> None:
    """Continue a prompt through the session's mode; at temperature 0 by the likeliest token.

    Raises:
        ApiError: the prompt is empty, holds unknown tokens, or leaves no room for the answer.
    """
    plan, asked = desk.plan(operation.session_id), operation.request
    desk.require_sites(plan)
    prompt = _encoded(desk, asked["prompt"])
    room = context_length(desk.base.model)
    if len(prompt) + asked["max_tokens"] > room:
        raise ApiError(
            f"prompt has {len(prompt)} tokens, and max_tokens is {asked['max_tokens']}, but the model's context has "
            f"{room}; shorten one of them.",
            code="context_length_exceeded",
            param="prompt",
        )
    sampler = Sampler(Sampling(asked["temperature"], asked["top_p"]), seed_of(asked.get("seed")))
    mode, versions = desk.mode({operation.id: plan})
    tokens = generate(desk, mode, operation.id, prompt, sampler, asked["max_tokens"])
    text = desk.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    desk.succeed(operation, {"text": text, "tokens": len(tokens)}, versions[plan.auxiliary_id])


@torch.no_grad()
def generate(
    desk: Desk, mode: Mode, customer: str, prompt: Sequence[int], sampler: Sampler, max_tokens: int
) -> list[int]:
    """Tokens that follow a prompt, up to one that ends a text, which is left out.

    Args:
        customer: in whose name the row goes through the mode.
    """
    model, ends = desk.base.model, end_tokens(desk.base.model, desk.tokenizer)
    sites = {name: desk.base.sites[name] for one in mode.auxiliaries.values() for name in one.sites}
    cache, made = DynamicCache(config=model.config), []
    given = torch.tensor([list(prompt)], device=model.device)
    with Taps(model, sites, mode) as taps, taps.batch([customer]):
        while len(made) < max_tokens:
            logits = model(given, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0, -1].float()
            if not logits.isfinite().all():
                raise NotFiniteError("the model's output is not finite; load an auxiliary with smaller weights")
            token = sampler.pick(logits)
            if token in ends:
                break
            made.append(token)
            given = torch.tensor([[token]], device=model.device)
    return made


def _encoded(desk: Desk, prompt: str | list[int]) -> list[int]:
    tokens = list(desk.tokenizer(prompt)["input_ids"]) if isinstance(prompt, str) else prompt  # type: ignore
    vocabulary = desk.base.model.config.get_text_config().vocab_size
    if not tokens or not all(0 <= token < vocabulary for token in tokens):
        raise ApiError(
            f"prompt has {len(tokens)} tokens; use one or more, each from 0 to {vocabulary - 1}.", param="prompt"
        )
    return tokens
