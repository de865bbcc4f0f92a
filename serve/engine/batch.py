"""Rows of one batch, of any adapters, that grow by a token a step; choices join and leave between steps.

Whose turn it is, and where steps run, is batching.py's part. Letters: B rows, T positions, V vocabulary."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from transformers import DynamicCache, DynamicLayer

from ot_ray.model import depth_of
from ot_ray.model.multi_adapter import MultiAdapter
from serve.engine.job import Row, lost
from serve.engine.kv_rows import RowCache
from serve.engine.sampling import pick
from serve.engine.scoring import TokenScore, score_prompt, scores_of
from serve.failures import ApiError

_log = logging.getLogger(__name__)

# Prompt tokens that are read between two steps, so that long prompts don't hold up those who wait for their next token.
PREFILL = 2048


class Batch:
    """The choices that are generated now. Everything here runs on one thread.

    What a row computes depends on its own tokens, adapter and seed; beside other rows it is the same up to the
    rounding of sums that are taken in another order.

    Args:
        ends: tokens that end a choice.
    """

    def __init__(self, many: MultiAdapter, ends: frozenset[int]) -> None:
        self._many, self._ends = many, ends
        self._device = many.model.device
        self._cache = RowCache(depth_of(many.model), self._device)
        self.rows: list[Row] = []
        self.tokens = self.steps = 0
        """Tokens made, and passes that each made one a row."""

    def __len__(self) -> int:
        return len(self.rows)

    @torch.inference_mode()
    def join(self, rows: Sequence[Row]) -> None:
        """Read what rows have so far, and make the next token of each; those for which that fails, fail alone."""
        rows = [row for row in rows if self._echoed(row) and not self._needs_nothing(row)]
        for together in _of_like_length(rows):
            if not self._joins(together):
                # One of them is at fault, or all are too many at once, and the others need not know.
                for row in together:
                    if len(together) == 1 or not self._joins([row]):
                        self._refuse(row)

    def _joins(self, rows: Sequence[Row]) -> bool:
        try:
            self._add(rows)
        except Exception:
            _log.exception("%d rows cannot join the batch", len(rows))
            return False
        return True

    def _refuse(self, row: Row) -> None:
        row.ticket.fail(ApiError("The model failed to read this request; try again.", 500))

    def _add(self, rows: Sequence[Row]) -> None:
        """Have rows join; where that fails, they and the batch are as they were."""
        firsts, numbers, logits, read = self._read(rows)
        before = len(self.rows)
        self._cache.join(read, [len(row.read) for row in firsts], numbers)
        self.rows += rows
        try:
            chosen = self._choose(rows, logits[torch.tensor(numbers, device=self._device)])
        except BaseException:
            for place in range(len(self.rows) - 1, before - 1, -1):
                self._leave(place)
            raise
        self._take(rows, *chosen)

    def _read(self, rows: Sequence[Row]) -> tuple[list[Row], list[int], torch.Tensor, DynamicCache]:
        """Read what rows have so far, the same prompt once; the batch is left as it is.

        Returns:
            Rows that were read, which of them each of `rows` goes on from, logits [B, V], and the cache.
        """
        keys = [(row.adapter, id(row.read)) for row in rows]
        firsts = dict(zip(keys, rows, strict=True))
        place = {key: number for number, key in enumerate(firsts)}
        numbers = [place[key] for key in keys]
        return list(firsts.values()), numbers, *self._prefill(list(firsts.values()))

    @torch.inference_mode()
    def step(self) -> None:
        """Make one more token for every row."""
        self._cache.trim()
        mask, positions = self._cache.step()
        ids = torch.tensor([[row.token] for row in self.rows], device=self._device)
        logits = self._run(self.rows, ids, mask, positions, self._cache.cache)
        self.steps += 1
        self._take(self.rows, *self._choose(self.rows, logits))

    @torch.inference_mode()
    def drop(self, gone: Callable[[Row], bool]) -> None:
        """Take rows out."""
        for place in range(len(self.rows) - 1, -1, -1):
            if gone(self.rows[place]):
                self._leave(place)

    def _leave(self, place: int) -> None:
        self._cache.leave(place)
        self.rows[place] = self.rows[-1]
        self.rows.pop()

    def clear(self) -> None:
        """Take all rows out, in whatever state a failed step has left them."""
        self.rows = []
        self._cache.clear()

    @torch.inference_mode()
    def logits_of(self, adapter: int, ids: torch.Tensor) -> torch.Tensor:
        """Logits of every position, [B, T, V], of token ids [B, T] without padding; the batch is left as it is."""
        inputs: dict[str, Any] = {"input_ids": ids.to(self._device), "use_cache": False}
        return self._many([adapter] * len(ids), **inputs).logits

    def _prefill(self, rows: Sequence[Row]) -> tuple[torch.Tensor, DynamicCache]:
        longest = max(len(row.read) for row in rows)
        begins = torch.tensor([[longest - len(row.read)] for row in rows])
        ids = torch.tensor([[0] * (longest - len(row.read)) + row.read for row in rows])
        columns = torch.arange(longest)[None]
        mask = (columns >= begins).long().to(self._device) if begins.any() else None
        positions = (columns - begins).clamp(min=0).to(self._device)
        cache = self._fresh_cache()
        return self._run(rows, ids.to(self._device), mask, positions, cache), cache

    def _run(
        self, rows: Sequence[Row], ids: torch.Tensor, mask: torch.Tensor | None, positions: torch.Tensor, cache: Any
    ) -> torch.Tensor:
        """Float32 logits [B, V] after the last of the ids [B, T]."""
        output = self._many(
            [row.adapter for row in rows],
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1].float()

    def _choose(self, rows: Sequence[Row], logits: torch.Tensor) -> tuple[list[int], list[int], dict[int, TokenScore]]:
        """The next token of every row, whether its logits are finite, and the scores that were asked for."""
        tokens = pick([row.sampler for row in rows], logits)
        # A sum is finite where everything in it is, and one pass finds it.
        sound = logits.sum(-1).isfinite()
        chosen, finite = torch.stack([tokens, sound.long()]).tolist()
        scores = self._scores(rows, tokens, logits)
        for row, token in zip(rows, chosen, strict=True):
            row.sampler.move_on(token)
        return chosen, finite, scores

    def _take(self, rows: Sequence[Row], chosen: list[int], finite: list[int], scores: dict[int, TokenScore]) -> None:
        """Give rows their tokens, and take out those that end."""
        over: set[int] = set()
        for place, row in enumerate(rows):
            if not finite[place]:
                row.ticket.fail(_not_finite(row))
                continue
            try:
                if row.take(chosen[place], scores.get(place), self._ends):
                    over.add(id(row))
            except Exception as error:
                _log.exception("a token cannot be told; its request ends")
                row.ticket.fail(lost(error))
        self.tokens += len(rows)
        self.drop(lambda row: id(row) in over or row.ticket.over)

    def _scores(self, rows: Sequence[Row], tokens: torch.Tensor, logits: torch.Tensor) -> dict[int, TokenScore]:
        tops = {place: row.ticket.job.top for place, row in enumerate(rows) if row.ticket.job.top is not None}
        if not tops:
            return {}
        places = torch.tensor(list(tops), device=self._device)
        found = scores_of(tokens[places], logits[places], max(tops.values()))
        return {
            place: TokenScore(score.token, score.logprob, dict(islice(score.top.items(), top)))
            for (place, top), score in zip(tops.items(), found, strict=True)
        }

    def _echoed(self, row: Row) -> bool:
        """Tell a row's prompt if that was asked for; False if the request failed of it."""
        if row.ticket.job.echo and not row.made:
            try:
                self._echo(row)
            except Exception:
                _log.exception("a prompt cannot be echoed")
                self._refuse(row)
        return not row.ticket.over

    def _echo(self, row: Row) -> None:
        job, known = row.ticket.job, row.ticket.prompt_scores
        place = row.index // job.n
        if place not in known:
            known[place] = [] if job.top is None else self._score(row, job.top)
        row.pass_on(row.growing.echo(row.text, known[place]), 0)

    def _score(self, row: Row, top: int) -> list[TokenScore]:
        """Score a prompt, stretch by stretch: logits of all its tokens at once could be larger than the model."""
        cache = self._fresh_cache()

        def logits_of(ids: torch.Tensor) -> torch.Tensor:
            before = cache.get_seq_length()
            positions = torch.arange(before, before + ids.shape[1])[None]
            inputs: dict[str, Any] = {"past_key_values": cache, "use_cache": True}
            inputs |= {"input_ids": ids.to(self._device), "position_ids": positions.to(self._device)}
            return self._many([row.adapter], **inputs).logits

        return score_prompt(logits_of, row.prompt, top)

    def _fresh_cache(self) -> DynamicCache:
        cache = DynamicCache()
        cache.layers.extend(DynamicLayer() for _ in range(depth_of(self._many.model)))
        return cache

    def _needs_nothing(self, row: Row) -> bool:
        if row.ticket.job.max_tokens == 0:
            row.pass_on(row.growing.finish("length"), 0)
        return row.ticket.job.max_tokens == 0


def _of_like_length(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """Rows that are read together: padded to the longest of them, they are no more than may be read at once."""
    together: list[Row] = []
    for row in sorted(rows, key=lambda row: len(row.read)):
        if together and (len(together) + 1) * len(row.read) > PREFILL:
            yield together
            together = []
        together.append(row)
    if together:
        yield together


def _not_finite(row: Row) -> ApiError:
    return ApiError(
        f"The model `{row.ticket.job.model}` computes values that are not finite, so it cannot answer; tune it "
        "anew, or roll it back.",
        500,
        "model_not_finite",
    )
