"""From `validating_files` to the queue: reads a job's files as training will, and puts numbers for "auto".

What a valid file is, is validation.py's to know; the numbers are hyperparameters.py's."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from transformers import AutoTokenizer

from ot_ray.artifacts.manifest import MANIFEST, BundleManifest
from ot_ray.artifacts.strict_json import parse_json
from ot_ray.errors import NotFoundError
from ot_ray.model import Method
from ot_ray.store import Store
from serve.catalogue.records import Job
from serve.catalogue.runs import Line
from serve.controller.desk import Desk, job_prefix
from serve.controller.hyperparameters import BASE_LEARNING_RATES, resolve
from serve.controller.validation import ValidationRules, validate
from serve.controller.validation_report import ValidationReport
from serve.stored_files import file_key

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FileKind = Literal["training_file", "validation_file"]


def check(desk: Desk, job: Job) -> None:
    """Validate a job's files; the job is queued with its figures, or has failed with what is wrong."""
    if job.wanted == "cancel":
        desk.cancel(job)
        return
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = bundle_tokenizer(desk.store, job.bundle, Path(folder, "tokenizer"))
        training = _validate(desk, job, "training_file", job.training_file, tokenizer, Path(folder))
        if training is None:
            return
        if job.validation_file is not None and not _validate(
            desk, job, "validation_file", job.validation_file, tokenizer, Path(folder)
        ):
            return
    _queue(desk, job, training)


def bundle_tokenizer(store: Store, bundle: Mapping[str, Any], folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a published bundle, of which everything but the weights is downloaded into `folder`.

    Raises:
        NotFoundError: the bundle is not in the store.
    """
    prefix = f"bundles/{bundle['model']}/{bundle['version']}"
    manifest = parse_json(BundleManifest, store.read(f"{prefix}/{MANIFEST}"), f"{prefix}/{MANIFEST}")
    for name, entry in manifest.files.items():
        if not name.endswith(".safetensors"):
            store.download(f"{prefix}/{name}", folder / name, sha256=entry.sha256)
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)


def input_key(job: Job, kind: FileKind) -> str:
    """Where the job's own copy of a file lies, from which job_folder.py goes on."""
    return f"{job_prefix(job)}/input/{'train' if kind == 'training_file' else 'validation'}.jsonl"


def _validate(
    desk: Desk, job: Job, kind: FileKind, file_id: str, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> ValidationReport | None:
    """The report of a valid file; None where the job has failed."""
    path = folder / f"{kind}.jsonl"
    try:
        file = desk.catalogue.files.get(job.tenant_id, file_id)
        desk.store.download(file_key(job.tenant_id, file_id), path, sha256=file.sha256)
    except NotFoundError:
        desk.fail(job, f"invalid_{kind}", f"The file {file_id} was deleted before the job was queued.", kind)
        return None
    fewest = 10 if kind == "training_file" else 1
    rules = ValidationRules.model_validate(
        {"length": desk.settings.sequence_length, "file": kind, "min_examples": fewest}
    )
    report = validate(path, tokenizer, rules)
    if report.error is not None:
        # The lines are the customer's own; nothing of this machine is in them.
        desk.fail(job, report.error["code"], report.error["message"], report.error["param"], data=report.data)
        return None
    # What was checked is what is trained on, whatever becomes of the file meanwhile.
    desk.store.upload(path, input_key(job, kind))
    path.unlink()
    told = [
        Line(f"{kind}:{number:02d}", text, level=level, data=report.data if number == 0 else None)
        for number, (level, text) in enumerate(report.lines)
    ]
    desk.catalogue.runs.take(job, told)
    return report


def _queue(desk: Desk, job: Job, training: ValidationReport) -> None:
    method: Method = job.method.get("tuning_method", desk.settings.tuning_method)
    rates = dict(BASE_LEARNING_RATES)
    if desk.settings.learning_rate is not None:
        rates[method] = desk.settings.learning_rate
    resolved = resolve(
        job.hyperparameters,
        tuning_method=method,
        examples=training.examples,
        tokens=training.tokens,
        most_tokens=desk.catalogue.tenants.get(job.tenant_id).limits.tokens_per_day,
        base_rates=rates,
    )
    desk.catalogue.jobs.move(
        job.id,
        {"validating_files"},
        "queued",
        event="Files validated, moving job to queued state",
        queued_at=desk.catalogue.now(),
        tokens=training.tokens * resolved.n_epochs,
        resolved=resolved.model_dump(mode="json"),
    )
