"""The whole of offsite tuning on one machine, on real text, in a few minutes.

Each step is one of the other verbs; this module makes the data, hands results on, and cleans up."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field

from jobs import evaluate, make_emulator, plug_in, tune
from jobs.command import config_file, run_command
from jobs.memory import PeakMemory
from jobs.service import complete, running_service
from jobs.tuning.config import TuneTraining
from ot_ray.artifacts import BundleSource, generate_key
from ot_ray.client import OfferedBundle
from ot_ray.config import Config
from ot_ray.data import DataConfig, StreamConfig, write_quickstart_data
from ot_ray.evaluation import FiveSettings
from ot_ray.launch import JobSpec, RayJobLauncher, WorkerGroup, ray_cluster, require_free_port, wait_for_job
from ot_ray.launch.cluster import ClusterAddress
from ot_ray.model import BottleneckSettings, DistillLoss, LoraSettings, Method, ModelConfig, SplitPlan
from ot_ray.training import TrainingConfig
from ot_ray.training.distill_config import DistillTraining

MODEL, TENANT, SUFFIX, VERSION = "docs", "acme", "reference", "1"


class QuickstartConfig(Config):
    """Sizes of a run that fits a laptop."""

    base: str | None = None
    """Folder of the base model; unset, the one in `jobs/base` that `jobs.make_base` made."""
    folder: str = "runs/quickstart"
    """Everything is written below it, each run in a folder of its own."""
    split: SplitPlan
    """How the base model is cut."""
    sequence_length: int = Field(default=256, ge=2)
    """Tokens of a sequence, in every step."""
    loss: DistillLoss = DistillLoss()
    """Weights of the distillation objective."""
    distil: DistillTraining
    """The distillation, on two workers."""
    workers: WorkerGroup = WorkerGroup(count=2)
    """Who distils."""
    method: Method = "full"
    """The tuning method."""
    lora: LoraSettings = LoraSettings()
    """For method `lora`."""
    bottleneck: BottleneckSettings = BottleneckSettings()
    """For method `bottleneck`."""
    tune: TrainingConfig
    """Tuning the adapter, and full fine-tuning for reference."""
    seed: int = Field(default=0, ge=0)
    """Splits the customer's text."""
    prompt: str = "A class definition"
    """What both models are asked to continue."""
    port: int = Field(default=8000, ge=1, le=65535)
    """Where the service listens."""
    num_cpus: int = Field(default=2, ge=2)
    """Logical CPUs of the local Ray."""
    keep: bool = False
    """Leave the service running until Ctrl-C."""


def run(config: QuickstartConfig) -> dict[str, Any]:
    """Make an emulator, tune its adapter in an isolated job, plug it in, evaluate, and serve it."""
    require_free_port("127.0.0.1", config.port)
    story = _Story(config)
    with ExitStack() as stack:
        memory = stack.enter_context(PeakMemory())
        with story.step("Start a local Ray, write the owner's public text and the customer's private text"):
            cluster = stack.enter_context(ray_cluster(num_cpus=config.num_cpus))
            story.prepare()
        with story.step(f"make_emulator: split {config.split}, distil with DeepSpeed ZeRO-{config.distil.zero_stage}"):
            made = make_emulator.run(story.emulator())
            assert made is not None
            gap = made["emulator_gap"]
            print(f"perplexity on held-out public text: full {gap['full']:.1f}, layers dropped {gap['dropped']:.1f}, "
                  f"distilled {gap['emulated']:.1f}")  # fmt: skip
        with story.step("tune: an isolated Ray job, given the bundle and the customer's text"):
            story.submit_tuning(cluster)
        with story.step("plug_in: inspect what came back, plug it in, promote it"):
            promoted = plug_in.run(story.plug_in())
            print(f"promoted {promoted['model_id']}")
        with story.step("evaluate: the five settings on the customer's test split"):
            evaluation = story.evaluation()
            report = evaluate.run(evaluation)
        with story.step("serve: the base model and its plug-in over HTTP"):
            service = stack.enter_context(running_service(story.service(), cluster.ray))
            for name in (MODEL, promoted["model_id"]):
                print(f"{name}: {config.prompt!r} -> {complete(service, name, config.prompt)!r}")
            print(f"the service answers at {service}")
        result = story.summary(report, promoted["model_id"], memory)
        if config.keep:
            _until_interrupted(service)
    return result


class _Story:
    """Folders, configurations and timings of one run."""

    def __init__(self, config: QuickstartConfig) -> None:
        self.config = config
        self.folder = (Path(config.folder) / datetime.now().strftime("%Y%m%d-%H%M%S")).resolve()
        self.base = config.base or str(Path(__file__).parent / "base")
        self.times: dict[str, float] = {}

    @contextmanager
    def step(self, title: str) -> Iterator[None]:
        number = len(self.times) + 1
        print(f"\n[{number}/6] {title}", flush=True)
        start = time.monotonic()
        yield
        self.times[title.split(":")[0]] = round(time.monotonic() - start, 1)
        print(f"[{number}/6] done in {self.times[title.split(':')[0]]:.0f} s", flush=True)

    def prepare(self) -> None:
        for name, characters in write_quickstart_data(self.folder / "data", self.config.seed).items():
            print(f"  data/{name}: {characters:,} characters")
        self._hold_out_public()
        self.private_key, self.public_key = generate_key(self.folder / "keys")

    def _hold_out_public(self) -> None:
        # The emulator gap is measured on public text that was not distilled on.
        train = self.folder / "data/public/train.jsonl"
        lines = train.read_text(encoding="utf-8").splitlines(keepends=True)
        held_out = lines[::20]
        (train.parent / "validation.jsonl").write_text("".join(held_out), encoding="utf-8")
        train.write_text("".join(line for i, line in enumerate(lines) if i % 20), encoding="utf-8")

    def model(self) -> ModelConfig:
        return ModelConfig(name=MODEL, source=self.base)

    def data(self, name: str) -> DataConfig:
        return DataConfig(source=str(self.folder / f"data/{name}.jsonl"))

    def bundle(self) -> BundleSource:
        return BundleSource(
            store=str(self.folder / "bundles"), model=MODEL, version=VERSION, public_key=str(self.public_key)
        )

    def emulator(self) -> make_emulator.MakeEmulatorConfig:
        workers = self.config.workers.model_copy(update={"ray_storage": str(self.folder / "ray")})
        return make_emulator.MakeEmulatorConfig(
            model=self.model(),
            split=self.config.split,
            # Few steps read little text; the passes are there for those who ask for more.
            data=StreamConfig(source=self.data("public/train").source, workers=1, passes=100),
            validation=self.data("public/validation"),
            sequence_length=self.config.sequence_length,
            loss=self.config.loss,
            training=self.config.distil,
            store=str(self.folder / "owner"),
            bundles=str(self.folder / "bundles"),
            run="distil",
            version=VERSION,
            workers=workers,
            recommended={"learning_rate": self.config.tune.lr, "steps": self.config.tune.steps},
            private_key=str(self.private_key),
        )

    def submit_tuning(self, cluster: ClusterAddress) -> None:
        """Ship a folder with the customer's text and settings, and nothing else, as an isolated job."""
        job = self.folder / "tuning-job"
        job.mkdir()
        for part in ("train", "validation"):
            shutil.copy(self.folder / f"data/customer/{part}.jsonl", job)
        shutil.copy(self.public_key, job / "owner.pem")
        settings = tune.TuneConfig(
            bundle=OfferedBundle(**{**self.bundle().model_dump(), "public_key": "owner.pem"}),
            data=DataConfig(source="train.jsonl"),
            validation=DataConfig(source="validation.jsonl"),
            sequence_length=self.config.sequence_length,
            method=self.config.method,
            lora=self.config.lora,
            bottleneck=self.config.bottleneck,
            training=TuneTraining(**self.config.tune.model_dump()),
            output=str(self.folder / "adapter"),
        )
        (job / "tune.yaml").write_text(yaml.safe_dump(settings.model_dump(mode="json")), encoding="utf-8")
        assert cluster.dashboard is not None
        launcher = RayJobLauncher(cluster.dashboard)
        spec = JobSpec(
            job_id=f"tune-{TENANT}-{self.folder.name}",
            command=[sys.executable, "-m", "jobs.tune", "--config", "tune.yaml"],
            working_dir=str(job),
            environment={"OMP_NUM_THREADS": str(self.config.num_cpus)},
            cpus=self.config.num_cpus,
        )
        wait_for_job(launcher, launcher.submit(spec), _show)

    def plug_in(self) -> plug_in.PlugInConfig:
        return plug_in.PlugInConfig(
            model=self.model(),
            bundle=self.bundle(),
            adapter=str(self.folder / "adapter"),
            tenant=TENANT,
            suffix=SUFFIX,
            store=str(self.folder / "registry"),
            data=self.data("customer/validation"),
            sequence_length=self.config.sequence_length,
            max_perplexity_ratio=1.0,
        )

    def evaluation(self) -> evaluate.EvaluateConfig:
        return evaluate.EvaluateConfig(
            model=self.model(),
            bundle=self.bundle(),
            adapter=str(self.folder / "adapter"),
            train=self.data("customer/train"),
            test=self.data("customer/test"),
            sequence_length=self.config.sequence_length,
            training=self.config.tune,
            output=str(self.folder / "report"),
        )

    def service(self) -> dict[str, Any]:
        return {
            "model": self.model().model_dump(mode="json"),
            "store": str(self.folder / "registry"),
            "port": self.config.port,
        }

    def summary(self, report: dict[str, Any], model_id: str, memory: PeakMemory) -> dict[str, Any]:
        result = {
            "five_settings": report,
            "broken_promises": FiveSettings.of(report).broken_promises(),
            "plug_in": model_id,
            "seconds": self.times,
            "seconds_in_all": round(sum(self.times.values()), 1),
            "peak_memory_gib": round(memory.peak_bytes / 2**30, 2),
            "folder": str(self.folder),
        }
        (self.folder / "summary.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        return result


def _show(piece: str) -> None:
    for line in piece.splitlines():
        if sys.stdout.isatty() and "%|" in line:
            # A progress bar of the job: the next one takes its place.
            print(f"\r{line}\x1b[K", end="", flush=True)
        else:
            print(line, flush=True)


def _until_interrupted(service: str) -> None:
    print(f"\nserving at {service}; Ctrl-C stops it", flush=True)
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        print("stopping", flush=True)


if __name__ == "__main__":
    run_command("quickstart", QuickstartConfig, run, default_config=config_file("quickstart.yaml"))
