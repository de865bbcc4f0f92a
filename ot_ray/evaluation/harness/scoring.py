"""One model in memory, one task: the lm-evaluation-harness's own numbers.

The harness wraps the model, makes the requests and computes the metrics; finding the task is the data room's."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from pydantic import ConfigDict
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ot_ray.config import Config
from ot_ray.data.tasks import harness, quiet_harness
from ot_ray.errors import DataError

_PREFERRED = ("acc", "exact_match", "word_perplexity")


class TaskScore(Config):
    """What the harness says of one model on one task."""

    # Perplexities of a broken model may be infinite, and are to be seen.
    model_config = ConfigDict(allow_inf_nan=True, ser_json_inf_nan="constants")

    task: str
    """The task's name."""
    version: str
    """The task's version."""
    documents: int
    """How many of its documents were scored."""
    metrics: dict[str, float]
    """By the metric's name; where a filter other than the harness's default was applied, `metric,filter`."""
    stderr: dict[str, float | None]
    """Standard error of each; None where the harness gives none."""
    higher_is_better: dict[str, bool | None]
    """Of each; None where the harness does not say."""

    @property
    def main(self) -> str:
        """The metric that the paper's Table 1 shows: accuracy, exact match on webqs, perplexity by word on
        wikitext; of other tasks the first."""
        return next((name for name in _PREFERRED if name in self.metrics), next(iter(self.metrics)))


def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Any,
    *,
    batch_size: int = 8,
    num_fewshot: int | None = None,
    limit: int | None = None,
) -> TaskScore:
    """Score a model, where it lies, with the harness's `HFLM` and its default seeds.

    The random states of Python, NumPy and PyTorch are set anew, as the harness does.

    Args:
        model: put into evaluation mode.
        task: of `ot_ray.data.tasks.load_task`; not used before.
        batch_size, num_fewshot, limit: as in `HarnessConfig`.

    Raises:
        DataError: the harness gives no numbers.
        MissingDependencyError: the harness is not installed.
    """
    wrapper = harness("lm_eval.models.huggingface").HFLM
    evaluator = harness("lm_eval.evaluator")
    with quiet_harness():
        wrapped = wrapper(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size)
        # What the harness's `simple_evaluate` does, which would then spend seconds on describing the machine.
        _prepare(task, num_fewshot)
        found = evaluator.evaluate(
            lm=wrapped, task_dict={"tasks": {task.task_name: task}}, limit=limit, log_samples=False
        )
    return read_score(found, task.task_name)


def read_score(found: dict[str, Any], name: str) -> TaskScore:
    """One task's part of the harness's results, as `simple_evaluate` returns and its command line writes them.

    Raises:
        DataError: there are no numbers of this task in them.
    """
    values = {key: value for key, value in found["results"][name].items() if "," in key}
    metrics = {key: value for key, value in values.items() if "_stderr," not in key}
    if not metrics:
        raise DataError(f"task {name}: the harness computed no metric; check metric_list in its YAML file")
    errors = {key: values.get(key.replace(",", "_stderr,", 1)) for key in metrics}
    better = found["higher_is_better"].get(name, {})
    return TaskScore(
        task=name,
        version=str(found["versions"].get(name)),
        documents=found["n-samples"][name]["effective"],
        metrics={_short(key): float(value) for key, value in metrics.items()},
        stderr={_short(key): value if isinstance(value, float | int) else None for key, value in errors.items()},
        higher_is_better={_short(key): better.get(key.partition(",")[0]) for key in metrics},
    )


def _prepare(task: Any, num_fewshot: int | None) -> None:
    seeds = harness("lm_eval.defaults")
    random.seed(seeds.DEFAULT_RANDOM_SEED)
    np.random.seed(seeds.DEFAULT_OTHER_SEED)
    torch.manual_seed(seeds.DEFAULT_OTHER_SEED)
    shots = task.get_config("num_fewshot")
    # A task that says 0 keeps it, whatever is asked for.
    if shots is None or (num_fewshot is not None and shots != 0):
        task.set_config("num_fewshot", num_fewshot or 0)
    task.set_fewshot_seed(seeds.DEFAULT_OTHER_SEED)


def _short(key: str) -> str:
    return key.removesuffix(",none")
