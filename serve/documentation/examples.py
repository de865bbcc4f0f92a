"""An example body of each operation that takes JSON, by operation id; each is of the shape that the service takes."""

from __future__ import annotations

from typing import Any

_SHA256 = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"

EXAMPLES: dict[str, dict[str, Any]] = {
    "complete": {"model": "docs", "prompt": "A class definition", "max_tokens": 24, "temperature": 0},
    "chat": {
        "model": "docs",
        "messages": [{"role": "user", "content": "What is a class?"}],
        "max_tokens": 64,
        "stream": True,
    },
    "create_job": {
        "model": "docs",
        "training_file": "file-0123456789abcdef01234567",
        "suffix": "reference",
        "seed": 7,
        "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": "auto", "batch_size": 8}}},
        "metadata": {"team": "support"},
    },
    "create_adapter": {
        "bundle_id": "b-1",
        "suffix": "reference",
        "files": [
            {"name": "manifest.json", "bytes": 2048, "sha256": _SHA256},
            {"name": "adapter.safetensors", "bytes": 1048576, "sha256": _SHA256},
        ],
    },
    "create_endpoint": {
        "name": "tuning",
        "url": "https://example.com/hooks/tuning",
        "event_types": ["fine_tuning.job.succeeded", "fine_tuning.job.failed"],
    },
    "update_endpoint": {"event_types": ["fine_tuning.job.succeeded"]},
    "rotate_secret": {"keep_old_secret_active_for_24_hours": True},
    "test_endpoint": {"event_type": "fine_tuning.job.succeeded"},
    "create_session": {
        "sites": ["*.q_proj", "*.v_proj"],
        "auxiliary": {"kind": "low_rank", "rank": 8, "alpha": 8.0, "seed": 1},
        "mode": "alone",
        "fit": "server",
        "interval": 4,
        "fitting": {"optimizer": "adamw", "lr": 0.001},
        "metadata": {"team": "support"},
    },
    "forward_backward": {
        "number": 0,
        "rows": [{"tokens": [17, 42, 7, 99], "loss_mask": [0, 0, 1, 1]}],
        "coding": "int8",
    },
    "step_session": {"number": 1},
    "sample_session": {"number": 2, "prompt": "A class definition", "max_tokens": 24, "temperature": 0.0},
    "save_session": {"number": 3},
    "create_tenant": {"name": "acme", "limits": {"running_jobs": 2, "requests_per_minute": 600}},
    "change_tenant": {"limits": {"queued_jobs": 20}, "disabled": False},
    "create_key": {
        "tenant_id": "ten_0123456789abcdef01234567",
        "name": "laptop",
        "scopes": ["files", "jobs", "inference"],
        "expires_days": 90,
    },
    "rotate_key": {"overlap_seconds": 3600},
}
