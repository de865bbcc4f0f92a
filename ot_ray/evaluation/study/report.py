"""The report of a study: one Markdown page with the paper's Tables 1 to 6, Figures 3 and 4, and the frontier; CSV and
PNG beside it. What stands in tables and figures is theirs; this is the order and the words around them."""

from __future__ import annotations

from ot_ray.evaluation.study import figures, published, tables
from ot_ray.evaluation.study.drawing import drawn
from ot_ray.evaluation.study.elsewhere import efficiency, images, large_models, small_models
from ot_ray.evaluation.study.results import Measured, Study
from ot_ray.evaluation.study.tables import Table
from ot_ray.store import Store

NOTHING = "Nothing was measured here."
_FIGURES = frozenset({"figure3.png", "figure4.png", "frontier.png"})
_SPREAD = "Where there are several seeds, a cell is their mean, with the smallest and the largest in brackets."


def write_report(study: Study, store: Store) -> list[str]:
    """Write `study.md`, a CSV and a PNG file a table and a PNG file a figure.

    Returns:
        The keys that were written, `study.md` last.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        StoreError: the store does not take them.
    """
    page = _Page(study)
    for name, content in page.files.items():
        store.write(name, content)
    store.write("study.md", page.text.encode())
    return [*page.files, "study.md"]


class _Page:
    """Collects the page's lines and the files that it refers to."""

    def __init__(self, study: Study) -> None:
        self._study = study
        self._lines: list[str] = [f"# {study.title}", "", *study.about, "", _SPREAD]
        self._title = study.title
        self.files: dict[str, bytes] = {}
        self._frontier()
        self._text_tables()
        self._images()
        self._axes()
        self._efficiency()
        self._sources()

    @property
    def text(self) -> str:
        return "\n".join(self._lines) + "\n"

    def _frontier(self) -> None:
        study = self._study
        self._section("What an owner decides on")
        self._say(
            "The share of the gap from zero-shot to full fine-tuning that the plug-in closes, and by how much the "
            "tuned emulator's perplexity is above the plug-in's, belong together: the first is what the customer "
            "gets, the second what keeps the emulator from replacing the model."
        )
        self._figure("frontier", figures.frontier(study), "the frontier of the two numbers")
        self._lines += ["", *_best(study), *_promises(study)]
        self._table(tables.everything(study, figures.numbered(study)))
        for row in study.rows:
            for seed, reason in sorted(row.failures.items()):
                self._lines += ["", f"- failed: {row.label}, seed {seed}: {reason}"]

    def _text_tables(self) -> None:
        self._section("Table 1: the five settings")
        self._table(tables.five_settings(self._study))
        self._say(f"Of {self._study.centre.label}, the row from which the axes below depart. On tasks:")
        self._beside(small_models(self._study.evaluations))
        self._say("Published:")
        self._table(tables.published_text(published.TABLE_1), file=False)
        self._section("Table 2: larger models")
        self._beside(large_models(self._study.evaluations))
        self._say("Published, with layers dropped and nothing distilled:")
        self._table(tables.published_text(published.TABLE_2), file=False)

    def _images(self) -> None:
        self._section("Table 3: images")
        self._beside(images(self._study.evaluations))
        splits = ", ".join(f"{model} {split}" for model, split in published.TABLE_3_SPLITS.items())
        sets = ", ".join(published.TABLE_3_SETS)
        self._say(f"Published: {splits} on {sets}; the accuracies are not at hand.")

    def _axes(self) -> None:
        study = self._study
        self._section("Table 4: distilled or not")
        self._axis("distilled", tables.distilled(study))
        self._say("Published for OPT-1.3B, the plug-in's mean accuracy (%) over eight tasks:")
        rows = [[how, f"{mean:.1f}"] for how, mean in published.TABLE_4.items()]
        self._table(Table("published", ["emulator", "mean"], rows), file=False)
        self._section("Table 5: tuning methods")
        self._axis("methods", tables.methods(study))
        self._say("Published, trainable parameters with two adapter layers at each end:")
        rows = [[name, cell.gpt2_xl, cell.opt_1b] for name, cell in published.TABLE_5.items()]
        self._table(Table("published", ["method", "GPT2-XL", "OPT-1.3B"], rows), file=False)
        self._section("Figure 3: position and size of the adapter")
        self._axis("positions", tables.positions(study))
        self._figure("figure3", figures.figure3(study), "perplexity by position and size of the adapter")
        self._say(published.FIGURE_3)
        self._section("Figure 4: compression of the middle")
        self._axis("compressions", tables.compressions(study))
        self._figure("figure4", figures.figure4(study), "perplexity by the bytes that are left of the middle")
        self._say(
            "Shares are of the bytes in memory, in the type in which the study holds the model. " + published.FIGURE_4
        )
        self._section("Which layers stay")
        self._axis("layers", tables.layer_choices(study))

    def _efficiency(self) -> None:
        self._section("Table 6: what tuning costs")
        self._beside(efficiency(self._study.efficiency))
        self._say("Published (batch 1, 512 tokens, one A6000):")
        rows = [
            [model, side, f"{cost.tokens_per_s:,.0f}", f"{cost.memory_mib:,.0f}"]
            for model, sides in published.TABLE_6.items()
            for side, cost in sides.items()
        ]
        self._table(Table("published", ["model", "side", "tokens/s", "memory (MiB)"], rows), file=False)

    def _sources(self) -> None:
        self._section("Sources")
        self._lines += ["", *(f"- {source}" for source in (published.PAPER, published.CODE, published.LATER))]

    def _section(self, title: str) -> None:
        self._title = title
        self._lines += ["", f"## {title}"]

    def _say(self, text: str) -> None:
        self._lines += ["", text]

    def _axis(self, name: str, table: Table) -> None:
        if len(self._study.along(name)) < 2:
            self._say(f"{NOTHING} The study did not vary it; the one row is the centre's.")
        self._table(table)

    def _beside(self, table: Table | None) -> None:
        if table is None:
            self._say(NOTHING)
        else:
            self._table(table)

    def _table(self, table: Table, file: bool = True) -> None:
        self._lines += ["", table.markdown()]
        if not file:
            return
        self.files[f"{table.name}.csv"] = table.csv()
        links = [f"[CSV]({table.name}.csv)"]
        # What a figure shows is drawn already.
        if f"{table.name}.png" not in _FIGURES:
            self.files[f"{table.name}.png"] = drawn(table, self._title)
            links.append(f"[PNG]({table.name}.png)")
        self._lines += ["", " ".join(links)]

    def _figure(self, name: str, picture: bytes, meaning: str) -> None:
        self.files[f"{name}.png"] = picture
        self._lines += ["", f"![{meaning}]({name}.png)"]


def _best(study: Study) -> list[str]:
    best = study.best
    if best is None:
        return ["No row was measured in which full fine-tuning gains something."]
    closed, worse = best.spread("gap_closed"), best.spread("emulator_worse_by")
    assert closed is not None and worse is not None
    aim = f"at least {study.aim.closed:.0%} closed with the emulator at least {study.aim.worse:.0%} worse"
    verdict = "reaches" if best.score(study.aim) >= 1 else "comes nearest to, and does not reach,"
    return [
        f"**{best.label}** {verdict} the aim ({aim}): the plug-in closes {closed.text('.1%')}, the tuned emulator is "
        f"{worse.text('.1%')} worse."
    ]


def _promises(study: Study) -> list[str]:
    distilled = [row for row in study.rows if row.distilled and row.settings]
    broken = [(row, text) for row in distilled for text in row.broken()]
    if not distilled:
        return ["", "No distilled row was measured."]
    said = f"In {_kept(distilled, broken)} of {len(distilled)} distilled configurations the plug-in beats both "
    lines = ["", said + "zero-shot and the tuned emulator with every seed."]
    return lines + [f"- {row.label}, {text}" for row, text in broken]


def _kept(distilled: list[Measured], broken: list[tuple[Measured, str]]) -> int:
    return len(distilled) - len({row.label for row, _ in broken})
