"""Adapters of the tiny service's bundle, really tuned for a few steps, and how a client sends one by plain HTTP."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from fastapi.testclient import TestClient

from ot_ray.artifacts import Bundle, open_bundle, write_adapter
from ot_ray.model import BottleneckSettings, LoraSettings, Method, prepare_tuning
from tests.http.tiny_service import tokens_of

TEXT = "the quick brown fox jumps over the lazy dog, and the dog sleeps on"
PLACE = "/v1/offsite/adapters"


def tuned_adapter(bundle: Bundle | Path, method: Method, folder: Path, steps: int = 4, lr: float = 1e-3) -> Path:
    """Tune the bundle on one line of text, and write the adapter."""
    bundle = bundle if isinstance(bundle, Bundle) else open_bundle(bundle)
    torch.manual_seed(0)
    model = prepare_tuning(
        bundle.load_model(), bundle.manifest.plan, method, LoraSettings(rank=4), BottleneckSettings(size=8)
    )
    ids = torch.tensor([tokens_of(TEXT)])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    for _ in range(steps):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    write_adapter(folder, model.eval(), bundle.manifest, method=method, steps=steps, learning_rate=lr)
    return folder


def listed(folder: Path) -> list[dict[str, Any]]:
    """What is announced of a folder's files."""
    return [
        {"name": path.name, "bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in sorted(folder.iterdir())
    ]


def announce(client: TestClient, folder: Path, bundle_id: str, suffix: str = "support") -> Any:
    """The answer to the announcement of a folder's files."""
    body = {"bundle_id": bundle_id, "suffix": suffix, "files": listed(folder)}
    return client.post(PLACE, json=body)


def send(client: TestClient, folder: Path, bundle_id: str, suffix: str = "support") -> str:
    """Announce, send each file whole, complete; the adapter's id."""
    answer = announce(client, folder, bundle_id, suffix)
    assert answer.status_code == 200, answer.text
    adapter_id = answer.json()["id"]
    for path in sorted(folder.iterdir()):
        answer = client.put(f"{PLACE}/{adapter_id}/files/{path.name}", content=path.read_bytes())
        assert answer.status_code == 200, answer.text
    answer = client.post(f"{PLACE}/{adapter_id}/complete")
    assert answer.status_code == 200, answer.text
    assert answer.json()["state"] == "received"
    return adapter_id
