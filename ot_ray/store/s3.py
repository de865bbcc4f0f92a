"""A store on S3 or a server that speaks its protocol, by boto3.

Retries and the meaning of failures are left to `s3_failures`, the URL to `s3_address`."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import Any
from uuid import uuid4

from ot_ray.errors import AlreadyExistsError, NotFoundError, StoreError
from ot_ray.store.base import (
    Advance,
    ObjectInfo,
    check_deletable,
    check_key,
    check_prefix,
    check_range,
    join_key,
)
from ot_ray.store.partial import chunks_of, disk_errors, save
from ot_ray.store.s3_address import S3Address
from ot_ray.store.s3_failures import PreconditionFailedError, RangeBeyondEndError, Retry
from ot_ray.store.s3_session import CredentialsFile, boto_session

_MOST_PARTS = 10_000  # S3's limit for one upload
_LONGEST_CONNECT = 10.0  # seconds
_MOST_DELETED = 1_000  # S3's limit for one request


class S3Store:
    """A store in a bucket. See `Store` for the methods.

    An object carries the sha256 of all its bytes as metadata, because the checksum that S3 computes for an
    upload in parts is one of parts. `create` needs a server that honours `If-None-Match: *` on a put.
    """

    url: str
    credentials: CredentialsFile | None
    """Where requests find what they are signed with, if not where boto3 looks."""

    def __init__(self, address: S3Address) -> None:
        self.address = address
        self.url = address.url
        self.credentials = file = CredentialsFile(address.credentials) if address.credentials else None
        self._retry = Retry(address.attempts, address.base_delay, file and file.key_id)
        self._client: Any = None
        self._opening = Lock()
        self._bucket_seen = False

    def __reduce__(self) -> tuple[type[S3Store], tuple[S3Address]]:
        return S3Store, (self.address,)

    def __repr__(self) -> str:
        return f"S3Store({self.url!r})"

    def read(self, key: str) -> bytes:
        return self._get(key)

    def read_range(self, key: str, start: int, end: int) -> bytes:
        check_range(key, start, end)
        if start == end:  # S3 knows no empty range
            self._head(key)
            return b""
        try:
            return self._get(key, Range=f"bytes={start}-{end - 1}")
        except RangeBeyondEndError:
            return b""

    def info(self, key: str) -> ObjectInfo:
        head = self._head(key)
        return ObjectInfo(key, head["ContentLength"], head["Metadata"].get("sha256"), head["ETag"])

    def exists(self, key: str) -> bool:
        try:
            self._head(key)
        except NotFoundError:
            return False
        return True

    def write(self, key: str, data: bytes) -> None:
        self._put(key, data)

    def create(self, key: str, data: bytes) -> None:
        writer = uuid4().hex
        try:
            self._put(key, data, {"writer": writer}, IfNoneMatch="*")
        except PreconditionFailedError:
            # When the answer to a first attempt is lost, the second one meets this writer's own object.
            if self._metadata(key).get("writer") != writer:
                raise AlreadyExistsError(
                    f"cannot create {self._place(key)}: it is already there; choose another name or version, "
                    "or delete it first"
                ) from None

    def upload(self, path: str | Path, key: str, progress: Advance | None = None) -> ObjectInfo:
        path = Path(path)
        with disk_errors(f"cannot read {path}"):
            size = path.stat().st_size
        if size <= self.address.part_size:
            data = b"".join(chunks_of(path))
            self._put(key, data)
            if progress:
                progress(len(data))
            return ObjectInfo(key, len(data), hashlib.sha256(data).hexdigest())
        digest = hashlib.sha256()
        for chunk in chunks_of(path):
            digest.update(chunk)
        self._upload_parts(path, key, size, digest.hexdigest(), progress)
        return ObjectInfo(key, size, digest.hexdigest())

    def download(self, key: str, path: str | Path, sha256: str | None = None, progress: Advance | None = None) -> None:
        head = self._head(key)
        ranges = self._ranges(key, head["ContentLength"], head["ETag"])
        save(Path(path), ranges, self._place(key), sha256 or head["Metadata"].get("sha256"), progress)

    def list(self, prefix: str = "") -> Iterator[str]:
        cut = len(join_key(self.address.prefix, ""))
        for key in self._raw_keys(check_prefix(prefix)):
            # Consoles mark an empty folder by an object whose name ends in a slash.
            if not key.endswith("/"):
                yield key[cut:]

    def delete(self, key: str) -> None:
        self._call("delete_object", f"cannot delete {self._place(key)}", Key=self._key(key))

    def delete_prefix(self, prefix: str) -> None:
        task = f"cannot delete {self._place(check_deletable(prefix))}"
        keys = list(self._raw_keys(check_prefix(prefix)))
        for start in range(0, len(keys), _MOST_DELETED):
            batch = [{"Key": key} for key in keys[start : start + _MOST_DELETED]]
            answer = self._call("delete_objects", task, Delete={"Objects": batch, "Quiet": True})
            for error in answer.get("Errors", []):
                raise StoreError(f"{task}: {error['Key']} was refused ({error['Code']}); check the bucket's policy")

    def _key(self, key: str) -> str:
        return join_key(self.address.prefix, check_key(key))

    def _place(self, key: str) -> str:
        endpoint = f" at {self.address.endpoint_url}" if self.address.endpoint_url else ""
        return f"{self.address.place}/{key}".rstrip("/") + endpoint

    def _connect(self) -> Any:
        with self._opening:
            if self._client is None:
                self._client = self._retry(self._open, f"cannot open {self._place('')}")
        return self._client

    def _open(self) -> Any:
        from botocore.config import Config

        address = self.address
        options = Config(
            connect_timeout=min(address.timeout, _LONGEST_CONNECT),
            read_timeout=address.timeout,
            retries={"total_max_attempts": 1},  # `Retry` alone tries again
            s3={"addressing_style": "path"} if address.endpoint_url else None,
            # Every put states a sha256; servers other than Amazon's trip over the newer defaults.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        )
        return boto_session(self.credentials).client(
            "s3", endpoint_url=address.endpoint_url, region_name=address.region, config=options
        )

    def _call(self, operation: str, task: str, **arguments: Any) -> Any:
        request = getattr(self._connect(), operation)
        return self._retry(lambda: request(Bucket=self.address.bucket, **arguments), task)

    def _head(self, key: str) -> Any:
        task = f"cannot read {self._place(key)}"
        try:
            return self._call("head_object", task, Key=self._key(key))
        except NotFoundError:
            self._require_bucket(task)
            raise

    def _require_bucket(self, task: str) -> None:
        """Tell a missing bucket from a missing object, which the bare answer to a HEAD does not."""
        if not self._bucket_seen:
            try:
                self._call("head_bucket", task)
            except NotFoundError:
                raise StoreError(f"{task}: there is no such bucket; create it, or correct the URL") from None
            self._bucket_seen = True

    def _metadata(self, key: str) -> dict[str, str]:
        try:
            return self._head(key)["Metadata"]
        except NotFoundError:
            return {}

    def _get(self, key: str, **arguments: Any) -> bytes:
        name, request = self._key(key), self._connect().get_object
        # The body is part of the attempt: most connections break there.
        return self._retry(
            lambda: request(Bucket=self.address.bucket, Key=name, **arguments)["Body"].read(),
            f"cannot read {self._place(key)}",
        )

    def _ranges(self, key: str, size: int, etag: str) -> Iterator[bytes]:
        for start in range(0, size, self.address.part_size):
            end = min(start + self.address.part_size, size)
            # The entity tag keeps ranges of an object and of its replacement apart.
            data = self._get(key, Range=f"bytes={start}-{end - 1}", IfMatch=etag)
            if len(data) != end - start:
                raise StoreError(
                    f"cannot read {self._place(key)}: bytes {start} to {end} were asked for and "
                    f"{len(data)} bytes came; the server must support range requests"
                )
            yield data

    def _put(self, key: str, data: bytes, metadata: dict[str, str] | None = None, **arguments: Any) -> None:
        digest = hashlib.sha256(data)
        self._call(
            "put_object",
            f"cannot write {self._place(key)}",
            Key=self._key(key),
            Body=data,
            ChecksumSHA256=base64.b64encode(digest.digest()).decode(),
            Metadata={"sha256": digest.hexdigest(), **(metadata or {})},
            **arguments,
        )

    def _upload_parts(self, path: Path, key: str, size: int, sha256: str, progress: Advance | None) -> None:
        task, name = f"cannot write {self._place(key)}", self._key(key)
        upload = {
            "Key": name,
            "UploadId": self._call(
                "create_multipart_upload",
                task,
                Key=name,
                ChecksumAlgorithm="SHA256",
                Metadata={"sha256": sha256},
            )["UploadId"],
        }
        try:
            parts = self._send_parts(path, task, upload, size, sha256, progress)
            self._complete(key, task, upload, parts, sha256)
        except BaseException:
            # Parts of an unfinished upload cost money and show in no listing.
            with suppress(Exception):
                self._connect().abort_multipart_upload(Bucket=self.address.bucket, **upload)
            raise

    def _send_parts(
        self, path: Path, task: str, upload: dict[str, str], size: int, sha256: str, progress: Advance | None
    ) -> Sequence[dict[str, Any]]:
        parts, whole = [], hashlib.sha256()
        part_size = max(self.address.part_size, -(-size // _MOST_PARTS))
        for number, data in enumerate(chunks_of(path, part_size), start=1):
            whole.update(data)
            checksum = base64.b64encode(hashlib.sha256(data).digest()).decode()
            answer = self._call("upload_part", task, **upload, PartNumber=number, Body=data, ChecksumSHA256=checksum)
            parts.append({"PartNumber": number, "ETag": answer["ETag"], "ChecksumSHA256": checksum})
            if progress:
                progress(len(data))
        if whole.hexdigest() != sha256:
            raise StoreError(f"{task}: {path} changed while it was uploaded; upload it when nobody writes to it")
        return parts

    def _complete(
        self, key: str, task: str, upload: dict[str, str], parts: Sequence[dict[str, Any]], sha256: str
    ) -> None:
        try:
            self._call("complete_multipart_upload", task, **upload, MultipartUpload={"Parts": [*parts]})
        except StoreError:
            # When the answer to a first attempt is lost, the second one finds the upload already completed.
            if self._metadata(key).get("sha256") != sha256:
                raise

    def _raw_keys(self, prefix: str) -> Iterator[str]:
        """Keys as the bucket has them, folder markers included, page by page."""
        folder = join_key(self.address.prefix, prefix).rstrip("/")
        arguments = {"Prefix": f"{folder}/" if folder else ""}
        while True:
            page = self._call("list_objects_v2", f"cannot list {self._place(prefix)}", **arguments)
            yield from (item["Key"] for item in page.get("Contents", []))
            if not page["IsTruncated"]:
                return
            arguments["ContinuationToken"] = page["NextContinuationToken"]
