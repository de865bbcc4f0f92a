"""Image batches: pixels by an independent formula, order by seed and epoch, rows by rank, resuming, decoding ahead."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from ot_ray.data.images import ImageBatches, ImageConfig, LabelledImages, load_images, ordered_batches
from ot_ray.errors import ConfigError, DataError, TrainingError

COUNT, SIDE = 7, 6
PROCESSOR = ViTImageProcessorPil(size={"height": SIDE, "width": SIDE}, do_resize=False)


def picture(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (SIDE, SIDE, 3), np.uint8)


@pytest.fixture
def images(tmp_path: Path) -> LabelledImages:
    for number in range(COUNT):
        folder = tmp_path / f"class{number % 2}"
        folder.mkdir(exist_ok=True)
        Image.fromarray(picture(number)).save(folder / f"{number}.png")
    return load_images(ImageConfig(source=str(tmp_path)))


def numbers_of(images: LabelledImages, pixels: torch.Tensor) -> list[int]:
    """Which pictures a batch holds, told by their pixels."""
    known = {
        (picture(n).astype(np.float64) / 255 * 2 - 1).transpose(2, 0, 1).round(4).tobytes(): n for n in range(COUNT)
    }
    return [known[row.double().numpy().round(4).tobytes()] for row in pixels]


def taken(batches: ImageBatches, images: LabelledImages, count: int, rank: int = 0, world: int = 1) -> list[list[int]]:
    return [numbers_of(images, batches.next_batch(rank, world)["pixel_values"]) for _ in range(count)]


def test_pixels_and_labels_are_those_of_the_files(images: LabelledImages) -> None:
    (batch,) = ordered_batches(images, PROCESSOR, 100)
    assert batch["pixel_values"].shape == (COUNT, 3, SIDE, SIDE) and batch["pixel_values"].dtype == torch.float32
    assert numbers_of(images, batch["pixel_values"]) == [0, 2, 4, 6, 1, 3, 5]
    assert batch["labels"].tolist() == [0, 0, 0, 0, 1, 1, 1] and batch["labels"].dtype == torch.int64


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_ordered_batches_show_each_image_once(images: LabelledImages, workers: int) -> None:
    (whole,) = ordered_batches(images, PROCESSOR, COUNT)
    for size, sizes in ((3, [3, 3, 1]), (2, [2, 2, 2, 1]), (COUNT, [COUNT])):
        batches = list(ordered_batches(images, PROCESSOR, size, workers))
        assert [len(batch["labels"]) for batch in batches] == sizes
        assert all(torch.equal(torch.cat([batch[name] for batch in batches]), whole[name]) for name in whole)
    started = ordered_batches(images, PROCESSOR, 2, workers)
    next(started)
    started.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("images")]


@pytest.mark.parametrize("workers", [0, 2])
def test_each_epoch_shows_each_image_once_in_an_order_of_its_own(images: LabelledImages, workers: int) -> None:
    batches = ImageBatches(images, PROCESSOR, COUNT, seed=3, workers=workers)
    first, second = taken(batches, images, 2)
    batches.close()
    assert sorted(first) == sorted(second) == list(range(COUNT)) and first != second
    again = ImageBatches(images, PROCESSOR, COUNT, seed=3)
    other = ImageBatches(images, PROCESSOR, COUNT, seed=4)
    assert taken(again, images, 2) == [first, second]
    assert taken(other, images, 1) != [first]


@pytest.mark.parametrize("workers", [0, 2])
def test_ranks_share_the_same_global_batches(images: LabelledImages, workers: int) -> None:
    whole = taken(ImageBatches(images, PROCESSOR, 5, seed=0), images, 4)
    ranks = [ImageBatches(images, PROCESSOR, 5, seed=0, workers=workers) for _ in range(2)]
    for batch in whole:
        parts = [taken(batches, images, 1, rank, 2)[0] for rank, batches in enumerate(ranks)]
        assert [len(part) for part in parts] == [3, 2] and parts[0] + parts[1] == batch
    for batches in ranks:
        batches.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_goes_on_where_it_was(images: LabelledImages, workers: int) -> None:
    whole = taken(ImageBatches(images, PROCESSOR, 4, seed=0), images, 5)
    first = ImageBatches(images, PROCESSOR, 4, seed=0, workers=workers)
    assert taken(first, images, 2) == whole[:2]
    state = first.state()
    first.close()
    then = ImageBatches(images, PROCESSOR, 4, seed=0, workers=workers)
    taken(then, images, 1)  # what was decoded ahead no longer counts
    then.restore([state])
    assert taken(then, images, 3) == whole[2:]
    then.close()
    with pytest.raises(TrainingError, match="data position is 'x'"):
        then.restore([{"position": "x"}])


def test_threads_end_with_the_batches(images: LabelledImages) -> None:
    before = set(threading.enumerate())
    batches = ImageBatches(images, PROCESSOR, 2, seed=0, workers=2)
    batches.next_batch()
    assert set(threading.enumerate()) - before
    batches.close()
    batches.close()
    assert not set(threading.enumerate()) - before


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_does_not_decode_is_named(images: LabelledImages, workers: int) -> None:
    path = Path(images.name(0))
    path.write_bytes(path.read_bytes()[:60])
    batches = ImageBatches(images, PROCESSOR, COUNT, seed=0, workers=workers)
    with pytest.raises(DataError, match=r"0\.png: the image does not open"):
        batches.next_batch()
    batches.close()


def test_images_of_any_size_are_brought_to_the_models(tmp_path: Path) -> None:
    for name, size in (("a", (40, 9)), ("b", (5, 31))):
        (tmp_path / name).mkdir()
        Image.new("L", size, 51).save(tmp_path / name / "x.png")
    images = load_images(ImageConfig(source=str(tmp_path)))
    clip = CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    (batch,) = ordered_batches(images, clip, 2)
    assert batch["pixel_values"].shape == (2, 3, 8, 8)
    expected = (0.2 - torch.tensor(clip.image_mean)) / torch.tensor(clip.image_std)
    assert torch.allclose(batch["pixel_values"][0, :, 4, 4], expected, atol=1e-5)


def test_what_cannot_be_batched(images: LabelledImages) -> None:
    with pytest.raises(ConfigError, match="batch_size is 0; use 1 or more"):
        ImageBatches(images, PROCESSOR, 0, seed=0)
    with pytest.raises(ConfigError, match="leaves ranks without a row"):
        ImageBatches(images, PROCESSOR, 1, seed=0).next_batch(0, 2)
