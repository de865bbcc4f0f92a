"""The five settings of an image model, by accuracy on the customer's test images (the paper's Table 3)."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from transformers import BaseImageProcessor, PreTrainedModel

from jobs.evaluation.config import EvaluateConfig
from jobs.limits import require_kind
from ot_ray.artifacts import InspectedAdapter, inspect_adapter, load_full, open_model_source, plain_state
from ot_ray.data.images import ImageConfig, LabelledImages, load_images
from ot_ray.evaluation import ACCURACY, FiveSettings, accuracy, class_mean_head
from ot_ray.model import SplitPlan, adapter_state, plug_in
from ot_ray.progress import Progress
from ot_ray.store import download_folder, open_store
from ot_ray.training import TrainingConfig, fit_images
from ot_ray.training.text_source import bucket_files


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
    train, test = (_labelled(images) for images in (config.train_images, config.test_images))
    test = test.with_classes(train.classes, "a head made of train_images")
    with tempfile.TemporaryDirectory() as temporary:
        bundle = config.bundle.open(Path(temporary) / "bundle")
        plan = bundle.manifest.plan
        folder = Path(temporary) / "adapter"
        download_folder(open_store(config.adapter), "", folder)
        adapter = inspect_adapter(folder, bundle.manifest)
        classes = adapter.manifest.classes or ()
        test.with_classes(classes, "the adapter's head")
        train.with_classes(classes, "the adapter's head")
        emulated = bundle.load_model()
    model = load_full(config.model, source=source)
    state = plain_state(adapter, adapter_state(model, plan))
    tuned = {
        "ot_emulator": accuracy(plug_in(emulated, plan, state, classes), test, processor),
        "ot_plug_in": accuracy(plug_in(model, plan, state, classes), test, processor),
    }
    class_mean_head(model, train, processor)
    class_mean_head(emulated, train, processor)
    return FiveSettings(
        full_zero_shot=accuracy(model, test, processor),
        emulator_zero_shot=accuracy(emulated, test, processor),
        **tuned,
        # Last, because it changes the model in place.
        full_fine_tuned=_full_fine_tuned(model, train, test, processor, config.training, config.train_images.workers),
        measure=ACCURACY,
    )


def image_report(
    images: ImageConfig,
    processor: BaseImageProcessor,
    emulated: PreTrainedModel,
    model: PreTrainedModel,
    plan: SplitPlan,
    adapter: InspectedAdapter,
) -> dict[str, float]:
    """Accuracies of an adapter that came back: in the emulated model, and plugged into the full one.

    Raises:
        DataError: images do not open, or are of classes that the adapter does not know; names both.
    """
    classes = adapter.manifest.classes or ()
    chosen = _labelled(images).with_classes(classes, "the adapter's head")
    state = plain_state(adapter, adapter_state(model, plan))
    return {
        "ot_emulator_accuracy": accuracy(plug_in(emulated, plan, state, classes), chosen, processor),
        "plug_in_accuracy": accuracy(plug_in(model, plan, state, classes), chosen, processor),
    }


def _full_fine_tuned(
    model: PreTrainedModel,
    train: LabelledImages,
    test: LabelledImages,
    processor: BaseImageProcessor,
    training: TrainingConfig,
    workers: int,
) -> float:
    torch.manual_seed(training.seed)
    model.requires_grad_(True)
    with Progress("full fine-tuning", training.steps) as bar:
        fit_images(
            model,
            train,
            processor,
            training,
            workers=workers,
            report=lambda figures: bar.at(int(figures["step"]), loss=figures["loss"]),
        )
    return accuracy(model, test, processor)


def _labelled(config: ImageConfig) -> LabelledImages:
    images = load_images(config, bucket_files(config.source))
    images.require_classes()
    return images
