"""Frozen, typed configuration: YAML files plus ``section.key=value`` overrides.

What a setting means stands beside its owner, as a ``Config`` subclass with one docstring a field; this
module only reads, merges and refuses. Environment variables and secrets are never read here."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from ot_ray.errors import ConfigError


class Config(BaseModel):
    """Base of every configuration and manifest: immutable, and closed to unknown keys."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        protected_namespaces=(),
        validate_default=True,
        allow_inf_nan=False,
    )


C = TypeVar("C", bound=Config)


class _Loader(yaml.SafeLoader):
    """YAML 1.1 takes 1e-4 for text; a person who writes it without quotes means the number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]{1,3}\Z"), list("-+0123456789")
)


def load(cls: type[C], path: str | Path | None = None, overrides: Iterable[str] = ()) -> C:
    """Read a configuration from a YAML file, then apply overrides from left to right.

    Args:
        cls: the configuration class to fill.
        path: a YAML file whose top level is a mapping; ``None`` starts from the defaults.
        overrides: ``section.key=value`` strings; the value is read as YAML (``training.lr=1e-4``), but taken
            as it stands where the field is text (``version=1``).

    Raises:
        ConfigError: the file is missing or no mapping, an override has no ``=``, a key is unknown
            (the nearest valid key is named), or a value has the wrong type or range.
    """
    values = _read_yaml(Path(path)) if path is not None else {}
    overridden = {_apply(cls, values, override): f"override {override!r}" for override in overrides}
    return parse(cls, values, str(path) if path is not None else "the configuration", overridden)


def parse(cls: type[C], values: Mapping[str, Any], where: str, origins: Mapping[str, str] | None = None) -> C:
    """Check plain values against a configuration class.

    Args:
        where: the file or object that the values come from, for error messages.
        origins: where single fields come from instead, by their dotted names.

    Raises:
        ConfigError: one line for each problem, naming field, value and way out.
    """
    try:
        return cls.model_validate(dict(values))
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(cls, item, where, origins or {}) for item in error.errors())) from None


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file; pass an existing YAML file") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}; pass a YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: the top level is a {type(values).__name__}; write `key: value` lines")
    return values


def _apply(cls: type[BaseModel], values: dict[str, Any], override: str) -> str:
    """Put an override into the values; return the dotted name of its field."""
    key, sign, text = override.partition("=")
    if not sign or not key.strip():
        raise ConfigError(f"{override!r} is not an override; write section.key=value")
    *sections, leaf = key.strip().split(".")
    for section in sections:
        if values.get(section) is None:
            values[section] = {}
        inner = values[section]
        if not isinstance(inner, dict):
            raise ConfigError(f"{override!r}: {section} is {inner!r}, not a section that holds keys")
        values = inner
    value = _yaml_value(text, override)
    owner = _class_at(cls, sections)
    # YAML would make a number or a date of a version; whoever sets a text field means the text.
    as_it_stands = owner is not None and _is_text(owner, leaf) and not isinstance(value, str | None)
    values[leaf] = text.strip() if as_it_stands else value
    return key.strip()


def _yaml_value(text: str, override: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError:
        raise ConfigError(f"{override!r}: the value is not valid YAML; quote it") from None


def _explain(cls: type[BaseModel], item: Any, where: str, origins: Mapping[str, str]) -> str:
    location = [str(part) for part in item["loc"]]
    field = ".".join(location)
    where = origins.get(field, where)
    if item["type"] == "extra_forbidden":
        owner = _class_at(cls, [part for part in location[:-1] if not part.isdigit()])
        valid = list(owner.model_fields) if owner else []
        return f"{where}: unknown key {field}" + (_near(location[-1], valid) or f"; valid keys: {', '.join(valid)}")
    if item["type"] == "missing":
        return f"{where}: {field} is required; set {field}=..."
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "literal_error":
        message += _near(item["input"], re.findall(r"'([^']*)'", item["ctx"]["expected"]))
    if item["type"] == "string_type" and isinstance(item["input"], bool | int | float):
        message += "; put it in quotes"
    # A rule between the fields of a section names them itself; the section's whole text would bury it.
    value = "" if isinstance(item["input"], Mapping) else f" is {item['input']!r}"
    return f"{where}: {field}{value}: {message}" if field else f"{where}: {message}"


def _near(value: Any, valid: Iterable[str]) -> str:
    near = difflib.get_close_matches(str(value), list(valid), n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""


def _is_text(owner: type[BaseModel], field: str) -> bool:
    if field not in owner.model_fields:
        return False
    annotation = owner.model_fields[field].annotation
    return annotation is str or set(get_args(annotation)) == {str, NoneType}


def _class_at(cls: type[BaseModel], path: list[str]) -> type[BaseModel] | None:
    for part in path:
        if cls is None or part not in cls.model_fields:
            return None
        cls = _config_class(cls.model_fields[part].annotation)  # type: ignore[assignment]
    return cls


def _config_class(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in getattr(annotation, "__args__", ()):
        found = _config_class(inner)
        if found is not None:
            return found
    return None
