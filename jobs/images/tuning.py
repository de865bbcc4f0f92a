"""What a tuning run of an image model works on: a bundle's model with a head for the customer's classes, and images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import BaseImageProcessor, PreTrainedModel

from jobs.images.opening import labelled_images
from jobs.tuning.config import TuneConfig
from ot_ray.artifacts import Bundle, BundleManifest
from ot_ray.data.images import LabelledImages, image_digest
from ot_ray.evaluation import class_mean_head, loss_and_accuracy
from ot_ray.training import TrainingConfig, TrainingResult, fit_images
from ot_ray.training.text_source import image_files


@dataclass(frozen=True)
class ImageWork:
    """A bundle's model and a customer's images, found and looked at. Stands where `Work` does."""

    model: PreTrainedModel
    """The emulated model under the class-mean head of the training images; a run changes it."""
    bundle: BundleManifest
    """What it came from."""
    images: LabelledImages
    """The training images."""
    held_out: LabelledImages | None
    """Validation images."""
    processor: BaseImageProcessor
    """The bundle's own."""
    workers: int
    """Threads that decode ahead, in training and in evaluation."""
    digest: str
    """What identifies the training images."""

    @property
    def figures(self) -> dict[str, Any]:
        """What went in, as JSON values."""
        return {"images": len(self.images), "classes": list(self.images.classes)}

    @property
    def rows(self) -> int:
        """Images that an epoch shows."""
        return len(self.images)

    @property
    def examples(self) -> int:
        """The same."""
        return len(self.images)

    @property
    def evaluated(self) -> bool:
        """Whether there is anything to evaluate on."""
        return self.held_out is not None

    def evaluate(self, tuned: Any) -> dict[str, float]:
        """`validation_loss` in nats an image, and `validation_accuracy`."""
        assert self.held_out is not None
        plain = tuned.get_base_model() if hasattr(tuned, "get_base_model") else tuned
        loss, right = loss_and_accuracy(plain, self.held_out, self.processor, self.workers)
        return {"validation_loss": loss, "validation_accuracy": right}

    def fit(self, tuned: Any, training: TrainingConfig, **hooks: Any) -> TrainingResult:
        """Tune whatever has gradients. `hooks` as for `fit_images`."""
        return fit_images(tuned, self.images, self.processor, training, workers=self.workers, **hooks)


def open_image_work(bundle: Bundle, config: TuneConfig) -> ImageWork:
    """Read the images' headers, and fit the head that tuning starts from.

    Raises:
        DataError: images do not open (names them), the validation images are of other classes, or there are fewer
            than two classes.
        ArtifactError: the bundle has no image processor.
    """
    assert config.images is not None
    processor = bundle.load_processor()
    images = labelled_images(config.images)
    held_out = None
    if config.validation_images is not None:
        held_out = labelled_images(config.validation_images).with_classes(images.classes, "the training images' head")
    model = bundle.load_model()
    class_mean_head(model, images, processor, config.images.workers)
    return ImageWork(
        model=model,
        bundle=bundle.manifest,
        images=images,
        held_out=held_out,
        processor=processor,
        workers=config.images.workers,
        digest=image_digest(config.images, image_files(config.images.source)),
    )
