"""Files of gradients: what one pass yields for one customer, as safetensors, whole or coded in fewer bits.

How files travel is left to the service and to ot_ray.client, fitting to fitting.py."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as load_bytes
from torch import Tensor

from ot_ray.cola.codings import CODINGS, SCALED, decode, encode
from ot_ray.cola.pairs import Pair
from ot_ray.cola.sites import Site
from ot_ray.errors import GradientLearningError, NotFiniteError

_KEY = "gradients"
_LENGTH = 8  # bytes at the start, which hold the header's length
_LONGEST = 64 * 2**20  # bytes of a header
_ROOM = 64  # bytes that the header may grow by, once the errors are known
_DTYPES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int8: "I8",
    torch.float8_e4m3fn: "F8_E4M3",
}
_PLAIN = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class GradientFile:
    """What a file of gradients holds, decoded."""

    session: str
    """Whose pass it was."""
    number: int
    """Of the operation that made the pass."""
    version: int
    """Of the auxiliary that the rows went through."""
    coding: str
    """One of `CODINGS`."""
    errors: dict[str, float]
    """What coding cost: the root of the mean square of the error by that of the values, over all of `x` and of `g`."""
    pairs: dict[str, Pair]
    """By site."""

    def require(self, session: str, number: int, version: int) -> None:
        """Refuse gradients of another session, another step, or another version of the auxiliary.

        Raises:
            GradientLearningError: names what differs.
        """
        for name, found, wanted in (
            ("session", self.session, session),
            ("number", self.number, number),
            ("version", self.version, version),
        ):
            if found != wanted:
                raise GradientLearningError(
                    f"the gradients are of {name} {found!r}, not {wanted!r}; give those of the step that is fitted"
                )


def write_gradients(
    path: Path | str, pairs: Mapping[str, Pair], *, session: str, number: int, version: int, coding: str = "none"
) -> dict[str, float]:
    """Write the pairs of one pass, tensor by tensor; where sites see one and the same x, it is written once.

    Args:
        path: the file; one that is there is replaced, and none is left where writing fails.
        pairs: by site, on any device.
        session, number, version: as in `GradientFile`.
        coding: one of `CODINGS`.

    Returns:
        The errors of `x` and `g`, measured; empty where nothing is rounded.

    Raises:
        GradientLearningError: an unknown coding, or values of a type that is not written.
        NotFiniteError: x or g holds NaN or infinity, or does once it is rounded.
    """
    if coding not in CODINGS:
        raise GradientLearningError(f"coding is {coding!r}; use one of {', '.join(CODINGS)}")
    values, same_x = _values(pairs)
    about = {"session": session, "number": number, "version": version, "coding": coding, "same_x": same_x}
    table = _table(values, coding)
    room = len(_header(table, {**about, "errors": {"x": 0.0, "g": 0.0}})) + _ROOM
    room += -room % 8
    path = Path(path)
    try:
        with path.open("wb") as file:
            errors = _write_values(file, table, values, coding, _LENGTH + room)
            file.seek(0)
            # Readers take spaces behind the header for a part of it.
            file.write(room.to_bytes(_LENGTH, "little") + _header(table, {**about, "errors": errors}).ljust(room))
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return errors


def read_gradients(source: Path | str | bytes, sites: Mapping[str, Site]) -> GradientFile:
    """Read a file of gradients, and check it for the sites that it should be of.

    Args:
        source: the file, or its bytes.
        sites: by name; the file has a pair for each of them, and no other.

    Returns:
        Its contents. Whose they are is to be checked by `GradientFile.require`.

    Raises:
        GradientLearningError: it is no such file, or its names, types or shapes are not those of the sites.
        NotFiniteError: x or g holds NaN or infinity.
        OSError: the file cannot be read.
    """
    try:
        about = _about(source)
        with _opened(source) as (names, tensor_of):
            pairs = _pairs(names, tensor_of, about["coding"], about["same_x"], sites)
    except (SafetensorError, RecursionError) as error:
        raise GradientLearningError(f"this is no file of gradients: {error}; download it again") from None
    return GradientFile(about["session"], about["number"], about["version"], about["coding"], about["errors"], pairs)


def _values(pairs: Mapping[str, Pair]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors to write by their names, and by site the one whose x is the same."""
    values: dict[str, Tensor] = {}
    first: dict[Any, str] = {}
    same_x: dict[str, str] = {}
    for site, pair in pairs.items():
        x = pair.x
        place = first.setdefault((x.data_ptr(), x.shape, x.stride(), x.dtype, x.device), site)
        if place == site:
            values[f"x.{site}"] = x
        else:
            same_x[site] = place
        values[f"g.{site}"] = pair.g
    return values, same_x


def _table(values: Mapping[str, Tensor], coding: str) -> dict[str, dict[str, Any]]:
    """The header's lines. Wide types come first, so that each tensor starts at a multiple of its own width."""
    kinds: dict[str, tuple[torch.dtype, list[int]]] = {}
    for name, tensor in values.items():
        if tensor.dtype not in _PLAIN and tensor.dtype != torch.int64:
            raise GradientLearningError(f"{name} is {tensor.dtype}; give floats, or int64 ids")
        coded = coding != "none" and tensor.is_floating_point()
        kinds[name] = (SCALED.get(coding, torch.bfloat16) if coded else tensor.dtype, [*tensor.shape])
        if coded and coding in SCALED:
            kinds[f"scale.{name}"] = (torch.float32, [len(tensor)])
    table, start = {}, 0
    for name, (dtype, shape) in sorted(kinds.items(), key=lambda item: -item[1][0].itemsize):
        end = start + math.prod(shape) * dtype.itemsize
        table[name] = {"dtype": _DTYPES[dtype], "shape": shape, "data_offsets": [start, end]}
        start = end
    return table


def _header(table: Mapping[str, Any], about: Mapping[str, Any]) -> bytes:
    return json.dumps({"__metadata__": {_KEY: json.dumps(about)}, **table}).encode()


def _write_values(
    file: IO[bytes], table: Mapping[str, Any], values: Mapping[str, Tensor], coding: str, start: int
) -> dict[str, float]:
    """Write every tensor at its place; the errors."""
    lost, whole = {"x": 0.0, "g": 0.0}, {"x": 0.0, "g": 0.0}
    for name, tensor in values.items():
        tensor = tensor.detach()
        if not tensor.isfinite().all():
            raise NotFiniteError(f"{name[0]} at site {name[2:]} holds NaN or infinity; the batch is refused")
        coded, scales = encode(tensor, coding)
        for key, part in ((name, coded), (f"scale.{name}", scales)):
            if part is not None:
                file.seek(start + table[key]["data_offsets"][0])
                file.write(part.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        if coding != "none" and tensor.is_floating_point():
            precise = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
            lost[name[0]] += _square(decode(coded, scales).to(precise) - precise)
            whole[name[0]] += _square(tensor)
    if coding == "none":
        return {}
    # Rounded to figures that always fit into the header's room.
    errors = {side: float(f"{math.sqrt(lost[side] / whole[side]) if whole[side] else 0.0:.6g}") for side in lost}
    if not all(map(math.isfinite, errors.values())):
        raise NotFiniteError(f"values beyond {coding}'s range; use coding 'none', or scale the loss down")
    return errors


def _square(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) ** 2


def _about(source: Path | str | bytes) -> dict[str, Any]:
    """What the header says of the file, checked."""
    try:
        about = json.loads(json.loads(_header_of(source))["__metadata__"][_KEY])
        kinds = {"session": str, "number": int, "version": int, "coding": str, "same_x": dict, "errors": dict}
        whole = about.keys() == kinds.keys() and all(type(about[name]) is kind for name, kind in kinds.items())
        texts = [*about["same_x"], *about["same_x"].values()]
        whole = whole and all(isinstance(value, str) for value in texts)
        whole = whole and all(type(value) is float and 0 <= value < math.inf for value in about["errors"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise GradientLearningError(f"this is no file of gradients: {error!r}; download it again") from None
    if not whole or about["coding"] not in CODINGS:
        raise GradientLearningError("the file's header is none of a file of gradients; update ot_ray")
    return about


def _header_of(source: Path | str | bytes) -> bytes:
    with BytesIO(source) if isinstance(source, bytes) else Path(source).open("rb") as file:
        return file.read(min(int.from_bytes(file.read(_LENGTH), "little"), _LONGEST))


@contextmanager
def _opened(source: Path | str | bytes) -> Iterator[tuple[set[str], Callable[[str], Tensor]]]:
    """Names of the tensors, and what gives each."""
    if isinstance(source, bytes):
        tensors = load_bytes(source)
        yield set(tensors), tensors.__getitem__
        return
    with safe_open(source, framework="pt") as file:
        yield set(file.keys()), file.get_tensor


def _pairs(
    names: set[str],
    tensor_of: Callable[[str], Tensor],
    coding: str,
    same_x: Mapping[str, str],
    sites: Mapping[str, Site],
) -> dict[str, Pair]:
    own = {site: same_x.get(site, site) for site in sites}
    wanted = {f"x.{place}" for place in own.values()} | {f"g.{site}" for site in sites}
    if coding in SCALED:
        ids = {f"x.{name}" for name, site in sites.items() if site.layout == "embedding"}
        wanted |= {f"scale.{name}" for name in wanted - ids}
    if names != wanted:
        odd = sorted(names ^ wanted)[0]
        raise GradientLearningError(
            f"the file {'lacks' if odd in wanted else 'has'} {odd[:200]!r}; its sites are not those of the session"
        )
    read: dict[str, Tensor] = {}
    for name in sorted(wanted):
        if not name.startswith("scale."):
            read[name] = _decoded(name, tensor_of, coding, f"scale.{name}" in wanted)
    for name, place in own.items():
        _check(sites[name], read[f"x.{place}"], read[f"g.{name}"])
    return {name: Pair(read[f"x.{place}"], read[f"g.{name}"]) for name, place in own.items()}


def _decoded(name: str, tensor_of: Callable[[str], Tensor], coding: str, scaled: bool) -> Tensor:
    coded = tensor_of(name)
    scales = tensor_of(f"scale.{name}") if scaled else None
    if scales is not None and (
        coded.dim() < 2
        or coded.dtype != SCALED[coding]
        or scales.dtype != torch.float32
        or scales.shape != coded.shape[:1]
    ):
        raise GradientLearningError(
            f"{name[:200]} is {coded.dtype} {[*coded.shape]} with scales {scales.dtype} {[*scales.shape]}, which is no "
            f"{coding}; download it again"
        )
    if coded.dtype not in (*_PLAIN, torch.int64, SCALED.get(coding)):
        raise GradientLearningError(f"{name[:200]} is {coded.dtype}, which no {coding} has; download it again")
    values = decode(coded, scales)
    if values.is_floating_point() and not values.isfinite().all():
        raise NotFiniteError(f"{name[0]} at site {name[2:202]} holds NaN or infinity; the batch is refused")
    return values


def _check(site: Site, x: Tensor, g: Tensor) -> None:
    """Refuse shapes and types that are not a site's. Spaces of a convolution are left to what fits them."""
    dims = 2 + len(site.kernel)
    if site.layout == "embedding":
        fits = x.dtype == torch.int64 and x.dim() == 1 and bool(((x >= 0) & (x < site.inputs)).all())
    else:
        fits = x.dtype in _PLAIN and x.dim() == dims and x.shape[1] == site.inputs
    fits = fits and g.dtype in _PLAIN and g.dim() == dims and g.shape[1] == site.outputs
    if not fits or len(x) != len(g) or not len(x):
        raise GradientLearningError(
            f"at site {site.name} x is {x.dtype} {[*x.shape]} and g {g.dtype} {[*g.shape]}, which are not those of "
            f"{site}; download them again"
        )
