"""Scores of a model in memory on the tasks of the lm-evaluation-harness, kept by content, and the paper's Table 1.

Which model each of the five settings is, and where it is computed, is the jobs' part."""

from ot_ray.evaluation.harness.cache import ScoreCache
from ot_ray.evaluation.harness.config import PAPER_TASKS, HarnessConfig
from ot_ray.evaluation.harness.scoring import TaskScore, score
from ot_ray.evaluation.harness.table import TaskTable
from ot_ray.evaluation.harness.task_identity import harness_version, task_identity

__all__ = [
    "PAPER_TASKS",
    "HarnessConfig",
    "ScoreCache",
    "TaskScore",
    "TaskTable",
    "harness_version",
    "score",
    "task_identity",
]
