"""The five settings of an image model, by accuracy on the customer's test images (the paper's Table 3)."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from transformers import BaseImageProcessor, PreTrainedModel

from jobs.evaluation.config import EvaluateConfig
from jobs.images.opening import labelled_images
from jobs.limits import require_kind, require_same_model
from ot_ray.artifacts import inspect_adapter, load_full, open_model_source, plain_state
from ot_ray.data.images import ImageConfig, LabelledImages
from ot_ray.evaluation import ACCURACY, FiveSettings, accuracy, class_mean_head
from ot_ray.model import SplitPlan, adapter_state, plug_in
from ot_ray.progress import Progress
from ot_ray.store import download_folder, open_store
from ot_ray.training import fit_images


def measure_images(config: EvaluateConfig) -> FiveSettings:
    """Compute the five accuracies; full fine-tuning is trained here, for reference.

    Zero-shot is the untuned model, full or emulated, under the class-mean head of the training images; full
    fine-tuning starts from the full model under that head.

    Raises:
        DataError: images do not open, or the classes of training images, test images and adapter differ; names both.
    """
    assert config.bundle and config.adapter and config.train_images and config.test_images
    source = open_model_source(config.model)
    require_kind(source.config.model_type, "test", images=True)
    processor = source.processor()
    train, test = (labelled_images(images) for images in (config.train_images, config.test_images))
    test = test.with_classes(train.classes, "a head made of train_images")
    with tempfile.TemporaryDirectory() as temporary:
        bundle = config.bundle.open(Path(temporary) / "bundle")
        require_same_model(bundle.manifest.model, config.model.name)
        plan = bundle.manifest.plan
        folder = Path(temporary) / "adapter"
        download_folder(open_store(config.adapter), "", folder)
        adapter = inspect_adapter(folder, bundle.manifest)
        classes = adapter.manifest.classes or ()
        test.with_classes(classes, "the adapter's head")
        train.with_classes(classes, "the adapter's head")
        emulated = bundle.load_model()
    model, workers = load_full(config.model, source=source), config.test_images.workers
    state = plain_state(adapter, adapter_state(model, plan))
    tuned = {
        "ot_emulator": accuracy(plug_in(emulated, plan, state, classes), test, processor, workers),
        "ot_plug_in": accuracy(plug_in(model, plan, state, classes), test, processor, workers),
    }
    class_mean_head(model, train, processor, config.train_images.workers)
    class_mean_head(emulated, train, processor, config.train_images.workers)
    return FiveSettings(
        full_zero_shot=accuracy(model, test, processor, workers),
        emulator_zero_shot=accuracy(emulated, test, processor, workers),
        **tuned,
        # Last, because it changes the model in place.
        full_fine_tuned=_full_fine_tuned(model, train, test, processor, config),
        measure=ACCURACY,
        method=adapter.manifest.method,
    )


def image_report(
    images: ImageConfig,
    processor: BaseImageProcessor,
    emulated: PreTrainedModel,
    model: PreTrainedModel,
    plan: SplitPlan,
    state: Mapping[str, torch.Tensor],
    classes: Sequence[str],
) -> dict[str, float]:
    """Accuracies of an adapter that came back: in the emulated model, and plugged into the full one.

    Args:
        state: the adapter, as `plain_state` gives it for `model`.
        classes: that its head tells apart.

    Raises:
        DataError: images do not open, or are of classes that the adapter does not know; names both.
    """
    chosen = labelled_images(images).with_classes(classes, "the adapter's head")
    return {
        "ot_emulator_accuracy": accuracy(plug_in(emulated, plan, state, classes), chosen, processor, images.workers),
        "plug_in_accuracy": accuracy(plug_in(model, plan, state, classes), chosen, processor, images.workers),
    }


def _full_fine_tuned(
    model: PreTrainedModel,
    train: LabelledImages,
    test: LabelledImages,
    processor: BaseImageProcessor,
    config: EvaluateConfig,
) -> float:
    assert config.train_images and config.test_images
    training = config.training
    torch.manual_seed(training.seed)
    model.requires_grad_(True)
    with Progress("full fine-tuning", training.steps) as bar:
        fit_images(
            model,
            train,
            processor,
            training,
            workers=config.train_images.workers,
            report=lambda figures: bar.at(int(figures["step"]), loss=figures["loss"]),
        )
    return accuracy(model, test, processor, config.test_images.workers)
