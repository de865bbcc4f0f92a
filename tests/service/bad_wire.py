"""Requests that are wrong as HTTP, as JSON, as names or as training data, made by hand."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from tests.http.tiny_service import BASE
from tests.service.raw_requests import Piece
from tests.service.sockets import HANG_UP

LINE = b'{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}\n'
KEY = b"{key}"
"""Stands for the header with mallory's key."""
JSON_HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n" + KEY
CHUNKED = JSON_HEAD + b"transfer-encoding: chunked\r\n\r\n"
SMALL = json.dumps({"model": BASE, "prompt": "a", "max_tokens": 1}).encode()
CHUNK = b"%x\r\n%s\r\n" % (len(SMALL), SMALL)


@dataclass(frozen=True)
class Lie:
    """Bytes, and how they may be answered; 0 stands for a connection that ends without an answer."""

    pieces: tuple[Piece, ...]
    statuses: tuple[int, ...] = (400,)


def lie(*pieces: Piece, to: tuple[int, ...] = (400,)) -> Lie:
    return Lie(pieces, to)


def get(*headers: bytes, path: bytes = b"/v1/models", to: tuple[int, ...] = (200,)) -> Lie:
    lines = b"".join(header + b"\r\n" for header in headers)
    return Lie((b"GET " + path + b" HTTP/1.1\r\nhost: a\r\n" + KEY + lines + b"\r\n",), to)


LIES = {
    # Lengths.
    "both lengths": lie(JSON_HEAD + b"content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n"),
    "both lengths, the other way": lie(JSON_HEAD + b"transfer-encoding: chunked\r\ncontent-length: 5\r\n\r\n0\r\n\r\n"),
    "two lengths": lie(JSON_HEAD + b"content-length: 5\r\ncontent-length: 6\r\n\r\n123456"),
    "a list of lengths": lie(JSON_HEAD + b"content-length: 5, 5\r\n\r\n12345"),
    "a negative length": lie(JSON_HEAD + b"content-length: -1\r\n\r\n"),
    "a length in hexadecimal": lie(JSON_HEAD + b"content-length: 0x10\r\n\r\n" + SMALL),
    "a length of 2**64": lie(JSON_HEAD + b"content-length: 18446744073709551616\r\n\r\n" + SMALL),
    "a length of 2**63": lie(JSON_HEAD + b"content-length: 9223372036854775808\r\n\r\n" + SMALL, to=(400, 413)),
    "a length of 20 GB": lie(JSON_HEAD + b"content-length: 20000000000\r\n\r\n" + SMALL, to=(413,)),
    "less than stated": lie(JSON_HEAD + b"content-length: 500\r\n\r\n" + SMALL, to=(408,)),
    "less than stated, and gone": lie(JSON_HEAD + b"content-length: 500\r\n\r\n" + SMALL, HANG_UP, to=(0,)),
    "more than stated": lie(JSON_HEAD + b"content-length: 5\r\n\r\n" + SMALL),
    "an unknown encoding": lie(JSON_HEAD + b"transfer-encoding: gzip\r\n\r\n" + SMALL),
    "chunked not last": lie(JSON_HEAD + b"transfer-encoding: chunked, gzip\r\n\r\n0\r\n\r\n"),
    "chunked with a tail": lie(JSON_HEAD + b"transfer-encoding: chunkedx\r\n\r\n0\r\n\r\n"),
    "a chunk without size": lie(CHUNKED + b"\r\nabc\r\n0\r\n\r\n"),
    "a chunk of size -1": lie(CHUNKED + b"-1\r\nabc\r\n0\r\n\r\n"),
    "a chunk of size 0x5": lie(CHUNKED + b"0x5\r\nabcde\r\n0\r\n\r\n"),
    "a chunk of 2**68": lie(CHUNKED + b"FFFFFFFFFFFFFFFFF\r\nabc\r\n0\r\n\r\n"),
    "a chunk longer than its size": lie(CHUNKED + b"3\r\nabcdef\r\n0\r\n\r\n"),
    "a chunk shorter than its size": lie(CHUNKED + b"ff\r\nabc", to=(408,)),
    "no last chunk": lie(CHUNKED + CHUNK, to=(408,)),
    "no last chunk, and gone": lie(CHUNKED + CHUNK, HANG_UP, to=(0,)),
    "a trailer without end": lie(CHUNKED + CHUNK + b"0\r\nx-a: ", *[b"y" * 65536] * 100, to=(0, 400, 431)),
    # Heads.
    "nothing": lie(HANG_UP, to=(0,)),
    "half a head": lie(b"GET / HTTP/1.1\r\nhost", HANG_UP, to=(0,)),
    "noise": lie(bytes(range(256)) * 40),
    "a greeting of TLS": lie(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 500),
    "HTTP/2": lie(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", to=(400, 404, 405)),
    "HTTP/9.9": lie(b"GET /v1/models HTTP/9.9\r\nhost: a\r\n\r\n"),
    "no version": lie(b"GET /v1/models\r\n\r\n", HANG_UP, to=(0, 400, 401)),
    "a method of noise": lie(b"G\x00T / HTTP/1.1\r\nhost: a\r\n\r\n"),
    "an unknown method": lie(b"FROB /v1/models HTTP/1.1\r\nhost: a\r\n\r\n"),
    "CONNECT": lie(b"CONNECT evil:443 HTTP/1.1\r\nhost: a\r\n\r\n", to=(400, 404, 405)),
    "TRACE": lie(b"TRACE /v1/models HTTP/1.1\r\nhost: a\r\n\r\n", to=(405,)),
    "a path that is not ASCII": lie(b"GET /v1/m\xff HTTP/1.1\r\nhost: a\r\n\r\n", to=(400, 404)),
    "a path with NUL": lie(b"GET /v1/\x00 HTTP/1.1\r\nhost: a\r\n\r\n"),
    "a path without end": lie(b"GET /", *[b"a" * 65536] * 100, to=(0, 400, 431)),
    "a header without end": lie(b"GET / HTTP/1.1\r\nx-a: ", *[b"a" * 65536] * 100, to=(0, 431)),
    "headers without end": lie(b"GET / HTTP/1.1\r\n", *[b"x-a: y\r\n" * 8192] * 100, to=(0, 431)),
    "a header of 50,000 bytes": get(b"x-a: " + b"a" * 50_000, to=(431,)),
    "a cookie of 40,000 bytes": get(b"cookie: a=" + b"a" * 40_000, to=(431,)),
    "500 headers": get(*[b"x-%d: y" % n for n in range(500)], to=(431,)),
    "a query of 40,000 bytes": get(path=b"/v1/files?after=" + b"a" * 40_000, to=(431,)),
    "a header's name with a blank": get(b"x a: b", to=(400,)),
    "a header without name": get(b": b", to=(400,)),
    "a header with NUL": get(b"x-a: \x00", to=(400,)),
    "a header with a bare carriage return": get(b"x-a: a\rb: c", to=(400,)),
    "a folded header": get(b"x-a: a", b" b", to=(200, 400)),
    "a header of high bytes": get(b"x-a: \x80\xff\xfe"),
    "a WebSocket": get(
        b"connection: upgrade",
        b"upgrade: websocket",
        b"sec-websocket-version: 13",
        b"sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==",
        to=(403,),
    ),
    "HTTP/2 by upgrade": get(b"connection: upgrade", b"upgrade: h2c", b"http2-settings: AAMAAABkAAQAAP__"),
    "an unknown expectation": get(b"expect: the unexpected"),
    # Headers that somebody reads.
    "a request id of high bytes": get(b"x-request-id: \xff\xfe"),
    "a request id with a terminal's colours": get(b"x-request-id: \x1b[31m", to=(200, 400)),
    "a request id of 20,000 letters": get(b"x-request-id: " + b"a" * 20_000),
    "two request ids": get(b"x-request-id: a", b"x-request-id: b"),
    "a time limit of no time": get(b"x-request-timeout-seconds: 0.000001"),
    "a time limit of nan": get(b"x-request-timeout-seconds: nan"),
    "a time limit of high bytes": get(b"x-request-timeout-seconds: \xff"),
    "a session of high bytes": get(b"x-session-id: \xff\xfe"),
    "a replica's model of high bytes": get(b"serve_multiplexed_model_id: \xff"),
    "no client watched": get(b"x-request-disconnect-disabled: \xff"),
    "a span of high bytes": get(b"traceparent: \xff\xff"),
    "two keys": get(b"authorization: Bearer sk-ot-other", to=(200, 401)),
    "a key of high bytes": lie(b"GET /v1/files HTTP/1.1\r\nhost: a\r\nauthorization: Bearer \xff\r\n\r\n", to=(401,)),
    "a key of 20,000 letters": lie(
        b"GET /v1/files HTTP/1.1\r\nhost: a\r\nauthorization: Bearer " + b"a" * 20_000 + b"\r\n\r\n", to=(401,)
    ),
    "another scheme": lie(b"GET /v1/files HTTP/1.1\r\nhost: a\r\nauthorization: Basic YTpi\r\n\r\n", to=(401,)),
    "a forwarded prefix": get(b"x-forwarded-prefix: /../..", b"x-forwarded-host: evil"),
}

_NOT_FOUND = (400, 401, 404, 405)
TARGETS = [
    *[
        f"{verb} {place}"
        for place in (
            "/v1/files/../../etc/passwd",
            "/v1/files/%2e%2e%2f%2e%2e%2fetc%2fpasswd/content",
            "/v1/files/..%5c..%5cetc/content",
            "/v1/files/%00/content",
            "/v1/files/%ff%fe/content",
            "/v1/files/%ed%a0%80/content",
            "/v1/files/file-0%0d%0aset-cookie:%20a=b",
            "/v1/files/" + "a" * 20_000,
            "/v1/fine_tuning/jobs/..%2f..%2ffiles",
            "/v1/models/../../files/x",
            "/v1/models/ft%3Atiny%3Aben%3A..%2f..%2f",
            "/v1/models/%e2%80%aetiny",
            "/v1/offsite/bundles/..",
            "/v1/offsite/bundles/tiny/files/../../../1/manifest.json",
            "/v1/offsite/bundles/tiny/files/..%2f..%2f..%2f..%2fservice.db",
            "/v1/offsite/bundles/tiny/files/%2fetc%2fpasswd",
            "/v1/offsite/bundles/tiny/files/manifest.json%00.txt",
            "/v1/offsite/adapters/..%2f..%2ffiles/files/manifest.json",
            "/v1/offsite/adapters/adp_0/files/..%2f..%2fmanifest.json",
            "/docs/..%2f..%2fserve.yaml",
            "/docs/../../serve.yaml",
            "//etc/passwd",
        )
        for verb in ("GET", "PUT", "DELETE")
    ],
    "GET /v1/files?after=../../etc/passwd",
    "GET /v1/files?after=%ff%fe",
    "GET /v1/files?after=%00",
    "GET /v1/files?limit=" + "9" * 1000,
    "GET /v1/files?limit=1e3",
    "GET /v1/files?limit=NaN",
    "GET /v1/fine_tuning/jobs?limit=-1",
    "GET /v1/files?order=%27%20OR%201=1--",
]
"""Requests for what lies elsewhere."""


def _field(name: str, value: bytes) -> bytes:
    return b'{"model": "tiny", "%s": %s}' % (name.encode(), value)


BODIES = {
    "nothing": b"",
    "10,000 lists": b"[" * 10_000 + b"]" * 10_000,
    "10,000 objects": b'{"model":' * 10_000 + b"1" + b"}" * 10_000,
    "10,000 lists in a field": _field("metadata", b"[" * 10_000 + b"]" * 10_000),
    "10,000 open lists": b"[" * 10_000,
    "100,000 items": b"[" + b"1," * 100_000 + b"1]",
    "100,000 items in a field": _field("suffix", b"[" + b"1," * 100_000 + b"1]"),
    "NaN": _field("seed", b"NaN"),
    "Infinity": _field("seed", b"-Infinity"),
    "1e999": _field("seed", b"1e999"),
    "2**64": _field("seed", b"18446744073709551616"),
    "5,000 digits": _field("seed", b"9" * 5000),
    "a key twice": b'{"model": "a", "model": "b"}',
    "half a pair": rb'{"model": "\ud800"}',
    "half a pair as a key": rb'{"model": "tiny", "\ud800": 1}',
    "NUL": rb'{"model": "\u0000"}',
    "NULs": b"\x00" * 1000,
    "UTF-16": '{"model": 5}'.encode("utf-16"),
    "not UTF-8": b'{"model": "\xff\xfe"}',
    "null": b"null",
    "a list": b"[]",
    "text": b'"tiny"',
    "two objects": b"{}{}",
    "a cut object": b'{"model": "ti',
    "a key of 100,000 letters": b'{"' + b"k" * 100_000 + b'": 1}',
    "prototypes": b'{"__proto__": {"a": 1}, "constructor": 1, "__class__": "os.system"}',
}
ENDPOINTS = ("completions", "chat/completions", "fine_tuning/jobs", "webhook_endpoints", "offsite/adapters")
CONTENT_TYPES = ("text/plain", "application/xml", "multipart/form-data; boundary=B", "application/json; charset=utf-16")

SUFFIXES = [
    "",
    "..",
    "../../x",
    "a/b",
    "a\\b",
    "a:b",
    "a b",
    "-a",
    "x" * 65,
    "a\n",
    "\u0000",
    "%2e%2e",
    "é",  # one letter
    "e\u0301",  # the same, of two
    "ѕupport",  # the first letter is Cyrillic
    "supp\u00adort",
    "a\u200bb",
    "a\u200db",
    "a\u202eb",
    "a\u2066b\u2069",
    "a\ufeff",
    "ｓｕｐｐｏｒｔ",
    "\u212aelvin",
    "ﬁle",
    "①",
    "a\ufe0f",
    "😀",
    "\ud800",
    "𝐚",
    "ا",
]
"""Names for models that are no plain names, or look like others."""


def _line(**changes: Any) -> bytes:
    return json.dumps({**json.loads(LINE), **changes}).encode() + b"\n"


def _said(*messages: Any) -> bytes:
    return _line(messages=list(messages))


_USER, _MODEL = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}
JSONL = {
    "cut": LINE[:40] + b"\n",
    "no JSON": b"hello\n",
    "bytes": bytes(range(256)) + b"\n",
    "UTF-16": LINE.decode().encode("utf-16"),
    "NULs": b"\x00" * 100 + b"\n",
    "gzip": b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03" + b"\xcb\x48\xcd\xc9\xc9\x07\x00" + b"\n",
    "a pickle": b"\x80\x04\x95\x00cos\x94\x8c\x06system\x94.\n",
    "10,000 lists": b"[" * 10_000 + b"]" * 10_000 + b"\n",
    "10,000 objects": b'{"messages":' * 3000 + b"1" + b"}" * 3000 + b"\n",
    "10,000 lists in a field": b'{"messages": ' + b"[" * 10_000 + b"]" * 10_000 + b"}\n",
    "a key twice": b'{"messages": [], "messages": []}\n',
    "NaN": LINE.replace(b'"ho"}', b'"ho", "weight": NaN}'),
    "Infinity": LINE.replace(b'"ho"}', b'"ho", "weight": Infinity}'),
    "1e999": LINE.replace(b'"ho"}', b'"ho", "weight": 1e999}'),
    "5,000 digits": LINE.replace(b'"ho"}', b'"ho", "weight": ' + b"9" * 5000 + b"}"),
    "half a pair": LINE.replace(b'"ho"', rb'"\ud800"'),
    "a list": b"[]\n",
    "a number": b"9223372036854775808\n",
    "null": b"null\n",
    "an empty object": b"{}\n",
    "no messages": _said(),
    "messages of text": _line(messages="hi"),
    "messages of null": _said(None, None),
    "no answer": _said(_USER),
    "an unknown role": _said({"role": "\u202eresu", "content": "hi"}, _MODEL),
    "a role of Cyrillic": _said({"role": "usеr", "content": "hi"}, _MODEL),
    "a content of a number": _said(_USER, {"role": "assistant", "content": 7}),
    "a content of null": _said(_USER, {"role": "assistant", "content": None}),
    "a line of 80,000 brackets": b"{" * 80_000 + b"\n",
}
"""A line of training data that is none; it comes after twelve good ones."""


def hand_made() -> int:
    """How many things stand here."""
    bodies = len(BODIES) * len(ENDPOINTS) + len(CONTENT_TYPES)
    return len(LIES) + len(TARGETS) + bodies + len(SUFFIXES) + len(JSONL)
