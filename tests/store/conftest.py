"""Stores to test: one in a folder, one in a fresh bucket of a real server, one behind a faulty proxy."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
from faulty_proxy import FaultyProxy

from ot_ray.store import S3Address, Store, open_store


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """An empty store of each kind."""
    if request.param == "local":
        return open_store(str(tmp_path / "store with space"))
    return open_store(request.getfixturevalue("s3_url") + "&part_size=5242880&base_delay=0.01")


@pytest.fixture
def proxy(s3_server: str) -> Iterator[FaultyProxy]:
    """A proxy in front of the S3 server, with no faults yet."""
    server = FaultyProxy(s3_server)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def proxied_url(proxy: FaultyProxy, s3_url: str) -> str:
    """The URL of an empty store behind the proxy, which tries three times, quickly."""
    address = S3Address.parse(s3_url)
    endpoint = quote(proxy.url, safe="")
    return f"{address.place}?endpoint_url={endpoint}&attempts=3&base_delay=0.01&part_size=5242880"
