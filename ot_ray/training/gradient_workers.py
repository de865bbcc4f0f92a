"""Gradient learning as each rank of a worker group runs it, where the base model is too large for one device.

How ranks share the base is deepspeed_base.py's, how they share the rest rank_learning.py's."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor

from ot_ray.artifacts import ModelSource
from ot_ray.cola import Mode, find_sites
from ot_ray.errors import MergeError
from ot_ray.model import empty_model
from ot_ray.model.loading import DTYPES
from ot_ray.model.losses import HEAD_TOKENS
from ot_ray.training.deepspeed_base import ShardedBasePass
from ot_ray.training.gradient_checkpoints import GradientCheckpoints
from ot_ray.training.gradient_fitting import Fitting
from ot_ray.training.gradient_learning import GradientRun, RowsByNumber, learn
from ot_ray.training.loop import Evaluate, Report, TrainingResult
from ot_ray.training.rank_learning import RankCheckpoints, RankFitting


def open_sharded_base(
    source: ModelSource, dtype: str, patterns: str | Iterable[str], head_tokens: int = HEAD_TOKENS
) -> ShardedBasePass:
    """A base model whose weights are read as they are sharded: a rank holds its own parts and one whole tensor.

    Every rank of the process group calls this with the same arguments.

    Args:
        dtype: of the weights, as `ModelConfig.dtype` has it.
        patterns: of the sites that auxiliaries may have.

    Raises:
        SiteError: a pattern matches nothing that can be a site.
        MissingDependencyError: DeepSpeed is not installed.
    """
    model = empty_model(source.config, DTYPES[dtype])
    places, sites = source.stored_names(model), find_sites(model, patterns)

    def fill(name: str, start: int, end: int) -> Tensor:
        return source.weights.read(places[name], start, end)

    return ShardedBasePass(model, sites, DTYPES[dtype], fill, head_tokens)


def learn_together(
    base: ShardedBasePass,
    mode: Mode,
    batches: RowsByNumber,
    fitting: Callable[[], Fitting],
    run: GradientRun,
    *,
    checkpoints: Callable[[], GradientCheckpoints] | None = None,
    evaluate: Evaluate | None = None,
    report: Report | None = None,
) -> tuple[TrainingResult, dict[str, object]]:
    """`learn` on every rank of a group, with the same arguments everywhere.

    Args:
        fitting: makes the fitting, on rank 0 alone, which gets the pairs of all; it is closed afterwards.
        checkpoints: makes the run's, on rank 0 alone.
        evaluate: computed by all ranks together, on the whole of the data.
        report: called on every rank.

    Returns:
        What `learn` returns, and where each owner's fitter is in the end (`Fits.state_dict`).

    Raises:
        MergeError: `run.merged`; no rank has a whole weight to merge into.
    """
    if run.merged:
        raise MergeError(
            "run.merged is true, but the base's weights are sharded over ranks, none of which has a whole one; set "
            "run.merged=false, or run the base in one process"
        )
    first = base.messages.rank == 0
    shared = RankFitting(fitting() if first else None, base.messages)
    try:
        kept = None if checkpoints is None else RankCheckpoints(checkpoints() if first else None, base.messages)
        result = learn(base, mode, batches, shared, run, checkpoints=kept, evaluate=evaluate, report=report)
        return result, shared.states()
    finally:
        shared.close()
