"""Which modules are sites, and what taps and modes refuse."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ot_ray.cola import Alone, Auxiliary, Collaboration, Joint, Taps, customers_loss, find_sites, gradients
from ot_ray.errors import GradientLearningError, MergeError, SiteError
from tests.cola.inside import ImageNet, TextNet, inputs, net, row_losses
from tests.fixtures.models import tiny_model, tokens


def test_patterns_choose_sites_in_the_models_order() -> None:
    model = tiny_model("llama", depth=2)
    assert [*find_sites(model, ["*.v_proj", "model.layers.0.self_attn.q_proj"])] == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.self_attn.v_proj",
        "model.layers.1.self_attn.v_proj",
    ]
    # Norms and blocks that a pattern meets are no sites.
    found = find_sites(model, "model.layers.1.*")
    assert len(found) == 7 and {site.layout for site in found.values()} == {"linear"}
    conv1d = find_sites(tiny_model("gpt2", depth=1), "*.c_attn")["transformer.h.0.attn.c_attn"]
    assert (conv1d.inputs, conv1d.outputs, conv1d.transposed) == (32, 96, True)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("*.q_prj", r"'\*\.q_prj' matches no module; the nearest that could be sites: .*q_proj"),
        ("model.layers.0.mlp.gate", "model.layers.0.mlp.gate_proj"),
        ("zzz", r"matches no module; the nearest that could be sites: model\.embed_tokens"),
        ("*norm", "matches model.layers.0.input_layernorm .LlamaRMSNorm., but no linear map"),
        ("model.layers.0.mlp", "model.layers.0.mlp is a LlamaMLP; a site is"),
    ],
)
def test_patterns_that_choose_nothing_are_refused(pattern: str, message: str) -> None:
    with pytest.raises(SiteError, match=message):
        find_sites(tiny_model("llama", depth=1), pattern)


def test_modules_that_do_more_are_no_sites() -> None:
    model = nn.ModuleDict(
        {
            "grouped": nn.Conv1d(4, 4, 1, groups=2),
            "mirrored": nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect"),
            "bounded": nn.Embedding(3, 2, max_norm=1.0),
        }
    )
    for name in model:
        with pytest.raises(SiteError, match=name):
            find_sites(model, name)
    # OPT's positions are an embedding that changes its input.
    with pytest.raises(SiteError, match="more than look up"):
        find_sites(tiny_model("opt", depth=1), "model.decoder.embed_positions")


def test_rows_that_do_not_fit_are_refused() -> None:
    model = net(TextNet)
    sites = find_sites(model, "plain")
    ours = {name: Auxiliary(sites, dtype=torch.float64) for name in ("ada", "bob")}
    ids = inputs(TextNet, 3)
    with Taps(model, sites, Alone(ours)) as taps:
        with pytest.raises(GradientLearningError, match="outside a batch"):
            model(ids)
        for rows, mask, message in [
            (None, None, "does not say whose"),
            ([], None, "nobody; the customers are ada, bob"),
            (["ada", "eve"], None, "rows name eve; the customers are ada, bob"),
            (["ada"], torch.ones(3, 6), "name 1 customers, the mask has 3"),
            (["ada"], torch.ones(3), r"the mask is \[3\]"),
        ]:
            with pytest.raises(GradientLearningError, match=message), taps.batch(rows, mask):
                pass
        with taps.batch(["ada"] * 2), pytest.raises(GradientLearningError, match="not the batch's 2 rows"):
            model(ids)
        with taps.batch(["ada"] * 3, torch.ones(3, 5)):
            loss = row_losses(model(ids)).sum()
            with pytest.raises(GradientLearningError, match="6 positions, the mask has 5"):
                loss.backward()
        with taps.batch(["ada"] * 3), pytest.raises(GradientLearningError, match="one at a time"), taps.batch(["bob"]):
            pass
        with pytest.raises(GradientLearningError, match="open already"), taps:
            pass
    with pytest.raises(GradientLearningError, match="open taps"), taps.batch(["ada"]):
        pass
    with pytest.raises(GradientLearningError, match="2 customers, the batch has 3"):
        customers_loss(torch.zeros(3, 2, 4), torch.zeros(3, 2, dtype=torch.int64), ["ada", "bob"])


def test_gradients_that_did_not_come_are_missed() -> None:
    model = net(TextNet)
    sites = find_sites(model, TextNet.patterns)
    with Taps(model, sites, Joint(Auxiliary(sites, dtype=torch.float64))) as taps:
        with taps.batch() as batch:
            model(inputs(TextNet))
        with pytest.raises(GradientLearningError, match="no gradient came to site gpt and 3 more"):
            batch.pairs()
        with taps.batch() as batch, torch.no_grad():
            model(inputs(TextNet))
        with pytest.raises(GradientLearningError, match="no gradient came"):
            batch.pairs()


def test_passes_of_one_batch_add_up() -> None:
    model = net(ImageNet)
    sites = find_sites(model, ImageNet.patterns)
    images = inputs(ImageNet, 4)
    with Taps(model, sites, Joint(Auxiliary(sites, dtype=torch.float64))) as taps:
        with taps.batch(["ada", "ada"]) as batch:
            for half in images.split(2):
                row_losses(model(half)).sum().backward()
        pairs = batch.pairs()["joint"]
    assert pairs["first"].x.shape == (4, 3, 8, 8) and pairs["last"].x.shape == (4, 4)
    assert torch.equal(pairs["first"].x, images)


def test_taps_ask_for_every_site_of_an_auxiliary() -> None:
    model = net(TextNet)
    few, all_of_them = find_sites(model, "plain"), find_sites(model, TextNet.patterns)
    with pytest.raises(SiteError, match="has site table, which is not tapped"):
        Taps(model, few, Joint(Auxiliary(all_of_them)))
    with pytest.raises(SiteError, match="no module plain"):
        Taps(nn.Linear(2, 2), few, Joint(Auxiliary(few)))
    # The other way round, a customer may have fewer sites than another.
    mode = Alone({"ada": Auxiliary(few, dtype=torch.float64), "bob": Auxiliary(all_of_them, dtype=torch.float64)})
    with Taps(model, all_of_them, mode) as taps, taps.batch(["ada", "bob", "ada"]) as batch:
        row_losses(model(inputs(TextNet, 3))).sum().backward()
    assert {name: sorted(pairs) for name, pairs in batch.pairs().items()} == {
        "ada": ["plain"],
        "bob": sorted(all_of_them),
    }


def test_batch_norms_do_not_mix_customers() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    sites = find_sites(model, "0")
    mode = Alone({"ada": Auxiliary(sites), "bob": Auxiliary(sites)})
    with Taps(model, sites, mode) as taps:
        with (
            pytest.raises(GradientLearningError, match="1 is a batch norm in training mode"),
            taps.batch(["ada", "bob"]),
        ):
            pass
        model.eval()
        with taps.batch(["ada", "bob"]) as batch:
            model(torch.randn(2, 3)).sum().backward()
        assert sorted(batch.pairs()) == ["ada", "bob"]


def test_modes_refuse_what_does_not_fit() -> None:
    sites = find_sites(net(TextNet), "plain")
    ours = {name: Auxiliary(sites) for name in ("ada", "bob")}
    with pytest.raises(GradientLearningError, match="no auxiliaries"):
        Alone({})
    with pytest.raises(GradientLearningError, match=r"weights are for \['ada'\]"):
        Collaboration(ours, {"ada": 1.0})
    with pytest.raises(GradientLearningError, match="finite"):
        Collaboration(ours, {"ada": 1.0, "bob": float("nan")})
    with pytest.raises(MergeError, match="2 customers' rows need weights of their own"):
        Taps(net(TextNet), sites, Alone(ours), merged=True)
    assert Alone({"ada": ours["ada"]}).summands() == [(1.0, ours["ada"])]


def test_pairs_go_where_they_are_to_be_fitted() -> None:
    model = net(ImageNet)
    sites = find_sites(model, ImageNet.patterns)
    # The device that stands for any other one.
    with Taps(model, sites, Joint(Auxiliary(sites, dtype=torch.float64)), device="meta") as taps, taps.batch() as batch:
        row_losses(model(inputs(ImageNet, 2))).sum().backward()
    for site, pair in batch.pairs()["joint"].items():
        assert pair.x.is_meta and pair.g.is_meta
        assert pair.x.shape[1] == sites[site].inputs and pair.g.shape[1] == sites[site].outputs


def test_a_base_in_bfloat16_keeps_its_precision() -> None:
    model = tiny_model("llama", depth=1).bfloat16()
    sites = find_sites(model, "*_proj")
    ours = Auxiliary(sites)
    for tensor in ours.tensors.values():
        tensor.add_(0.01)
    with torch.no_grad():
        base = model(input_ids=tokens(2)).logits
    with Taps(model, sites, Alone({"ada": ours})) as taps, taps.batch(["ada", None]) as batch:
        logits = model(input_ids=tokens(2)).logits
        logits.float().square().mean().backward()
    assert logits.dtype == torch.bfloat16
    assert not torch.equal(logits[0], base[0]) and torch.equal(logits[1], base[1])
    pairs = batch.pairs()["ada"]
    assert {tensor.dtype for pair in pairs.values() for tensor in (pair.x, pair.g)} == {torch.bfloat16}
    assert {gradient.dtype for gradient in gradients(ours, pairs).values()} == {torch.float32}


def test_parameters_get_back_what_they_had_when_a_pass_breaks() -> None:
    model = net(TextNet)
    model.gpt.requires_grad_(False)
    sites = find_sites(model, "plain")
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    taps = Taps(model, sites, Joint(Auxiliary(sites, dtype=torch.float64)))
    with taps:
        assert not any(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(IndexError), taps, taps.batch():
        model(inputs(TextNet) + 100)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before
    ids = inputs(TextNet)
    model(ids).sum().backward()
    assert model.plain.weight.grad is not None
    # Taps may be opened again.
    with taps, taps.batch() as batch:
        row_losses(model(ids)).sum().backward()
    assert batch.pairs()["joint"]["plain"].g.any()
