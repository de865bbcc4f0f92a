"""What `/v1/cola` says, as objects of this side, and rows as it takes them.

Asking for it is left to cola.py and cola_session.py."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ot_ray.client.http import Answer, Http
from ot_ray.cola import AuxiliaryConfig, FitConfig, Site
from ot_ray.errors import GradientLearningError, NotFiniteError, ServiceError

Rows = Sequence[Sequence[int] | Mapping[str, Sequence[int]]]
"""Rows of text: token ids, or `{"tokens": ids, "loss_mask": 0 or 1 for each}`, where 0 is read but not learnt."""


@dataclass(frozen=True)
class SessionState:
    """A session as the service has it."""

    id: str
    model: str
    status: str
    """`open` or `closed`."""
    sites: dict[str, Site]
    auxiliary: AuxiliaryConfig
    mode: str
    group: str | None
    fit: str
    interval: int | None
    fitting: FitConfig | None
    """Where the service fits."""
    version: int
    """Of the auxiliary."""
    next_number: int
    """Of the next operation."""
    metadata: dict[str, str]


@dataclass(frozen=True)
class Passed:
    """What a pass of the base model said."""

    number: int
    """Of the operation."""
    version: int
    """Of the auxiliary that the rows went through."""
    loss: float
    """Mean cross-entropy of the tokens that are learnt, in nats."""
    tokens: int
    """How many those are."""
    coding: str
    """Of the gradients."""
    errors: dict[str, float]
    """What that cost (`GradientFile.errors`)."""
    fits: int | None
    """Fits so far, where the service fits."""
    bytes: int
    """Of the file of gradients."""
    sha256: str | None
    """Of the same, where the service says it."""


def session_state(value: Any) -> SessionState:
    """A session of the service's."""
    with _known("a session"):
        fitting = value.get("fitting")
        return SessionState(
            id=str(value["id"]),
            model=str(value["model"]),
            status=str(value["status"]),
            sites={site.name: site for site in map(site_of, value["sites"])},
            auxiliary=AuxiliaryConfig.model_validate(value["auxiliary"]),
            mode=str(value["mode"]),
            group=value["group"],
            fit=str(value["fit"]),
            interval=value["interval"],
            fitting=FitConfig.model_validate(fitting) if fitting else None,
            version=int(value["version"]),
            next_number=int(value["next_number"]),
            metadata=dict(value.get("metadata") or {}),
        )


def site_of(value: Any) -> Site:
    """A site of the service's."""
    with _known("a site"):
        padding = value["padding"]
        return Site(
            name=str(value["name"]),
            layout=value["layout"],
            inputs=int(value["inputs"]),
            outputs=int(value["outputs"]),
            transposed=bool(value["transposed"]),
            kernel=tuple(map(int, value["kernel"])),
            stride=tuple(map(int, value["stride"])),
            padding=padding if isinstance(padding, str) else tuple(map(int, padding)),
            dilation=tuple(map(int, value["dilation"])),
        )


def passed(operation: Mapping[str, Any]) -> Passed:
    """What came of a `forward_backward` that succeeded."""
    with _known("a pass"):
        result = operation["result"]
        return Passed(
            number=int(operation["number"]),
            version=int(operation["version"]),
            loss=float(result["loss"]),
            tokens=int(result["tokens"]),
            coding=str(result["coding"]),
            errors=dict(result["errors"] or {}),
            fits=result["fits"],
            bytes=int(result["bytes"]),
            sha256=result.get("sha256"),
        )


def rows_of(rows: Rows) -> list[dict[str, list[int]]]:
    """Rows as the service takes them.

    Raises:
        GradientLearningError: there are none, or one is neither ids nor a mapping with `tokens`.
    """
    found = []
    for row in rows:
        fields = dict(row) if isinstance(row, Mapping) else {"tokens": row}
        if "tokens" not in fields or not fields.keys() <= {"tokens", "loss_mask"}:
            raise GradientLearningError(f"a row has {sorted(fields)}; give tokens, and a loss_mask where it needs one")
        found.append({name: [int(value) for value in values] for name, values in fields.items()})
    if not found:
        raise GradientLearningError("there are no rows; give at least one")
    return found


def ended(operation: Mapping[str, Any], where: str) -> bool:
    """Whether an operation is over, and well.

    Raises:
        NotFiniteError: it was refused, since something was not finite; the session goes on.
        ServiceError: it failed.
    """
    with _known("an operation"):
        status = operation["status"]
        if status not in ("failed", "succeeded", "queued", "running"):
            raise ValueError(status)
        if status != "failed":
            return status == "succeeded"
        error = operation["error"]
        message = f"{where}: {operation['kind']} {operation['number']} failed: {str(error['message'])[:2000]}"
    if error.get("code") == "not_finite":
        raise NotFiniteError(message)
    raise ServiceError(message, None, error.get("code"))


def tagged(http: Http, path: str) -> tuple[int, str, Answer]:
    """Bytes and SHA-256 of a file that the service has, and the answer that told them.

    Raises:
        ServiceError: the service refused, or does not answer.
    """
    # One byte: routes that answer GET need not answer HEAD.
    answer = http.answer("GET", path, headers={"range": "bytes=0-0"})
    http.require(answer, "GET", path)
    size = answer.headers.get("content-range", "").rpartition("/")[2]
    tag = answer.headers.get("etag", "").strip('"')
    if answer.status != 206 or not size.isdecimal() or len(tag) != 64:
        raise ServiceError(f"{http.url}{path} is no file that is sent by ranges; check the URL, or update ot_ray")
    return int(size), tag, answer


@contextmanager
def _known(what: str) -> Iterator[None]:
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError):
        raise ServiceError(f"the service described {what} in a way this version does not know; update ot_ray") from None
