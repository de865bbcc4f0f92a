"""Accuracy and the class-mean head, against formulas written out here; five settings as accuracies."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from ot_ray.data.images import ImageConfig, LabelledImages, load_images, ordered_batches
from ot_ray.errors import DataError
from ot_ray.evaluation import ACCURACY, FiveSettings, accuracy, class_mean_head, loss_and_accuracy
from ot_ray.evaluation.accuracy import SCALE
from ot_ray.model import IMAGE_FAMILIES, classes_of
from tests.fixtures.models import SIDE, tiny_image_model

PROCESSOR = ViTImageProcessorPil(size={"height": SIDE, "width": SIDE})
EACH = 4


@pytest.fixture
def images(tmp_path: Path) -> LabelledImages:
    """Three classes, each noise around a level of its own."""
    draw = np.random.default_rng(0)
    for number, name in enumerate(("ash", "birch", "cedar")):
        (tmp_path / name).mkdir()
        for i in range(EACH):
            noise = draw.normal(60 + 70 * number, 30, (SIDE, SIDE, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(noise).save(tmp_path / name / f"{i}.png")
    return load_images(ImageConfig(source=str(tmp_path)))


def logits_of(model, images: LabelledImages) -> torch.Tensor:
    (batch,) = ordered_batches(images, PROCESSOR, len(images))
    with torch.no_grad():
        return model(pixel_values=batch["pixel_values"]).logits


@pytest.mark.parametrize("model_type", sorted(IMAGE_FAMILIES))
def test_the_class_mean_head_is_the_formula(model_type: str, images: LabelledImages) -> None:
    model = tiny_image_model(model_type)
    seen: list[torch.Tensor] = []
    hook = model.classifier.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].double()))
    logits_of(model, images)
    hook.remove()
    class_mean_head(model, images, PROCESSOR, batch_size=5)
    assert classes_of(model) == ("ash", "birch", "cedar")
    x = seen[0].numpy()
    means = x.reshape(3, EACH, -1).mean(1)
    centre = means.mean(0)
    radius = np.linalg.norm(x - centre, axis=1).mean()
    directions = (means - centre) / np.linalg.norm(means - centre, axis=1, keepdims=True)
    expected = SCALE / radius * (x - centre) @ directions.T
    assert np.allclose(logits_of(model, images).numpy(), expected, atol=1e-3)


def test_accuracy_and_loss_are_those_of_the_logits(images: LabelledImages) -> None:
    model = tiny_image_model("vit")
    class_mean_head(model, images, PROCESSOR)
    with torch.no_grad():
        # Some answers are wrong.
        model.classifier.bias += torch.tensor([0.0, 100.0, 0.0])
    logits = logits_of(model, images)
    right = (logits.argmax(-1) == torch.tensor(images.labels)).tolist()
    assert 0 < sum(right) < len(images)
    logs = logits.double().log_softmax(-1)
    expected = -sum(logs[i, label].item() for i, label in enumerate(images.labels)) / len(images)
    share = sum(right) / len(images)
    for workers in (0, 3):
        found = loss_and_accuracy(model, images, PROCESSOR, workers, batch_size=5)
        assert found == (pytest.approx(expected, rel=1e-6), share)
    assert accuracy(model, images, PROCESSOR, batch_size=5) == share


def test_a_model_on_the_cpu_is_measured_on_the_gpu_and_comes_back(images: LabelledImages) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    model = tiny_image_model("vit")
    class_mean_head(model, images, PROCESSOR)
    seen: set[str] = set()
    hook = model.classifier.register_forward_pre_hook(lambda _, inputs: seen.add(inputs[0].device.type))
    first = loss_and_accuracy(model, images, PROCESSOR)
    hook.remove()
    assert seen == {"cuda"} and next(model.parameters()).device.type == "cpu"
    logits = logits_of(model, images)
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor(images.labels)).item()
    assert first[0] == pytest.approx(loss, rel=1e-3)


def test_classes_are_matched_by_name_and_not_by_number(images: LabelledImages) -> None:
    model = tiny_image_model("vit")
    class_mean_head(model, images, PROCESSOR)
    known = accuracy(model, images, PROCESSOR)
    order = [2, 0, 1]
    with torch.no_grad():
        model.classifier.weight.copy_(model.classifier.weight[order].clone())
        model.classifier.bias.copy_(model.classifier.bias[order].clone())
    model.config.id2label = {i: ("ash", "birch", "cedar")[j] for i, j in enumerate(order)}
    assert accuracy(model, images, PROCESSOR) == known > 0.5


def test_a_head_of_other_classes_is_refused_with_both(images: LabelledImages) -> None:
    with pytest.raises(
        DataError, match=r"of classes ash, birch, cedar, which the model's head does not know: .*LABEL_0"
    ):
        accuracy(tiny_image_model("vit"), images, PROCESSOR)


def test_the_model_is_left_in_the_mode_it_was_in(images: LabelledImages) -> None:
    model = tiny_image_model("vit").train()
    class_mean_head(model, images, PROCESSOR)
    assert model.training
    assert accuracy(model, images, PROCESSOR) == accuracy(model.eval(), images, PROCESSOR)


def test_five_accuracies() -> None:
    report = FiveSettings(
        full_zero_shot=0.5,
        emulator_zero_shot=0.4,
        full_fine_tuned=0.9,
        ot_emulator=0.72,
        ot_plug_in=0.8,
        measure=ACCURACY,
    )
    assert report.gap_closed == pytest.approx(0.75)
    assert report.emulator_worse_by == pytest.approx(0.1)
    assert report.broken_promises() == []
    lines = report.table().splitlines()
    assert lines[0].split() == ["setting", "accuracy"] and lines[2].split()[-1] == "50.0%"
    assert len({len(line) for line in lines[:7]}) == 1
    assert "10.0% worse" in lines[-1]
    worse = FiveSettings(
        full_zero_shot=0.8,
        emulator_zero_shot=0.9,
        full_fine_tuned=0.9,
        ot_emulator=0.7,
        ot_plug_in=0.7,
        measure=ACCURACY,
    )
    assert len(worse.broken_promises()) == 3


def test_five_accuracies_as_files(tmp_path: Path) -> None:
    report = FiveSettings(0.5, 0.4, 0.9, 0.72, 0.8, ACCURACY)
    files = report.write(tmp_path, "pets")
    assert '"measure": "accuracy"' in Path(files["json"]).read_text()
    assert Path(files["chart"]).read_bytes().startswith(b"\x89PNG")
