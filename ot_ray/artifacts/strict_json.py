"""JSON from outside: no duplicate keys, no NaN, an object at the top, and closed schemas.

Which fields a document has is left to the classes it is read into."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from pydantic import ValidationError

from ot_ray.config import Config
from ot_ray.errors import ArtifactError
from ot_ray.store.partial import disk_errors

C = TypeVar("C", bound=Config)

MAX_BYTES = 8 * 1024 * 1024  # of one JSON document; a manifest of a 100-layer adapter is far below


def read_json(cls: type[C], path: Path) -> C:
    """Read a file into a closed schema. Raises ArtifactError as `parse_json` does, or if it is too large."""
    with disk_errors(f"cannot read {path}"):
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise ArtifactError(f"{path.name} has {size} bytes; at most {MAX_BYTES} are read")
        data = path.read_bytes()
    return parse_json(cls, data, path.name)


def parse_json(cls: type[C], data: bytes, where: str) -> C:
    """Read JSON text into a closed schema, without converting types.

    Args:
        where: the name of the document, for messages.

    Raises:
        ArtifactError: the text is not strict JSON, or a field is unknown, missing or of another type;
            every such field is named.
    """
    parse_object(data, where)
    try:
        return cls.model_validate_json(data, strict=True)
    except ValidationError as error:
        raise ArtifactError("; ".join(_explain(item, where) for item in error.errors())) from None


def parse_object(data: bytes, where: str) -> dict[str, Any]:
    """Read JSON text whose top level is an object.

    Raises:
        ArtifactError: not UTF-8, not JSON, a key stands twice, a number is NaN or infinite, or it is
            nested too deeply.
    """
    try:
        values = json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{where} is not strict JSON: {error}; write it anew") from None
    if not isinstance(values, dict):
        raise ArtifactError(f"{where} holds a {type(values).__name__}, not an object; write it anew")
    return values


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise ValueError(f"key {key[:80]!r} stands twice")
        values[key] = value
    return values


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON number")


def _explain(item: Any, where: str) -> str:
    field = ".".join(str(part) for part in item["loc"] if part != "[key]")
    if item["type"] == "extra_forbidden":
        return f"{where}: unknown key {field}; remove it, or use the version of ot_ray that wrote it"
    if item["type"] == "missing":
        return f"{where}: {field} is missing; write it anew"
    message = item["msg"].removeprefix("Value error, ")
    return f"{where}: {field} is {str(item['input'])[:80]!r}: {message}"
