"""Files of gradients: every coding against arithmetic by hand, and everything that such a file must not be."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from ot_ray.cola import Auxiliary, AuxiliaryConfig, Pair, Site, gradients
from ot_ray.cola.codings import CODINGS, decode, encode
from ot_ray.cola.gradient_files import GradientFile, read_gradients, write_gradients
from ot_ray.errors import GradientLearningError, NotFiniteError

SITES = {
    site.name: site
    for site in (
        Site("table", "embedding", 11, 6, transposed=True),
        Site("layers.0.q", "linear", 6, 5),
        Site("layers.0.k", "linear", 6, 3),
        Site("conv", "conv", 6, 4, kernel=(3,), stride=(1,), padding=(1,), dilation=(1,)),
    )
}
ABOUT = {"session": "cola-1", "number": 3, "version": 2}


def pairs(dtype: torch.dtype = torch.float32, rows: int = 7) -> dict[str, Pair]:
    """One of every layout; q and k see the same x. Positions differ in size by many powers of ten."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        sizes = 10.0 ** torch.linspace(-6, 2, shape[0], dtype=torch.float64)
        return (values * sizes.reshape(-1, *[1] * (len(shape) - 1))).to(dtype)

    seen = drawn(rows, 6)
    return {
        "table": Pair(torch.randint(11, (rows,), generator=generator), drawn(rows, 6)),
        "layers.0.q": Pair(seen, drawn(rows, 5)),
        "layers.0.k": Pair(seen, drawn(rows, 3)),
        "conv": Pair(drawn(2, 6, 9), drawn(2, 4, 9)),
    }


def rounded(values: Tensor, coding: str) -> Tensor:
    """What a coding leaves of values, position by position, in float64."""
    if not values.is_floating_point() or coding == "none":
        return values
    if coding == "bfloat16":
        return values.bfloat16()
    found = values.double().clone()
    for place, row in enumerate(values.double()):
        if coding == "int8":
            step = row.abs().max().item() / 127
            found[place] = torch.tensor([round(v / step) * step for v in row.flatten().tolist()]).reshape(row.shape)
        else:
            step = row.abs().max().item() / 448
            found[place] = torch.tensor([_e4m3(v / step) * step for v in row.flatten().tolist()]).reshape(row.shape)
    return found


def _e4m3(value: float) -> float:
    # Three bits behind the first one, of which the smallest stands for 2**-6.
    if value == 0:
        return 0.0
    step = 2.0 ** (max(math.floor(math.log2(abs(value))), -6) - 3)
    return round(value / step) * step


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_without_a_coding_every_bit_is_kept(tmp_path: Path, dtype: torch.dtype) -> None:
    given = pairs(dtype)
    assert write_gradients(tmp_path / "file", given, **ABOUT) == {}
    for source in (tmp_path / "file", (tmp_path / "file").read_bytes()):
        file = read_gradients(source, SITES)
        assert (file.session, file.number, file.version, file.coding, file.errors) == ("cola-1", 3, 2, "none", {})
        for name, pair in given.items():
            for wanted, found in ((pair.x, file.pairs[name].x), (pair.g, file.pairs[name].g)):
                assert found.dtype == wanted.dtype and torch.equal(found, wanted), name


@pytest.mark.parametrize("coding", CODINGS[1:])
def test_codings_round_as_arithmetic_by_hand_does(tmp_path: Path, coding: str) -> None:
    given = pairs()
    errors = write_gradients(tmp_path / "file", given, **ABOUT, coding=coding)
    file = read_gradients(tmp_path / "file", SITES)
    assert (file.coding, file.errors) == (coding, errors)
    lost, whole = {"x": 0.0, "g": 0.0}, {"x": 0.0, "g": 0.0}
    for name, pair in given.items():
        for side, wanted, found in (("x", pair.x, file.pairs[name].x), ("g", pair.g, file.pairs[name].g)):
            torch.testing.assert_close(
                found.double(), rounded(wanted, coding).double(), rtol=1e-5, atol=0, msg=f"{side} {name}"
            )
            if wanted.is_floating_point() and not (side == "x" and name == "layers.0.k"):
                lost[side] += (found.double() - wanted.double()).square().sum().item()
                whole[side] += wanted.double().square().sum().item()
    measured = {side: math.sqrt(lost[side] / whole[side]) for side in lost}
    assert errors == pytest.approx(measured, rel=1e-4)
    # Of random values: half a step of 127, three bits, eight bits.
    bounds = {"bfloat16": (5e-4, 3e-3), "int8": (1e-3, 1e-2), "fp8": (1e-2, 5e-2)}[coding]
    assert all(bounds[0] < error < bounds[1] for error in errors.values())


@pytest.mark.parametrize(("coding", "share"), [("none", 1.0), ("bfloat16", 0.5), ("int8", 0.25), ("fp8", 0.25)])
def test_a_coding_makes_the_file_smaller(tmp_path: Path, coding: str, share: float) -> None:
    site = {"q": Site("q", "linear", 256, 256)}
    given = {"q": Pair(torch.randn(300, 256), torch.randn(300, 256))}
    write_gradients(tmp_path / "file", given, **ABOUT, coding=coding)
    whole = 2 * 300 * 256 * 4
    scales = 2 * 300 * 4 if coding in ("int8", "fp8") else 0
    assert 0 < (tmp_path / "file").stat().st_size - whole * share - scales < 2000
    assert len(read_gradients(tmp_path / "file", site).pairs["q"].x) == 300


def test_an_x_that_several_sites_see_is_written_once(tmp_path: Path) -> None:
    write_gradients(tmp_path / "file", pairs(), **ABOUT)
    with safe_open(tmp_path / "file", framework="pt") as file:
        names = set(file.keys())
    assert {name for name in names if name[0] == "x"} == {"x.table", "x.layers.0.q", "x.conv"}
    found = read_gradients(tmp_path / "file", SITES).pairs
    assert found["layers.0.k"].x is found["layers.0.q"].x


@pytest.mark.parametrize("kind", ["low_rank", "linear", "mlp"])
def test_what_is_read_is_what_is_fitted(tmp_path: Path, kind: str) -> None:
    given = pairs()
    auxiliary = Auxiliary(SITES, AuxiliaryConfig.model_validate({"kind": kind, "rank": 2}))
    with torch.no_grad():
        for tensor in auxiliary.tensors.values():
            tensor.add_(0.1)
    write_gradients(tmp_path / "file", given, **ABOUT)
    found = gradients(auxiliary, read_gradients(tmp_path / "file", SITES).pairs)
    for name, wanted in gradients(auxiliary, given).items():
        assert torch.equal(found[name], wanted), name


@pytest.mark.parametrize("coding", ["int8", "fp8"])
def test_positions_of_zeros_and_of_the_smallest_values(coding: str) -> None:
    values = torch.tensor([[0.0, 0.0], [1e-44, -1e-44], [3.4e38, -1e-38], [1e-30, 2e-30]])
    found = decode(*encode(values, coding))
    assert found.isfinite().all()
    assert found[0].tolist() == [0.0, 0.0]
    assert found[1].abs().max() <= 2e-44
    torch.testing.assert_close(found[2:, 0], values[2:, 0], rtol=0.04, atol=0)


@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_so_in_every_coding(coding: str, value: float) -> None:
    values = torch.ones(3, 4)
    values[1, 2] = value
    found = decode(*encode(values, coding))
    assert found.isfinite().all(dim=1).tolist() == [True, False, True]


@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize("side", ["x", "g"])
def test_what_is_not_finite_is_not_written(tmp_path: Path, coding: str, side: str) -> None:
    given = pairs()
    getattr(given["conv"], side)[1, 0, 3] = math.nan
    with pytest.raises(NotFiniteError, match=f"{side} at site conv holds NaN"):
        write_gradients(tmp_path / "file", given, **ABOUT, coding=coding)
    assert not (tmp_path / "file").exists()


def test_values_beyond_a_coding_s_range_are_not_written(tmp_path: Path) -> None:
    given = {"q": Pair(torch.ones(2, 3), torch.full((2, 3), 3.4e38))}
    with pytest.raises(NotFiniteError, match="beyond bfloat16's range"):
        write_gradients(tmp_path / "file", given, **ABOUT, coding="bfloat16")


def test_odd_orders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(GradientLearningError, match="coding is 'int4'; use one of none, bfloat16, int8, fp8"):
        write_gradients(tmp_path / "file", pairs(), **ABOUT, coding="int4")
    with pytest.raises(GradientLearningError, match=r"g\.q is torch\.int32"):
        write_gradients(tmp_path / "file", {"q": Pair(torch.ones(2, 3), torch.ones(2, 3).int())}, **ABOUT)
    assert not (tmp_path / "file").exists()


def test_gradients_of_another_step_are_refused(tmp_path: Path) -> None:
    write_gradients(tmp_path / "file", pairs(), **ABOUT)
    file = read_gradients(tmp_path / "file", SITES)
    file.require("cola-1", 3, 2)
    for given, named in (
        (("cola-2", 3, 2), "of session 'cola-1', not 'cola-2'"),
        (("cola-1", 4, 2), "of number 3, not 4"),
        (("cola-1", 3, 1), "of version 2, not 1"),
    ):
        with pytest.raises(GradientLearningError, match=named):
            file.require(*given)


def changed(tmp_path: Path, coding: str, change: Callable[[dict[str, Tensor]], object]) -> bytes:
    """A file of gradients whose tensors were changed."""
    write_gradients(tmp_path / "file", pairs(), **ABOUT, coding=coding)
    with safe_open(tmp_path / "file", framework="pt") as file:
        names, metadata = list(file.keys()), file.metadata()
        tensors = {name: file.get_tensor(name) for name in names}
    change(tensors)
    return save(tensors, metadata)


def _infinite(name: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors[name].view(-1).__setitem__(0, math.inf)


BAD: dict[str, tuple[str, Callable[[dict[str, Tensor]], object], type[Exception], str]] = {
    "missing": ("none", lambda t: t.pop("g.conv"), GradientLearningError, "lacks 'g.conv'"),
    "unknown": ("none", lambda t: t.update({"g.other": torch.ones(2)}), GradientLearningError, "has 'g.other'"),
    "no scale": ("int8", lambda t: t.pop("scale.g.conv"), GradientLearningError, "lacks 'scale.g.conv'"),
    "narrow x": ("none", lambda t: t.update({"x.layers.0.q": torch.ones(7, 5)}), GradientLearningError, "at site lay"),
    "narrow g": ("none", lambda t: t.update({"g.table": torch.ones(7, 5)}), GradientLearningError, "at site table"),
    "few g": ("none", lambda t: t.update({"g.layers.0.k": torch.ones(6, 3)}), GradientLearningError, "at site lay"),
    "none": ("none", lambda t: t.update({"x.conv": torch.ones(0, 6, 9), "g.conv": torch.ones(0, 4, 9)}),
             GradientLearningError, "at site conv"),
    "flat": ("none", lambda t: t.update({"g.conv": torch.ones(2, 4)}), GradientLearningError, "at site conv"),
    "an id too high": ("none", lambda t: t["x.table"].fill_(11), GradientLearningError, "at site table"),
    "an id below 0": ("int8", lambda t: t["x.table"].fill_(-1), GradientLearningError, "at site table"),
    "ids in float": ("none", lambda t: t.update({"x.table": torch.ones(7)}), GradientLearningError, "at site table"),
    "x of ids": ("none", lambda t: t.update({"x.conv": torch.ones(2, 6, 9).long()}), GradientLearningError, "at site"),
    "of bytes": ("none", lambda t: t.update({"g.conv": torch.ones(2, 4, 9).byte()}), GradientLearningError, "uint8"),
    "another coding": ("int8", lambda t: t.update({"g.conv": torch.ones(2, 4, 9)}), GradientLearningError, "no int8"),
    "wide scales": ("fp8", lambda t: t.update({"scale.g.conv": torch.ones(3)}), GradientLearningError, "no fp8"),
    "infinity": ("none", _infinite("g.conv"), NotFiniteError, "g at site conv"),
    "an infinite scale": ("int8", _infinite("scale.x.conv"), NotFiniteError, "x at site conv"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_files_that_do_not_fit_their_sites_are_refused(tmp_path: Path, case: str) -> None:
    coding, change, error, named = BAD[case]
    data = changed(tmp_path, coding, change)
    (tmp_path / "file").write_bytes(data)
    for source in (data, tmp_path / "file"):
        with pytest.raises(error, match=named):
            read_gradients(source, SITES)


def test_files_of_other_things_are_refused(tmp_path: Path) -> None:
    write_gradients(tmp_path / "file", pairs(), **ABOUT)
    whole = (tmp_path / "file").read_bytes()
    length = int.from_bytes(whole[:8], "little")
    about = json.loads(json.loads(whole[8 : 8 + length])["__metadata__"]["gradients"])

    def headed(**more: object) -> bytes:
        return save({"x.q": torch.ones(2, 2)}, {"gradients": json.dumps({**about, **more})})

    bad = [
        b"",
        b"no such file",
        b"\xff" * 64,
        whole[: length // 2],
        whole[:-1],
        whole + b"\0",
        save({"x": torch.ones(2)}),
        save({"x": torch.ones(2)}, {"gradients": "[]"}),
        save({"x": torch.ones(2)}, {"gradients": "[" * 100_000}),
        headed(number="3"),
        headed(number=True),
        headed(coding="int4"),
        headed(errors={"x": math.nan}),
        headed(errors={"x": math.inf}),
        headed(same_x={"layers.0.k": 1}),
        headed(more=1),
    ]
    for data in bad:
        (tmp_path / "bad").write_bytes(data)
        for source in (data, tmp_path / "bad"):
            with pytest.raises(GradientLearningError, match="of gradients"):
                read_gradients(source, SITES)


def test_a_file_says_what_it_is(tmp_path: Path) -> None:
    write_gradients(tmp_path / "file", pairs(), session="cola-é", number=2**40, version=0, coding="bfloat16")
    file = read_gradients(tmp_path / "file", SITES)
    assert isinstance(file, GradientFile)
    assert (file.session, file.number, file.version) == ("cola-é", 2**40, 0)
