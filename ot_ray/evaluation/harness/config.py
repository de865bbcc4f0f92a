"""Which tasks of the lm-evaluation-harness a model is scored on, and how."""

from __future__ import annotations

from pydantic import Field, field_validator

from ot_ray.config import Config

PAPER_TASKS = ("openbookqa", "piqa", "arc_easy", "arc_challenge", "hellaswag", "sciq", "webqs", "race")
"""The eight tasks of the paper's Table 1, in its order; its last column is `wikitext`."""


class HarnessConfig(Config):
    """Tasks, and what decides the scores on them."""

    tasks: tuple[str, ...] = Field(default=(*PAPER_TASKS, "wikitext"), min_length=1)
    """Tasks of the harness, by name; no groups. Its own are loaded from the hub, or from its local cache."""
    tasks_folder: str | None = Field(default=None, min_length=1)
    """Tasks of your own: a folder with YAML files of the harness, which win over its own of the same name. The
    Python functions that such files name are run, so it must be the operator's own folder, never one that somebody
    sent; all machines must reach it."""
    num_fewshot: int | None = Field(default=None, ge=0)
    """Examples before each question; unset, as the task says (none, in the paper's tasks)."""
    limit: int | None = Field(default=None, ge=1)
    """Only the first so many documents of each task, to try things out; unset, all."""
    batch_size: int = Field(default=8, ge=1)
    """Requests a pass. Another one changes the last digits of likelihoods, and counts as the same score."""

    @field_validator("tasks")
    @classmethod
    def _named_once(cls, tasks: tuple[str, ...]) -> tuple[str, ...]:
        twice = sorted({name for name in tasks if tasks.count(name) > 1})
        if twice:
            raise ValueError(f"{', '.join(twice)} stands there more than once; name each task once")
        return tasks
