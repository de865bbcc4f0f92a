"""Reading configurations: merging, refusing, and what each refusal says."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
from pydantic import Field, model_validator

from ot_ray.config import Config, load, parse
from ot_ray.errors import ConfigError


class Rates(Config):
    lr: float = Field(default=1e-3, gt=0)
    steps: int = 10
    kind: Literal["cosine", "linear"] = "cosine"

    @model_validator(mode="after")
    def _consistent(self) -> Rates:
        if self.steps == 13:
            raise ValueError("steps is 13; use a luckier number")
        return self


class Section(Config):
    rates: Rates = Rates()
    folder: str = "here"


class Whole(Config):
    name: str
    section: Section = Section()
    other: Section | None = None
    extras: dict[str, float | int | str | bool] = {}  # noqa: RUF012 - pydantic copies defaults


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def refusal(*overrides: str, path: Path | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load(Whole, path, overrides)
    return str(caught.value)


def test_file_then_overrides_from_left_to_right(tmp_path: Path) -> None:
    path = write(tmp_path, "name: a\nsection:\n  rates: {steps: 3, lr: 0.5}\n  folder: there\n")
    config = load(Whole, path, ["section.rates.steps=4", "section.rates.steps=5", "name=b"])
    assert config == Whole(name="b", section=Section(rates=Rates(steps=5, lr=0.5), folder="there"))


def test_an_empty_file_and_an_empty_section_are_defaults(tmp_path: Path) -> None:
    assert load(Section, write(tmp_path, "")) == Section()
    path = write(tmp_path, "name: a\nsection:\n")
    assert load(Whole, path, ["section.rates.steps=4", "other.folder=x"]) == Whole(
        name="a", section=Section(rates=Rates(steps=4)), other=Section(folder="x")
    )


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "1.e-4", "1.0e-4", "0.0001", "+1e-4"])
def test_exponents_are_numbers_in_files_and_overrides(text: str, tmp_path: Path) -> None:
    path = write(tmp_path, f"name: a\nextras: {{lr: {text}}}\n")
    assert load(Whole, path, [f"extras.other={text}", f"section.rates.lr={text}"]) == Whole(
        name="a", extras={"lr": 1e-4, "other": 1e-4}, section=Section(rates=Rates(lr=1e-4))
    )


@pytest.mark.parametrize("text", ["'1e-4'", "1e-4x", "12e45678", "nan", "1_e4"])
def test_what_is_quoted_or_no_number_stays_text(text: str) -> None:
    assert load(Whole, overrides=[f"name={text}"]).name == text.strip("'")


def test_a_number_where_text_belongs_in_a_file_says_to_quote_it(tmp_path: Path) -> None:
    refused = refusal(path=write(tmp_path, "name: 1.0\n"))
    assert refused.endswith("name is 1.0: Input should be a valid string; put it in quotes")


@pytest.mark.parametrize("text", ["1", "1.0", "2026-11-21", "1e-4", "true", "0x10"])
def test_an_override_of_a_text_field_is_taken_as_it_stands(text: str) -> None:
    whole = load(Whole, overrides=[f"name={text}", f"other.folder={text}"])
    assert (whole.name, whole.other.folder) == (text, text)  # type: ignore[union-attr]


def test_configurations_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Rates().lr = 2.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["nmae=a", "name=a"], "override 'nmae=a': unknown key nmae; did you mean name?"),
        (["name=a", "section.rates.stpes=1"], "unknown key section.rates.stpes; did you mean steps?"),
        (["name=a", "other.rates.stpes=1"], "unknown key other.rates.stpes; did you mean steps?"),
        (["name=a", "section.rates.qqq=1"], "unknown key section.rates.qqq; valid keys: lr, steps, kind"),
        ([], "the configuration: name is required; set name=..."),
        (["name=a", "section.rates.steps=ten"], "section.rates.steps is 'ten': Input should be a valid integer"),
        (["name=a", "section.rates.steps=1.5"], "section.rates.steps is 1.5: "),
        (["name=a", "section.rates.lr=0"], "section.rates.lr is 0: Input should be greater than 0"),
        (["name=a", "section.rates.lr=.inf"], "section.rates.lr is inf: "),
        (["name=a", "section.rates.kind=square"], "section.rates.kind is 'square': Input should be 'cosine' or 'lin"),
        (["name=a", "section.rates.kind=cosin"], "'cosine' or 'linear'; did you mean cosine?"),
        (["name=a", "section.rates.steps=13"], "section.rates: steps is 13; use a luckier number"),
        (["name=a", "section=3"], "section is 3: Input should be a valid dictionary or instance of Section"),
        (["name=a", "section=3", "section.folder=x"], "'section.folder=x': section is 3, not a section that holds"),
        (["name"], "'name' is not an override; write section.key=value"),
        (["=a"], "'=a' is not an override; write section.key=value"),
        (["name=[a"], "'name=[a': the value is not valid YAML; quote it"),
    ],
)
def test_refusals_name_field_value_and_way_out(overrides: list[str], message: str) -> None:
    text = refusal(*overrides)
    assert message in text
    assert "\n" not in text


def test_each_problem_has_a_line_of_its_own() -> None:
    lines = refusal("nmae=a", "section.rates.lr=-1").splitlines()
    assert len(lines) == 3
    starts = ("the configuration: name", "override 'nmae=a': ", "override 'section.rates.lr=-1': ")
    assert sorted(line.startswith(starts) for line in lines) == [True] * 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b\n", "the top level is a list; write `key: value` lines"),
        ("just words\n", "the top level is a str; write `key: value` lines"),
        ("name: [a\nb: }", "not valid YAML: "),
    ],
)
def test_files_that_are_no_mapping(text: str, message: str, tmp_path: Path) -> None:
    path = write(tmp_path, text)
    refused = refusal(path=path)
    assert refused.startswith(f"{path}: ") and message in refused and "\n" not in refused


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    missing = tmp_path / "missing.yaml"
    assert refusal(path=missing) == f"{missing}: no such configuration file; pass an existing YAML file"
    assert refusal(path=tmp_path).startswith(f"{tmp_path}: cannot be read: ")
    (tmp_path / "bytes.yaml").write_bytes(b"name: \xff\xfe")
    assert "not valid YAML" in refusal(path=tmp_path / "bytes.yaml")


def test_parse_names_where_the_values_come_from() -> None:
    with pytest.raises(ConfigError, match=r"^manifest\.json: unknown key lrr; did you mean lr\?$"):
        parse(Rates, {"lrr": 1}, where="manifest.json")
