"""From a study's results to what its report shows: names, axes, seeds together, and other verbs' files.

Tables and figures are evaluation's."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.studies.config import Other, Row, StudyConfig
from jobs.studies.parts import RowParts
from jobs.studies.work import Result
from ot_ray.errors import ConfigError
from ot_ray.evaluation import FiveSettings
from ot_ray.evaluation.study import Aim, Measured, Study
from ot_ray.evaluation.study.elsewhere import readable
from ot_ray.model import EmulatorConfig

_NOTHING = "was not computed"


@dataclass(frozen=True)
class Elsewhere:
    """What other verbs left."""

    efficiency: Mapping[str, Any] | None
    evaluations: tuple[Mapping[str, Any], ...]


def read_other(other: Other) -> Elsewhere:
    """Read the files of other verbs. Raises ConfigError: one is missing, no JSON, or of another kind."""
    found = _efficiency(other.efficiency) if other.efficiency is not None else None
    return Elsewhere(found, tuple(_evaluation(path) for path in other.evaluations))


def _evaluation(path: str) -> dict[str, Any]:
    found = _read("other.evaluations", path)
    if not readable(found):
        raise ConfigError(
            f"other.evaluations names {path!r}, which is no result of jobs.evaluate on tasks or images; name its "
            "task_scores.json or five_settings.json"
        )
    return found


def _efficiency(path: str) -> dict[str, Any]:
    found = _read("other.efficiency", path)
    if found.get("benchmark") != "efficiency":
        raise ConfigError(
            f"other.efficiency names {path!r}, which is no result of jobs.benchmark efficiency; name the file that its "
            "output=... wrote"
        )
    return found


def study_of(
    config: StudyConfig,
    title: str,
    about: Sequence[str],
    depth: int,
    rows: Sequence[tuple[str, RowParts]],
    results: Mapping[str, Result],
    elsewhere: Elsewhere,
) -> Study:
    """What the report is made of.

    Args:
        rows: every row with its axis, as `Parts.rows` gives them.
        results: by the parts' keys; a row without one counts as failed.
    """
    measured = _measured(config, depth, rows, results)
    axes: dict[str, dict[str, Measured]] = {}
    centre = measured[_identity(config.centre)]
    for axis, parts in rows:
        # The centre belongs to every axis, the first of it.
        found = axes.setdefault(axis, {centre.label: centre})
        one = measured[_identity(parts.row)]
        found[one.label] = one
    return Study(
        title=title,
        about=about,
        centre=centre,
        axes={axis: list(found.values()) for axis, found in axes.items()},
        aim=Aim(config.aim.closed, config.aim.worse),
        efficiency=elsewhere.efficiency,
        evaluations=elsewhere.evaluations,
    )


def _measured(
    config: StudyConfig, depth: int, rows: Sequence[tuple[str, RowParts]], results: Mapping[str, Result]
) -> dict[str, Measured]:
    """Every configuration, by its identity."""
    together: dict[str, list[RowParts]] = {}
    for _, parts in rows:
        group = together.setdefault(_identity(parts.row), [])
        if all(known.seed != parts.seed for known in group):
            group.append(parts)
    labels = _labels(config, depth, [group[0] for group in together.values()])
    found = {}
    for label, (identity, group) in zip(labels, together.items(), strict=True):
        outcomes = {parts.seed: results.get(parts.tuned.key, {"failed": _NOTHING}) for parts in group}
        found[identity] = _one(label, group[0].row, depth, outcomes)
    return found


def _one(label: str, row: Row, depth: int, outcomes: Mapping[int, Result]) -> Measured:
    plan = row.plan(depth)
    done = {seed: outcome for seed, outcome in outcomes.items() if "failed" not in outcome}
    some: Result = next(iter(done.values()), {})
    return Measured(
        label=label,
        bottom=plan.bottom,
        keep=plan.keep,
        top=plan.top,
        method=row.method,
        compression=_kind(row, depth),
        detail=", ".join([f"{plan.keep} of {len(plan.middle(depth))} layers", *_compressed(row.emulator)]),
        layers=row.emulator.layers,
        distilled=row.distilled,
        settings={seed: FiveSettings(**outcome["settings"]) for seed, outcome in done.items()},
        failures={seed: outcome["failed"] for seed, outcome in outcomes.items() if seed not in done},
        ratio=some.get("ratio"),
        trainable=some.get("trainable_parameters"),
        parameters=some.get("parameters"),
    )


def _identity(row: Row) -> str:
    """Equal for rows that are the same whatever their settings for other methods."""
    others = {"lora", "bottleneck"} - {row.method}
    return row.model_dump_json(exclude=others)


def _labels(config: StudyConfig, depth: int, rows: Iterable[RowParts]) -> list[str]:
    """A name for each row, each another."""
    labels: list[str] = []
    for parts in rows:
        wanted = parts.change.label or _label(parts.row, config.centre, depth)
        same = sum(label == wanted or label.startswith(f"{wanted} #") for label in labels)
        labels.append(f"{wanted} #{same + 1}" if same else wanted)
    return labels


def _label(row: Row, centre: Row, depth: int) -> str:
    parts = [f"{row.plan(depth)} {row.method}", *_compressed(row.emulator)]
    parts += [row.emulator.layers] if row.emulator.layers != "uniform" else []
    parts += [] if row.distilled else ["not distilled"]
    parts += [f"{row.distil_steps} steps distilled"] if row.distilled and row.distil_steps is not None else []
    parts += [f"lr {row.lr:g}"] if row.lr != centre.lr else []
    parts += [f"{row.steps} steps"] if row.steps != centre.steps else []
    return ", ".join(parts)


def _kind(row: Row, depth: int) -> str:
    emulator, plan = row.emulator, row.plan(depth)
    kinds = {
        "prune": emulator.sparsity > 0,
        "quantize": emulator.bits is not None,
        "factor": emulator.attention_rank is not None or emulator.mlp_channels is not None,
    }
    found = [name for name, is_so in kinds.items() if is_so]
    dropped = plan.keep < len(plan.middle(depth)) or not found
    return "+".join(["drop", *found] if dropped else found)


def _compressed(emulator: EmulatorConfig) -> list[str]:
    parts = [f"{emulator.sparsity:.0%} pruned"] if emulator.sparsity else []
    parts += [f"{emulator.bits} bits"] if emulator.bits is not None else []
    parts += [f"attention of rank {emulator.attention_rank:.0%}"] if emulator.attention_rank is not None else []
    parts += [f"{emulator.mlp_channels:.0%} of the MLP's channels"] if emulator.mlp_channels is not None else []
    return parts


def _read(field: str, path: str) -> dict[str, Any]:
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{field} names {path!r}, which cannot be read: {error.strerror}; name a JSON file") from None
    except ValueError:
        raise ConfigError(f"{field} names {path!r}, which is no JSON; name a file that the other verb wrote") from None
    return found if isinstance(found, dict) else {}
