"""From the bytes of an image file to an upright RGB image; only known formats of a bounded size are opened.

Sizes and colours that a model wants are its processor's affair."""

from __future__ import annotations

import io
import struct
import zlib
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

from ot_ray.errors import DataError

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
"""What is opened; of a moving picture, the first frame."""

MOST_PIXELS = 80_000_000
"""Larger images are refused by their headers: a file of a few kB may ask for any amount of memory."""


_UNREADABLE = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    OverflowError,
    IndexError,
    TypeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
"""What Pillow raises for files that are damaged; it documents OSError alone."""


def check_header(stream: BinaryIO) -> str | None:
    """Why an image cannot be opened, by its first bytes; None if it seems it can."""
    try:
        with _opened(stream):
            return None
    except _UNREADABLE as error:
        return _reason(error)


def decode(data: bytes, name: str) -> Image.Image:
    """An image in RGB, turned as its EXIF orientation says; what is transparent becomes white.

    Args:
        name: for messages.

    Raises:
        DataError: it is no image of a known format, too large, or damaged.
    """
    try:
        with _opened(io.BytesIO(data)) as image:
            image.load()
            return _rgb(ImageOps.exif_transpose(image))
    except _UNREADABLE as error:
        raise DataError(f"{name}: the image does not open: {_reason(error)}; replace or remove it") from None


def _opened(stream: BinaryIO) -> Image.Image:
    image = Image.open(stream, formats=FORMATS)
    width, height = image.size
    if width * height > MOST_PIXELS:
        image.close()
        raise ValueError(f"it has {width} x {height} pixels, more than {MOST_PIXELS}")
    return image


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # Pillow cuts values above 255 off where 16 bits are meant.
        values = np.asarray(image).astype(np.float64) / 257
        image = Image.fromarray(values.round().clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        clear = image.convert("RGBA")
        ground = Image.new("RGBA", clear.size, "white")
        return Image.alpha_composite(ground, clear).convert("RGB")
    return image.convert("RGB")


def _reason(error: BaseException) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        # Pillow's own message names the stream, which tells nothing.
        return f"no image of a known format ({', '.join(FORMATS)})"
    if isinstance(error, Image.DecompressionBombError):
        return f"more than {MOST_PIXELS} pixels"
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
