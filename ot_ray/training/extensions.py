"""DeepSpeed's compiled operator, built once: `python -m ot_ray.training.extensions` at installation.

A process that was killed while compiling leaves a lock behind on which every later one would wait for
ever; such a lock is found by its age and removed."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

STALE_SECONDS = 180.0
"""A compilation takes under a minute; a lock older than this belongs to nobody."""


def prepare_extensions(poll_seconds: float = 0.5) -> Path:
    """Choose the folder of compiled extensions, and wait for or remove the locks in it.

    `TORCH_EXTENSIONS_DIR` is kept where it is set; otherwise it becomes a folder of this Python
    environment.

    Returns:
        The folder.
    """
    folder = Path(os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions")))
    for lock in folder.glob("**/lock"):
        _wait_or_remove(lock, poll_seconds)
    return folder


def _wait_or_remove(lock: Path, poll_seconds: float) -> None:
    while True:
        try:
            age = time.time() - lock.stat().st_mtime
        except FileNotFoundError:
            return
        if age > STALE_SECONDS:
            lock.unlink(missing_ok=True)
            return
        time.sleep(poll_seconds)


def build() -> None:
    """Compile what a CPU run needs; a machine with a GPU needs nothing beforehand."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    folder = prepare_extensions()
    # Nothing else builds at installation: a lock that is still here was left behind.
    for lock in folder.glob("**/lock"):
        lock.unlink(missing_ok=True)
    from deepspeed.comm.torch import build_shm_op

    build_shm_op()


if __name__ == "__main__":
    build()
