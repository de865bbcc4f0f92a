"""The page of a run: what it says, that nothing in it is taken for HTML, and that its curves can be seen."""

from __future__ import annotations

import base64
import io
import math
import re
from html.parser import HTMLParser
from typing import Any

import numpy as np
from matplotlib import image

from ot_ray.evaluation import RunReport, Verdict

PASSED = Verdict(passed=True, reasons=(), notes=("1.5 times the full model's",))
FIGURES = {"full": 12.5, "dropped": 40.0, "emulated": 18.25}


def rows(steps: int = 120, resumed: tuple[int, ...] = ()) -> list[dict[str, float]]:
    return [
        {
            "step": step,
            "loss": 5 - step / 60,
            "lm_loss": 4 - step / 60,
            "kd_loss": math.exp(-step / 40),
            "lr": 1e-3 * min(1, step / 10),
            "tokens_per_s": 1000.0 + step % 7,
            "seconds": 36.0,
            "data_wait": 0.9,
            "data_wait_share": 0.025,
            **({"resumed": 1.0} if step in resumed else {}),
        }
        for step in range(1, steps + 1)
    ]


def report(**changes: Any) -> RunReport:
    values: dict[str, Any] = {
        "model": "tiny",
        "version": "e-1",
        "run": "r-1",
        "history": rows(),
        "perplexity": FIGURES,
        "verdict": PASSED,
        "bound": 12.75,
        "workers": 2,
        "price_per_worker_hour": None,
        "config": {"model": {"name": "tiny"}, "sequence_length": 512},
    }
    return RunReport(**{**values, **changes})


class Seen(HTMLParser):
    """Tags, and text as a browser shows it."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data + "\n"


def pixels(png: bytes) -> np.ndarray:
    return image.imread(io.BytesIO(png))


def test_the_page_says_how_the_run_went() -> None:
    text = Seen(report(price_per_worker_hour=2.5, history=rows(resumed=(40, 80))).page(b"")).text
    for part in ("tiny, version e-1", "Passed the gate", "1.5 times the full model's", "18.25", "12.5", "r-1",
                 "2, resumed at step 40, 80", "2.50%", "sequence_length"):  # fmt: skip
        assert part in text
    # 120 steps of 36 s on two workers are 2.4 hours.
    assert re.search(r"worker hours\n2\.4\n", text)
    assert "6.00 (2.5 a worker hour)" in text


def test_workers_that_came_and_went_cost_what_they_worked() -> None:
    history = [{**row, "workers": 4.0 if row["step"] <= 60 else 1.0} for row in rows()]
    made = report(history=history, price_per_worker_hour=1.0)
    assert math.isclose(made.worker_hours, (60 * 36 * 4 + 60 * 36) / 3600)
    assert made.cost == made.worker_hours


def test_a_rejected_run_says_why() -> None:
    verdict = Verdict(passed=False, reasons=("its perplexity is 9",), notes=())
    text = Seen(report(verdict=verdict).page(b"")).text
    assert "Rejected: kept, not published." in text and "its perplexity is 9" in text


def test_the_page_needs_nothing_but_itself() -> None:
    made = report()
    chart = made.chart()
    page = Seen(made.page(chart))
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "link", "iframe", "a"})
    (picture,) = (attributes["src"] for tag, attributes in page.tags if tag == "img")
    assert picture is not None
    assert base64.b64decode(picture.removeprefix("data:image/png;base64,")) == chart


def test_no_value_is_taken_for_html() -> None:
    bad = "<script>alert('x')</script><img src=x>\"&"
    made = report(
        model=bad,
        version=bad,
        run=bad,
        verdict=Verdict(passed=False, reasons=(bad,), notes=(bad,)),
        perplexity={bad: 1.0},
        config={bad: bad, "deep": {bad: [bad]}},
    )
    page = Seen(made.page(b""))
    assert [tag for tag, _ in page.tags].count("img") == 1
    assert "script" not in {tag for tag, _ in page.tags}
    assert page.text.count("alert('x')") >= 8


def test_the_curves_are_drawn() -> None:
    drawn, empty = pixels(report().chart()), pixels(report(history=[], perplexity={}, bound=None).chart())
    assert drawn.shape == empty.shape
    # Blue ink of the curves, in each panel of the grid.
    blue = (drawn[..., 2] - drawn[..., 0]) > 0.3
    height, width = blue.shape
    for row in range(2):
        for column in range(3):
            panel = blue[row * height // 2 : (row + 1) * height // 2, column * width // 3 : (column + 1) * width // 3]
            assert panel.sum() > 100, (row, column)
    assert not ((empty[..., 2] - empty[..., 0]) > 0.3).any()


def test_interruptions_are_marked() -> None:
    def rust(png: bytes) -> int:
        seen = pixels(png)
        return int(((seen[..., 0] - seen[..., 2]) > 0.4).sum())

    plain, marked = report(bound=None).chart(), report(bound=None, history=rows(resumed=(60,))).chart()
    assert rust(marked) > rust(plain) + 500


def test_a_name_with_dollars_is_drawn_as_it_stands() -> None:
    assert pixels(report(model="$\\frac{$").chart()).std() > 0.01


def test_figures_that_are_not_finite_leave_gaps() -> None:
    history = [{**row, "lm_loss": math.nan} for row in rows(5)]
    made = report(history=history, perplexity={"full": 10.0, "emulated": math.inf}, bound=math.inf)
    assert "inf" in Seen(made.page(made.chart())).text


def test_a_run_without_steps_has_a_page() -> None:
    text = Seen(report(history=[], perplexity={}).page(b"")).text
    assert "Not measured" in text and "none" in text
