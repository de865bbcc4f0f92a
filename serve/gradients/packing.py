"""Which operations share a pass of the base model, and their rows as its batch. Letters: B rows, T positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ot_ray.cola import CustomerRows
from ot_ray.model.losses import IGNORED
from serve.catalogue.records import GradientOperation
from serve.failures import ApiError
from serve.gradients.plans import SessionPlan


@dataclass(frozen=True)
class Wanted:
    """An operation that wants a pass."""

    operation: GradientOperation
    plan: SessionPlan
    tokens: tuple[tuple[int, ...], ...]
    """Of each row."""
    learnt: tuple[tuple[bool, ...], ...]
    """Which of them are learnt."""

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(len(row) for row in self.tokens)


def read_wanted(operation: GradientOperation, plan: SessionPlan, vocabulary: int, longest: int) -> Wanted:
    """Read a request for a pass. The routes have checked it; what would break everybody's pass is checked again.

    Args:
        vocabulary: how many tokens the model knows.
        longest: the most that it takes in a row.

    Raises:
        ApiError: there are no rows, a row is empty or too long, or a token unknown.
    """
    tokens, learnt = [], []
    for index, row in enumerate(operation.request["rows"]):
        ids, mask = row["tokens"], row.get("loss_mask")
        if not 1 <= len(ids) <= longest or not all(0 <= token < vocabulary for token in ids):
            raise ApiError(
                f"rows.{index} has {len(ids)} tokens; use 1 to {longest} of them, each from 0 to {vocabulary - 1}.",
                param=f"rows.{index}.tokens",
            )
        if mask is not None and len(mask) != len(ids):
            raise ApiError(
                f"rows.{index} has {len(ids)} tokens, but a loss_mask of {len(mask)}; make them equal.",
                param=f"rows.{index}.loss_mask",
            )
        tokens.append(tuple(ids))
        learnt.append((True,) * len(ids) if mask is None else tuple(bool(value) for value in mask))
    if not tokens:
        raise ApiError("rows is empty; give at least one.", param="rows")
    return Wanted(operation, plan, tuple(tokens), tuple(learnt))


def packed(wanted: Sequence[Wanted], max_rows: int, max_tokens: int) -> list[list[Wanted]]:
    """Operations in as few passes as have room for them, those of similar length together.

    Args:
        max_rows: rows of a pass; an operation with more has a pass of its own.
        max_tokens: rows times the longest of them, likewise.

    Returns:
        Passes. Over an operation with a pass of its own, which comes late, a process was lost before.
    """
    passes: list[list[Wanted]] = []
    rows = 0
    alone = [[one] for one in wanted if one.operation.attempt > 1]
    wanted = [one for one in wanted if one.operation.attempt == 1]
    # The longest come first, so that each pass is as long as its first row.
    for one in sorted(wanted, key=lambda one: -one.longest):
        rows += len(one.tokens)
        if not passes or rows > max_rows or rows * passes[-1][0].longest > max_tokens:
            passes.append([])
            rows = len(one.tokens)
        passes[-1].append(one)
    return passes + alone


def batch_of(wanted: Sequence[Wanted]) -> CustomerRows:
    """The rows of some operations, padded on the right, under their operations' ids: [B, T]."""
    longest = max(one.longest for one in wanted)
    rows = [
        (one.operation.id, ids, learnt) for one in wanted for ids, learnt in zip(one.tokens, one.learnt, strict=True)
    ]
    ids_BT = torch.zeros(len(rows), longest, dtype=torch.int64)
    labels_BT = torch.full_like(ids_BT, IGNORED)
    mask_BT = torch.zeros_like(ids_BT, dtype=torch.bool)
    for place, (_, ids, learnt) in enumerate(rows):
        row = torch.tensor(ids, dtype=torch.int64)
        ids_BT[place, : len(ids)] = row
        labels_BT[place, : len(ids)] = row.where(torch.tensor(learnt), IGNORED)
        mask_BT[place, : len(ids)] = True
    return CustomerRows(ids_BT, tuple(name for name, _, _ in rows), labels_BT, mask_BT)
