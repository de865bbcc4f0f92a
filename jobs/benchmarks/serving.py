"""What serving many tenants costs: this service, beside one whole model a tenant behind the same HTTP, in one run.

Both servers run at once and are asked in turns; the plain one is serving_plain.py, the tenants serving_load.py."""

from __future__ import annotations

import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

import psutil
from pydantic import Field, model_validator

from jobs.benchmarks.serving_load import Answer, Load, drive, figures
from jobs.benchmarks.serving_plain import PlainConfig
from jobs.benchmarks.serving_scene import NAME, Scene, build_scene, prompts, random_base
from jobs.benchmarks.shapes import shape_of
from jobs.benchmarks.sides import GIB, keep, machine, require_device, require_output
from jobs.service import running_service
from ot_ray.artifacts import load_shape
from ot_ray.config import Config
from ot_ray.errors import LaunchError
from ot_ray.launch import ray_cluster
from ot_ray.model import ModelConfig, SplitPlan

Side = Literal["service", "plain"]
Phase = Literal["cold", "warm"]
_RATES = ("requests_per_s", "tokens_per_s", "first_token_ms", "first_token_ms_p95")
_BASE = str(Path(__file__).parents[1] / "base")


class ServingBenchmark(Config):
    """Who asks what, how often, of which model."""

    model: str = _BASE
    """The base model; unset, the one that ships."""
    shape: str | None = None
    """Instead of `model`: layers of jobs/benchmarks/shapes.py with random weights, and the vocabulary of the base that
    ships."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights, on both sides."""
    split: SplitPlan = SplitPlan(bottom=2, keep=2, top=2)
    """The adapter layers of every plug-in."""
    tenants: list[int] = Field(default=[1, 8, 64], min_length=1)
    """Tenants that ask at the same time, one request each."""
    sides: list[Side] = Field(default=["service", "plain"], min_length=1)
    """What is asked."""
    requests: int = Field(default=4, ge=1)
    """Requests of each tenant in a warm round."""
    prompt_tokens: int = Field(default=32, ge=1)
    """Tokens of a prompt."""
    max_tokens: int = Field(default=32, ge=1)
    """Tokens of an answer, at most."""
    repeats: int = Field(default=3, ge=1)
    """Rounds, each with tenants that nobody asked before; the median counts."""
    plain_concurrent: int = Field(default=4, ge=1)
    """Requests that the plain server computes at the same time."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where both sides compute."""
    timeout_s: float = Field(default=600.0, gt=0)
    """Seconds that one answer may take."""
    output: str | None = None
    """A file for the result as JSON, beside standard output."""

    @model_validator(mode="after")
    def _possible(self) -> ServingBenchmark:
        if any(count < 1 for count in self.tenants):
            raise ValueError(f"tenants is {self.tenants}; each is 1 or more")
        return self


def run(config: ServingBenchmark) -> dict[str, Any]:
    """Measure requests a second, tokens a second and the time to the first token, for tenants cold and warm."""
    require_device(config.device)
    require_output(config.output)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        model = _model(config, folder)
        fresh = config.repeats * sum(config.tenants)
        # One more is asked before the clock starts, so that nobody measures a first request of all.
        scene = build_scene(model, config.split, 1 + fresh, folder)
        urls: dict[Side, tuple[str, psutil.Process]] = {
            side: stack.enter_context(_serving(side, config, model, scene, folder)) for side in config.sides
        }
        results = _measure(config, urls, scene, load_shape(model).vocab_size)
    print(table(results), file=sys.stderr)
    found = {
        "benchmark": "serve",
        "machine": machine(config.device),
        "model": config.shape or config.model,
        "dtype": config.dtype,
        "prompt_tokens": config.prompt_tokens,
        "max_tokens": config.max_tokens,
        "results": results,
    }
    return keep(found, config.output)


def _model(config: ServingBenchmark, folder: Path) -> ModelConfig:
    source = config.model
    if config.shape is not None:
        source = random_base(shape_of(config.shape), _BASE, folder / "base", config.dtype)
    return ModelConfig(name=NAME, source=source, dtype=config.dtype)


def _measure(
    config: ServingBenchmark, urls: dict[Side, tuple[str, psutil.Process]], scene: Scene, vocabulary: int
) -> list[dict[str, Any]]:
    first, *waiting = scene.models
    asked = prompts(config.requests, config.prompt_tokens, vocabulary)
    warm = Load(asked, config.max_tokens, config.timeout_s)
    cold = Load(asked[:1], config.max_tokens, config.timeout_s)
    loads: dict[Phase, Load] = {"cold": cold, "warm": warm}
    for url, _ in urls.values():
        drive(url, [first], cold)
    results = []
    for count in config.tenants:
        rounds: dict[tuple[Side, Phase], list[dict[str, Any]]] = {}
        for repeat in range(config.repeats):
            models, waiting = waiting[:count], waiting[count:]
            # The sides take turns at being first.
            for side in list(urls)[:: -1 if repeat % 2 else 1]:
                for phase, load in loads.items():
                    seconds, answers = drive(urls[side][0], models, load)
                    found = {**figures(seconds, answers), "memory_bytes": _memory(side, urls[side][1])}
                    rounds.setdefault((side, phase), []).append({**found, "answers": answers})
                    print(f"{count} tenants, {side}, {phase}: {found['tokens_per_s']:.0f} tokens/s", file=sys.stderr)
        results += [_one(count, side, phase, found) for (side, phase), found in rounds.items()]
        results[-1]["same_text"] = _same(rounds)
    return results


def _one(count: int, side: Side, phase: Phase, rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Several rounds as one: medians, and the spread of the tokens a second."""
    speeds = [found["tokens_per_s"] for found in rounds]
    medians = {name: statistics.median(found[name] for found in rounds) for name in _RATES}
    return {
        "tenants": count,
        "side": side,
        "adapter": phase,
        **medians,
        "tokens_per_s_runs": speeds,
        "retries": sum(found["retries"] for found in rounds),
        "memory_bytes": max((found["memory_bytes"] or 0 for found in rounds), default=0) or None,
    }


def _same(rounds: dict[tuple[Side, Phase], list[dict[str, Any]]]) -> float | None:
    """The share of answers that are the same text on both sides; None where one side ran."""
    texts: dict[str, list[str]] = {}
    for (side, phase), found in rounds.items():
        if phase == "warm":
            texts[side] = [answer.text for one in found for answer in _ordered(one["answers"])]
    if len(texts) < 2:
        return None
    one, other = texts.values()
    return sum(a == b for a, b in zip(one, other, strict=True)) / len(one)


def _ordered(answers: Sequence[Answer]) -> list[Answer]:
    return sorted(answers, key=lambda answer: answer.model)


def _memory(side: Side, process: psutil.Process) -> int | None:
    """Bytes that the server holds in memory: the plain process, or the replicas of the engine."""
    if side == "plain":
        return process.memory_info().rss
    engines = [p for p in psutil.process_iter(["cmdline"]) if ":Engine" in " ".join(p.info["cmdline"] or [])]
    return sum(engine.memory_info().rss for engine in engines) or None


@contextmanager
def _serving(
    side: Side, config: ServingBenchmark, model: ModelConfig, scene: Scene, folder: Path
) -> Iterator[tuple[str, psutil.Process]]:
    """One side as a running server: its address, and a process of it."""
    port = _free_port()
    if side == "plain":
        with _plain(config, scene, port, folder) as process:
            yield f"http://127.0.0.1:{port}/v1", psutil.Process(process.pid)
        return
    settings = {
        "model": model.model_dump(mode="json"),
        "store": scene.registry,
        "port": port,
        "max_plug_ins": max(config.tenants),
        "max_concurrent": max(config.tenants),
        "num_gpus": 1 if config.device == "cuda" else 0,
        # Tenants of a round wait for each other's answers, not for a refusal.
        "wait_s": config.timeout_s,
        "refresh_s": 600.0,
    }
    with ray_cluster(dashboard=False, show_logs=False) as cluster, running_service(settings, cluster.ray) as url:
        yield url, psutil.Process()


@contextmanager
def _plain(config: ServingBenchmark, scene: Scene, port: int, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    given = PlainConfig(
        models=scene.models,
        port=port,
        device=config.device,
        dtype=config.dtype,
        concurrent=config.plain_concurrent,
    )
    (folder / "plain.json").write_text(given.model_dump_json(), encoding="utf-8")
    command = [sys.executable, "-m", "jobs.benchmarks.serving_plain", str(folder / "plain.json")]
    log = folder / "plain.log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        _wait(process, port, log)
        yield process
    finally:
        process.kill()
        process.wait()


def _wait(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + 180
    while process.poll() is None and time.monotonic() < deadline:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=10).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise LaunchError(f"the plain server did not come up: {log.read_text(errors='replace')[-500:]}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def table(results: Sequence[dict[str, Any]]) -> str:
    """The figures as a Markdown table: medians, with the slowest and fastest round's tokens a second."""
    lines = [
        "| tenants | side | adapter | requests/s | tokens/s (slowest to fastest) | first token (95 %) | memory |",
        "|---|---|---|---|---|---|---|",
    ]
    for found in results:
        runs, memory = found["tokens_per_s_runs"], found["memory_bytes"]
        lines.append(
            f"| {found['tenants']} | {found['side']} | {found['adapter']} | {found['requests_per_s']:.1f} | "
            f"{found['tokens_per_s']:.0f} ({min(runs):.0f} to {max(runs):.0f}) | "
            f"{found['first_token_ms']:.0f} ms ({found['first_token_ms_p95']:.0f}) | "
            f"{f'{memory / GIB:.2f} GiB' if memory else 'not known'} |"
        )
    return "\n".join(lines)
