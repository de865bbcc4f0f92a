"""What decides a model's score on a task, apart from the model: the harness, the task's settings and functions,
and the documents. Scores are kept under it."""

from __future__ import annotations

import hashlib
import inspect
import itertools
import json
from collections.abc import Iterable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

# Where the documents lie says nothing of what they are, and they count themselves.
_PLACES = {"dataset_path", "dataset_name", "dataset_kwargs"}
# Nor does where the YAML file lies, which the harness notes down.
_FILE = "config_source"


def harness_version() -> str:
    """The version of the lm-evaluation-harness that is installed."""
    return version("lm_eval")


def task_identity(task: Any, num_fewshot: int | None = None, limit: int | None = None) -> dict[str, Any]:
    """Plain values that are equal where the harness asks a model the same and computes the same of its answers.

    Args:
        task: of `ot_ray.data.tasks.load_task`.
        num_fewshot, limit: as in `HarnessConfig`.
    """
    # A dictionary in its own right, so that functions stand in it as they are.
    config = {name: value for name, value in asdict(task.config).items() if name not in _PLACES}
    config["metadata"] = {name: value for name, value in (config["metadata"] or {}).items() if name != _FILE}
    shots = task.config.num_fewshot if num_fewshot is None else num_fewshot
    return {
        "task": task.task_name,
        "version": str(task.VERSION),
        "harness": harness_version(),
        "num_fewshot": num_fewshot,
        "limit": limit,
        "settings": _digest([config]),
        "documents": _digest(itertools.islice(task.eval_docs, limit)),
        "examples": _digest(task.fewshot_docs() or ()) if shots else None,
    }


def _digest(values: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for value in values:
        digest.update(json.dumps(value, sort_keys=True, default=_plain).encode() + b"\n")
    return digest.hexdigest()


def _plain(value: Any) -> str:
    """What stands for a value that JSON does not know; for a function, the whole file that it stands in, because
    it may call others there."""
    if callable(value):
        try:
            source = Path(inspect.getsourcefile(value) or "").read_text(encoding="utf-8")
        except (TypeError, OSError):
            source = ""
        return f"{getattr(value, '__qualname__', type(value).__qualname__)}\n{source}"
    return str(value)
