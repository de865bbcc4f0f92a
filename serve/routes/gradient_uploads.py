"""An auxiliary that a customer fitted, on its way in: received, inspected like anything from outside, kept in float32.

Making it a session's auxiliary is an operation like others, and serve/gradients/'s."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from starlette.requests import ClientDisconnect, Request

from ot_ray.artifacts.safetensors_header import LENGTH_BYTES, MAX_HEADER, read_header
from ot_ray.cola import AuxiliaryConfig, Site, tensor_shapes
from ot_ray.errors import ArtifactError
from ot_ray.store.partial import disk_errors
from serve.catalogue.records import GradientSession
from serve.failures import ApiError
from serve.routes.gradient_model import site_of
from serve.routes.transfers import in_thread, spool

HEADER_ROOM = MAX_HEADER + LENGTH_BYTES
"""Bytes that a file may have beside its tensors."""
_TAKEN = {"F32": 4, "BF16": 2, "F16": 2}


@dataclass(frozen=True)
class Received:
    """A body on this machine's disk."""

    path: Path
    sha256: str


def sites_of(session: GradientSession) -> dict[str, Site]:
    """A session's sites by name."""
    return {site.name: site for site in map(site_of, session.settings["sites"])}


def shapes_of(session: GradientSession) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a session's auxiliary."""
    return tensor_shapes(sites_of(session), AuxiliaryConfig.model_validate(session.settings["auxiliary"]))


@asynccontextmanager
async def received(request: Request, most: int, folder: str | None) -> AsyncIterator[Received]:
    """A request's body as a file, until the end of the block.

    Args:
        most: bytes.
        folder: where the file lies; None takes the system's folder for temporary files.

    Raises:
        ApiError: it is larger, or broke off.
    """
    digest, size = hashlib.sha256(), 0
    with disk_errors("cannot keep an auxiliary"), await in_thread(spool, folder) as file:
        try:
            async for data in request.stream():
                size += len(data)
                if size > most:
                    raise ApiError(f"This session's auxiliary takes at most {most} bytes.", 413)
                digest.update(data)
                await in_thread(file.write, data)
        except ClientDisconnect:
            raise ApiError(f"The connection broke after {size} bytes; send the auxiliary again.") from None
        await in_thread(file.flush)
        yield Received(Path(file.name), digest.hexdigest())


def converted(path: Path, shapes: Mapping[str, tuple[int, ...]], target: Path) -> None:
    """Inspect an auxiliary's file, and write its tensors in float32.

    Args:
        shapes: of the tensors that it must hold, no more and no less.

    Raises:
        ApiError: the file is malformed, or a tensor missing, unknown, of another shape or type, or not finite.
    """
    try:
        header = read_header(path)
    except ArtifactError as error:
        raise _refused(str(error).replace(path.name, "the body")) from None
    for name in (*shapes, *header):
        if name not in header:
            raise _refused(f"tensor {name[:200]} is missing")
        if name not in shapes:
            raise _refused(f"tensor {name[:200]} is none of this session's auxiliary")
        if header[name].shape != shapes[name]:
            raise _refused(f"tensor {name[:200]} is {[*header[name].shape]}, not {[*shapes[name]]}")
        if header[name].dtype not in _TAKEN:
            raise _refused(f"tensor {name[:200]} has dtype {header[name].dtype}; use one of {', '.join(_TAKEN)}")
    tensors: dict[str, torch.Tensor] = {}
    try:
        with safe_open(path, "pt") as file:
            for name in shapes:
                tensors[name] = file.get_tensor(name).to(torch.float32)
                if not tensors[name].isfinite().all():
                    raise _refused(f"tensor {name[:200]} holds NaN or infinity")
    except SafetensorError as error:
        raise _refused(f"the body is no safetensors file: {error}") from None
    save_file(tensors, target)


def _refused(reason: str) -> ApiError:
    return ApiError(f"The auxiliary is refused: {reason}.", code="invalid_auxiliary", param="body")
