"""The settings of `jobs.evaluate`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from ot_ray.artifacts import BundleSource
from ot_ray.config import Config
from ot_ray.data import DataConfig
from ot_ray.data.images import ImageConfig
from ot_ray.evaluation.harness import HarnessConfig
from ot_ray.model import ModelConfig
from ot_ray.training import TrainingConfig

Setting = Literal["full_zero_shot", "emulator_zero_shot", "ot_emulator", "ot_plug_in", "full_fine_tuned"]
ALL: tuple[Setting, ...] = ("full_zero_shot", "emulator_zero_shot", "ot_emulator", "ot_plug_in", "full_fine_tuned")
WITH_BUNDLE: frozenset[Setting] = frozenset({"emulator_zero_shot", "ot_emulator", "ot_plug_in"})
EMULATED: frozenset[Setting] = frozenset({"emulator_zero_shot", "ot_emulator"})
TUNED: frozenset[Setting] = frozenset({"ot_emulator", "ot_plug_in"})


class ScoringWorkers(Config):
    """What a Ray task that scores a model gets."""

    cpus: float = Field(default=1.0, gt=0)
    """CPUs."""
    gpus: float = Field(default=0.0, ge=0)
    """GPUs; a share below 1 where several models fit on one."""
    tasks_each: int = Field(default=1, ge=1)
    """Tasks of the harness that are scored one after the other on a model that was loaded once; 1 for all of them
    side by side."""


class TaskEvaluation(HarnessConfig):
    """Scores of the settings on tasks of the lm-evaluation-harness."""

    settings: tuple[Setting, ...] = Field(default=ALL, min_length=1)
    """Which of the five; those with an adapter need one, and `full_fine_tuned` is trained where it was not yet."""
    adapters: dict[str, str] = {}  # noqa: RUF012 - pydantic copies defaults
    """Folder or address of the adapter for single tasks, by their names, where one was tuned for each as in the
    paper; for other tasks, `adapter`."""
    cache: str = "runs/scores"
    """Folder or `s3://` address where scores, and the weights of full fine-tuning, are kept by what decides them;
    all machines must reach it."""
    workers: ScoringWorkers = ScoringWorkers()
    """What each Ray task gets."""
    address: str | None = None
    """Ray cluster; unset, the one this runs in, or else a local one."""

    @model_validator(mode="after")
    def _adapters_have_tasks(self) -> TaskEvaluation:
        lost = sorted(self.adapters.keys() - set(self.tasks))
        if lost:
            raise ValueError(f"adapters names {', '.join(lost)}, which tasks does not; add it there, or leave it out")
        return self


class EvaluateConfig(Config):
    """A model, its bundle, a tuned adapter, and on what the five settings are compared: text, tasks, or both."""

    model: ModelConfig
    """The full model."""
    bundle: BundleSource | None = None
    """The bundle that was tuned."""
    adapter: str | None = None
    """Folder or address of the tuned adapter."""
    train: DataConfig | None = None
    """What the adapter was tuned on: the reference, full fine-tuning, is trained on the same. Unset, for each task
    its own training examples (`task:<name>`)."""
    test: DataConfig | None = None
    """The test split, for perplexities."""
    train_images: ImageConfig | None = None
    """For an image model, the images that the adapter was tuned on: the reference is trained on the same, and what is
    not tuned gets its head from them."""
    test_images: ImageConfig | None = None
    """For an image model, the test images, for accuracies."""
    harness: TaskEvaluation | None = None
    """Tasks, for their own metrics."""
    sequence_length: int = Field(default=512, ge=2)
    """Tokens of a sequence."""
    training: TrainingConfig
    """The optimiser run of full fine-tuning; for a fair comparison, the adapter's own."""
    output: str
    """Folder for the reports: `five_settings.json` and `.png` of the text, `task_scores.json` and `.txt` of the
    tasks."""

    @model_validator(mode="after")
    def _complete(self) -> EvaluateConfig:
        if self.test_images is not None:
            self._check_images()
            return self
        if self.train_images is not None:
            raise ValueError(
                "train_images is set, but test_images is not, so that nothing says what to measure on; set "
                "test_images.source=..."
            )
        if self.test is None and self.harness is None:
            raise ValueError("test is required, or harness; set test.source=... or harness.tasks=[...]")
        wanted = set(self.harness.settings) if self.harness is not None else set()
        if self.test is not None:
            wanted |= set(ALL)
        uncovered = self.harness is not None and set(self.harness.tasks) - self.harness.adapters.keys()
        needed = {
            "bundle": bool(wanted & WITH_BUNDLE),
            "adapter": self.test is not None or bool(wanted & TUNED and uncovered),
            "train": self.test is not None,
        }
        missing = [name for name, is_needed in needed.items() if is_needed and getattr(self, name) is None]
        if missing:
            way_out = "" if self.test is not None else ", or leave those out that need it by harness.settings=[...]"
            raise ValueError(f"{missing[0]} is required for these settings; set it{way_out}")
        return self

    def _check_images(self) -> None:
        missing = [name for name in ("bundle", "adapter", "train_images") if getattr(self, name) is None]
        if missing:
            raise ValueError(f"{missing[0]} is required with test_images; set it")
        other = [name for name in ("test", "train", "harness") if getattr(self, name) is not None]
        if other:
            raise ValueError(f"{other[0]} is for text, but test_images is set; leave one of them out")
