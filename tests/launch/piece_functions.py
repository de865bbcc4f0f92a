"""What the pieces of test_pieces.py do; the workers import it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ot_ray.errors import DataError


def note(payload: dict[str, Any]) -> str:
    """Leave a file, and say what was seen."""
    Path(payload["place"], payload["name"]).write_text(os.environ.get("OT_RAY_TEST", ""))
    return payload["name"]


def after_note(payload: dict[str, Any]) -> bool:
    """Whether an earlier piece's file is there."""
    return Path(payload["place"], payload["earlier"]).exists()


def seen_gpus(payload: dict[str, Any]) -> tuple[str | None, int]:
    """What hides GPUs from this process, and which it is."""
    return os.environ.get("CUDA_VISIBLE_DEVICES"), os.getpid()


def refuse(payload: dict[str, Any]) -> None:
    raise DataError(f"{payload['name']} is no text; write text")


def stumble(payload: dict[str, Any]) -> None:
    raise ZeroDivisionError("nothing to share")


def vanish(payload: dict[str, Any]) -> None:
    os._exit(3)
