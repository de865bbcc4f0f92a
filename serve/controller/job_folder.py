"""What an isolated job is given: its input in a folder of its own, settings that name nothing else, and a command.

Starting it is starting.py's; what it does with all that is `jobs.tune`'s, which the service never imports."""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from ot_ray.artifacts import BundleManifest, fetch_bundle, open_bundle
from ot_ray.artifacts.publication import published_manifest
from ot_ray.errors import AlreadyExistsError, ArtifactError
from ot_ray.launch import JobSpec
from ot_ray.store import LocalStore, PatientStore, Store, scoped
from ot_ray.store.s3 import S3Store
from serve.catalogue.records import Job
from serve.controller.credentials import FILE as CREDENTIALS
from serve.controller.credentials import write_credentials
from serve.settings.jobs import JobsConfig

CONFIG, PUBLIC_KEY = "config.json", "public.pem"
_GRACE_S = 120.0
"""Seconds that a job's process has beyond the time limit, to end by itself and say why."""


def prepare(store: Store, job: Job, settings: JobsConfig, folder: Path) -> JobSpec:
    """Fill `jobs/<id>/input` of the store and the job's working folder; safe to repeat, also for a later attempt.

    The input is the tenant's training and validation file, copied once, so that they may be deleted meanwhile; and
    the bundle, where the store is a folder (on S3 it is read where it is published). The working folder holds the
    settings, the public key, and on S3 credentials of minutes' life. The job reads and writes nothing else.

    Args:
        job: validated, so that its hyperparameters are resolved.
        folder: an empty folder; the launcher takes what is in it.

    Raises:
        NotFoundError: a file or the bundle is gone.
        ArtifactError, SignatureError: the bundle is not the one that the job was made for.
        ConfigError: no credentials can be made for the job.
        StoreError, StoreUnavailableError: the store cannot be read or written.
    """
    inner = store.inner if isinstance(store, PatientStore) else store
    own = f"jobs/{job.id}"
    told: Store = inner
    environment = {
        "OMP_NUM_THREADS": str(max(1, math.ceil(settings.cpus))),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if isinstance(inner, S3Store):
        write_credentials(inner, job, settings, folder / CREDENTIALS)
        told = S3Store(inner.address.model_copy(update={"credentials": CREDENTIALS}))
        environment |= _aws_environment(inner)
    for name, file in (("train", job.training_file), ("validation", job.validation_file)):
        if file is not None:
            _copy_once(inner, f"files/{job.tenant_id}/{file}", f"{own}/input/{name}.jsonl")
    if settings.public_key is not None:
        (folder / PUBLIC_KEY).write_bytes(Path(settings.public_key).read_bytes())
    values = {"bundle": _bundle(inner, told, job, settings), **_settings(told, job, settings)}
    (folder / CONFIG).write_text(json.dumps(values, indent=2), encoding="utf-8")
    return JobSpec(
        job_id=job.submission_id or job.id,
        command=[sys.executable, "-m", "jobs.tune", "--config", CONFIG],
        working_dir=str(folder),
        environment=environment,
        cpus=settings.cpus,
        gpus=settings.gpus,
        memory_bytes=settings.memory_bytes,
        time_limit_s=settings.time_limit_s + _GRACE_S,
        joins_ray=False,
    )


def _settings(store: Store, job: Job, settings: JobsConfig) -> dict[str, Any]:
    """The settings of `jobs.tune`, but for the bundle.

    Args:
        store: as the job addresses it.
    """
    resolved, own = job.resolved, f"jobs/{job.id}"
    assert resolved is not None, "a job is started after its validation"
    validation = None if job.validation_file is None else {"source": _source(store, f"{own}/input/validation.jsonl")}
    return {
        "data": {"source": _source(store, f"{own}/input/train.jsonl"), "format": "jsonl"},
        "validation": validation and {**validation, "format": "jsonl"},
        "sequence_length": settings.sequence_length,
        "method": resolved["tuning_method"],
        "epochs": resolved["n_epochs"],
        "examples_per_step": resolved["batch_size"],
        "training": {
            "lr": resolved["learning_rate"],
            "seed": job.seed,
            "schedule": "cosine",
            "warmup_share": settings.warmup_share,
            "micro_batch_size": settings.micro_batch_size,
            "precision": settings.precision,
            "checkpoint_every": settings.checkpoint_every,
        },
        "checkpoints": scoped(store, f"{own}/checkpoints").url,
        "events": scoped(store, f"{own}/events").url,
        "output": scoped(store, f"{own}/output").url,
        "time_limit_s": settings.time_limit_s,
    }


def _bundle(store: Store, told: Store, job: Job, settings: JobsConfig) -> dict[str, Any]:
    key = {"public_key": PUBLIC_KEY} if settings.public_key is not None else {}
    model, version = job.bundle["model"], job.bundle["version"]
    if not isinstance(store, LocalStore):
        _require_bundle(job, published_manifest(store, model, version))
        return {"store": told.url, "model": model, "version": version, **key}
    folder = store.root / "jobs" / job.id / "input/bundle"
    trusted = None if settings.public_key is None else Path(settings.public_key)
    with suppress(AlreadyExistsError):
        fetch_bundle(store, model, version, folder, trusted)
    _require_bundle(job, open_bundle(folder, trusted).manifest)
    return {"folder": str(folder), **key}


def _require_bundle(job: Job, manifest: BundleManifest) -> None:
    wanted = job.bundle["bundle_id"]
    if manifest.bundle_id != wanted:
        raise ArtifactError(f"the bundle is {manifest.bundle_id}, but the job is for {wanted}; make a new job")


def _source(store: Store, key: str) -> str:
    """An object as `data.source` names it."""
    return str(store.root / key) if isinstance(store, LocalStore) else scoped(store, key).url


def _copy_once(store: Store, source: str, target: str) -> None:
    if any(key == target for key in store.list(target.rpartition("/")[0])):
        return
    with tempfile.TemporaryDirectory() as temporary:
        # On the store's own disk a download is the copy; elsewhere the bytes pass through this machine's.
        local = isinstance(store, LocalStore)
        path = store.root / target if local else Path(temporary) / "file"
        store.download(source, path)
        if not local:
            store.upload(path, target)


def _aws_environment(store: S3Store) -> dict[str, str]:
    """So that boto3 finds no credentials by itself: those of the job stand in its addresses."""
    region = store.address.region or os.environ.get("AWS_DEFAULT_REGION") or os.environ.get("AWS_REGION")
    return {
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_EC2_METADATA_DISABLED": "true",
        **({"AWS_DEFAULT_REGION": region} if region else {}),
    }
