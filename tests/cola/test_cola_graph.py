"""What the server keeps for a backward pass: no graph of auxiliaries, and no more tensors for more customers."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

from ot_ray.cola import Alone, Auxiliary, AuxiliaryConfig, Collaboration, Joint, Merging, Mode, Taps, find_sites
from tests.cola.inside import TextNet, inputs, net, row_losses

CUSTOMERS = [f"c{i}" for i in range(8)]


def leaves_of(loss: Tensor) -> set[int]:
    """Identities of the tensors that a backward pass from here gives gradients to."""
    found, seen, waiting = set(), set(), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        waiting += [following for following, _ in node.next_functions]
    return found


def saved_bytes(model: nn.Module, taps: Taps, rows: list[str], ids: Tensor) -> int:
    """Bytes of storage that the graph of a forward pass keeps beyond weights, auxiliaries and the ids."""
    held = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers(), ids)}
    for auxiliary in taps._mode.auxiliaries.values():
        held |= {tensor.untyped_storage().data_ptr() for tensor in auxiliary.tensors.values()}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in held:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with taps, taps.batch(rows), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = row_losses(model(ids)).sum()
    # Storages are told apart by their places, so the graph stays until they are counted.
    total = sum(storages.values())
    del loss
    return total


def auxiliaries(model: nn.Module, kind: str, names: list[str]) -> dict[str, Auxiliary]:
    sites = find_sites(model, TextNet.patterns)
    found = {}
    for seed, name in enumerate(names):
        found[name] = Auxiliary(sites, AuxiliaryConfig(kind=kind, rank=2, seed=seed), dtype=torch.float64)
        for tensor in found[name].tensors.values():
            tensor.add_(0.01).requires_grad_(True)
    return found


def test_the_graph_has_no_leaf_but_the_taps_own() -> None:
    model, ids = net(TextNet), inputs(TextNet, len(CUSTOMERS))
    sites = find_sites(model, TextNet.patterns)
    for kind in ("low_rank", "linear", "mlp"):
        ours = auxiliaries(model, kind, CUSTOMERS)
        modes: list[Mode] = [Joint(ours["c0"]), Alone(ours), Collaboration(ours)]
        for mode in modes:
            with Taps(model, sites, mode) as taps, taps.batch(CUSTOMERS) as batch:
                loss = row_losses(model(ids)).sum()
                assert leaves_of(loss) == {id(taps._anchor)}
                loss.backward()
            assert taps._anchor.grad is None
            tensors = [tensor for own in batch.pairs().values() for p in own.values() for tensor in (p.x, p.g)]
            assert not any(tensor.requires_grad for tensor in tensors)
        assert all(tensor.grad is None for own in ours.values() for tensor in own.tensors.values())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_merged_customers_cost_no_memory() -> None:
    model, ids = net(TextNet), inputs(TextNet, len(CUSTOMERS))
    # The table is looked up by ids, which no weight of it changes.
    sites = find_sites(model, TextNet.patterns)
    found = []
    for count in (1, 8):
        ours = Collaboration(auxiliaries(model, "low_rank", CUSTOMERS[:count]))
        with Merging(model, sites) as merging:
            merging.merge(ours.summands())
            rows = [CUSTOMERS[row % count] for row in range(len(CUSTOMERS))]
            found.append(saved_bytes(model, Taps(model, sites, ours, merged=True), rows, ids))
    assert found[0] == found[1] > 0


@pytest.mark.parametrize("kind", ["low_rank", "linear", "mlp"])
def test_customers_of_their_own_cost_a_pass_no_memory(kind: str) -> None:
    model, ids = net(TextNet), inputs(TextNet, len(CUSTOMERS))
    sites = find_sites(model, TextNet.patterns)
    found = set()
    for count in (1, 4, 8):
        ours, mixed = Alone(auxiliaries(model, kind, CUSTOMERS[:count])), [CUSTOMERS[row % count] for row in range(8)]
        found |= {saved_bytes(model, Taps(model, sites, ours), rows, ids) for rows in (mixed, sorted(mixed))}
    assert len(found) == 1 and min(found) > 0


def test_low_rank_auxiliaries_keep_nothing_of_a_pass_but_x() -> None:
    model, ids = net(TextNet), inputs(TextNet, len(CUSTOMERS))
    sites = find_sites(model, ["gpt", "plain"])
    ours = Joint(Auxiliary(sites, AuxiliaryConfig(rank=2), dtype=torch.float64))
    unmerged = saved_bytes(model, Taps(model, sites, ours), ["c0"] * 8, ids)
    merged = saved_bytes(model, Taps(model, sites, ours, merged=True), ["c0"] * 8, ids)
    assert unmerged == merged > 0


def test_pairs_outlive_the_pass_and_nothing_else_does() -> None:
    model, ids = net(TextNet), inputs(TextNet, 2)
    sites = find_sites(model, "plain")
    seen: list[weakref.ref] = []
    handle = model.get_submodule("plain").register_forward_hook(
        lambda module, args, output: seen.extend([weakref.ref(args[0]), weakref.ref(output)])
    )
    with Taps(model, sites, Joint(Auxiliary(sites, dtype=torch.float64))) as taps:
        with taps.batch(mask=torch.ones(2, 6)) as batch:
            row_losses(model(ids)).sum().backward()
        pairs = batch.pairs()
        del batch
        gc.collect()
        assert [reference() for reference in seen] == [None, None]
    handle.remove()
    assert pairs["joint"]["plain"].x.shape == (12, 5)
