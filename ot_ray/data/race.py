"""Training documents of `race`: the harness's own data set of it has test documents alone, so that these come from
the original data set, in the harness's shape. Writing them as examples is the harness's, asked by tasks.py."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from typing import Any

from ot_ray.errors import DataError

HARNESS_DATASET = "EleutherAI/race"
"""Where the harness has its documents from."""
ORIGINAL_DATASET = "ehovy/race"
"""The original on the hub (Lai et al., 2017): one row a question."""


def training_documents(level: str | None) -> list[dict[str, str]]:
    """The training split as the harness has the test split: one document an article.

    Args:
        level: the schools' level, as the data set's configurations are called; unset, `high`.

    Raises:
        DataError: the data set cannot be loaded.
    """
    # Whoever has the harness has this.
    datasets = importlib.import_module("datasets")
    level = level or "high"
    try:
        rows = datasets.load_dataset(ORIGINAL_DATASET, level, split="train")
    except Exception as error:
        # Besides its own errors, the library raises what pyarrow, fsspec and its network client raise.
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise DataError(
            f"task:race has its training split from {ORIGINAL_DATASET}/{level}, which cannot be loaded: {reason}; load "
            "it once with a network, so that it lies in the cache (HF_HOME) of every machine, or train on something "
            "else"
        ) from None
    return by_article(rows)


def by_article(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Rows of the original grouped by their article, in the order in which the articles come first.

    Args:
        rows: `article`, `question`, `answer` (A to D) and `options` (four).

    Returns:
        `article`, and `problems`, a Python list of dictionaries as text, which the harness's functions read.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        problem = {"question": row["question"], "answer": row["answer"], "options": list(row["options"])}
        found.setdefault(row["article"], []).append(problem)
    return [{"article": article, "problems": repr(problems)} for article, problems in found.items()]
