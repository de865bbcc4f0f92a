"""The adapters that jobs leave at the end of each epoch, as rows."""

from __future__ import annotations

from functools import partial
from typing import Any

from serve.catalogue import schema
from serve.catalogue.database import Database, page
from serve.catalogue.events import require_job
from serve.catalogue.records import Checkpoint, Page, new_id, record

_table = schema.checkpoints
_checkpoint = partial(record, Checkpoint)


class Checkpoints:
    """The table of checkpoints."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(
        self,
        tenant_id: str,
        job_id: str,
        *,
        step_number: int,
        metrics: dict[str, Any],
        fine_tuned_model_checkpoint: str,
    ) -> bool:
        """Add a checkpoint; False if the job has one of this step already."""
        row = {
            "id": new_id("ftckpt_"),
            "tenant_id": tenant_id,
            "job_id": job_id,
            "step_number": step_number,
            "metrics": metrics,
            "fine_tuned_model_checkpoint": fine_tuned_model_checkpoint,
            "created_at": self._database.now(),
        }
        added = self._database.insert(_table).values(row)
        added = added.on_conflict_do_nothing(index_elements=["job_id", "step_number"]).returning(_table.c.id)
        with self._database.write() as connection:
            return connection.execute(added).one_or_none() is not None

    def list(self, tenant_id: str, job_id: str, *, after: str | None = None, limit: int = 10) -> Page[Checkpoint]:
        """Checkpoints of a tenant's job, the latest step first. Raises NotFoundError for an unknown job or `after`."""
        with self._database.read() as connection:
            require_job(connection, tenant_id, job_id)
            return page(
                connection,
                _table,
                [_table.c.job_id == job_id],
                _checkpoint,
                after=after,
                limit=limit,
                by=_table.c.step_number,
            )
