"""A study's report: means and spreads by hand, promises, the aim, tables, figures that show what was measured."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import image

from ot_ray.evaluation import FiveSettings
from ot_ray.evaluation.study import Aim, Measured, Spread, Study, drawing, published, write_report
from ot_ray.evaluation.study.elsewhere import readable
from ot_ray.evaluation.study.tables import Table
from ot_ray.store import LocalStore


def five(plug_in: float, emulator: float, zero: float = 40.0, tuned: float = 20.0) -> FiveSettings:
    return FiveSettings(
        full_zero_shot=zero, emulator_zero_shot=50.0, full_fine_tuned=tuned, ot_emulator=emulator, ot_plug_in=plug_in
    )


def row(label: str, *settings: FiveSettings, **fields: Any) -> Measured:
    values: dict[str, Any] = {
        "bottom": 2, "keep": 2, "top": 2, "method": "full", "compression": "drop", "detail": "2 of 6 layers",
        "layers": "uniform", "distilled": True, "ratio": 1 / 3, "trainable": 100, "parameters": 400, **fields,
    }  # fmt: skip
    return Measured(label=label, settings=dict(enumerate(settings)), **values)


CENTRE = row("centre", five(24.0, 27.0), five(26.0, 28.0))
METHODS = [CENTRE, row("lora", five(30.0, 33.0), method="lora", trainable=8)]
POSITIONS = [
    CENTRE,
    row("bottom", five(28.0, 33.0), bottom=4, top=0),
    row("top", five(29.0, 30.0), bottom=0, top=4),
    row("larger", five(22.0, 23.2), bottom=3, top=3),
]
COMPRESSIONS = [
    CENTRE,
    row("pruned", five(23.0, 25.0), compression="prune", detail="6 of 6 layers, 50% pruned", ratio=0.53),
    row("quantized", five(22.5, 23.0), compression="quantize", detail="4 bits", ratio=0.15, distilled=False),
]  # fmt: skip


def study(**changes: Any) -> Study:
    axes = {"methods": METHODS, "positions": POSITIONS, "compressions": COMPRESSIONS}
    return Study(**{"title": "A study", "about": ["On something."], "centre": CENTRE, "axes": axes, **changes})


def written(one: Study, folder: Path) -> dict[str, bytes]:
    keys = write_report(one, LocalStore(folder))
    assert keys[-1] == "study.md" and len(set(keys)) == len(keys)
    return {key: (folder / key).read_bytes() for key in keys}


def table(files: dict[str, bytes], name: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(files[name].decode())))


def test_seeds_are_averaged_and_spread() -> None:
    closed, worse = CENTRE.spread("gap_closed"), CENTRE.spread("emulator_worse_by")
    assert closed is not None and worse is not None
    assert closed.values == (pytest.approx(0.8), pytest.approx(0.7)) and closed.mean == pytest.approx(0.75)
    assert worse.values == (pytest.approx(27 / 24 - 1), pytest.approx(28 / 26 - 1))
    assert Spread((2.0, 3.0, 4.0)).text() == "3.00 (2.00 to 4.00)"
    assert Spread((2.0,)).text() == "2.00" and Spread((2.001, 2.002)).text() == "2.00"
    assert Spread((0.5, 0.7)).text(".0%") == "60% (50% to 70%)"
    assert row("nothing").spread("ot_plug_in") is None


def test_where_fine_tuning_gains_nothing_no_share_is_shown(tmp_path: Path) -> None:
    flat = row("flat", five(39.0, 41.0), five(39.0, 41.0, tuned=41.0))
    assert flat.spread("gap_closed") is None and flat.spread("ot_plug_in") == Spread((39.0, 39.0))
    one = study(centre=flat, axes={})
    assert one.best is None
    files = written(one, tmp_path)
    assert table(files, "rows.csv")[0]["gap closed"] == ""
    assert "no row was measured in which full fine-tuning gains" in files["study.md"].decode().lower()


def test_the_best_row_is_the_one_nearest_to_both_aims() -> None:
    # Closed and worse: larger 90 % and 5.5 %, quantized 87.5 % and 2.2 %, pruned 85 % and 8.7 %.
    assert study().best is COMPRESSIONS[1]
    assert COMPRESSIONS[1].score(Aim()) == pytest.approx(0.85 / 0.75)
    assert COMPRESSIONS[2].score(Aim()) == pytest.approx((23 / 22.5 - 1) / 0.05)
    assert study(aim=Aim(closed=0.9, worse=0.05)).best is POSITIONS[3]
    assert study(aim=Aim(closed=0.5, worse=0.15)).best is POSITIONS[1]
    assert study(aim=Aim(closed=1.0, worse=0.0)).best is POSITIONS[3]


def test_broken_promises_are_said_row_by_row(tmp_path: Path) -> None:
    emulator_wins = row("emulator wins", five(25.0, 27.0), five(25.0, 24.0))
    useless = row("useless", five(40.0, 50.0))
    not_distilled = row("not distilled", five(41.0, 40.5), distilled=False)
    axes = {"extra": [CENTRE, emulator_wins, useless, not_distilled]}
    files = written(study(axes=axes), tmp_path)
    page = files["study.md"].decode()
    assert "In 1 of 3 distilled configurations the plug-in beats both" in page
    assert "- emulator wins, seed 1: plug-in 25.00 is no better than the tuned emulator 24.00" in page
    assert "- useless, seed 0: plug-in 40.00 is no better than zero-shot 40.00" in page
    assert "- not distilled" not in page
    verdicts = {found["configuration"]: found["promises"] for found in table(files, "rows.csv")}
    assert verdicts == {
        "centre": "kept", "emulator wins": "broken", "useless": "broken", "not distilled": "broken",
    }  # fmt: skip


def test_tables_hold_what_was_measured(tmp_path: Path) -> None:
    files = written(study(), tmp_path)
    first = {found["setting"]: found["perplexity"] for found in table(files, "table1.csv")}
    assert first["full model, zero-shot"] == "40.00"
    assert first["OT plug-in (tuned adapter in the full model)"] == "25.00 (24.00 to 26.00)"
    assert [(found["method"], found["trainable parameters"], found["share of the model"])
            for found in table(files, "table5.csv")] == [("full", "100", "25.00%"), ("lora", "8", "2.00%")]  # fmt: skip
    assert [(found["adapter at"], found["adapter layers"]) for found in table(files, "figure3.csv")] == [
        ("both", "4"), ("both", "6"), ("bottom", "4"), ("top", "4"),
    ]  # fmt: skip
    share = "emulator's share of the middle's bytes"
    assert [found[share] for found in table(files, "figure4.csv")] == ["0.333", "0.530", "0.150"]
    page = files["study.md"].decode()
    for name in files:
        assert name == "study.md" or name.endswith(".csv") or f"({name})" in page
    # A table of the page has as many cells in each line as in its head.
    widths = [line.count("|") for line in page.splitlines() if line.startswith("|")]
    assert set(widths) <= {3, 4, 5, 6, 7, 8, 9, 10, 11} and len(widths) > 30


def test_a_failed_row_is_listed_and_left_out_of_figures(tmp_path: Path) -> None:
    failed = row("failed | one", failures={0: "TrainingError: the loss became nan\nat once"}, ratio=None)
    files = written(study(axes={"positions": [CENTRE, failed], "compressions": [CENTRE, failed]}), tmp_path)
    page = files["study.md"].decode()
    assert "- failed: failed | one, seed 0: TrainingError: the loss became nan" in page
    assert "failed \\| one" in page, "a bar in a cell is no border"
    (found,) = [one for one in table(files, "rows.csv") if one["configuration"] == "failed | one"]
    assert found["OT plug-in"] == "" and found["promises"] == "failed" and found["#"] == ""


def test_published_figures_stand_there_and_nothing_else_is_claimed(tmp_path: Path) -> None:
    page = written(study(axes={}), tmp_path)["study.md"].decode()
    for name in ("Table 2", "Table 3", "Table 6"):
        section = page.split(f"## {name}")[1].split("\n## ")[0]
        assert "Nothing was measured here." in section
    for figure in ("13.15", "14.94", "10.78", "14.58", "1.65M", "106K", "8,525", "49.8", "4-22-4"):
        assert figure in page
    assert page.count("The study did not vary it") == 5
    # The paper's own ratios: OT+LoRA of OPT-1.3B is 6.5 times as fast as FT, GPT2-XL in 5.6 times less memory.
    costs = published.TABLE_6
    assert costs["OPT-1.3B"]["OT+LoRA"].tokens_per_s / costs["OPT-1.3B"]["FT"].tokens_per_s == pytest.approx(6.5, 0.01)
    assert costs["GPT2-XL"]["FT"].memory_mib / costs["GPT2-XL"]["OT+LoRA"].memory_mib == pytest.approx(5.6, 0.01)


def test_other_verbs_results_stand_beside_the_papers(tmp_path: Path) -> None:
    sides = costs()
    cost = {"benchmark": "efficiency", "results": {"opt-1.3b, batch 1": sides, "tiny": sides}}
    accuracy = {"acc": 0.5, "acc_norm": 0.6}
    scores = {"version": "1", "documents": 9, "metrics": accuracy, "stderr": dict.fromkeys(accuracy),
              "higher_is_better": dict.fromkeys(accuracy, True)}  # fmt: skip
    words = {**scores, "metrics": {"word_perplexity": 13.5}, "stderr": {"word_perplexity": None},
             "higher_is_better": {"word_perplexity": False}}  # fmt: skip
    one = {"model": "opt-1.3b", "ot_plug_in": {"tasks": {"piqa": scores, "wikitext": words}, "mean": 50.0}}
    large = {"model": "facebook-opt-6.7b", "ot_plug_in": {"tasks": {"piqa": scores}, "mean": 51.0}}
    pictures = {"title": "digits", "measure": "accuracy", **five(0.9, 0.8, 0.5, 0.95).as_dict()}
    assert all(map(readable, (one, large, pictures))) and not readable(cost) and not readable({"model": "x"})
    files = written(study(efficiency=cost, evaluations=[one, large, pictures]), tmp_path)

    (table1,) = table(files, "table1_tasks.csv")
    assert [table1[name] for name in ("piqa", "wikitext", "mean", "published: WikiText perplexity")] == [
        "50.0", "13.50", "50.0", "13.15",
    ]  # fmt: skip
    (table2,) = table(files, "table2.csv")
    assert (table2["model"], table2["published: mean of eight tasks"]) == ("facebook-opt-6.7b", "53.0")
    assert [found["digits"] for found in table(files, "table3.csv")] == ["50.0%", "5000.0%", "80.0%", "90.0%", "95.0%"]
    rows = {(found["model"], found["side"]): found for found in table(files, "table6.csv")}
    offsite = rows["opt-1.3b, batch 1", "OT"]
    assert (offsite["tokens/s"], offsite["published: tokens/s"]) == ("500", "5,207")
    assert (
        rows["opt-1.3b, batch 1", "OT+LoRA"]["tokens/s"] == "failed" and rows["tiny", "FT"]["published: tokens/s"] == ""
    )
    page = files["study.md"].decode()
    assert "| opt-1.3b, batch 1 | OT | 1 | 500 | 5.00 | 1,024 | 0.25 | 5,207 | 3.96 | 9,336 | 0.31 |" in page


def costs(length: int = 512, full: int = 1, offsite: int = 1) -> dict[str, Any]:
    """What the benchmark measured of one shape, at these batch sizes."""
    sides = {"FT": {"batch_size": full, "tokens_per_s": 100.0, "peak_bytes": 4 * 2**30},
             "OT": {"batch_size": offsite, "tokens_per_s": 500.0, "peak_bytes": 2**30},
             "OT+LoRA": {"batch_size": offsite, "failed": "out of memory"}}  # fmt: skip
    return {"sequence_length": length, "sides": sides}


def test_only_equal_steps_are_held_against_each_other(tmp_path: Path) -> None:
    results = {
        "opt-1.3b, batch 1": costs(),
        "opt-1.3b, batch 4": costs(full=4, offsite=4),
        "opt-1.3b, short": costs(length=128),
        "opt-1.3b, batch largest": costs(full=1, offsite=16),
    }
    files = written(study(efficiency={"benchmark": "efficiency", "results": results}), tmp_path)
    rows = {found["model"]: found for found in table(files, "table6.csv") if found["side"] == "OT"}
    assert {name.partition(", ")[2]: row["published: tokens/s"] for name, row in rows.items()} == {
        "batch 1": "5,207", "batch 4": "", "short": "", "batch largest": "",
    }  # fmt: skip
    assert [(row["batch"], row["to FT"], row["of FT"]) for row in rows.values()] == [
        ("1", "5.00", "0.25"), ("4", "5.00", "0.25"), ("1", "5.00", "0.25"), ("16", "5.00", ""),
    ]  # fmt: skip


def test_evaluations_on_images_are_told_apart(tmp_path: Path) -> None:
    def pictures(**about: str) -> dict[str, Any]:
        return {"title": "vit: offsite tuning", "measure": "accuracy", **about, **five(0.9, 0.8, 0.5, 0.95).as_dict()}

    same: dict[str, str] = {"model": "vit", "method": "full"}
    found = [pictures(**same, data="pets"), pictures(**same, data="cars"), pictures(**{**same, "method": "lora"},
             data="pets"), pictures()]  # fmt: skip
    assert all(map(readable, found))
    files = written(study(evaluations=found), tmp_path)
    assert list(table(files, "table3.csv")[0]) == [
        "setting", "vit, pets, full", "vit, cars, full", "vit, pets, lora", "vit: offsite tuning",
    ]  # fmt: skip
    # They are no scores on tasks.
    assert "table1_tasks.csv" not in files


def test_figures_show_their_points_in_their_colours(tmp_path: Path) -> None:
    files = written(study(), tmp_path)
    blue, orange, green = "1f77b4", "d98e32", "2f8f4e"
    for name, colours in {"figure3.png": (blue, orange, green), "figure4.png": (blue, orange, green),
                          "frontier.png": (blue, "b8461f")}.items():  # fmt: skip
        picture = (image.imread(io.BytesIO(files[name])) * 255).round().astype(int)[..., :3]
        assert picture.shape[0] > 400 and picture.shape[1] > 900
        for colour in colours:
            wanted = np.array([int(colour[i : i + 2], 16) for i in (0, 2, 4)])
            assert (np.abs(picture - wanted).max(axis=-1) <= 1).sum() > 20, f"{name} has no {colour}"
        # Nothing is cut off at the border.
        border = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
        assert (border == 255).all(), name


def test_tables_are_drawn_too(tmp_path: Path) -> None:
    def ink(picture: bytes) -> np.ndarray:
        found = (image.imread(io.BytesIO(picture)) * 255).round().astype(int)[..., :3]
        border = np.concatenate([found[0], found[-1], found[:, 0], found[:, -1]])
        assert (border == 255).all(), "nothing is cut off"
        return found.max(axis=-1) < 128

    files = written(study(efficiency={"benchmark": "efficiency", "results": {"tiny": costs()}}), tmp_path)
    drawn = {name.removesuffix(".csv") for name in files if name.endswith(".csv")} - {"figure3", "figure4"}
    assert {"table1", "table4", "table5", "table6", "rows", "layers"} <= drawn
    for name in drawn:
        found = ink(files[f"{name}.png"])
        # Three rules reach from one side to the other.
        assert (found.mean(axis=1) > 0.8).sum() >= 3
        assert found.shape[0] > 18 * len(table(files, f"{name}.csv"))
        assert f"[PNG]({name}.png)" in files["study.md"].decode()
    more = written(study(axes={"methods": [*METHODS, row("bitfit", method="bitfit")]}), tmp_path)
    assert ink(more["table5.png"]).shape[0] > ink(files["table5.png"]).shape[0]
    # A cell that is longer than a line is broken, and makes its row higher.
    long = drawing.drawn(Table("t", ["a"], [["one " * 40]]), "Long")
    assert ink(long).shape[0] > 3 * ink(drawing.drawn(Table("t", ["a"], [["one"]]), "Short")).shape[0] / 2
    assert ink(long).shape[1] < 400


def test_a_report_replaces_an_older_one(tmp_path: Path) -> None:
    written(study(title="Old"), tmp_path)
    page = written(study(title="New"), tmp_path)["study.md"].decode()
    assert page.startswith("# New\n") and "Old" not in page
