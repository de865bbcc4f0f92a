"""Malformed uploads and bodies, by hand: each is told what is wrong in OpenAI's words and leaves nothing behind."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI

from ot_ray.config import parse
from ot_ray.store import LocalStore
from serve.api import create_api
from serve.catalogue import Catalogue
from serve.config import ServeConfig
from serve.engine.backend import Backend
from serve.service import Service
from tests.service.bad_requests import CASES, GOOD, MOST, MULTIPART, Bad
from tests.service.raw_requests import Answer, send_now


@dataclass(frozen=True)
class World:
    """A service in which ben has a file, and anna sends what is bad."""

    app: FastAPI
    catalogue: Catalogue
    store: LocalStore
    folder: Path
    anna: tuple[str, str]
    ben: tuple[str, str]

    def send(self, bad: Bad) -> Answer:
        kind = [] if bad.content_type is None else [("content-type", bad.content_type)]
        headers = [("authorization", f"Bearer {self.anna[1]}"), *kind, *bad.headers]
        return send_now(self.app, bad.pieces, headers, bad.method, bad.path, bad.query)

    def state(self) -> dict[str, Any]:
        """All that an upload could have changed."""
        headers = [("authorization", f"Bearer {self.ben[1]}")]
        bens = send_now(self.app, (), headers, "GET")
        return {
            "incoming": os.listdir(self.folder),
            "store": list(self.store.list()),
            "anna's": self.catalogue.files.list(self.anna[0]).items,
            "anna's bytes": self.catalogue.files.kept_bytes(self.anna[0]),
            "reserved": self.catalogue.files.doomed(),
            "ben's": (bens.status, bens.json()),
        }


@pytest.fixture(scope="module")
def world(
    base_backend: Backend, checkpoint: Path, empty_database: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[World]:
    place = tmp_path_factory.mktemp("bad_uploads")
    database = f"sqlite:///{shutil.copy(empty_database, place / 'service.sqlite')}"
    store, folder = LocalStore(place / "store"), place / "incoming"
    folder.mkdir()
    settings = {
        "model": {"name": "tiny", "source": str(checkpoint)},
        "store": store.url,
        "database": {"url": database},
        "files": {"max_bytes": MOST, "folder": str(folder)},
    }
    catalogue = Catalogue.open(database)
    app = create_api(Service(base_backend, parse(ServeConfig, settings, "test"), catalogue, store))
    keys = []
    for name in ("anna", "ben"):
        tenant = catalogue.tenants.create(name)
        catalogue.tenants.change_limits(tenant.id, {"requests_per_minute": 10**6})
        keys.append((tenant.id, catalogue.keys.create(tenant.id, ("files", "inference")).secret))
    headers = [("authorization", f"Bearer {keys[1][1]}"), ("content-type", MULTIPART)]
    assert send_now(app, (GOOD,), headers).status == 200
    yield World(app, catalogue, store, folder, keys[0], keys[1])
    catalogue.close()


@pytest.mark.parametrize("name", CASES)
def test_bad_uploads(world: World, name: str) -> None:
    bad, before = CASES[name], world.state()
    assert before["incoming"] == [] and len(before["store"]) == 1
    answer = world.send(bad)
    assert answer.status == bad.status, answer.content
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    assert bad.words in error["message"], error
    assert len(error["message"]) < 5000 and error["message"].isprintable()
    assert "Traceback" not in error["message"] and str(world.folder) not in error["message"]
    assert answer.headers["x-request-id"].startswith("req_")
    assert world.state() == before


def test_there_are_at_least_fifty_and_a_good_one_passes(world: World) -> None:
    assert len(CASES) >= 50
    headers = [("authorization", f"Bearer {world.anna[1]}"), ("content-type", MULTIPART)]
    answer = send_now(world.app, (GOOD,), headers)
    assert answer.status == 200
    deleted = send_now(world.app, (), headers[:1], "DELETE", f"/v1/files/{answer.json()['id']}")
    assert deleted.status == 200
    assert world.state()["anna's bytes"] == 0
