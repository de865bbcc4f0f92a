"""Images in a bucket: how much of them is read, and by whom their headers are looked at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from ot_ray.artifacts import open_model_source
from ot_ray.data.images import ImageConfig, load_images
from ot_ray.errors import DataError
from ot_ray.store import Store, open_store
from ot_ray.training import DistillConfig
from ot_ray.training.distill_data import open_distill_data
from ot_ray.training.text_source import HEADER, StoreFiles, image_files
from tests.fixtures.models import SIDE, tiny_image_model


class Counted:
    """A store that keeps account of the ranges that are read."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.read: list[tuple[int, int]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def read_range(self, key: str, start: int, end: int) -> bytes:
        self.read.append((start, end))
        return self._store.read_range(key, start, end)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two photographs of more than 100 kB."""
    for number, name in enumerate(("cat", "dog")):
        (tmp_path / "pets" / name).mkdir(parents=True)
        noise = np.random.default_rng(number).integers(0, 256, (200, 200, 3), np.uint8)
        Image.fromarray(noise).save(tmp_path / "pets" / name / "1.png")
    return tmp_path


def test_of_a_header_little_is_read_and_of_an_image_everything_at_once(folder: Path) -> None:
    store = Counted(open_store(str(folder)))
    images = load_images(ImageConfig(source="s3://bucket/pets"), StoreFiles(store, HEADER))  # type: ignore[arg-type]
    assert store.read == [(0, HEADER)] * 2
    store.read.clear()
    whole = np.asarray(images.load(1))
    assert store.read == [(0, (folder / "pets/dog/1.png").stat().st_size)]
    assert np.array_equal(whole, np.asarray(Image.open(folder / "pets/dog/1.png")))


def test_only_buckets_need_to_be_opened(folder: Path) -> None:
    assert image_files(str(folder)) is None
    assert image_files("hub:owner/name") is None


def test_ranks_do_not_look_at_headers_again(folder: Path, tmp_path: Path) -> None:
    tiny_image_model("vit", depth=3).save_pretrained(tmp_path / "full")
    ViTImageProcessorPil(size={"height": SIDE, "width": SIDE}).save_pretrained(tmp_path / "full")
    (folder / "pets/cat/1.png").write_bytes(b"no image")
    (folder / "pets/dog/1.png").write_bytes(b"no image")
    config = ImageConfig(source=str(folder / "pets"), workers=0)
    with pytest.raises(DataError, match="2 of 2 images do not open"):
        load_images(config)
    distilling = DistillConfig.model_validate(
        {
            "model": {"name": "tiny", "source": str(tmp_path / "full")},
            "split": {"bottom": 1, "keep": 1, "top": 0},
            "images": config.model_dump(),
            "training": {"steps": 1, "batch_size": 1},
            "store": str(tmp_path / "owner"),
            "run": "r",
        }
    )
    data = open_distill_data(distilling, open_model_source(distilling.model), 0, 1)
    with pytest.raises(DataError, match=r"1\.png: the image does not open"):
        data.batches.next_batch()
    data.batches.close()
