"""The five-setting report: its numbers by hand, its verdict, its table, its files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib import image

from ot_ray.evaluation import ACCURACY, SETTINGS, FiveSettings
from ot_ray.evaluation.five_settings import PERPLEXITY

GOOD = FiveSettings(
    full_zero_shot=30.0, emulator_zero_shot=45.0, full_fine_tuned=10.0, ot_emulator=18.0, ot_plug_in=15.0
)


def changed(**values):
    return FiveSettings(**{**{name: getattr(GOOD, name) for name in SETTINGS}, **values})


def test_the_two_numbers():
    assert GOOD.gap_closed == pytest.approx(0.75)
    assert GOOD.emulator_worse_by == pytest.approx(0.2)
    assert changed(ot_plug_in=8.0).gap_closed == pytest.approx(1.1)
    assert changed(ot_plug_in=32.0).gap_closed == pytest.approx(-0.1)


def test_where_fine_tuning_gains_nothing_there_is_no_gap_to_close():
    flat = changed(full_fine_tuned=30.0)
    assert flat.gap_closed != flat.gap_closed
    assert "nan%" in flat.table()


@pytest.mark.parametrize(
    ("values", "promise"),
    [
        ({"ot_plug_in": 30.0, "ot_emulator": 31.0}, "the plug-in is no better than the untuned full model"),
        ({"ot_emulator": 15.0}, "the tuned emulator is no worse than the plug-in"),
        ({"emulator_zero_shot": 29.0}, "the emulator is no worse than the full model"),
        ({"ot_plug_in": float("nan"), "ot_emulator": 31.0}, "the plug-in is no better than the untuned full model"),
    ],
)
def test_broken_promises_are_named(values, promise):
    assert GOOD.broken_promises() == []
    assert promise in changed(**values).broken_promises()


def test_the_table_has_every_setting_and_both_numbers():
    lines = GOOD.table().splitlines()
    for name, label in SETTINGS.items():
        (line,) = [line for line in lines if line.startswith(label)]
        assert line.split()[-1] == f"{getattr(GOOD, name):.2f}"
    assert len({len(line) for line in lines[:7]}) == 1, "the columns are aligned"
    assert "closes 75% of the gap" in lines[-1] and "20.0% worse" in lines[-1]


def test_files_are_written_and_replaced_whole(tmp_path):
    folder = tmp_path / "deep/report"
    paths = GOOD.write(folder, "quickstart")
    assert sorted(path.name for path in folder.iterdir()) == ["five_settings.json", "five_settings.png"]
    with open(paths["json"], encoding="utf-8") as file:
        assert json.load(file) == {"title": "quickstart", "method": None, "measure": "perplexity", **GOOD.as_dict()}
    picture = image.imread(paths["chart"])
    assert picture.shape[0] > 300 and picture.shape[1] > 800
    # Five bars of five colours, on white.
    colours = {tuple(round(float(c), 2) for c in pixel[:3]) for pixel in picture[::4, ::4].reshape(-1, 4)}
    for text in ("9aa5b1", "c9b18f", "d98e32", "1f77b4", "4a4a4a"):
        assert tuple(round(int(text[i : i + 2], 16) / 255, 2) for i in (0, 2, 4)) in colours
    again = replace(changed(ot_plug_in=14.0), method="lora")
    again.write(folder, "again", {"model": "vit", "data": "pets"})
    found = json.loads((folder / "five_settings.json").read_text())
    assert found == {"title": "again", "model": "vit", "data": "pets", "method": "lora", "measure": "perplexity",
                     **again.as_dict()}  # fmt: skip
    assert found["ot_plug_in"] == 14.0 and "method" not in again.as_dict()


@pytest.mark.parametrize("measure", [PERPLEXITY, ACCURACY])
def test_settings_come_back_from_what_was_written(tmp_path, measure):
    report = FiveSettings(0.5, 0.4, 0.9, 0.6, 0.8, measure, method="lora")
    assert FiveSettings.of({"measure": measure.name, **report.as_dict()}) == replace(report, method=None)
    files = report.write(tmp_path, "mine")
    assert FiveSettings.of(json.loads(Path(files["json"]).read_text())) == report
