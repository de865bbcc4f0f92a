"""What an IAM policy allows, by the rules of AWS's own documentation: an evaluator of its own, for the tests.

Identity-based policies with Allow and Deny, lists or single values, and the condition operator StringLike."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

_OPERATIONS = {
    "HEAD": "s3:GetObject",
    "GET": "s3:GetObject",
    "PUT": "s3:PutObject",
    "DELETE": "s3:DeleteObject",
}


def allowed(policy: Mapping[str, Any], action: str, resource: str, context: Mapping[str, str] | None = None) -> bool:
    """Whether a request is allowed: some statement allows it, and none denies it."""
    assert policy["Version"] == "2012-10-17"
    effects = [
        statement["Effect"]
        for statement in _listed(policy["Statement"])
        if _matches(statement["Action"], action, ignore_case=True)
        and _matches(statement["Resource"], resource)
        and _holds(statement.get("Condition", {}), context or {})
    ]
    return "Allow" in effects and "Deny" not in effects


def asked_by(method: str, target: str, posted: bytes = b"") -> list[tuple[str, str, dict[str, str]]]:
    """Actions, resources and contexts of a request to S3 with the bucket in its path."""
    parts = urlsplit(target)
    bucket, _, key = unquote(parts.path).strip("/").partition("/")
    arn, query = f"arn:aws:s3:::{bucket}", parse_qs(parts.query, keep_blank_values=True)
    if not key and method == "POST":
        assert "delete" in query, target
        keys = re.findall(r"<Key>([^<]*)</Key>", posted.decode())
        assert keys
        return [("s3:DeleteObject", f"{arn}/{key}", {}) for key in keys]
    if not key:
        assert method in ("GET", "HEAD"), f"{method} {target}"
        context = {f"s3:{name}": query[name][0] for name in ("prefix", "delimiter") if name in query}
        return [("s3:ListBucket", arn, context)]
    action = _OPERATIONS["PUT" if method == "POST" else method]
    if method == "DELETE" and "uploadId" in query:
        action = "s3:AbortMultipartUpload"
    return [(action, f"{arn}/{key}", {})]


def _holds(conditions: Mapping[str, Mapping[str, Any]], context: Mapping[str, str]) -> bool:
    for operator, keys in conditions.items():
        assert operator == "StringLike", f"the evaluator does not know {operator}"
        for key, patterns in keys.items():
            # A key that the request does not have fails a condition without IfExists.
            if key not in context or not _matches(patterns, context[key]):
                return False
    return True


def _matches(patterns: Any, value: str, ignore_case: bool = False) -> bool:
    flags = re.DOTALL | (re.IGNORECASE if ignore_case else 0)
    return any(
        re.fullmatch("".join({"*": ".*", "?": "."}.get(letter, re.escape(letter)) for letter in pattern), value, flags)
        for pattern in _listed(patterns)
    )


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
