"""A tuning job in miniature: it keeps to the protocol of files that the real one keeps to, with a prepared adapter.

Started as a script by its path, with the standard library alone, so that many start within a second."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any


def main(prefix: Path, adapter: Path, plan: dict[str, Any]) -> None:
    """Run a job whose part of the store is `prefix`; the plan says what happens to it."""
    checkpoint = prefix / "checkpoints" / "step"
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    done = int(checkpoint.read_text()) if checkpoint.exists() else 0
    steps = plan["steps"]
    for step in range(done + 1, steps + 1):
        time.sleep(plan.get("step_s", 0.02))
        if step == plan.get("killed_at"):
            os.kill(os.getpid(), plan.get("signal", signal.SIGKILL))
        if step == plan.get("leaves_at"):
            os._exit(3)
        figures = {"step": step, "total_steps": steps, "train_loss": 2.0 / step, "lr": 0.001, "tokens": 100 * step}
        tell(prefix, {"type": "metrics", "epoch": step / 2, "train_mean_token_accuracy": 0.5, **figures})
        if step % 2 == 0:
            place(adapter, prefix / "output" / f"step-{step}")
            made = {"step": step, "folder": f"step-{step}", "metrics": {"train_loss": 2.0 / step}}
            tell(prefix, {"type": "checkpoint", **made})
        save(checkpoint, str(step).encode())
        if step == plan.get("crash_at") and not (prefix / "checkpoints" / "crashed").exists():
            save(prefix / "checkpoints" / "crashed", b"")
            os._exit(1)
        if step == plan.get("error_at"):
            tell(prefix, {"type": "message", "level": "error", "message": f"{prefix}/input/train.jsonl: line 3 is odd"})
            raise SystemExit(1)
        if step == plan.get("hang_at"):
            time.sleep(3600)
    place(adapter, prefix / "output" / "adapter")
    save(prefix / "output" / "result.csv", b"step,train_loss\n1,2.0\n")
    result = {"adapter": "adapter", "steps": steps, "tokens": 100 * steps, "metrics": {"train_loss": 0.5}}
    save(prefix / "output" / "result.json", json.dumps(result).encode())


def tell(prefix: Path, event: dict[str, Any]) -> None:
    """Write the next progress file."""
    folder = prefix / "events"
    folder.mkdir(exist_ok=True)
    number = sum(1 for path in folder.iterdir() if path.suffix == ".json") + 1
    save(folder / f"{number:08d}.json", json.dumps({**event, "at": time.time()}).encode())


def save(path: Path, data: bytes) -> None:
    """Write a file that appears whole, under a name that the store does not list before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".part-{path.name}")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def place(adapter: Path, target: Path) -> None:
    """Copy the adapter; a second copy is the same."""
    shutil.copytree(adapter, target, dirs_exist_ok=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))
