"""What the service's documents and its shipped configuration name is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ot_ray.config import load
from serve.config import ServeConfig

ROOT = Path(__file__).parents[2]
_PATH = re.compile(r"`((?:[a-z_0-9.-]+/)*[a-z_0-9]+(?:\.py|\.md|\.yaml)?)`")


def test_shipped_configuration_has_everything_on() -> None:
    config = load(ServeConfig, str(ROOT / "serve/configs/service.yaml"), [])
    assert config.database is not None and config.store is not None and config.gradients is not None
    assert (ROOT / config.model.source / "config.json").is_file()


def test_threat_model_names_modules_and_tests_that_exist() -> None:
    text = (ROOT / "docs/threat-model.md").read_text()
    table = text.partition("## What is enforced where")[2].partition("\n###")[0]
    lines = [line for line in table.splitlines() if line.startswith("| ")][1:]
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    assert len(rows) > 15
    for threat, enforcement, modules, tests in rows:
        assert threat and enforcement
        place = ""
        for name in _PATH.findall(modules):
            # A name without folders stands in the folder of the one before it.
            place = str(Path(name).parent) if "/" in name else place
            found = ROOT / name if "/" in name else ROOT / place / name
            assert found.exists(), f"{threat}: {name}"
        place = ""
        for name in _PATH.findall(tests):
            place = str(Path(name).parent) if "/" in name else place
            assert any((ROOT / "tests" / folder / name).exists() for folder in ("", place)), f"{threat}: {name}"


@pytest.mark.parametrize("name", ["docs/threat-model.md", "docs/service.md"])
def test_documents_link_to_files_that_exist(name: str) -> None:
    text = (ROOT / name).read_text()
    for link in re.findall(r"\]\(([^)#]+)", text):
        assert link.startswith("http") or ((ROOT / name).parent / link).exists(), link
    for path in re.findall(r"\b(?:docs|tests|serve|jobs|ot_ray)/[\w./-]+\.(?:py|md|yaml)\b", text):
        assert (ROOT / path).exists(), path
