"""Malformed uploads and bodies, written by hand: what is sent, and what the answer says of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tests.service.raw_requests import CUT, Piece

MOST = 100_000
LINE = b'{"prompt": "2 + 2 =", "completion": " 4"}\n'
CRLF = b"\r\n"


def part(disposition: bytes, data: bytes = b"x", *headers: bytes) -> bytes:
    lines = [b"--B", b"Content-Disposition: " + disposition, *headers, b"", data]
    return CRLF.join(lines) + CRLF


def form(*parts: bytes) -> bytes:
    return b"".join(parts) + b"--B--\r\n"


PURPOSE = part(b'form-data; name="purpose"', b"fine-tune")
FILE = part(b'form-data; name="file"; filename="a.jsonl"', LINE)
GOOD = form(PURPOSE, FILE)
MULTIPART = "multipart/form-data; boundary=B"


@dataclass(frozen=True)
class Bad:
    """A body, the status of its answer, and words of it."""

    pieces: tuple[Piece, ...]
    words: str
    status: int = 400
    content_type: str | bytes | None = MULTIPART
    headers: list[tuple[str | bytes, str | bytes]] = field(default_factory=list)
    method: str = "POST"
    path: str = "/v1/files"
    query: bytes = b""


def body(*parts: bytes, words: str, status: int = 400, **more: Any) -> Bad:
    return Bad((form(*parts),), words, status, **more)


def raw(content: bytes, words: str, status: int = 400, **more: Any) -> Bad:
    return Bad((content,), words, status, **more)


def typed(content_type: str | bytes | None, words: str, status: int = 400) -> Bad:
    return Bad((GOOD,), words, status, content_type)


def named(*pairs: tuple[str | bytes, str | bytes], words: str, status: int = 400) -> Bad:
    return Bad((GOOD,), words, status, headers=list(pairs))


def file_part(parameters: bytes, data: bytes = LINE) -> bytes:
    return part(b'form-data; name="file"' + parameters, data)


def said(content: bytes, words: str = "", status: int = 400) -> Bad:
    return Bad((content,), words, status, "application/json", path="/v1/completions")


CASES = {
    # The content-type.
    "no content-type": typed(None, "multipart/form-data", 415),
    "JSON": Bad((b'{"purpose": "fine-tune"}',), "multipart/form-data", 415, "application/json"),
    "a form without files": Bad((b"purpose=fine-tune",), "form-data", 415, "application/x-www-form-urlencoded"),
    "another multipart": typed("multipart/mixed; boundary=B", "multipart/form-data", 415),
    "no boundary": typed("multipart/form-data", "boundary"),
    "an empty boundary": typed("multipart/form-data; boundary=", "boundary"),
    "a boundary of 71": typed(f"multipart/form-data; boundary={'b' * 71}", "boundary"),
    "a boundary of 10,000": typed(f"multipart/form-data; boundary={'b' * 10_000}", "boundary"),
    "a boundary with a line's end": typed(b'multipart/form-data; boundary="B\r\nX"', "boundary"),
    "a boundary that is not ASCII": typed("multipart/form-data; boundary=\xfcber", "boundary"),
    "a boundary that ends in a blank": typed('multipart/form-data; boundary="B "', "boundary"),
    "another boundary": typed("multipart/form-data; boundary=C", "malformed"),
    "a content-type of noise": typed(b'\xff\xfe;;;="\\', "multipart/form-data", 415),
    # The frame.
    "nothing": raw(b"", "cut off"),
    "no boundary line": raw(LINE, "malformed"),
    "text before it": raw(b"preamble\r\n" + GOOD, "malformed"),
    "line feeds alone": raw(GOOD.replace(CRLF, b"\n"), "malformed"),
    "no last boundary": raw(GOOD[:-7], "cut off"),
    "half a last boundary": raw(GOOD[:-3], "cut off"),
    "the last boundary at once": raw(b"--B--\r\n", "'file'"),
    "cut in a header": raw(GOOD[:20], "cut off"),
    "cut in the data": raw(GOOD[: len(PURPOSE) + 90], "cut off"),
    "a boundary line with noise": raw(GOOD.replace(b"--B\r\n", b"--Bnoise\r\n"), "malformed"),
    "another boundary than said": raw(b"--C\r\n\r\n" + GOOD, "malformed"),
    "a MB of line ends before it": raw(CRLF * 25_000 + b"no", "cut off"),
    "a MB of blanks after a boundary": raw(FILE.rstrip(CRLF) + b"\r\n--B" + b" " * 90_000, "beside its file"),
    "a MB after the last boundary": raw(GOOD + b"x" * 90_000, "beside its file"),
    "a hundred parts": body(*[PURPOSE.replace(b"purpose", b"p%d" % n) for n in range(100)], words="more than 8 parts"),
    "a hundred thousand empty parts": raw(b"--B\r\n\r\n" * 100_000, "larger", 413),
    "a thousand empty parts": raw(b"--B\r\n\r\n" * 1000, "content-disposition"),
    # The parts' headers.
    "a part without headers": raw(b"--B\r\n\r\nx\r\n--B--\r\n", "content-disposition"),
    "no content-disposition": body(b"--B\r\nContent-Type: text/plain\r\n\r\nx\r\n", words="content-disposition"),
    "another disposition": body(PURPOSE, part(b'attachment; name="file"; filename="a"'), words="content-disposition"),
    "no name": body(PURPOSE, part(b'form-data; filename="a"'), words="content-disposition"),
    "a name in RFC 5987": body(PURPOSE, part(b"form-data; name*=UTF-8''file"), words="content-disposition"),
    "a name that is not UTF-8": body(part(b'form-data; name="\xff\xfe"'), words="not UTF-8"),
    "a header twice": body(
        part(b'form-data; name="purpose"', b"fine-tune", b'Content-Disposition: form-data; name="file"'), words="twice"
    ),
    "a header without name": raw(b"--B\r\n: x\r\n\r\nx\r\n--B--\r\n", "malformed"),
    "a header without colon": raw(b"--B\r\nContent-Disposition\r\n\r\nx\r\n--B--\r\n", "malformed"),
    "a header's name with a blank": raw(b"--B\r\nContent Disposition: x\r\n\r\nx\r\n--B--\r\n", "malformed"),
    "a folded header": raw(
        b'--B\r\nContent-Disposition: form-data;\r\n name="file"\r\n\r\nx\r\n--B--\r\n', "malformed"
    ),
    "a header with a bare carriage return": raw(b"--B\r\nA: b\rC: d\r\n\r\nx\r\n--B--\r\n", "malformed"),
    "a header of 80,000 bytes": body(part(b'form-data; name="' + b"n" * 80_000 + b'"'), words="malformed"),
    "a thousand headers": body(
        part(b'form-data; name="purpose"', b"x", *[b"X-%d: y" % n for n in range(1000)]), words="malformed"
    ),
    "a header with NUL": body(part(b'form-data; name="pur\x00pose"'), FILE, words="Unrecognized request argument"),
    "base64": body(
        PURPOSE,
        part(b'form-data; name="file"; filename="a"', b"eA==", b"Content-Transfer-Encoding: base64"),
        words="encoded",
    ),
    "quoted-printable": body(
        part(b'form-data; name="purpose"', b"fine=2Dtune", b"Content-Transfer-Encoding: quoted-printable"),
        words="encoded",
    ),
    # The fields.
    "no file": body(PURPOSE, words="'file'"),
    "no purpose": body(FILE, words="'purpose'"),
    "two files": body(PURPOSE, FILE, FILE, words="twice"),
    "two purposes": body(PURPOSE, PURPOSE, FILE, words="twice"),
    "a file as text": body(PURPOSE, file_part(b""), words="no filename"),
    "an empty filename": body(PURPOSE, file_part(b'; filename=""'), words="no filename"),
    "a filename in RFC 5987": body(PURPOSE, file_part(b"; filename*=UTF-8''a.jsonl"), words="no filename"),
    "a filename of 513 bytes": body(PURPOSE, file_part(b'; filename="' + b"x" * 513 + b'"'), words="longer than 512"),
    "a filename that is not UTF-8": body(PURPOSE, file_part(b'; filename="\xff.jsonl"'), words="not UTF-8"),
    "a filename with surrogates": body(PURPOSE, file_part(b'; filename="\xed\xa0\x80"'), words="not UTF-8"),
    "a filename with NUL": body(PURPOSE, file_part(b'; filename="a\x00b"'), words="NUL"),
    "an empty file": body(PURPOSE, file_part(b'; filename="a"', b""), words="empty"),
    "a file too large": body(PURPOSE, file_part(b'; filename="a"', b"x" * (MOST + 1)), words="larger", status=413),
    "a body too large": raw(b"x" * 300_000, "larger", 413),
    "purpose as a file": body(part(b'form-data; name="purpose"; filename="p"', b"fine-tune"), FILE, words="is a file"),
    "an empty purpose": body(part(b'form-data; name="purpose"', b""), FILE, words="purpose"),
    "an unknown purpose": body(part(b'form-data; name="purpose"', b"tuning"), FILE, words="fine-tune"),
    "a purpose of another service": body(part(b'form-data; name="purpose"', b"batch"), FILE, words="fine-tune"),
    "a purpose of jobs": body(part(b'form-data; name="purpose"', b"fine-tune-results"), FILE, words="fine-tune"),
    "a purpose of 5,000 bytes": body(part(b'form-data; name="purpose"', b"p" * 5000), FILE, words="longer than 1024"),
    "a purpose that is not UTF-8": body(part(b'form-data; name="purpose"', b"\xff"), FILE, words="not UTF-8"),
    "a purpose with a line's end": body(part(b'form-data; name="purpose"', b"fine-tune\r\n"), FILE, words="purpose"),
    "wide letters": body(part(b'form-data; name="purpose"', "ｆｉｎｅ-ｔｕｎｅ".encode()), FILE, words="fine-tune"),
    "an unknown field": body(PURPOSE, FILE, part(b'form-data; name="model"'), words="Unrecognized request argument"),
    "a field of control characters": body(
        PURPOSE, FILE, part('form-data; name="\u202e\x1b[31m"'.encode()), words="Unrecognized request argument"
    ),
    "an inner field alone": body(PURPOSE, FILE, part(b'form-data; name="file[x]"'), words="file"),
    "expiry in words": body(
        PURPOSE,
        FILE,
        part(b'form-data; name="expires_after[anchor]"', b"created_at"),
        part(b'form-data; name="expires_after[seconds]"', b"an hour"),
        words="expires_after",
    ),
    "expiry below zero": body(
        PURPOSE,
        FILE,
        part(b'form-data; name="expires_after[anchor]"', b"created_at"),
        part(b'form-data; name="expires_after[seconds]"', b"-3600"),
        words="expires_after",
    ),
    "expiry beyond all numbers": body(
        PURPOSE,
        FILE,
        part(b'form-data; name="expires_after[anchor]"', b"created_at"),
        part(b'form-data; name="expires_after[seconds]"', b"9" * 1000),
        words="expires_after",
    ),
    "expiry in other digits": body(
        PURPOSE,
        FILE,
        part(b'form-data; name="expires_after[anchor]"', b"created_at"),
        part(b'form-data; name="expires_after[seconds]"', "٣٦٠٠".encode()),
        words="expires_after",
    ),
    "expiry nested too deeply": body(
        PURPOSE, FILE, part(b'form-data; name="expires_after[a][b]"'), words="Unrecognized request argument"
    ),
    # The request around it.
    "gone at once": Bad((CUT,), "cut off"),
    "gone in the middle": Bad((GOOD[:-10], CUT), "cut off"),
    "a length that is too small": named(("content-length", "10"), words="10 bytes"),
    "a length that is too large": named(("content-length", "5000"), words="5000 bytes"),
    "a length below zero": named(("content-length", "-1"), words="content-length"),
    "a length in letters": named(("content-length", "ten"), words="content-length"),
    "a length with a sign": named(("content-length", "+10"), words="content-length"),
    "a length in other digits": named(("content-length", "\xb2\xb3"), words="content-length"),
    "a length of 5,000 digits": named(("content-length", "9" * 5000), words="content-length"),
    "two lengths": named(("content-length", "10"), ("content-length", "11"), words="content-length"),
    "a length beyond the limit": named(("content-length", "999999999999"), words="larger", status=413),
    "packed with gzip": named(("content-encoding", "gzip"), words="Compressed", status=415),
    "packed twice": named(("content-encoding", "gzip, br"), words="Compressed", status=415),
    "a header of 100,000 bytes": named(("x-noise", "n" * 100_000), words="headers", status=431),
    "a thousand headers around it": named(*[(f"x-{n}", "y") for n in range(1000)], words="headers", status=431),
    "a query of 100,000 bytes": Bad((GOOD,), "query", 431, query=b"a=" + b"x" * 100_000),
    "an idempotency key of noise": named(("idempotency-key", "a b\xff"), words="Idempotency-Key"),
    # Bodies in JSON, of whatever route.
    "JSON of 10,000 lists": said(b"[" * 10_000 + b"]" * 10_000),
    "JSON of 10,000 objects": said(b'{"model":' * 10_000 + b"1" + b"}" * 10_000),
    "JSON of 10,000 lists in a field": said(b'{"model": "tiny", "prompt": ' + b"[" * 10_000 + b"]" * 10_000 + b"}"),
    "JSON of 5,000 digits": said(b'{"model": "tiny", "prompt": "a", "seed": ' + b"9" * 5000 + b"}"),
    "JSON of 300 digits": said(b'{"model": "tiny", "prompt": "a", "seed": ' + b"9" * 300 + b"}"),
    "JSON of NaN": said(b'{"model": "tiny", "prompt": "a", "temperature": NaN}'),
    "JSON of 1e999": said(b'{"model": "tiny", "prompt": "a", "temperature": 1e999}'),
    "JSON of half a surrogate pair": said(rb'{"model": "tiny", "prompt": "\ud800"}'),
    "JSON of half a pair in a model": said(rb'{"model": "\udfff", "prompt": "a"}'),
    "JSON of half a pair in a key": said(rb'{"model": "tiny", "prompt": "a", "\ud800": 1}'),
    "JSON of a key of 1 MB": said(b'{"model": "tiny", "prompt": "a", "' + b"k" * 2**20 + b'": 1}'),
    "JSON of 10,000 unknown keys": said(b"{" + b",".join(b'"k%d": 1' % n for n in range(10_000)) + b"}"),
    "JSON of half a pair, deeply": said(rb'{"model": "tiny", "prompt": ["a", "\ud83d"]}'),
    "JSON that is not UTF-8": said(b'{"model": "\xff\xfe"}'),
    "JSON of NULs": said(b"\x00" * 1000),
    "JSON beyond the limit": said(b'{"model": "' + b"m" * 5 * 2**20 + b'"}', "larger", 413),
    "PUT": Bad((GOOD,), "Not allowed", 405, method="PUT"),
    "an upload to a file": Bad((GOOD,), "Not allowed", 405, path="/v1/files/file-0"),
    "an upload below the files": Bad((GOOD,), "Unknown request URL", 404, path="/v1/files/../../etc/passwd"),
}
