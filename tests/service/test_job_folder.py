"""What an isolated job is given, proven by the real command: it tunes where nothing else is left to be seen."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote

import pytest

from ot_ray.artifacts import BundleManifest, generate_key, inspect_adapter, publish_bundle
from ot_ray.errors import ArtifactError, ConfigError, NotFoundError, SignatureError
from ot_ray.launch import JobSpec
from ot_ray.store import LocalStore, PatientStore, S3Address, Store, download_folder, open_store
from ot_ray.store.s3_credentials import session_policy
from serve.catalogue.records import Job
from serve.controller.credentials import job_grant
from serve.controller.job_folder import prepare
from serve.controller.reports import CheckpointMade, Message, Metrics, parse_report, parse_result
from serve.settings.jobs import JobsConfig
from tests.service.iam import allowed, asked_by
from tests.service.job_samples import a_job
from tests.store.faulty_proxy import FaultyProxy

# The real command, on a machine with much else to do.
pytestmark = pytest.mark.timeout(700)

ROOT = Path(__file__).parents[2]
ROLE = "arn:aws:iam::123456789012:role/jobs"
EXAMPLES = "".join(json.dumps({"prompt": f"{i} and", "completion": f" {i + 1}"}) + "\n" for i in range(20))


@pytest.fixture
def public_key(owner_keys: tuple[Path, Path]) -> str:
    return str(owner_keys[1])


@pytest.fixture
def jobs(public_key: str) -> JobsConfig:
    return JobsConfig(sequence_length=64, public_key=public_key, role_arn=ROLE, checkpoint_every=2, time_limit_s=3600)


@pytest.fixture
def work(tmp_path: Path) -> Path:
    folder = tmp_path / "shipped"
    folder.mkdir()
    return folder


def filled(store: Store, manifest: BundleManifest, **changes: object) -> Job:
    """A job whose files are in the store."""
    job = a_job(bundle={"model": manifest.model, "version": manifest.version, "bundle_id": manifest.bundle_id})
    job = replace(job, validation_file="file-validation", **changes)
    for file in (job.training_file, job.validation_file):
        store.write(f"files/{job.tenant_id}/{file}", EXAMPLES.encode())
    store.write("files/other/file-other", b"somebody else's")
    return job


def run(spec: JobSpec, place: Path) -> str:
    """The job's command as a launcher starts it: in a copy of its folder, with no environment but its own."""
    assert spec.working_dir is not None
    shutil.copytree(spec.working_dir, place / "job")
    home = place / "home"
    home.mkdir()
    surroundings = {"PATH": os.defpath, "HOME": str(home), "PYTHONPATH": str(ROOT), "NO_PROXY": "127.0.0.1"}
    ended = subprocess.run(
        spec.command,
        cwd=place / "job",
        env={**surroundings, **spec.environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout
    return ended.stdout


def require_results(store: Store, job: Job, manifest: BundleManifest, place: Path) -> None:
    """An adapter an epoch and a last one, all sound; events and a result that the controller reads."""
    prefix = f"jobs/{job.id}"
    reports = [parse_report(store.read(key)) for key in store.list(f"{prefix}/events")]
    assert not [report for report in reports if isinstance(report, Message) and report.level != "info"]
    steps = [report.step for report in reports if isinstance(report, Metrics)]
    result = parse_result(store.read(f"{prefix}/output/result.json"))
    assert steps == [*range(1, result.steps + 1)]
    made = [report for report in reports if isinstance(report, CheckpointMade)]
    assert len(made) == 2
    for name in (*(report.folder for report in made), result.adapter):
        download_folder(store, f"{prefix}/output/{name}", place / "adapters" / name)
        assert inspect_adapter(place / "adapters" / name, manifest).manifest.method == "lora"
    assert {"train_loss", "train_mean_token_accuracy", "valid_loss", "valid_mean_token_accuracy"} == set(result.metrics)


def test_a_job_of_a_local_store_needs_nothing_outside_its_folder(
    store: LocalStore, released: BundleManifest, jobs: JobsConfig, work: Path, tmp_path: Path
) -> None:
    job = filled(store, released)
    spec = prepare(PatientStore(store, 1.0), job, jobs, work)
    assert (spec.job_id, spec.joins_ray, spec.gpus) == (job.submission_id, False, 0)
    own = store.root / "jobs" / job.id
    assert {path.name for path in work.iterdir()} == {"config.json", "public.pem"}
    # Every address that it is told lies in its own folder; nothing else is a path at all.
    told = (work / "config.json").read_text() + json.dumps([*spec.environment.values(), *spec.command[1:]])
    paths = re.findall(r'"(?:file://)?(/[^"]*)"', told)
    assert paths
    assert all(Path(path).is_relative_to(own) for path in paths), paths
    # And there is nothing else: all that was in the store goes, the original files too.
    for path in store.root.iterdir():
        if path.name != "jobs":
            shutil.rmtree(path)
    run(spec, tmp_path)
    require_results(store, job, released, tmp_path)
    assert {path.name for path in own.iterdir()} == {"input", "events", "checkpoints", "output"}


def test_a_job_changes_no_file_but_its_own(
    store: LocalStore, released: BundleManifest, jobs: JobsConfig, work: Path
) -> None:
    job = filled(store, released)
    prepare(store, job, jobs, work)
    own = [path for path in (store.root / "jobs" / job.id).rglob("*") if path.is_file()]
    assert {path.name for path in own} > {"train.jsonl", "validation.jsonl", "manifest.json"}
    # No link to what others have.
    assert all(path.stat().st_nlink == 1 and not path.is_symlink() for path in own)


def test_it_is_filled_again_for_a_later_attempt_though_the_customer_deleted_the_files(
    store: LocalStore, released: BundleManifest, jobs: JobsConfig, work: Path, tmp_path: Path
) -> None:
    job = filled(store, released)
    prepare(store, job, jobs, work)
    before = {path: path.read_bytes() for path in store.root.joinpath("jobs").rglob("*") if path.is_file()}
    store.delete_prefix(f"files/{job.tenant_id}")
    again = tmp_path / "again"
    again.mkdir()
    spec = prepare(store, replace(job, attempt=2, submission_id=f"{job.id}-2"), jobs, again)
    assert spec.job_id == f"{job.id}-2"
    assert (again / "config.json").read_bytes() == (work / "config.json").read_bytes()
    assert {path: path.read_bytes() for path in store.root.joinpath("jobs").rglob("*") if path.is_file()} == before


def test_what_is_gone_or_foreign_is_refused(
    store: LocalStore, released: BundleManifest, jobs: JobsConfig, work: Path, tmp_path: Path
) -> None:
    job = filled(store, released)
    with pytest.raises(NotFoundError):
        prepare(store, replace(job, id="ftjob-1", training_file="file-gone"), jobs, work)
    with pytest.raises(NotFoundError, match="version 2 of"):
        prepare(store, replace(job, id="ftjob-2", bundle={**job.bundle, "version": "2"}), jobs, work)
    with pytest.raises(ArtifactError, match="the job is for another"):
        prepare(store, replace(job, id="ftjob-3", bundle={**job.bundle, "bundle_id": "another"}), jobs, work)
    _, other = generate_key(tmp_path / "other")
    with pytest.raises(SignatureError):
        prepare(store, replace(job, id="ftjob-4"), jobs.model_copy(update={"public_key": str(other)}), work)
    with pytest.raises(ConfigError, match="role_arn"):
        prepare(
            open_store("s3://data/root"),
            replace(job, id="ftjob-5"),
            jobs.model_copy(update={"role_arn": None}),
            work,
        )


@pytest.fixture
def recorder(s3_server: str) -> Iterator[FaultyProxy]:
    """Passes every request on to the S3 server, and remembers it."""
    proxy = FaultyProxy(s3_server)
    yield proxy
    proxy.shutdown()
    proxy.server_close()


def test_a_job_on_s3_asks_for_nothing_that_its_policy_denies(
    s3_url: str,
    s3_server: str,
    recorder: FaultyProxy,
    bundle_folder: Path,
    jobs: JobsConfig,
    work: Path,
    tmp_path: Path,
) -> None:
    """By its real requests, and an evaluator of policies that is not the service's."""
    address = S3Address.parse(s3_url)
    store = open_store(f"{address.place}?endpoint_url={quote(recorder.url, safe='')}")
    publish_bundle(store, bundle_folder)
    manifest = BundleManifest.model_validate_json((bundle_folder / "manifest.json").read_bytes())
    job = filled(store, manifest)
    spec = prepare(store, job, jobs.model_copy(update={"sts_endpoint": s3_server}), work)
    secrets = re.findall(r"= (\S+)", (work / "credentials").read_text())
    assert len(secrets) == 3
    assert stat.S_IMODE((work / "credentials").stat().st_mode) == 0o600

    recorder.seen.clear()
    log = run(spec, tmp_path)
    requests = [*recorder.seen]
    assert len(requests) > 30
    policy = session_policy(address, job_grant(job))
    for request in requests:
        for action, resource, context in asked_by(request.method, request.path, request.posted):
            assert allowed(policy, action, resource, context), (request.method, request.path)
            # S3 answers 403 and not 404 for what is not there, to whoever may not list the whole bucket.
            key = resource.partition(f"{address.prefix}/")[2]
            assert action != "s3:GetObject" or "/checkpoints/" in key or store.exists(key), request.path
        # Signed with the job's own session; the service's credentials were not there.
        assert f"Credential={secrets[0]}/" in request.authorization
    require_results(store, job, manifest, tmp_path)

    stored = b"".join(store.read(key) for key in store.list(f"jobs/{job.id}") if key.endswith((".json", ".csv")))
    told = log + repr(spec) + json.dumps(dict(spec.environment)) + (work / "config.json").read_text() + stored.decode()
    for secret in (*secrets, "test-secret"):
        assert secret not in told
