"""Requests by the thousand, made from a service's OpenAPI document: right and wrong ones, many about what exists."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
TRACES = (b"Traceback", b'File "', b"site-packages", b"ray::")
"""What no answer holds."""
TAGS = ("Admin", "Chat", "Completions", "Files", "Fine-tuning", "Models", "Offsite", "Webhooks")
EXAMPLES = 26
"""Requests of each operation that are right, and as many that are wrong."""
# Those that end what they name would leave nothing for the others to meet.
ENDING = ("DELETE",)


@dataclass
class Fuzzer:
    """Who asks, what exists, and what was answered.

    Args:
        root: the service's address, without `/v1`.
        known: values of things that exist, by the names of parameters and fields.
    """

    root: str
    key: str
    known: dict[str, str]
    session: requests.Session
    answered: Counter[int] = field(default_factory=Counter)

    def operations(self, tag: str) -> Sequence[Any]:
        document = schemathesis.openapi.from_url(f"{self.root}/openapi.json")
        found = [item.ok() for item in document.get_all_operations()]
        # Of `/healthz` there is one request only, which others make.
        assert {name for operation in found for name in operation.tags} == {*TAGS, "Health"}
        return [operation for operation in found if tag in operation.tags]

    def ask(self, tag: str) -> None:
        """Ask every operation of a tag; an answer that does not conform fails, with the request in its message."""
        for operation in self.operations(tag):
            for mode in GenerationMode:
                self._send(operation.as_strategy(generation_mode=mode))

    def _send(self, cases: Any) -> None:
        @settings(
            max_examples=EXAMPLES,
            derandomize=True,
            database=None,
            deadline=None,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=cases)
        def send(case: schemathesis.Case) -> None:
            _name_what_exists(case, self.known)
            response = case.call(session=self.session, headers={"authorization": f"Bearer {self.key}"})
            self.answered[response.status_code] += 1
            case.validate_response(response, checks=CHECKS)
            assert not [trace for trace in TRACES if trace in response.content], response.content

        send()


def _name_what_exists(case: schemathesis.Case, known: dict[str, str]) -> None:
    """Have every second id of a path, and every third of a body, name something that is there."""
    if case.method not in ENDING:
        for name, value in (case.path_parameters or {}).items():
            if name in known and zlib.crc32(repr(value).encode()) % 2:
                case.path_parameters[name] = known[name]
    if isinstance(case.body, dict) and zlib.crc32(repr(case.body).encode()) % 3 == 0:
        for name in case.body.keys() & known.keys():
            case.body[name] = known[name]
            if "messages" in case.body or "prompt" in case.body:
                # Text that nobody reads.
                case.body["max_tokens"] = 2
