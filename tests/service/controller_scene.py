"""A controller over a real database, store and launcher, with jobs in miniature: what its tests share."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ot_ray.launch import JobSpec, ProcessLauncher
from ot_ray.store import LocalStore
from serve.catalogue import Catalogue, TenantLimits
from serve.catalogue.records import ENDED, Job, Tenant
from serve.controller.acceptance import AcceptanceWork, Outcome, accept
from serve.controller.job_folder import prepare
from serve.controller.loop import Controller
from serve.settings.jobs import JobsConfig
from serve.stored_files import keep_file
from tests.service.job_records import JobRecords

STUB = Path(__file__).with_name("stub_job.py")
EVENTS = ("fine_tuning.job.succeeded", "fine_tuning.job.failed", "fine_tuning.job.cancelled")
EXAMPLES = "".join(
    json.dumps({"prompt": f"{number} and", "completion": f" {number + 1}"}) + "\n" for number in range(12)
)
_PATIENCE_S = 240.0


class Scene(JobRecords):
    """Everything but the HTTP side; the plan of a job (stub_job.py) is in its metadata."""

    def __init__(
        self,
        url: str,
        store: LocalStore,
        launcher: ProcessLauncher,
        bundle: dict[str, Any],
        adapters: Path,
    ) -> None:
        self.url, self.launcher, self.bundle, self.adapters = url, launcher, bundle, adapters
        self.store: LocalStore = store
        self.accept: Callable[[AcceptanceWork], Outcome] = accept
        self.canary: Callable[[str], object] = lambda model_id: None
        self.time: Callable[[], float] = time.time
        self.catalogue = Catalogue.open(url, self.clock)

    def clock(self) -> float:
        """Seconds since 1970, unless the test says otherwise."""
        return self.time()

    def close(self) -> None:
        """End what a test that failed may have left running."""
        for job_id in [path.name for path in self.launcher.folder.iterdir() if not path.name.startswith(".")]:
            self.launcher.stop(job_id)
        self.catalogue.close()

    def controller(self, **settings: Any) -> Controller:
        """A controller; its rounds are taken by the test."""
        self.settings = JobsConfig.model_validate({"sequence_length": 64, "lease_s": 1.0, **settings})
        return Controller(
            self.catalogue,
            self.store,
            self.launcher,
            self.settings,
            accept=self.accept,
            canary=self.canary,
            prepare=self.prepare,
            clock=self.clock,
        )

    def prepare(self, job: Job, folder: Path) -> JobSpec:
        """A job in miniature, as its metadata says, or the real one."""
        plan = json.loads((job.metadata or {})["plan"])
        if plan.pop("real", False):
            return prepare(self.store, job, self.settings, folder)
        adapter = self.adapters / plan.pop("adapter", "good")
        prefix = self.store.root / "jobs" / job.id
        (folder / "config.json").write_text("{}")
        command = [sys.executable, "-I", "-S", str(STUB), str(prefix), str(adapter), json.dumps(plan)]
        return JobSpec(job.submission_id or job.id, command, working_dir=str(folder))

    def tenant(self, name: str, **limits: int) -> Tenant:
        """A tenant with an endpoint for every webhook; as many jobs may run as the cluster takes."""
        tenant = self.catalogue.tenants.create(name, TenantLimits(**{"running_jobs": 10, "queued_jobs": 100, **limits}))
        self.catalogue.webhooks.create(tenant.id, "https://example.com/hook", EVENTS)
        return tenant

    def job(self, tenant: Tenant, text: str = EXAMPLES, **plan: Any) -> Job:
        """A new job of a tenant, on a new file with this text."""
        path = self.store.root.with_name("upload.jsonl")
        path.write_text(text)
        data = path.read_bytes()
        file = keep_file(
            self.catalogue,
            self.store,
            path,
            tenant_id=tenant.id,
            filename="train.jsonl",
            purpose="fine-tune",
            size=len(data),
            sha256=hashlib.sha256(data).hexdigest(),
        )
        job = self.catalogue.jobs.create(
            tenant.id,
            model=self.bundle["model"],
            bundle=self.bundle,
            training_file=file.id,
            seed=1,
            method={"type": "supervised", "tuning_method": "full"},
            hyperparameters={"n_epochs": 2, "batch_size": "auto", "learning_rate_multiplier": "auto"},
            metadata={"plan": json.dumps({"steps": 4, **plan})},
        )
        assert job is not None
        return job

    def until(self, controller: Controller, condition: Callable[[], object]) -> None:
        """Take rounds until a condition holds."""
        deadline = time.monotonic() + _PATIENCE_S
        while not condition():
            assert time.monotonic() < deadline, "waited too long"
            controller.tick()
            controller.wait()
            time.sleep(0.01)

    def ended(self, *jobs: Job) -> bool:
        """Whether jobs have ended and nothing is left of them."""
        now = [self.look(job) for job in jobs]
        return all(job.status in ENDED and job.cleaned_at is not None for job in now)

    def run(self, controller: Controller, *jobs: Job) -> list[Job]:
        """Take rounds until these jobs have ended, and return them."""
        self.until(controller, lambda: self.ended(*jobs))
        return [self.look(job) for job in jobs]
