"""Where an S3 store is and how patiently to call it, read from and written to an `s3://` URL.

Credentials are never part of it."""

from __future__ import annotations

import re
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

from pydantic import Field, field_validator

from ot_ray.config import Config, parse
from ot_ray.errors import ConfigError, StoreError
from ot_ray.store.base import check_prefix

_MIB = 1024 * 1024
_NO_SECRETS = (
    "holds credentials or a port where none belong (the value is not shown); give credentials to boto3 by "
    "the environment (AWS_ACCESS_KEY_ID, AWS_PROFILE, ...) or a role, and a server's address by "
    "?endpoint_url=..."
)


class S3Address(Config):
    """A bucket, a prefix in it, and how to reach it. The URL's query holds the fields after `prefix`."""

    bucket: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{1,61}[A-Za-z0-9]$")
    """Name of the bucket, which must exist."""
    prefix: str = ""
    """Folder in the bucket under which all keys lie."""
    endpoint_url: str | None = None
    """Address of a server other than Amazon's, `http://host:port` or `https://host`."""
    region: str | None = None
    """Region of the bucket; without it boto3's own configuration counts."""
    attempts: int = Field(default=5, ge=1, le=20)
    """How often one request is sent before the store counts as unavailable."""
    base_delay: float = Field(default=0.2, ge=0)
    """Seconds before the second attempt; doubled for each further one, then shortened at random."""
    timeout: float = Field(default=60.0, gt=0)
    """Seconds to wait for each piece of an answer; a connection is waited for 10 s at most."""
    credentials: str | None = Field(default=None, min_length=1)
    """File of credentials as a tuning job is given it, which is renewed while it is used; without it boto3's own
    configuration counts."""
    part_size: int = Field(default=16 * _MIB, ge=5 * _MIB, le=1024 * _MIB)
    """Bytes of one range of a download and one part of an upload; S3 takes no part under 5 MiB."""

    @field_validator("prefix")
    @classmethod
    def _prefix_is_a_key(cls, prefix: str) -> str:
        try:
            return check_prefix(prefix)
        except StoreError as error:
            raise ValueError(str(error)) from None

    @field_validator("endpoint_url")
    @classmethod
    def _endpoint_is_http(cls, endpoint: str | None) -> str | None:
        parts = urlsplit(endpoint or "http://default")
        host_is_valid = re.fullmatch(r"[A-Za-z0-9.:-]+", parts.hostname or "")
        if parts.scheme not in ("http", "https") or not host_is_valid or parts.port == 0:
            raise ValueError("write http://host:port or https://host, the host without underscores")
        return endpoint

    @classmethod
    def parse(cls, url: str) -> S3Address:
        """Read `s3://bucket/prefix?endpoint_url=...&region=...&attempts=...`.

        Raises:
            ConfigError: the URL holds credentials, an unknown or repeated parameter, or a value out of range.
        """
        try:
            parts = urlsplit(url)
        except ValueError as error:
            raise ConfigError(f"the s3:// URL cannot be read: {error}; write s3://bucket/prefix") from None
        pairs = parse_qsl(parts.query, keep_blank_values=True)
        query = dict(pairs)
        if {"@", ":"} & set(parts.netloc):
            raise ConfigError(f"the s3:// URL {_NO_SECRETS}")
        if "@" in query.get("endpoint_url", ""):
            raise ConfigError(f"endpoint_url of s3://{parts.netloc} {_NO_SECRETS}")
        where = f"s3://{parts.netloc}"
        if len(query) < len(pairs) or {"bucket", "prefix"} & set(query) or parts.fragment:
            raise ConfigError(
                f"{where}: a parameter is repeated or stands in the wrong place; "
                "write s3://bucket/prefix?endpoint_url=...&region=..., with %23 for #"
            )
        return parse(cls, {"bucket": parts.netloc, "prefix": unquote(parts.path)[1:], **query}, where)

    @property
    def place(self) -> str:
        """The URL without its query, for messages."""
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")

    @property
    def url(self) -> str:
        """The URL from which `parse` makes an equal address."""
        options = self.model_dump(exclude={"bucket", "prefix"}, exclude_defaults=True)
        query = f"?{urlencode(options)}" if options else ""
        return f"s3://{self.bucket}/{quote(self.prefix)}".rstrip("/") + query
