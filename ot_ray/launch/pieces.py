"""Independent pieces of work as Ray tasks, side by side: a skin over functions that know nothing of Ray.

A piece that fails takes nothing with it but those that wait for it; keeping results is the functions' affair."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ot_ray.errors import OTRayError
from ot_ray.launch.devices import gpu_visibility
from ot_ray.launch.failures import first_line


@dataclass(frozen=True)
class Piece:
    """One call of a function on some machine of the cluster."""

    name: str
    """One of its own; for messages."""
    function: Callable[[dict[str, Any]], Any]
    """Importable on the workers."""
    payload: dict[str, Any]
    """Plain values."""
    after: tuple[str, ...] = ()
    """Earlier pieces that must have succeeded before this one begins."""


def run_pieces(
    pieces: Sequence[Piece],
    resources: Mapping[str, float],
    done: Callable[[Piece, Any], None],
    environment: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Run pieces as the cluster, to which this process is connected, has room for them.

    Args:
        resources: of each, as Ray counts them, such as `{"CPU": 1}`; without GPUs among them, a piece sees none.
        done: called here with each piece that succeeded and what it returned, as it comes.
        environment: variables of the workers.

    Returns:
        Why each piece failed that did, by its name; one whose machine ran out of memory, after the retries that
        `ray_cluster` allows.
    """
    import ray
    from ray.exceptions import RayError

    rest = {name: amount for name, amount in resources.items() if name not in ("CPU", "GPU")}
    task = ray.remote(_run).options(
        num_cpus=resources.get("CPU", 0),
        num_gpus=resources.get("GPU", 0),
        resources=rest or None,
        runtime_env={"env_vars": {**(environment or {}), **gpu_visibility(resources)}},
    )
    references: dict[str, Any] = {}
    waiting: dict[Any, Piece] = {}
    for piece in pieces:
        reference = task.remote(piece.function, piece.payload, *(references[name] for name in piece.after))
        references[piece.name], waiting[reference] = reference, piece
    failed: dict[str, str] = {}
    try:
        while waiting:
            (reference,), _ = ray.wait(list(waiting), num_returns=1)
            piece = waiting.pop(reference)
            try:
                outcome = ray.get(reference)
            except RayError as error:
                failed[piece.name] = _reason(error)
            else:
                done(piece, outcome)
    finally:
        for reference in waiting:
            ray.cancel(reference, force=True)
    return failed


def _run(function: Callable[[dict[str, Any]], Any], payload: dict[str, Any], *earlier: Any) -> Any:
    # What the earlier pieces returned is waited for, and not needed.
    return function(payload)


def _reason(error: BaseException) -> str:
    from ray.exceptions import OutOfMemoryError, RayError

    cause = getattr(error, "cause", None)
    if isinstance(cause, OTRayError):
        return str(cause)
    if isinstance(cause, Exception) and not isinstance(cause, RayError):
        return f"{type(cause).__name__}: {cause}"
    # What became of an earlier piece comes as the cause of those that wait for it.
    ended = cause if isinstance(cause, RayError) else error
    if isinstance(ended, OutOfMemoryError):
        return (
            f"its machine ran out of memory each time that it was tried ({first_line(ended)}); let fewer run at a "
            "time, by more CPUs for each, or take machines with more memory"
        )
    return first_line(ended)
