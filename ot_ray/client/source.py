"""Where a bundle is taken from, once more, with the service as a third place.

Folders and stores are left to ot_ray.artifacts."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote

from ot_ray.artifacts import Bundle, BundleSource
from ot_ray.client.client import Client
from ot_ray.errors import ConfigError

_ADDRESS = re.compile(r"(https?://[^?#]+?)/v1/offsite/bundles/([^/?#]+)/?")


class OfferedBundle(BundleSource):
    """Names a bundle as `BundleSource` does, or by the `url` of a service that offers it."""

    url: str | None = None
    """`https://host/v1/offsite/bundles/<id or model>`; the key is taken from OT_RAY_API_KEY."""

    def _elsewhere(self) -> bool:
        others = [name for name in ("folder", "store", "model", "version") if getattr(self, name) is not None]
        if self.url is not None and others:
            raise ValueError(f"url names the bundle already; leave out {', '.join(others)}")
        return self.url is not None

    def open(self, cache: Path) -> Bundle:
        """Open the bundle, verified; see `BundleSource.open`, and `Client.download` for one from a service."""
        if self.url is None:
            return super().open(cache)
        service, name = service_of(self.url)
        return Client(service, public_key=self.public_key).download(name, cache)


def service_of(url: str) -> tuple[str, str]:
    """The service and the bundle's name that a bundle's URL holds.

    Raises:
        ConfigError: it is none.
    """
    match = _ADDRESS.fullmatch(url)
    if match is None:
        raise ConfigError(f"bundle.url is {url!r}; use https://host/v1/offsite/bundles/<id or model>")
    return match[1], unquote(match[2])
