"""`Client`: what a service offers, bundles down, adapters up.

Moving the bytes is left to downloads.py and uploads.py, tuning to tuning.py."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ot_ray.artifacts import Bundle
from ot_ray.client.downloads import download_bundle
from ot_ray.client.http import Http, quoted
from ot_ray.client.tuning import TunedAdapter
from ot_ray.client.uploads import send_adapter, wait_for_verdict
from ot_ray.errors import ConfigError, ServiceError

KEY_VARIABLE = "OT_RAY_API_KEY"


@dataclass(frozen=True)
class Offer:
    """A bundle that a service offers."""

    id: str
    model: str
    version: str
    bytes: int
    methods: tuple[str, ...]
    signing_key_id: str | None


class Client:
    """One customer of one service.

        client = Client("https://host", public_key="owner.pem")
        bundle = client.download("opt-6.7b", "bundle")
        model_id = client.upload(tune(bundle, data="mine.jsonl"), suffix="support")

    Args:
        url: the service.
        key: the customer's API key; unset, that in OT_RAY_API_KEY.
        public_key: the owner's public key, a PEM file that came by another way than the bundle; with it, bundles must
            be signed by that owner. Without it, hashes alone are checked.
        patience_s: seconds for which a request is tried again while the service does not answer, or says that it is
            busy.

    Raises:
        ConfigError: the URL is none, there is no key, or the key's file is missing.
    """

    def __init__(
        self, url: str, key: str | None = None, *, public_key: str | Path | None = None, patience_s: float = 300.0
    ) -> None:
        key = os.environ.get(KEY_VARIABLE) if key is None else key
        if not key:
            raise ConfigError(f"there is no key for {url}; set {KEY_VARIABLE}")
        if public_key is not None and not Path(public_key).is_file():
            raise ConfigError(f"public_key is {str(public_key)!r}, which is no file; ask the owner for theirs")
        self._http = Http(url, key, patience_s=patience_s)
        self._public_key = Path(public_key) if public_key is not None else None

    def __repr__(self) -> str:
        return f"Client({self._http.url!r})"

    def bundles(self) -> list[Offer]:
        """The bundles that are offered now.

        Raises:
            ServiceError: the service refused, or does not answer.
        """
        return [_offer(value) for value in self._http.json("GET", "/v1/offsite/bundles")["data"]]

    def offer(self, name: str) -> Offer:
        """A bundle by its id, or the current one by the model's name. Raises ServiceError."""
        return _offer(self._http.json("GET", f"/v1/offsite/bundles/{quoted(name)}"))

    def download(self, name: str, folder: str | Path) -> Bundle:
        """Download a bundle and verify it; a download that was cut goes on where it was.

        Args:
            name: the model's name for the current bundle, or a bundle's id.
            folder: where to; it appears when everything in it is verified.

        Raises:
            ServiceError: the service refused, or does not answer.
            AlreadyExistsError: the folder is there and not empty.
            ArtifactError: what came is not what the owner published.
            SignatureError: the bundle is not signed with the owner's key.
        """
        return download_bundle(self._http, self.offer(name).id, Path(folder), self._public_key)

    def upload(self, adapter: TunedAdapter | str | Path, suffix: str = "default", *, wait_s: float = 3600.0) -> str:
        """Send an adapter and wait until it is inspected; the same adapter goes on where an earlier try was cut.

        Args:
            adapter: what `tune` gave, or a folder with one.
            suffix: the customer's name for it; the last one accepted under a suffix is the current one.
            wait_s: seconds to wait for the verdict.

        Returns:
            The model's id, to be used with any OpenAI client.

        Raises:
            AdapterRejectedError: with every reason.
            ServiceError: the service refused, or does not answer in time.
            ArtifactError: there is no adapter in the folder.
        """
        folder = adapter.folder if isinstance(adapter, TunedAdapter) else Path(adapter)
        adapter_id = send_adapter(self._http, folder, suffix)
        return wait_for_verdict(self._http, adapter_id, wait_s)


def _offer(value: Any) -> Offer:
    try:
        return Offer(
            id=str(value["id"]),
            model=str(value["model"]),
            version=str(value["version"]),
            bytes=int(value["bytes"]),
            methods=tuple(map(str, value["methods"])),
            signing_key_id=value["signing_key_id"],
        )
    except (KeyError, TypeError, ValueError):
        raise ServiceError(
            "the service described a bundle in a way this version does not know; update ot_ray"
        ) from None
