"""Passes of a language model for many customers, against taps and losses that are written out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from ot_ray.cola import (
    Alone,
    Auxiliary,
    AuxiliaryConfig,
    BasePass,
    Collaboration,
    CustomerRows,
    Joint,
    Merging,
    Mode,
    Pair,
    Taps,
    customers_loss,
    find_sites,
)
from ot_ray.errors import GradientLearningError, SiteError
from tests.fixtures.models import tiny_model, tokens

SITES = {
    "gpt2": ("*.c_attn", "*.mlp.c_proj"),
    "llama": ("*.q_proj", "*.v_proj", "*.down_proj"),
    "opt": ("*.k_proj", "*.fc1", "*.fc2"),
}
CUSTOMERS = ("bob", "ada", None, "bob", "cyd")
LENGTHS = (12, 7, 12, 3, 9)
CLOSE = {"rtol": 1e-4, "atol": 1e-6}


def model_of(model_type: str) -> PreTrainedModel:
    return tiny_model(model_type, depth=2)


def auxiliaries(sites: dict) -> dict[str, Auxiliary]:
    kinds = {"ada": ("low_rank", 2), "bob": ("low_rank", 3), "cyd": ("mlp", 2)}
    made = {}
    for seed, (name, (kind, rank)) in enumerate(kinds.items()):
        made[name] = Auxiliary(sites, AuxiliaryConfig(kind=kind, rank=rank, seed=seed))
        generator = torch.Generator().manual_seed(seed)
        for tensor in made[name].tensors.values():
            tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=0.05)
    return made


def padded(customers: tuple[str | None, ...] = CUSTOMERS, lengths: tuple[int, ...] = LENGTHS) -> CustomerRows:
    """Rows of those lengths; on padding stand tokens and labels that must not matter."""
    ids = tokens(len(customers))
    mask = torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None]
    labels = ids.clone()
    labels[0, 4:6] = -100
    return CustomerRows(ids, customers, labels, mask)


def written_out(model: PreTrainedModel, rows: CustomerRows, mode: Mode) -> tuple[dict, dict]:
    """Pairs and each customer's loss from the model's own logits."""
    assert rows.mask is not None
    sites = next(iter(mode.auxiliaries.values())).sites
    with Taps(model, sites, mode) as taps, taps.batch(rows.customers, rows.mask) as batch:
        # Right padding hides behind the causal mask.
        logits = model(input_ids=rows.input_ids).logits
        customers_loss(logits, rows.labels, rows.customers, rows.mask).backward()
    losses: dict[str, list[Tensor]] = {}
    for row, name in enumerate(rows.customers):
        own = rows.labels[row, 1 : int(rows.mask[row].sum())]
        each = F.cross_entropy(logits[row, : len(own)].detach(), own, ignore_index=-100, reduction="none")
        if name is not None:
            losses.setdefault(name, []).append(each[own != -100])
    return batch.pairs(), {name: torch.cat(each) for name, each in losses.items()}


def require_equal(found: dict[str, dict[str, Pair]], wanted: dict[str, dict[str, Pair]]) -> None:
    assert found.keys() == wanted.keys()
    for name, pairs in wanted.items():
        assert found[name].keys() == pairs.keys()
        for site, pair in pairs.items():
            assert pair.g.abs().max() > 1e-6
            torch.testing.assert_close(found[name][site].x, pair.x, **CLOSE)
            torch.testing.assert_close(found[name][site].g, pair.g, **CLOSE)


@pytest.mark.parametrize("mode", ["alone", "collaboration", "joint"])
@pytest.mark.parametrize("model_type", SITES)
def test_a_pass_is_the_models_own(model_type: str, mode: str) -> None:
    model, rows = model_of(model_type), padded()
    own = auxiliaries(find_sites(model, SITES[model_type]))
    chosen = {"alone": Alone(own), "collaboration": Collaboration(own), "joint": Joint(own["ada"])}[mode]
    wanted, each = written_out(model, rows, chosen)
    # Every chunk of the head's has rows of several customers, or parts of them.
    passed = BasePass(model, own["ada"].sites, head_tokens=5)(rows, chosen)
    require_equal(passed.pairs, wanted)
    assert passed.tokens == {"bob": 11 - 2 + 2, "ada": 6, "cyd": 8} == rows.learnt()
    assert passed.tokens == {name: len(nll) for name, nll in each.items()}
    assert passed.losses == pytest.approx({name: float(nll.mean()) for name, nll in each.items()}, rel=1e-5)
    counts = {name: sum(p.x.shape[0] for p in pairs.values()) / len(pairs) for name, pairs in passed.pairs.items()}
    whole = {"bob": 15, "ada": 7, "cyd": 9}
    # What stands in rows of nobody's is the shared auxiliary's business in mode joint alone; it has no gradient.
    assert counts == ({"joint": sum(LENGTHS)} if mode == "joint" else whole)


@pytest.mark.parametrize("model_type", SITES)
def test_losses_alone_are_the_passes(model_type: str) -> None:
    model, rows = model_of(model_type), padded()
    own = auxiliaries(find_sites(model, SITES[model_type]))
    base = BasePass(model, own["ada"].sites, head_tokens=7)
    passed = base(rows, Alone(own))
    losses, counts = base.losses(rows, Alone(own))
    assert losses == pytest.approx(passed.losses, rel=1e-6) and counts == passed.tokens
    untouched, _ = base.losses(rows, Alone({name: Auxiliary(own["ada"].sites) for name in own}))
    assert all(abs(untouched[name] - losses[name]) > 1e-4 for name in own)


def test_what_stands_on_padding_does_not_matter() -> None:
    model, rows = model_of("llama"), padded()
    assert rows.mask is not None
    own = auxiliaries(find_sites(model, SITES["llama"]))
    base, mode = BasePass(model, own["ada"].sites), Alone(own)
    passed = base(rows, mode)
    other = CustomerRows(rows.input_ids.where(rows.mask, 3), rows.customers, rows.labels.where(rows.mask, 5), rows.mask)
    again = base(other, mode)
    assert again.losses == passed.losses and again.tokens == passed.tokens
    for name, pairs in passed.pairs.items():
        for site, pair in pairs.items():
            assert torch.equal(pair.x, again.pairs[name][site].x) and torch.equal(pair.g, again.pairs[name][site].g)


def test_parts_of_a_batch_add_up_to_it() -> None:
    model, rows = model_of("opt"), padded()
    assert rows.mask is not None
    own = auxiliaries(find_sites(model, SITES["opt"]))
    base, mode = BasePass(model, own["ada"].sites), Alone(own)
    whole = base(rows, mode)
    parts = []
    for part in (slice(0, 2), slice(2, 5)):
        some = CustomerRows(rows.input_ids[part], rows.customers[part], rows.labels[part], rows.mask[part])
        parts.append(base(some, mode, learnt=rows.learnt()))
    # Bob has rows in both.
    for name, pairs in whole.pairs.items():
        for site, pair in pairs.items():
            there = [part.pairs[name][site] for part in parts if name in part.pairs]
            torch.testing.assert_close(torch.cat([p.x for p in there]), pair.x, **CLOSE)
            torch.testing.assert_close(torch.cat([p.g for p in there]), pair.g, **CLOSE)
    nll = {name: sum(p.losses.get(name, 0.0) * p.tokens.get(name, 0) for p in parts) for name in own}
    assert {n: total / whole.tokens[n] for n, total in nll.items()} == pytest.approx(whole.losses, rel=1e-5)


def test_a_merged_pass_is_the_unmerged_one() -> None:
    model, rows = model_of("gpt2"), padded()
    sites = find_sites(model, SITES["gpt2"])
    own = {name: auxiliary for name, auxiliary in auxiliaries(sites).items() if name != "cyd"}
    rows = CustomerRows(rows.input_ids[:4], rows.customers[:4], rows.labels[:4], rows.mask[:4])  # type: ignore[index]
    base, mode = BasePass(model, sites), Collaboration(own, {"ada": 0.3, "bob": 0.9})
    unmerged = base(rows, mode)
    with Merging(model, sites) as merging:
        merging.merge(mode.summands())
        merged = base(rows, mode, merged=True)
    require_equal(merged.pairs, unmerged.pairs)
    assert merged.losses == pytest.approx(unmerged.losses, rel=1e-5)


def test_a_customer_without_a_label_has_pairs_without_gradients() -> None:
    model, rows = model_of("llama"), padded()
    labels = rows.labels.clone()
    labels[1] = -100
    rows = CustomerRows(rows.input_ids, rows.customers, labels, rows.mask)
    own = auxiliaries(find_sites(model, SITES["llama"]))
    passed = BasePass(model, own["ada"].sites)(rows, Alone(own))
    assert passed.losses["ada"] == 0.0 and passed.tokens["ada"] == 0
    assert all(not pair.g.any() for pair in passed.pairs["ada"].values())
    assert all(pair.g.any() for pair in passed.pairs["bob"].values())


def test_documents_packed_into_a_row_do_not_see_each_other() -> None:
    model = model_of("llama")
    own = auxiliaries(find_sites(model, SITES["llama"]))
    base, mode, ids = BasePass(model, own["ada"].sites), Alone(own), tokens(1)
    labels = ids.clone()
    labels[0, 5] = -100
    positions = torch.cat([torch.arange(5), torch.arange(ids.shape[1] - 5)])[None]
    packed = base(CustomerRows(ids, ("ada",), labels, position_ids=positions), mode)
    parts = [
        base(CustomerRows(ids[:, part], ("ada",), ids[:, part]), mode, learnt=packed.tokens)
        for part in (slice(0, 5), slice(5, None))
    ]
    for site, pair in packed.pairs["ada"].items():
        torch.testing.assert_close(pair.x, torch.cat([p.pairs["ada"][site].x for p in parts]), **CLOSE)
        torch.testing.assert_close(pair.g, torch.cat([p.pairs["ada"][site].g for p in parts]), **CLOSE)


def test_rows_that_are_none_are_refused() -> None:
    ids = tokens(2)
    for change, said in (
        ({"customers": ("ada",)}, "customers 1"),
        ({"labels": ids[:1]}, r"'labels': \[1, 12\]"),
        ({"mask": torch.ones(2, 3)}, r"'mask': \[2, 3\]"),
        ({"mask": torch.arange(12).flip(0).expand(2, 12) < 4}, "padding before a token"),
    ):
        with pytest.raises(GradientLearningError, match=said):
            CustomerRows(**{"input_ids": ids, "customers": ("ada", "bob"), "labels": ids, **change})
    model = model_of("llama")
    own = auxiliaries(find_sites(model, SITES["llama"]))
    rows = CustomerRows(ids, ("ada", "eve"), ids)
    with pytest.raises(GradientLearningError, match="rows name eve"):
        BasePass(model, own["ada"].sites)(rows, Alone(own))
    few = dict(list(own["ada"].sites.items())[:1])
    with pytest.raises(SiteError, match="not tapped"):
        BasePass(model, few)(CustomerRows(ids, ("ada", "bob"), ids), Alone(own))


@pytest.mark.parametrize("side", ["left", "right"])
def test_labels_on_padding_are_not_learnt(side: str) -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 6, 9), torch.randint(9, (2, 6))
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[1, slice(2) if side == "left" else slice(4, None)] = False
    whole = F.cross_entropy(logits[0, :-1], labels[0, 1:])
    kept = slice(2, 6) if side == "left" else slice(0, 4)
    short = F.cross_entropy(logits[1, kept][:-1], labels[1, kept][1:])
    torch.testing.assert_close(customers_loss(logits, labels, ["ada", "bob"], mask), whole + short)
    torch.testing.assert_close(customers_loss(logits, labels, ["ada", "bob"], mask.long()), whole + short)
    # Together they have one mean.
    both = (whole * 5 + short * 3) / 8
    torch.testing.assert_close(customers_loss(logits, labels, ["ada", "ada"], mask), both)
    torch.testing.assert_close(customers_loss(logits, labels, ["ada", None], mask), whole)
