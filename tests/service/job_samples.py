"""Jobs as the database has them, made by hand for tests that need no database."""

from __future__ import annotations

import dataclasses
from typing import Any

from serve.catalogue.records import Job
from tests.http.tiny_service import BASE

RESOLVED = {
    "n_epochs": 2,
    "batch_size": 4,
    "learning_rate_multiplier": 1.0,
    "learning_rate": 1e-3,
    "tuning_method": "lora",
}


def a_job(**changes: Any) -> Job:
    """A job of two epochs that is being launched."""
    unset = dict.fromkeys((field.name for field in dataclasses.fields(Job)), None)
    values: dict[str, Any] = {
        **unset,
        "id": "ftjob-0123456789abcdef01234567",
        "tenant_id": "ten_0123456789abcdef01234567",
        "status": "running",
        "stage": "launching",
        "wanted": "run",
        "attempt": 1,
        "submission_id": "ftjob-0123456789abcdef01234567",
        "model": BASE,
        "seed": 7,
        "method": {},
        "hyperparameters": {},
        "resolved": RESOLVED,
        "training_file": "file-0123456789abcdef01234567",
        "created_at": 0,
        "result_files": [],
        "bundle": {"model": BASE, "version": "1", "bundle_id": "unknown"},
    }
    return Job(**{**values, **changes})
