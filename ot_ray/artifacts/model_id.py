"""Names of plug-in models: ids of single versions, and aliases of whichever version is current.

What is in service under a name is left to registry.py."""

from __future__ import annotations

import re
from typing import NamedTuple

from ot_ray.artifacts.manifest import NAME_PATTERN
from ot_ray.errors import ArtifactError

_ALIAS_PATTERN = rf"ft:({NAME_PATTERN}):({NAME_PATTERN}):({NAME_PATTERN})"
MODEL_ID_PATTERN = rf"{_ALIAS_PATTERN}:([0-9a-f]{{12}})"

_ALIAS, _MODEL_ID = re.compile(_ALIAS_PATTERN), re.compile(MODEL_ID_PATTERN)


class ModelId(NamedTuple):
    """The parts of ``ft:<model>:<tenant>:<suffix>:<id>``, or of an alias, ``ft:<model>:<tenant>:<suffix>``."""

    model: str
    tenant: str
    suffix: str
    id: str
    """Empty in an alias."""

    def __str__(self) -> str:
        return f"{self.alias}:{self.id}" if self.id else self.alias

    @property
    def alias(self) -> str:
        """The name under which the current version of the suffix answers."""
        return f"ft:{self.model}:{self.tenant}:{self.suffix}"


def parse_model_id(text: str) -> ModelId:
    """Take a plug-in model's id apart.

    Raises:
        ArtifactError: it is not exactly ``ft:<model>:<tenant>:<suffix>:<12 hexadecimal digits>``.
    """
    match = _MODEL_ID.fullmatch(text)
    if match is None:
        raise ArtifactError(
            f"model id is {text[:200]!r}; it must be ft:<model>:<tenant>:<suffix>:<id>, each of the first three "
            f"{NAME_PATTERN} and the id 12 hexadecimal digits"
        )
    return ModelId(*match.groups())


def parse_model_name(text: str) -> ModelId:
    """Take the name of a plug-in model apart, be it an id or an alias.

    Raises:
        ArtifactError: it is neither ``ft:<model>:<tenant>:<suffix>:<12 hexadecimal digits>`` nor
            ``ft:<model>:<tenant>:<suffix>``.
    """
    match = _ALIAS.fullmatch(text)
    return ModelId(*match.groups(), id="") if match else parse_model_id(text)
