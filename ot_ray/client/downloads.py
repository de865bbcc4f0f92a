"""Bundles down: file by file, by ranges, beside the folder that appears when all of them are verified.

What a bundle must be is left to ot_ray.artifacts."""

from __future__ import annotations

import hashlib
import http.client as http_client
import os
import shutil
from pathlib import Path

from ot_ray.artifacts import Bundle, BundleManifest, key_id, open_bundle
from ot_ray.artifacts.manifest import MANIFEST, SIGNATURE
from ot_ray.artifacts.strict_json import MAX_BYTES, parse_json
from ot_ray.client.http import Answer, Http, quoted
from ot_ray.errors import AlreadyExistsError, ArtifactError, OTRayError, SignatureError
from ot_ray.progress import Progress
from ot_ray.store.partial import chunks_of, disk_errors

_CHUNK = 1 << 16  # bytes; a connection that breaks costs no more
_MB = 1_000_000
_MOST_SIGNATURE_BYTES = 8 * 2**20


def download_bundle(http: Http, bundle_id: str, folder: Path, public_key: Path | None) -> Bundle:
    """Download a bundle into a folder that is not there yet. Errors are those of `Client.download`."""
    folder = folder.absolute()
    staging = staged(folder, bundle_id)
    manifest = _manifest(http, bundle_id, staging, public_key)
    _fetch_files(http, manifest, staging)
    try:
        bundle = open_bundle(staging, public_key)
    except ArtifactError:
        # What is wrong once stays wrong: the next try begins anew.
        shutil.rmtree(staging, ignore_errors=True)
        raise
    with disk_errors(f"cannot write {folder}"):
        os.rename(staging, folder)
    return Bundle(folder, bundle.manifest)


def staged(folder: Path, name: str) -> Path:
    """The staging folder, made where it is not there yet, of what is to appear as `folder`.

    Raises:
        AlreadyExistsError: the folder is there and not empty.
    """
    with disk_errors(f"cannot write {folder}"):
        if folder.is_symlink() or (folder.exists() and (not folder.is_dir() or any(folder.iterdir()))):
            raise AlreadyExistsError(f"{folder} is already there; choose another folder or delete it")
        staging = staging_folder(folder, name)
        staging.mkdir(parents=True, exist_ok=True)
    return staging


def staging_folder(folder: Path, bundle_id: str) -> Path:
    """Where a bundle's files are until all are verified; of the bundle's own, so that a later run goes on with the same
    one and never with another."""
    return folder.parent / f".{folder.name}-{hashlib.sha256(bundle_id.encode()).hexdigest()[:12]}.download"


def _manifest(http: Http, bundle_id: str, staging: Path, public_key: Path | None) -> BundleManifest:
    """What the owner says that the bundle is; nothing else is fetched before it is read."""
    data = _small(http, bundle_id, MANIFEST, MAX_BYTES)
    manifest = parse_json(BundleManifest, data, MANIFEST)
    if manifest.bundle_id != bundle_id:
        raise ArtifactError(f"{http.url} sent bundle {manifest.bundle_id} for {bundle_id}; ask its operator")
    if public_key is not None:
        _require_signer(manifest, public_key)
    with disk_errors(f"cannot write {staging}"):
        (staging / MANIFEST).write_bytes(data)
        if manifest.signing_key_id is not None:
            (staging / SIGNATURE).write_bytes(_small(http, bundle_id, SIGNATURE, _MOST_SIGNATURE_BYTES))
    return manifest


def _require_signer(manifest: BundleManifest, public_key: Path) -> None:
    # Before anything is fetched: a key that is wrong here says nothing about the files that are there already.
    given = key_id(public_key)
    if manifest.signing_key_id is None:
        raise SignatureError(f"bundle {manifest.bundle_id} is not signed; ask the owner for a signed one")
    if manifest.signing_key_id != given:
        raise SignatureError(
            f"bundle {manifest.bundle_id} is signed with key {manifest.signing_key_id}, but {public_key} is key "
            f"{given}; ask the owner which key is theirs"
        )


def _small(http: Http, bundle_id: str, name: str, most: int) -> bytes:
    path = _path(bundle_id, name)
    answer = http.answer("GET", path)
    http.require(answer, "GET", path)
    if len(answer.body) > most:
        raise ArtifactError(f"{name} has more than {most} bytes; ask the service's operator")
    return answer.body


def _fetch_files(http: Http, manifest: BundleManifest, staging: Path) -> None:
    total = sum(entry.bytes for entry in manifest.files.values())
    with Progress("download", max(1, total // _MB), unit="MB") as bar:
        done = 0
        for name, entry in sorted(manifest.files.items()):
            fetch_file(http, _path(manifest.bundle_id, name), staging / name, entry.bytes, entry.sha256, bar, done)
            done += entry.bytes
            bar.at(done // _MB)


def fetch_file(
    http: Http, path: str, target: Path, size: int, sha256: str, bar: Progress | None = None, done: int = 0
) -> None:
    """Bring a file to its size, going on with what is there, and check its hash.

    Args:
        done: bytes that came before this file, for the bar.

    Raises:
        ServiceError: the service refused, or does not answer.
        ArtifactError: what came is longer, or has another hash.
    """
    with disk_errors(f"cannot write {target}"):
        target.parent.mkdir(parents=True, exist_ok=True)
        target.touch()
        if target.stat().st_size > size:
            target.unlink()
            target.touch()

    best = target.stat().st_size

    def attempt() -> Answer:
        # Whatever brings the file further counts as an answer, so that patience begins anew.
        try:
            answer = _more(http, path, target, size, sha256, bar, done)
        except (OSError, http_client.HTTPException) as error:
            if isinstance(error, OTRayError) or target.stat().st_size <= best:
                raise
            return Answer(206, {}, b"")
        if answer.status in (200, 206) and target.stat().st_size <= best:
            raise ConnectionError("the connection broke")
        return answer

    while best < size:
        http.require(http.patiently(attempt), "GET", path)
        best = target.stat().st_size
    digest = hashlib.sha256()
    for chunk in chunks_of(target):
        digest.update(chunk)
    if digest.hexdigest() != sha256:
        target.unlink()
        raise ArtifactError(f"{target.name} came with sha256 {digest.hexdigest()}, not {sha256}; download it again")


def _more(http: Http, path: str, target: Path, size: int, sha256: str, bar: Progress | None, done: int) -> Answer:
    """One request for what a file lacks."""
    have = target.stat().st_size
    headers = {"range": f"bytes={have}-", "if-range": f'"{sha256}"'} if have else {}
    with http.stream(path, headers) as response:
        told = {name.lower(): value for name, value in response.getheaders()}
        if response.status not in (200, 206):
            return Answer(response.status, told, response.read(1 << 16))
        _append(response, target, have if response.status == 206 else 0, size, bar, done)
        return Answer(response.status, told, b"")


def _append(
    response: http_client.HTTPResponse, target: Path, start: int, size: int, bar: Progress | None, done: int
) -> None:
    with target.open("r+b") as file:
        file.truncate(start)
        file.seek(start)
        while chunk := response.read(min(_CHUNK, size - start + 1)):
            start += len(chunk)
            if start > size:
                raise ArtifactError(f"{target.name} is longer than its {size} bytes; ask the operator")
            with disk_errors(f"cannot write {target}"):
                file.write(chunk)
            if bar is not None:
                bar.at((done + start) // _MB)


def _path(bundle_id: str, name: str) -> str:
    segments = "/".join(quoted(segment) for segment in name.split("/"))
    return f"/v1/offsite/bundles/{quoted(bundle_id)}/files/{segments}"
