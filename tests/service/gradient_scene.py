"""A gradient worker on a real database and store, with a tiny model, and what its results are compared with."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from ot_ray.cola import Auxiliary, AuxiliaryConfig, BasePass, FitConfig, Pair, find_sites
from ot_ray.cola.gradient_files import GradientFile, read_gradients
from ot_ray.store import Store
from serve.catalogue import Catalogue
from serve.catalogue.records import GradientOperation, GradientSession
from serve.gradients.desk import Desk
from serve.gradients.loading import reached_sites
from serve.gradients.residents import Residents
from serve.gradients.worker import GradientWorker
from serve.settings.gradients import GradientsConfig
from serve.stored_gradients import gradients_key
from tests.http.tiny_service import BASE, VOCABULARY, byte_tokenizer

SITES = ("*.q_proj", "*.v_proj", "*.fc1")
Through = Sequence[tuple[float, Auxiliary]]


def desk_of(
    catalogue: Catalogue, store: Store, model: PreTrainedModel, base: BasePass | None = None, **settings: Any
) -> Desk:
    """What a worker works with; `settings` are those of `GradientsConfig`."""
    config = GradientsConfig.model_validate({"operation_rows": 4, "operation_tokens": 128, **settings})
    base = base or BasePass(model, find_sites(model, "*"), device="cpu")
    return Desk(
        catalogue=catalogue,
        store=store,
        model_name=BASE,
        base=base,
        tokenizer=byte_tokenizer(),
        settings=config,
        residents=Residents(store, "cpu", config.cached_bytes),
        reached=reached_sites(model, base.sites),
    )


@dataclasses.dataclass
class Scene:
    """Tenants that open sessions and ask; a worker that carries it out."""

    catalogue: Catalogue
    store: Store
    model: PreTrainedModel

    def worker(self, **settings: Any) -> GradientWorker:
        """One that holds nothing yet, and renews no leases."""
        return GradientWorker(desk_of(self.catalogue, self.store, self.model, **settings))

    def tenant(self, name: str) -> str:
        """Its id; the tenant is made where there is none."""
        if name not in self._tenants:
            self._tenants[name] = self.catalogue.tenants.create(name).id
        return self._tenants[name]

    _tenants: dict[str, str] = dataclasses.field(default_factory=dict)

    def session(self, tenant: str = "anna", **settings: Any) -> GradientSession:
        """An open session; `settings` over those of one that its customer fits alone, at rank 2."""
        patterns = settings.pop("sites", SITES)
        sites = [dataclasses.asdict(site) for site in find_sites(self.model, patterns).values()]
        values = {
            "auxiliary": {"kind": "low_rank", "rank": 2, "alpha": 4.0, "seed": 0},
            "mode": "alone",
            "group": None,
            "fit": "client",
            "interval": None,
            "fitting": {"lr": 0.01},
            "metadata": None,
            **settings,
            "sites": sites,
        }
        values = json.loads(json.dumps(values))
        made = self.catalogue.gradient_sessions.create(self.tenant(tenant), model=BASE, settings=values, idle_s=3600)
        assert made is not None
        return made

    def ask(self, session: GradientSession, kind: Any, request: Mapping[str, Any] | None = None) -> int:
        """Submit the session's next operation; its number."""
        request = dict(request or {})
        number = self.catalogue.gradient_sessions.find(session.id).next_number
        rows = len(request.get("rows", ()))
        operations = self.catalogue.gradient_operations
        operation, is_new = operations.submit(session, kind, number, str(number), request, 1000, rows=rows)
        assert is_new
        return operation.number

    def forward_backward(
        self, session: GradientSession, rows: Sequence[Sequence[int]], coding: str = "none", skipped: int = 0
    ) -> int:
        """Ask for a pass.

        Args:
            skipped: tokens at the beginning of each row that are not learnt.
        """
        asked = [{"tokens": [*row], "loss_mask": [0] * skipped + [1] * (len(row) - skipped)} for row in rows]
        return self.ask(session, "forward_backward", {"rows": asked, "coding": coding})

    def upload(self, session: GradientSession, tensors: Mapping[str, Tensor], version: int) -> int:
        """Ask for tensors to be loaded."""
        key = f"cola/{session.tenant_id}/{session.auxiliary_id}/uploads/{session.id}-{uuid4().hex}.safetensors"
        self.store.write(key, save({name: tensor.detach().contiguous() for name, tensor in tensors.items()}))
        return self.ask(session, "load", {"key": key, "version": version})

    def found(self, session: GradientSession, number: int) -> GradientOperation:
        return self.catalogue.gradient_operations.find(session.id, number)

    def result(self, session: GradientSession, number: int) -> dict[str, Any]:
        """Of an operation that succeeded."""
        operation = self.found(session, number)
        assert operation.status == "succeeded", (operation.status, operation.error)
        assert operation.result is not None
        return operation.result

    def gradients(self, session: GradientSession, number: int, folder: Path) -> GradientFile:
        """What a pass left in the store."""
        path = folder / f"{session.id}-{number}.safetensors"
        self.store.download(gradients_key(self.found(session, number)), path)
        sites = {site["name"]: site for site in session.settings["sites"]}
        return read_gradients(path, find_sites(self.model, list(sites)))

    def present(self, session: GradientSession) -> Auxiliary:
        """The session's auxiliary, as the store has it."""
        desk = desk_of(self.catalogue, self.store, self.model)
        return desk.resident(desk.plan(session.id)).auxiliary


def auxiliary_of(session: GradientSession, model: PreTrainedModel, seed: int | None = None) -> Auxiliary:
    """The session's auxiliary at its start; moved away from it by noise where a seed is given."""
    sites = find_sites(model, [site["name"] for site in session.settings["sites"]])
    auxiliary = Auxiliary(sites, AuxiliaryConfig.model_validate(session.settings["auxiliary"]))
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        for tensor in auxiliary.tensors.values():
            tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=0.1)
    return auxiliary


def rows_of(seed: int, *lengths: int) -> list[list[int]]:
    """Random tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


def by_autograd(
    model: PreTrainedModel, through: Through, own: Auxiliary, rows: Sequence[Sequence[int]], skipped: int = 0
) -> tuple[float, dict[str, Pair]]:
    """Loss and pairs from the model's own logits, row by row, without taps."""
    taken: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in own.sites}
    share = sum(weight for weight, auxiliary in through if auxiliary is own)

    def hook(name: str) -> Any:
        def called(module: torch.nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
            x = args[0].detach()
            for weight, auxiliary in through:
                if name in auxiliary.sites:
                    output = output + weight * auxiliary.delta(name, args[0]).reshape(output.shape)
            if name in taken:
                leaf = torch.zeros_like(output, requires_grad=True)
                taken[name].append((x.reshape(-1, x.shape[-1]), leaf))
                output = output + leaf
            return output

        return called

    names = {name for _, auxiliary in through for name in auxiliary.sites}
    handles = [model.get_submodule(name).register_forward_hook(hook(name)) for name in names]
    try:
        sums, count = torch.zeros(()), 0
        for row in rows:
            logits = model(torch.tensor([list(row)])).logits[0, :-1]
            targets = torch.tensor(list(row))[1:]
            wanted = torch.arange(1, len(row)) >= skipped
            sums = sums + F.cross_entropy(logits[wanted], targets[wanted], reduction="sum")
            count += int(wanted.sum())
        loss = sums / count
        loss.backward()
    finally:
        for handle in handles:
            handle.remove()
    pairs = {}
    for name, calls in taken.items():
        gradients = [share * leaf.grad.reshape(-1, leaf.shape[-1]) for _, leaf in calls if leaf.grad is not None]
        pairs[name] = Pair(torch.cat([x for x, _ in calls]), torch.cat(gradients))
    return loss.item(), pairs


def fit_config(session: GradientSession) -> FitConfig:
    return FitConfig.model_validate({**session.settings["fitting"], "interval": session.settings["interval"] or 1})
