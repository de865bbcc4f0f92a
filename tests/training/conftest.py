"""Fixtures of the training room's tests."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def store_folder(tmp_path: Path) -> str:
    return str(tmp_path / "store")
