"""The frozen base of gradient learning where it is too large for one device: its weights lie in parts on all ranks, by
DeepSpeed's ZeRO-3, and a layer is whole only while it is computed.

What becomes of the ranks' pairs is rank_learning.py's."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from ot_ray.cola import BasePass, CustomerRows, Mode, Passed, Site
from ot_ray.errors import GradientLearningError, MergeError
from ot_ray.model.losses import HEAD_TOKENS, IGNORED
from ot_ray.training.deepspeed_loading import Fill, load_partitioned
from ot_ray.training.deepspeed_settings import BUCKET, import_deepspeed, quiet
from ot_ray.training.rank_messages import RankMessages


class ShardedBasePass(BasePass):
    """A `BasePass` of a process group. Every rank calls it with the rows of the whole batch, computes its own part of
    them, and has the pairs of that part afterwards; losses and tokens are the whole batch's on every rank.

    The parts are contiguous, so that pairs of all ranks in their order are those of one process. Nobody's gradient
    depends on how many ranks there are, but for the order in which floats are added.

    Args:
        model: its parameters may lie on the meta device; the others are taken from rank 0.
        sites: found in the model while its weights are whole, or on the meta device.
        fill: gives the values of what lies on the meta device, by the model's own names; each rank asks for its own
            ranges only.
        dtype: of the weights.
        whole_below: parameters of fewer elements stay whole on every rank, which saves more messages than memory.

    Raises:
        MissingDependencyError: DeepSpeed is not installed.
        TrainingError: values are missing.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        sites: Mapping[str, Site],
        dtype: torch.dtype = torch.float32,
        fill: Fill | None = None,
        head_tokens: int = HEAD_TOKENS,
        whole_below: int = 100_000,
    ) -> None:
        super().__init__(model, sites, "cpu", head_tokens)
        deepspeed = import_deepspeed()
        with quiet():
            deepspeed.init_distributed(dist_backend="nccl" if torch.cuda.is_available() else "gloo")
        self.messages = RankMessages()
        gpu = torch.cuda.is_available()
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
        hooked = _Hooked(model, self.head)
        settings = _settings(dtype, whole_below)
        with quiet():
            load_partitioned(hooked, dtype, device, None if fill is None else _by_model_name(fill), settings)
            # There is nothing to optimise: DeepSpeed only fetches weights and lets go of them, as modules run.
            deepspeed.initialize(model=hooked, config=settings)
        # Not a module of this one, of which its parts are already.
        self._hooked = (hooked,)

    def forward(
        self, rows: CustomerRows, mode: Mode, merged: bool = False, learnt: Mapping[str, int] | None = None
    ) -> Passed:
        """As `BasePass.forward`.

        Raises:
            MergeError: `merged`; no rank has a whole weight to merge into.
        """
        self._refuse_merged(merged)
        own, everybodys = self._own(rows, mode), rows.learnt() if learnt is None else learnt
        passed = self._inside(lambda: super(ShardedBasePass, self).forward(own, mode, learnt=everybodys))
        return Passed(passed.pairs, *self._of_all(rows, passed.losses, passed.tokens))

    def losses(self, rows: CustomerRows, mode: Mode, merged: bool = False) -> tuple[dict[str, float], dict[str, int]]:
        """As `BasePass.losses`."""
        self._refuse_merged(merged)
        own = self._own(rows, mode)
        return self._of_all(rows, *self._inside(lambda: super(ShardedBasePass, self).losses(own, mode)))

    def _refuse_merged(self, merged: bool) -> None:
        if merged:
            raise MergeError(
                "the base's weights are sharded over ranks, none of which has a whole one to merge into; set "
                "run.merged=false, or run the base in one process"
            )

    def _own(self, rows: CustomerRows, mode: Mode) -> CustomerRows:
        """This rank's part; where there are fewer rows than ranks, a row that is nobody's, as all compute together."""
        # Seen by all before any of them computes, so that none waits for one that has given up.
        unknown = {mode.owner(name) for name in rows.customers} - {*mode.names, None}
        if unknown:
            raise GradientLearningError(
                f"rows name {', '.join(sorted(map(str, unknown)))}; the customers are {', '.join(mode.names)}"
            )
        places = torch.arange(len(rows.customers)).tensor_split(dist.get_world_size())[dist.get_rank()].tolist()
        if places:
            return _chosen(rows, places)
        first = _chosen(rows, [0])
        return replace(first, customers=(None,), labels=torch.full_like(first.labels, IGNORED))

    def _inside(self, compute: Callable[[], Any]) -> Any:
        found: list[Any] = []
        self._hooked[0](lambda: found.append(compute()))
        return found[0]

    def _of_all(
        self, rows: CustomerRows, losses: Mapping[str, float], tokens: Mapping[str, int]
    ) -> tuple[dict[str, float], dict[str, int]]:
        """Each customer's mean and count, of the whole batch from those of each rank's part."""
        names = list(dict.fromkeys(name for name in rows.customers if name is not None))
        sums = [losses.get(name, 0.0) * tokens.get(name, 0) for name in names]
        added = self.messages.total([*sums, *(float(tokens.get(name, 0)) for name in names)])
        counts = {name: int(count) for name, count in zip(names, added[len(names) :], strict=True)}
        return {n: total / max(1, counts[n]) for n, total in zip(names, added, strict=False)}, counts


class _Hooked(nn.Module):
    """What DeepSpeed takes for the model: it watches what is inside while a function runs that uses it."""

    def __init__(self, model: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.model, self.head = model, head

    def forward(self, compute: Callable[[], None]) -> None:
        compute()


def _settings(dtype: torch.dtype, whole_below: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {
            "stage": 3,
            "allgather_bucket_size": BUCKET,
            "stage3_prefetch_bucket_size": BUCKET,
            "stage3_param_persistence_threshold": whole_below,
        },
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": dtype == torch.float16},
        "steps_per_print": 10**9,
    }


def _by_model_name(fill: Fill) -> Fill:
    return lambda name, start, end: fill(name.removeprefix("model."), start, end)


def _chosen(rows: CustomerRows, places: Sequence[int]) -> CustomerRows:
    """Some of the rows."""

    def cut(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor[list(places)]

    names: Iterable[str] = ("input_ids", "labels", "mask", "position_ids")
    cuts: dict[str, Any] = {name: cut(getattr(rows, name)) for name in names}
    return replace(rows, customers=tuple(rows.customers[place] for place in places), **cuts)
