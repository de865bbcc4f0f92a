"""What every benchmark of several sides shares: a process for each side, random inputs, the clock, peak memory.

What a side computes, and what is held against what, are each benchmark's own."""

from __future__ import annotations

import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from jobs.limits import require_folder
from ot_ray.config import Config
from ot_ray.errors import ConfigError

GIB = 2**30


def require_device(device: str) -> None:
    """Raises ConfigError for a GPU that is not there."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is 'cuda', but PyTorch sees no GPU here; use device=cpu")


def require_output(output: str | None) -> None:
    """Make the folder of a result's file, before anything is measured.

    Raises:
        ConfigError: the file can be none.
    """
    if output is None:
        return
    path = Path(output)
    if path.is_dir():
        raise ConfigError(f"output is {output!r}, which is a folder; name a file in it")
    require_folder("output", str(path.parent))
    path.parent.mkdir(parents=True, exist_ok=True)


def run_side(module: str, config: Config, timeout_s: float) -> dict[str, Any]:
    """Run one side in a new process.

    Args:
        module: run with ``-m``; it takes the configuration as JSON and prints its figures as its last line.

    Returns:
        The figures, or `failed` with a reason: a side that does not fit the device is a result too.
    """
    command = [sys.executable, "-m", module, config.model_dump_json()]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        return {"failed": f"no result after {timeout_s:g} s"}
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def middle(runs: Sequence[dict[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    """Several runs of one side as one: medians of the figures in `names`, the first run's other figures, and
    `tokens_per_s_runs`, the spread. A side that failed once has failed."""
    failed = next((run for run in runs if "failed" in run), None)
    if failed is not None:
        return failed
    medians = {n: statistics.median([run[n] for run in runs]) if runs[0][n] is not None else None for n in names}
    return {**runs[0], **medians, "tokens_per_s_runs": [run["tokens_per_s"] for run in runs]}


def random_model(shape: PreTrainedConfig, device: torch.device) -> PreTrainedModel:
    """A model of the shape with random weights, the same in every process: bfloat16 values, without gradients."""
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16)
    return model.eval().requires_grad_(False)


def random_batches(
    vocabulary: int, batch_size: int, sequence_length: int, count: int, device: torch.device
) -> list[dict[str, torch.Tensor]]:
    """Random tokens as the packer hands them over: one document a sequence, all of it learnt."""
    size = (batch_size, sequence_length)
    generator = torch.Generator().manual_seed(1)
    positions = torch.arange(sequence_length).expand(size).contiguous()
    real = torch.ones(size, dtype=torch.bool)
    batches = []
    for _ in range(count):
        ids = torch.randint(vocabulary, size, generator=generator)
        batches.append({"input_ids": ids, "labels": ids, "position_ids": positions, "real": real})
    return [{name: tensor.to(device) for name, tensor in batch.items()} for batch in batches]


def now(device: torch.device) -> float:
    """Seconds, after everything that was given to the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def resident_bytes() -> int:
    """What this process holds in memory."""
    return psutil.Process().memory_info().rss


def peak_bytes(device: torch.device, before: int) -> int:
    """On a GPU what the allocator held at most; on a CPU the growth of this process since it held `before`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():
        # What getrusage says of a child counts its parent's peak as well.
        peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(peak.split()[1]) * 1024 - before
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit - before


def machine(device: str) -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def keep(found: dict[str, Any], output: str | None) -> dict[str, Any]:
    """Write a result where the user asked for it, and return it."""
    if output is not None:
        Path(output).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return found
