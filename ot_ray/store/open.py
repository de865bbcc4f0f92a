"""From a URL to a store.

What the parts of an S3 URL mean is left to `s3_address`."""

from __future__ import annotations

from urllib.parse import unquote, urlsplit

from ot_ray.errors import ConfigError
from ot_ray.store.base import Store
from ot_ray.store.local import LocalStore
from ot_ray.store.s3 import S3Store
from ot_ray.store.s3_address import S3Address

_VALID = "use a folder, file:///folder or s3://bucket/prefix?endpoint_url=...&region=..."


def open_store(url: str) -> Store:
    """The store at a folder's path, a `file:///` URL or an `s3://` URL; nothing is read or written yet.

    An S3 URL takes the fields of `S3Address` as its query; credentials come from boto3's own chain
    (environment, configuration files, roles) and are refused in the URL.

    Raises:
        ConfigError: the URL is empty, has another scheme, or one of its parts is not valid.
    """
    scheme, colon, _ = url.partition(":")
    if not url or (colon and scheme in ("s3", "file") and not url.startswith(f"{scheme}://")):
        raise ConfigError(f"{url!r} is no store; {_VALID}")
    if "://" not in url:
        return LocalStore(url)
    if scheme == "s3":
        return S3Store(S3Address.parse(url))
    if scheme == "file":
        return _open_file(url)
    raise ConfigError(f"{scheme}:// is no store's scheme; {_VALID}")


def _open_file(url: str) -> LocalStore:
    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost") or not parts.path or parts.query or parts.fragment:
        raise ConfigError(f"{url!r} names no local folder; write file:///folder, with %23 for # and %3F for ?")
    return LocalStore(unquote(parts.path))
