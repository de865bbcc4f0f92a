"""What both ends of an adapter's way home agree on: which files it has, and what it may be called.

The files' contents are left to adapter.py and inspection.py."""

from __future__ import annotations

import re

from ot_ray.artifacts.adapter import ADAPTER_FILES
from ot_ray.artifacts.head import HEAD_WEIGHTS
from ot_ray.artifacts.lora import LORA_CONFIG
from ot_ray.artifacts.manifest import MANIFEST, NAME_PATTERN
from ot_ray.artifacts.strict_json import MAX_BYTES as MOST_DOCUMENT_BYTES

__all__ = ["ADAPTER_NAMES", "DOCUMENTS", "MANIFEST", "MOST_DOCUMENT_BYTES", "checked_suffix"]

ADAPTER_NAMES = frozenset({MANIFEST, HEAD_WEIGHTS}.union(*ADAPTER_FILES.values()))
"""Every file that an adapter of some method has."""
DOCUMENTS = frozenset({MANIFEST, LORA_CONFIG})
"""Those that are JSON, and small."""


def checked_suffix(suffix: str) -> str:
    """The suffix itself, where it can stand in a model's id. Raises ValueError."""
    if not re.fullmatch(NAME_PATTERN, suffix):
        raise ValueError("use 1 to 64 of the characters A-Z a-z 0-9 . _ -, the first a letter or a digit")
    return suffix
