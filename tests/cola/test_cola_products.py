"""Many auxiliaries in few products: each row against its own auxiliaries, one by one, by autograd in float64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import Tensor, nn

from ot_ray.cola import Alone, Auxiliary, AuxiliaryConfig, Collaboration, Joint, Mode, PerCustomer, Taps, find_sites
from ot_ray.cola import gradients as fitted_gradients
from ot_ray.errors import GradientLearningError
from tests.cola.inside import TextNet, inputs, net, row_losses

EXACT = {"rtol": 1e-10, "atol": 1e-12}
SUMS = Mapping[str, Sequence[tuple[float, Auxiliary]]]


def stirred(sites: dict, kind: str, rank: int, seed: int, dtype: torch.dtype = torch.float64) -> Auxiliary:
    made = Auxiliary(sites, AuxiliaryConfig(kind=kind, rank=rank, alpha=5.0, seed=seed), dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    for tensor in made.tensors.values():
        tensor.add_(torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype), alpha=0.3)
    return made


class OneByOne(nn.Module):
    """A site with the auxiliaries' own outputs added row by row; autograd sees their tensors."""

    def __init__(self, base: nn.Module, site: str, rows: Sequence[str | None], sums: SUMS) -> None:
        super().__init__()
        self.base, self.site, self.rows, self.sums = base, site, rows, sums

    def forward(self, x: Tensor) -> Tensor:
        each = []
        for row, name in enumerate(self.rows):
            output = self.base(x[row : row + 1])
            for share, auxiliary in self.sums.get(name, []) if name is not None else []:
                if self.site in auxiliary.sites:
                    output = output + share * auxiliary.delta(self.site, x[row : row + 1])
            each.append(output)
        return torch.cat(each)


def by_autograd(sites: dict, rows: Sequence[str | None], sums: SUMS, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Logits, and each row's loss with a graph to the auxiliaries' tensors."""
    twin = net(TextNet).requires_grad_(False)
    for site in sites:
        twin.set_submodule(site, OneByOne(twin.get_submodule(site), site, rows, sums))
    for summands in sums.values():
        for _, auxiliary in summands:
            for tensor in auxiliary.tensors.values():
                tensor.requires_grad_(True)
    logits = twin(ids)
    return logits, row_losses(logits)


def require_parity(mode: Mode, sums: SUMS, rows: Sequence[str | None], sites: dict) -> None:
    """Logits of all rows, and each owner's gradient by its own rows, are those of autograd."""
    ids, base = inputs(TextNet, len(rows)), net(TextNet)
    with Taps(base, find_sites(base, TextNet.patterns), mode) as taps, taps.batch(rows) as batch:
        logits = base(ids)
        row_losses(logits).sum().backward()
    wanted, losses = by_autograd(sites, rows, sums, ids)
    torch.testing.assert_close(logits, wanted, **EXACT)
    pairs = batch.pairs()
    assert sorted(pairs) == sorted({name for name in rows if name is not None})
    for name, own in pairs.items():
        auxiliary = mode.auxiliaries[name]
        mine = losses[[row for row, customer in enumerate(rows) if customer == name]].sum()
        expected = torch.autograd.grad(mine, list(auxiliary.tensors.values()), retain_graph=True)
        found = fitted_gradients(auxiliary, own)
        for tensor, gradient in zip(auxiliary.tensors, expected, strict=True):
            assert gradient.abs().max() > 1e-6
            torch.testing.assert_close(found[tensor], gradient, **EXACT)


ROWS = {
    "sorted, equal": ["ada", "ada", "bob", "bob", "cyd", "cyd"],
    "mixed": ["cyd", "ada", "bob", "bob", "ada", "bob"],
    "with nobody's": ["bob", None, "ada", "cyd", None, "ada"],
    "of one": ["bob", "bob"],
    "one and nobody": [None, "cyd", None],
}
KINDS = {
    "equal ranks": {"ada": ("low_rank", 2), "bob": ("low_rank", 2), "cyd": ("low_rank", 2)},
    # Two of these go together, padded; the third has a product of its own.
    "any ranks": {"ada": ("low_rank", 2), "bob": ("low_rank", 3), "cyd": ("low_rank", 9)},
    "any kinds": {"ada": ("mlp", 4), "bob": ("low_rank", 3), "cyd": ("linear", 1)},
}


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("kinds", KINDS)
def test_alone(kinds: str, rows: str) -> None:
    sites = find_sites(net(TextNet), TextNet.patterns)
    own = {name: stirred(sites, *KINDS[kinds][name], seed) for seed, name in enumerate(KINDS[kinds])}
    sums = {name: [(1.0, auxiliary)] for name, auxiliary in own.items()}
    require_parity(Alone(own), sums, ROWS[rows], sites)


@pytest.mark.parametrize("rows", ["mixed", "sorted, equal"])
@pytest.mark.parametrize("kind", ["low_rank", "linear", "mlp"])
def test_two_share_one_auxiliary(kind: str, rows: str) -> None:
    sites = find_sites(net(TextNet), TextNet.patterns)
    shared, other = stirred(sites, kind, 2, 1), stirred(sites, kind, 2, 2)
    own = {"ada": shared, "bob": shared, "cyd": other}
    sums = {name: [(1.0, auxiliary)] for name, auxiliary in own.items()}
    require_parity(PerCustomer(own, sums), sums, ROWS[rows], sites)


@pytest.mark.parametrize("rows", ["mixed", "with nobody's"])
@pytest.mark.parametrize("kinds", KINDS)
def test_a_group_collaborates_beside_one_that_is_alone(kinds: str, rows: str) -> None:
    sites = find_sites(net(TextNet), TextNet.patterns)
    own = {name: stirred(sites, *KINDS[kinds][name], seed) for seed, name in enumerate(KINDS[kinds])}
    together = [(0.6, own["ada"]), (-0.4, own["bob"])]
    sums = {"ada": together, "bob": list(together), "cyd": [(1.0, own["cyd"])]}
    mode = PerCustomer(own, sums)
    assert [mode.share(name) for name in ("ada", "bob", "cyd")] == [0.6, -0.4, 1.0]
    require_parity(mode, sums, ROWS[rows], sites)


def test_many_customers_in_one_sum_are_one_dense_product() -> None:
    sites = find_sites(net(TextNet), TextNet.patterns)
    names = ["ada", "bob", "cyd", *(f"c{i}" for i in range(9))]
    own = {name: stirred(sites, "low_rank", 3, seed) for seed, name in enumerate(names)}
    mean = [(1 / len(names), auxiliary) for auxiliary in own.values()]
    sums = dict.fromkeys(names, mean)
    rows = [*ROWS["mixed"], *names] * 3
    require_parity(Collaboration(own), sums, rows, sites)


def test_customers_have_sites_of_their_own() -> None:
    sites = find_sites(net(TextNet), TextNet.patterns)
    few = {name: site for name, site in sites.items() if name in ("table", "plain")}
    own = {"ada": stirred(few, "low_rank", 2, 0), "bob": stirred(sites, "low_rank", 2, 1)}
    own["cyd"] = stirred({"gpt": sites["gpt"]}, "linear", 1, 2)
    sums = {name: [(1.0, auxiliary)] for name, auxiliary in own.items()}
    require_parity(Alone(own), sums, ROWS["mixed"], sites)


@pytest.mark.parametrize("kind", ["low_rank", "mlp"])
def test_a_customers_auxiliary_that_broke_is_its_own_affair(kind: str) -> None:
    sites = find_sites(net(TextNet), ["gpt", "plain"])
    own = {name: stirred(sites, kind, 2, seed) for seed, name in enumerate(("ada", "bob", "cyd"))}
    ids, rows = inputs(TextNet, 6), ROWS["mixed"]

    def passed() -> tuple[Tensor, dict]:
        base = net(TextNet)
        with Taps(base, sites, Alone(own)) as taps, taps.batch(rows) as batch:
            logits = base(ids)
            row_losses(logits).sum().backward()
        return logits.detach(), batch.pairs()

    logits, pairs = passed()
    next(iter(own["bob"].tensors.values())).fill_(float("nan"))
    broken, of_broken = passed()
    for row, name in enumerate(rows):
        assert torch.equal(broken[row], logits[row]) == (name != "bob")
    for name in ("ada", "cyd"):
        for site, pair in of_broken[name].items():
            assert torch.equal(pair.x, pairs[name][site].x) and torch.equal(pair.g, pairs[name][site].g)


@pytest.mark.parametrize("kind", ["low_rank", "linear", "mlp"])
def test_a_fit_between_the_two_passes_is_found_out(kind: str) -> None:
    base = net(TextNet)
    sites = find_sites(base, ["gpt", "plain"])
    own = stirred(sites, kind, 2, 0)
    with Taps(base, sites, Joint(own)) as taps, taps.batch():
        loss = row_losses(base(inputs(TextNet))).sum()
        own.tensors[next(name for name in own.tensors if name.startswith("plain"))].add_(1.0)
        with pytest.raises(GradientLearningError, match="site plain changed between the forward and the backward"):
            loss.backward()


def test_rows_of_nobody_alone_are_the_bases() -> None:
    base, ids = net(TextNet), inputs(TextNet, 3)
    sites = find_sites(base, TextNet.patterns)
    for kind in ("low_rank", "mlp"):
        mode = Alone({"ada": stirred(sites, kind, 2, 0), "bob": stirred(sites, kind, 2, 1)})
        with Taps(base, sites, mode) as taps, taps.batch([None] * 3) as batch:
            logits = base(ids)
            row_losses(logits).sum().backward()
        assert batch.pairs() == {}
        assert torch.equal(logits, base(ids))


def test_outputs_have_the_auxiliarys_precision_under_autocast() -> None:
    base = net(TextNet).float()
    sites = find_sites(base, "plain")
    own = stirred(sites, "low_rank", 2, 0, torch.float32)
    x = torch.randn(2, 3, 5, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        found = Joint(own).delta("plain", x, None)
    assert found is not None and found.dtype == torch.float32
    torch.testing.assert_close(found, own.delta("plain", x.float()))
    with Taps(base, sites, Joint(own)) as taps, taps.batch() as batch, torch.autocast("cpu", torch.bfloat16):
        base(inputs(TextNet)).float().square().sum().backward()
    pair = batch.pairs()["joint"]["plain"]
    assert pair.x.shape == (24, 5) and pair.g.shape == (24, 6) and pair.g.isfinite().all()


def test_sites_that_see_one_x_share_its_tensor() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.left(x) * self.right(x)

    model = Twice()
    sites = find_sites(model, ["left", "right"])
    own = {name: Auxiliary(sites, AuxiliaryConfig(rank=2)) for name in ("ada", "bob")}
    with Taps(model, sites, Alone(own)) as taps, taps.batch(["bob", "ada", "bob"]) as batch:
        x = torch.randn(3, 5, 4)
        model(x).sum().backward()
    pairs = batch.pairs()
    for name, rows in (("ada", [1]), ("bob", [0, 2])):
        assert pairs[name]["left"].x is pairs[name]["right"].x
        assert torch.equal(pairs[name]["left"].x, x[rows].reshape(-1, 4))
        assert all(tensor.is_contiguous() for pair in pairs[name].values() for tensor in (pair.x, pair.g))
    # One tensor for all customers.
    assert pairs["ada"]["left"].x.untyped_storage().data_ptr() == pairs["bob"]["left"].x.untyped_storage().data_ptr()
