"""What the database, the store and the registry say of jobs, and what must be true of each one that has ended, whatever
was killed meanwhile."""

from __future__ import annotations

from collections import Counter

import sqlalchemy as sa

from ot_ray.artifacts import PlugInRecord, Registry
from ot_ray.store import Store
from serve.catalogue import Catalogue, schema
from serve.catalogue.records import ENDED, Job, JobEvent

RESUMED = "The fine-tuning job was resumed and waits in the queue"
"""What a job's history says when its customer resumes it."""
_ENDS = {
    "The job has successfully completed": "succeeded",
    "The fine-tuning job was cancelled": "cancelled",
}


class JobRecords:
    """Jobs as a service keeps them."""

    catalogue: Catalogue
    store: Store

    def look(self, job: Job) -> Job:
        """The job as it stands now."""
        return self.catalogue.jobs.find(job.id)

    def events(self, job: Job) -> list[JobEvent]:
        """Its history, the first first."""
        return self.catalogue.events.all(job.id)

    def told(self, job: Job) -> list[str]:
        """The messages of its history."""
        return [event.message for event in self.events(job)]

    def deliveries(self, job: Job) -> list[str]:
        """Types of the webhook deliveries about it."""
        rows = self.catalogue.webhooks.deliveries(job.tenant_id)
        return [delivery.type for delivery in rows if delivery.object_id == job.id]

    def charged(self, job: Job) -> int:
        """Tokens of all days that were taken from its tenant."""
        table = schema.token_counts
        query = sa.select(sa.func.sum(table.c.tokens)).where(table.c.tenant_id == job.tenant_id)
        with self.catalogue._database.read() as connection:
            return int(connection.execute(query).scalar_one() or 0)

    def served(self, job: Job) -> list[PlugInRecord]:
        """What is in service for its tenant."""
        name = self.catalogue.tenants.get(job.tenant_id).name
        return Registry(self.store).served(job.model, name)


def ended_once(records: JobRecords, job: Job, status: str, models: int) -> None:
    """The job ended once, so, with the truth in its events, and nothing of it is left but what it made.

    Args:
        models: in service of a job that succeeded, those of its checkpoints included.
    """
    now, events = records.look(job), records.events(job)
    told = [event.message for event in events]
    assert now.status == status, told
    assert now.status in ENDED and now.finished_at is not None and now.cleaned_at is not None
    # The history has no gap, ends with its one end, and says each thing once.
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    ends = [message for message in told if message in _ENDS or message.startswith("The job failed: ")]
    assert ends == told[-1:] and _ENDS.get(ends[0], "failed") == status
    sources = Counter(event.source_key for event in events if event.source_key is not None)
    assert not sources or max(sources.values()) == 1
    steps = [event.data["step"] for event in events if event.type == "metrics" and event.data]
    assert steps == list(range(1, len(steps) + 1)), told
    assert told.count("Fine-tuning job started") == 1
    assert told.count("Files validated, moving job to queued state") == 1
    assert told.count(RESUMED) == told.count("Fine-tuning job resumed")
    assert sum(message.startswith("Validated") for message in told) <= 1
    # The webhook is due once, and the store keeps nothing of the job.
    assert records.deliveries(job) == [f"fine_tuning.job.{status}"]
    assert list(records.store.list(f"jobs/{job.id}")) == []
    _served_once(records, now, models)


def _served_once(records: JobRecords, job: Job, models: int) -> None:
    mine = [record.model_id for record in records.served(job) if f":job-{job.id[6:14]}" in record.model_id]
    files = records.catalogue.files.list(job.tenant_id, purpose="fine-tune-results", limit=100).items
    results = [file.id for file in files if job.id in file.filename]
    if job.status != "succeeded":
        assert mine == [] and results == [] and job.fine_tuned_model is None
        return
    assert len(mine) == models and job.fine_tuned_model in mine
    assert results == job.result_files and len(results) == 1
    others = records.catalogue.jobs.list(job.tenant_id, limit=100).items
    assert records.charged(job) == sum(other.tokens or 0 for other in others)
