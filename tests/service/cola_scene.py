"""A service with gradient learning, in this process behind a real HTTP server, and learning by back-propagation beside
it: what the tests of the customer's client share."""

from __future__ import annotations

import copy
import itertools
import shutil
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import uvicorn
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel

from ot_ray.client import ColaClient
from ot_ray.cola import Auxiliary, AuxiliaryConfig
from ot_ray.config import parse
from ot_ray.store import Store, open_store
from serve.api import create_api
from serve.catalogue import Catalogue
from serve.config import ServeConfig
from serve.engine.backend import Backend
from serve.gradients.loading import load_desk
from serve.gradients.worker import GradientWorker
from serve.service import Service
from tests.http.tiny_service import BASE
from tests.service.clients import new_key

WAIT_S = 200
SITES = ["*.q_proj", "*.v_proj"]
AUXILIARY = AuxiliaryConfig(rank=4, alpha=8.0, seed=3)
LR = 5e-3
_numbers = itertools.count()


@dataclass(frozen=True)
class ColaScene:
    """Where the service answers, and what is behind it."""

    url: str
    catalogue: Catalogue
    store: Store

    def key(self, tenant: str) -> str:
        """The secret of a new key of a tenant, who may ask as often as it likes."""
        secret = new_key(self.catalogue, tenant, ("cola",))
        self.catalogue.tenants.change_limits(self.catalogue.tenants.named(tenant).id, {"requests_per_minute": 10**6})
        return secret

    def client(self, tenant: str | None = None, port: int | None = None) -> ColaClient:
        """A client of a tenant, who is new where none is named, so that tests do not share the sessions that one may
        have open; by way of another port where one is given."""
        tenant = f"tenant-{next(_numbers)}" if tenant is None else tenant
        url = self.url if port is None else f"http://127.0.0.1:{port}"
        return ColaClient(url, self.key(tenant), patience_s=WAIT_S)

    @property
    def port(self) -> int:
        """Of the service."""
        return int(self.url.rpartition(":")[2])


@contextmanager
def cola_service(folder: Path, checkpoint: Path, database: Path, backend: Backend) -> Iterator[ColaScene]:
    """The service, with one worker that makes its passes."""
    values = {
        "model": {"name": BASE, "source": str(checkpoint)},
        "store": str(folder / "store"),
        "database": {"url": f"sqlite:///{shutil.copy(database, folder / 'service.sqlite')}"},
        "refresh_s": 0,
        "gradients": {"poll_s": 0.01},
    }
    settings = parse(ServeConfig, values, "test")
    assert settings.database is not None
    assert settings.store is not None
    assert settings.gradients is not None
    catalogue = Catalogue.open(settings.database.url)
    store = open_store(settings.store)
    service = Service(backend, settings, catalogue, store)
    worker = GradientWorker(load_desk(settings, settings.gradients, catalogue, store))
    with _http(service) as url, _rounds(worker):
        yield ColaScene(url, catalogue, store)
    catalogue.close()


@contextmanager
def _http(service: Service) -> Iterator[str]:
    config = uvicorn.Config(create_api(service), host="127.0.0.1", port=0, log_level="warning", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    until(lambda: server.started)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(WAIT_S)
    assert not thread.is_alive()


@contextmanager
def _rounds(worker: GradientWorker) -> Iterator[None]:
    ended = threading.Event()

    def work() -> None:
        while not ended.is_set():
            if not worker.round():
                ended.wait(0.01)

    thread = threading.Thread(target=work)
    worker.start()
    thread.start()
    yield
    ended.set()
    thread.join(WAIT_S)
    worker.close()
    assert not thread.is_alive()


def until(found: Any) -> None:
    """Wait until something is true."""
    deadline = time.monotonic() + WAIT_S
    while not found():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def batches(count: int, rows: int = 3, longest: int = 24, seed: int = 0) -> list[list[dict[str, list[int]]]]:
    """Rows of random tokens of different lengths, the first few of each of which are not learnt."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        lengths = torch.randint(6, longest + 1, (rows,), generator=generator).tolist()
        tokens = [torch.randint(2, 200, (length,), generator=generator).tolist() for length in lengths]
        made.append([{"tokens": row, "loss_mask": [0] * 3 + [1] * (len(row) - 3)} for row in tokens])
    return made


class Backpropagation:
    """LoRA of PEFT's inside a copy of the base, trained by autograd through the whole model."""

    def __init__(self, base: PreTrainedModel, start: Mapping[str, Tensor], interval: int = 1, lr: float = LR) -> None:
        rank = LoraConfig(r=AUXILIARY.rank, lora_alpha=int(AUXILIARY.alpha), target_modules=["q_proj", "v_proj"])
        self.model = get_peft_model(copy.deepcopy(base).float(), rank).eval()
        self._tensors = {
            name.removeprefix("base_model.model.").replace(".default", ""): parameter
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad
        }
        assert self._tensors.keys() == start.keys()
        with torch.no_grad():
            for name, tensor in start.items():
                self._tensors[name].copy_(tensor)
        self._optimizer = torch.optim.AdamW([self._tensors[name] for name in start], lr=lr, weight_decay=0.0)
        self._interval, self._waiting = interval, 0

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self._tensors.items()}

    def loss(self, rows: Sequence[Mapping[str, list[int]]]) -> Tensor:
        """The mean over all that is learnt; each row goes by itself, so that there is no padding to get wrong."""
        sums, count = torch.zeros(()), 0
        for row in rows:
            ids = torch.tensor([row["tokens"]])
            learnt = torch.tensor(row["loss_mask"][1:], dtype=torch.bool)
            logits = self.model(input_ids=ids).logits[0, :-1].float()
            each = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
            sums, count = sums + each[learnt].sum(), count + int(learnt.sum())
        return sums / count

    def train_batch(self, rows: Sequence[Mapping[str, list[int]]]) -> float:
        loss = self.loss(rows)
        loss.backward()
        self._waiting += 1
        if self._waiting == self._interval:
            self.flush()
        return loss.item()

    def flush(self) -> None:
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._waiting = 0


def same(found: Auxiliary, wanted: Mapping[str, Tensor]) -> bool:
    """Whether an auxiliary is the same to the last bit."""
    return all(torch.equal(tensor.detach(), wanted[name]) for name, tensor in found.tensors.items())
