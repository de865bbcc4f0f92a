"""Adapters up: announced, sent in pieces that a cut costs nothing, and waited for until there is a verdict.

What an adapter must be is left to ot_ray.artifacts and the service."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

from ot_ray.artifacts.folder import check_files, describe_files
from ot_ray.artifacts.manifest import MANIFEST, AdapterManifest, FileEntry
from ot_ray.artifacts.offsite import checked_suffix
from ot_ray.artifacts.strict_json import read_json
from ot_ray.client.http import Answer, Http, quoted
from ot_ray.errors import AdapterRejectedError, ArtifactError, ConfigError, NotFoundError, ServiceError
from ot_ray.progress import Progress

_PLACE = "/v1/offsite/adapters"
_PIECE = 8 * 2**20  # bytes; a cut costs no more
_MB = 1_000_000
_LONGEST_PAUSE_S = 5.0
_MOST_REFUSALS = 6  # in a row, of pieces at the place that the service itself named


def send_adapter(http: Http, folder: Path, suffix: str) -> str:
    """Send the files of an adapter and complete the upload; its id. Errors are those of `Client.upload`."""
    try:
        checked_suffix(suffix)
    except ValueError as error:
        raise ConfigError(f"suffix is {suffix!r}: {error}") from None
    if not (folder / MANIFEST).is_file():
        raise NotFoundError(f"{folder} holds no adapter: {MANIFEST} is missing; tune one, or write one with PEFT")
    manifest = read_json(AdapterManifest, folder / MANIFEST)
    problems = check_files(folder, manifest.files, [MANIFEST])
    if problems:
        raise ArtifactError(f"{folder} is no whole adapter: " + "; ".join(problems))
    files = {**manifest.files, **describe_files(folder, [MANIFEST])}
    upload = _announce(http, manifest.bundle_id, suffix, files)
    if upload["state"] == "receiving":
        total = sum(entry.bytes for entry in files.values())
        with Progress("upload", max(1, total // _MB), unit="MB") as bar:
            done = 0
            for name, entry in sorted(files.items()):
                _send(http, upload, folder / name, entry.bytes, bar, done)
                done += entry.bytes
                bar.at(done // _MB)
        http.json("POST", f"{_PLACE}/{quoted(str(upload['id']))}/complete")
    return str(upload["id"])


def wait_for_verdict(http: Http, adapter_id: str, wait_s: float) -> str:
    """The model's id of an accepted adapter.

    Raises:
        AdapterRejectedError: with every reason.
        ServiceError: there is no verdict after `wait_s` seconds.
    """
    deadline, pause = time.monotonic() + wait_s, 0.2
    while True:
        upload = http.json("GET", f"{_PLACE}/{quoted(adapter_id)}")
        if upload["state"] == "accepted":
            return str(upload["model_id"])
        if upload["state"] == "rejected":
            reasons = [str(reason) for reason in upload["reasons"]]
            raise AdapterRejectedError("the adapter is rejected: " + "; ".join(reasons), reasons)
        if time.monotonic() + pause > deadline:
            raise ServiceError(
                f"adapter {adapter_id} is still {upload['state']} after {wait_s:g} s; upload it again later to go on"
            )
        time.sleep(pause)
        pause = min(pause * 1.5, _LONGEST_PAUSE_S)


def _announce(http: Http, bundle_id: str, suffix: str, files: dict[str, FileEntry]) -> dict[str, Any]:
    """The upload of exactly these files: one that was begun before, or a new one."""
    listed = [{"name": name, **entry.model_dump()} for name, entry in sorted(files.items())]
    body = {"bundle_id": bundle_id, "suffix": suffix, "files": listed}
    # The same adapter gives the same key, so that a later run finds what an earlier one began.
    same = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    begun = http.json("POST", _PLACE, body, {"idempotency-key": same})
    path = f"{_PLACE}/{quoted(str(begun['id']))}"
    answer = http.answer("GET", path)
    if answer.status != 404:
        http.require(answer, "GET", path)
        upload = json.loads(answer.body)
        if upload["state"] != "accepted" or not _is_gone(http, str(upload["model_id"])):
            return upload
    # It was deleted, or given up for abandoned, or its model was deleted.
    return http.json("POST", _PLACE, body, {"idempotency-key": uuid4().hex})


def _is_gone(http: Http, model_id: str) -> bool:
    """Whether a model is known not to be in service; a key that may not ask learns nothing."""
    return http.answer("GET", f"/v1/models/{quoted(model_id)}").status == 404


def _send(http: Http, upload: Mapping[str, Any], path: Path, size: int, bar: Progress, done: int) -> None:
    place = f"{_PLACE}/{quoted(str(upload['id']))}/files/{quoted(path.name)}"
    offset, most, refusals = _offset(http, place), min(_PIECE, int(upload["piece_bytes"])), 0
    with path.open("rb") as file:
        while offset < size:
            file.seek(offset)
            data = file.read(min(most, size - offset))
            if not data:
                raise ArtifactError(f"{path} has become shorter than {size} bytes; write the adapter anew")
            answer = _put(http, place, data, offset, size)
            if answer.status == 409 and "upload-offset" in answer.headers and refusals < _MOST_REFUSALS:
                # A piece that arrived although its answer was lost, or another client sends the same file.
                told = int(answer.headers["upload-offset"])
                refusals = 0 if told > offset else refusals + 1
                if refusals:
                    time.sleep(min(0.05 * 2**refusals, _LONGEST_PAUSE_S))
                offset = told
                continue
            http.require(answer, "PUT", place)
            offset, refusals = offset + len(data), 0
            bar.at((done + offset) // _MB)


def _put(http: Http, place: str, data: bytes, offset: int, size: int) -> Answer:
    content_range = f"bytes {offset}-{offset + len(data) - 1}/{size}"
    headers = {"content-type": "application/octet-stream", "content-range": content_range}
    return http.answer("PUT", place, data, headers)


def _offset(http: Http, place: str) -> int:
    answer = http.answer("HEAD", place)
    http.require(answer, "HEAD", place)
    told = answer.headers.get("upload-offset", "")
    if not told.isdecimal():
        raise ServiceError(f"{http.url} does not say how much of a file it has; check the URL, or update ot_ray")
    return int(told)
