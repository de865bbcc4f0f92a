"""Images: folders, buckets and data sets of the six schemas, decoding, bad files, classes, digests."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from ot_ray.data.files import LocalFiles
from ot_ray.data.images import DATASETS, NO_LABEL, ImageConfig, image_digest, load_images
from ot_ray.data.images.decoding import MOST_PIXELS, decode
from ot_ray.errors import ConfigError, DataError

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def save(path: Path, colour=RED, kind: str = "PNG", size=(4, 4)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(Image.new("RGB", size, colour), kind))


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    folder = tmp_path / "pets"
    save(folder / "dog/b.png", BLUE)
    save(folder / "dog/a.bmp", GREEN, "BMP")
    save(folder / "cat/deeper/c.png", RED)
    (folder / "README.txt").write_text("about pets")
    (folder / ".cache").mkdir()
    (folder / ".cache/x.png").write_text("hidden")
    return folder


def load(source: Path | str, **settings):
    return load_images(ImageConfig(source=str(source), **settings))


def names_of(images) -> list[str]:
    return [Path(images.name(i)).name for i in range(len(images))]


def test_class_folders_are_classes_in_the_order_of_their_names(pets: Path) -> None:
    images = load(pets)
    assert images.classes == ("cat", "dog")
    assert images.labels == (0, 1, 1)
    assert names_of(images) == ["c.png", "a.bmp", "b.png"]
    assert [images.load(i).getpixel((0, 0)) for i in range(3)] == [RED, GREEN, BLUE]


def test_a_folder_of_images_without_classes_serves_where_none_are_needed(tmp_path: Path) -> None:
    save(tmp_path / "one.png")
    save(tmp_path / "two.jpg", kind="JPEG")
    (tmp_path / "notes.txt").write_text("no image")
    images = load(tmp_path)
    assert images.classes == () and images.labels == (NO_LABEL, NO_LABEL)
    with pytest.raises(DataError, match=r"2 of 2 images have no class, .*one\.png among them; put each image into"):
        images.require_classes()


def test_a_few_of_each_class(pets: Path) -> None:
    images = load(pets, per_class=1)
    assert names_of(images) == ["c.png", "a.bmp"] and images.labels == (0, 1)


def test_what_is_wrong_with_a_folder(pets: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"images.source is 'flower', .*did you mean flowers\?"):
        load("flower")
    with pytest.raises(DataError, match="there is no such folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(DataError, match="is a file; name the folder"):
        load(pets / "README.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no images lie there"):
        load(tmp_path / "empty")
    save(pets / "stray.png")
    with pytest.raises(DataError, match=r"stray\.png and 0 more images stand beside the class folders cat, dog"):
        load(pets)
    with pytest.raises(ValidationError, match=r"split is 'test', but source .* is a folder"):
        ImageConfig(source=str(pets), split="test")
    with pytest.raises(ConfigError, match="needs `files` to open it"):
        load("s3://bucket/pets?endpoint_url=http://x")


@pytest.mark.parametrize(
    ("folders", "splits"),
    [(["train", "test"], "test, train"), (["Train", "val", "extra"], "Train, val"), (["train"], "train")],
)
def test_splits_are_no_classes(folders: list[str], splits: str, tmp_path: Path) -> None:
    for name in folders:
        save(tmp_path / "pets" / name / "cat/1.png")
        save(tmp_path / "pets" / name / "dog/1.png")
    last = splits.split(", ")[-1]
    chosen = "train" if "train" in folders else splits.split(", ")[0]
    expected = rf"its folders {splits} are splits and no classes; .* images\.source=\S*pets/{chosen}$"
    with pytest.raises(DataError, match=expected):
        load(tmp_path / "pets")
    with pytest.raises(DataError, match=r"images\.source=s3://bucket/pets/"):
        load_images(ImageConfig(source="s3://bucket/pets/?endpoint_url=http://secret"), Bucket(tmp_path))
    assert load(tmp_path / "pets" / last).classes == ("cat", "dog")


def test_one_class_may_have_the_name_of_a_split(tmp_path: Path) -> None:
    for name in ("bus", "tram", "train"):
        save(tmp_path / name / "1.png")
    assert load(tmp_path).classes == ("bus", "train", "tram")


def test_images_that_do_not_open_are_counted_and_ten_are_named(pets: Path) -> None:
    for number in range(12):
        (pets / f"cat/broken{number:02}.png").write_bytes(b"no image at all")
    (pets / "cat/empty.jpg").write_bytes(b"")
    (pets / "dog/page.html").write_text("<html>")
    with pytest.raises(DataError) as caught:
        load(pets)
    text = str(caught.value)
    assert "14 of 17 images do not open" in text and "and 4 more" in text
    assert [f"broken{number:02}.png" in text for number in range(12)] == [True] * 10 + [False] * 2
    assert "no image of a known format (PNG, JPEG" in text and "0x" not in text


def test_an_image_that_is_cut_off_is_named_when_it_is_decoded(pets: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    (pets / "cat/cut.jpg").write_bytes(encoded(Image.fromarray(noise), "JPEG")[:1500])
    images = load(pets)
    cut = names_of(images).index("cut.jpg")
    with pytest.raises(DataError, match=r"cut\.jpg: the image does not open: .*truncated.*; replace or remove it"):
        images.load(cut)


def test_an_image_that_is_gone_by_then_is_named(pets: Path) -> None:
    images = load(pets)
    (pets / "dog/b.png").unlink()
    with pytest.raises(DataError, match=r"b\.png: cannot be read: No such file"):
        images.load(2)


def huge_png() -> bytes:
    """A header that promises more pixels than are taken, in a file of a few bytes."""
    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    assert MOST_PIXELS < 20_000 * 20_000

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"0")) + chunk(b"IEND", b"")


def test_a_small_file_that_asks_for_much_memory_is_refused_by_its_header(pets: Path) -> None:
    (pets / "cat/bomb.png").write_bytes(huge_png())
    with pytest.raises(DataError, match=r"1 of 4 images do not open: .*bomb\.png \(.*pixels"):
        load(pets)


def test_other_formats_are_not_opened(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no image of a known format"):
        decode(encoded(Image.new("RGB", (4, 4)), "TIFF"), "scan.tif")
    with pytest.raises(DataError, match=r"page\.eps: .*no image of a known format"):
        decode(encoded(Image.new("RGB", (4, 4)), "EPS"), "page.eps")


def test_orientation_is_applied() -> None:
    picture = Image.new("RGB", (2, 3), RED)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    picture.putpixel((0, 0), BLUE)
    turned = decode(encoded(picture, "PNG", exif=exif), "photo")
    assert turned.size == (3, 2)
    assert turned.getpixel((2, 0)) == BLUE


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("L", (1, 1), 77), (77, 77, 77)),
        (Image.new("1", (1, 1), 1), (255, 255, 255)),
        # Pillow's own conversion makes 255 of every 16-bit value above 255.
        (Image.fromarray(np.array([[257 * 100]], np.uint16)), (100, 100, 100)),
        (Image.new("RGBA", (1, 1), (255, 0, 0, 0)), (255, 255, 255)),
        (Image.new("RGBA", (1, 1), (255, 0, 0, 255)), RED),
        (Image.new("LA", (1, 1), (0, 0)), (255, 255, 255)),
        (Image.new("P", (1, 1), 0), (0, 0, 0)),
    ],
    ids=["grey", "black and white", "16 bits", "clear", "opaque", "clear grey", "palette"],
)
def test_every_kind_of_colour_becomes_rgb(image: Image.Image, expected: tuple[int, int, int]) -> None:
    found = decode(encoded(image), "an image")
    assert found.mode == "RGB" and found.getpixel((0, 0)) == expected


def test_labels_count_in_the_classes_of_a_head(pets: Path) -> None:
    images = load(pets).with_classes(("bird", "dog", "cat"), "the head")
    assert images.labels == (2, 1, 1) and images.classes == ("bird", "dog", "cat")
    with pytest.raises(DataError, match=r"of classes cat, which the head does not know: its classes are dog, fish"):
        load(pets).with_classes(("dog", "fish"), "the head")


def test_the_digest_follows_content_and_not_place(pets: Path, tmp_path: Path) -> None:
    def digest(folder: Path, **settings) -> str:
        return image_digest(ImageConfig(source=str(folder), **settings))

    first = digest(pets)
    moved = pets.rename(tmp_path / "elsewhere")
    assert digest(moved) == first == digest(moved, workers=0)
    assert digest(moved, per_class=1) != first
    save(moved / "dog/b.png", GREEN)
    assert digest(moved) != first


class Bucket:
    """A folder as a bucket: keys are paths below it."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def list(self, prefix: str):
        for info in LocalFiles().list(str(self._root / prefix)):
            key = Path(info.key).relative_to(self._root).as_posix()
            yield type(info)(key, info.size, etag=f"etag-{key}")

    def open(self, key: str):
        return (self._root / key).open("rb")


def test_a_folder_in_a_bucket(pets: Path) -> None:
    config = ImageConfig(source="s3://bucket/pets?endpoint_url=http://secret")
    images = load_images(config, Bucket(pets.parent))
    assert images.classes == ("cat", "dog") and images.labels == (0, 1, 1)
    assert images.load(0).getpixel((0, 0)) == RED
    assert images.name(0) == "s3://bucket/pets/cat/deeper/c.png" and "secret" not in images.where
    assert image_digest(config, Bucket(pets.parent)) == image_digest(config, Bucket(pets.parent))


@pytest.fixture(params=sorted(DATASETS))
def saved(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """A data set laid out as one of the six is, in a folder; the name and the folder."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    known = DATASETS[request.param]
    extra = {"coarse_label": datasets.ClassLabel(names=["things"])} if request.param == "cifar100" else {}
    features = datasets.Features(
        {known.image: datasets.Image(), known.label: datasets.ClassLabel(names=["rose", "daisy"]), **extra}
    )
    rows = {
        known.image: [Image.new("RGB", (4, 4), colour) for colour in (RED, GREEN, BLUE)],
        known.label: [1, 0, 1],
        **{name: [0] * 3 for name in extra},
    }
    whole = datasets.Dataset.from_dict(rows, features)
    folder = tmp_path / "data set"
    datasets.DatasetDict({"train": whole, known.test: whole.select([0])}).save_to_disk(str(folder))
    return request.param, str(folder)


def test_a_data_set_of_each_of_the_six_schemas(saved: tuple[str, str]) -> None:
    name, folder = saved
    known = DATASETS[name]
    columns = {"image_column": known.image, "label_column": known.label}
    images = load(f"hub:{folder}", **columns)
    assert images.classes == ("rose", "daisy") and images.labels == (1, 0, 1)
    assert images.load(1).getpixel((0, 0)) == GREEN
    assert images.name(2) == f"hub:{folder}, split train, row 2"
    assert len(load(f"hub:{folder}", split=known.test, **columns)) == 1
    with pytest.raises(DataError, match="there is no such split; use one of train"):
        load(f"hub:{folder}", split="nosuch", **columns)
    with pytest.raises(DataError, match=rf"image_column is 'photo', and the columns of type Image are: {known.image}"):
        load(f"hub:{folder}", image_column="photo")
    if name == "cifar100":
        with pytest.raises(DataError, match=r"label_column is not set, .*: fine_label, coarse_label"):
            load(f"hub:{folder}")
    else:
        assert load(f"hub:{folder}").labels == images.labels


def test_short_names_stand_for_data_sets_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    food = ImageConfig(source="food", split="test")
    assert (food.dataset, food.chosen_split) == ("ethz/food101", "validation")
    assert ImageConfig(source="cifar100").chosen_split == "train"
    assert ImageConfig(source="hub:me/mine", split="test").chosen_split == "test"
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "food/pie/1.png")
    save(tmp_path / "food/soup/1.png")
    assert load("food").classes == ("pie", "soup")


def test_a_row_that_names_a_file_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    save(tmp_path / "secret.png")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    rows = {"image": [{"bytes": None, "path": str(tmp_path / "secret.png")}], "label": [0]}
    table = arrow.table(rows, schema=features.arrow_schema)
    (tmp_path / "set").mkdir()
    parquet.write_table(table, tmp_path / "set/train.parquet")
    with pytest.raises(DataError, match=r"1 of 1 images do not open: .*row 0 \(it holds no image bytes\)"):
        load(f"hub:{tmp_path}/set")
