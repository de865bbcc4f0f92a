"""What an isolated job is given, proven by the real command: it tunes where nothing else is left to be seen."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote

import pytest

from ot_ray.artifacts import BundleManifest, generate_key, inspect_adapter, publish_bundle
from ot_ray.errors import ArtifactError, ConfigError, NotFoundError, SignatureError
from ot_ray.launch import JobSpec
from ot_ray.store import LocalStore, PatientStore, S3Address, S3Store, Store, download_folder, open_store
from ot_ray.store.s3_session import Credentials
from serve.catalogue.records import Job
from serve.controller.credentials import lend
from serve.controller.job_folder import prepare
from serve.controller.reports import CheckpointMade, Message, Metrics, Report, parse_report, parse_result
from serve.settings.jobs import JobsConfig
from tests.service.iam_gate import OWNER, IamGate
from tests.service.job_samples import a_job

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


def run(spec: JobSpec, place: Path, status: int = 0) -> str:
    """The job's command as a launcher starts it: in a copy of its folder, with no environment but its own."""
    assert spec.working_dir is not None
    place.mkdir(exist_ok=True)
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
    assert ended.returncode == status, ended.stdout
    return ended.stdout


def reports_of(store: Store, job: Job) -> list[Report]:
    """What a job has told, the first first."""
    return [parse_report(store.read(key)) for key in store.list(f"jobs/{job.id}/events") if key.endswith(".json")]


def require_results(store: Store, job: Job, manifest: BundleManifest, place: Path) -> None:
    """An adapter an epoch and a last one, all sound; events and a result that the controller reads."""
    prefix = f"jobs/{job.id}"
    reports = reports_of(store, job)
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
def gate(s3_server: str) -> Iterator[IamGate]:
    gate = IamGate(s3_server)
    yield gate
    gate.close()


def test_a_job_on_s3_outlives_its_credentials_and_goes_on_where_they_ran_out(
    s3_url: str, gate: IamGate, bundle_folder: Path, jobs: JobsConfig, tmp_path: Path
) -> None:
    """Before a gate that lets nothing through but what each session's policy allows, for as long as it is good."""
    store = open_store(f"{S3Address.parse(s3_url).place}?endpoint_url={quote(gate.url, safe='')}")
    assert isinstance(store, S3Store)
    publish_bundle(store, bundle_folder)
    manifest = BundleManifest.model_validate_json((bundle_folder / "manifest.json").read_bytes())
    job, logs, shipped, lent = filled(store, manifest), list[str](), list[str](), list[Credentials]()

    def attempt(number: int, status: int) -> None:
        now = replace(job, attempt=number, submission_id=f"{job.id}-{number}")
        folder = tmp_path / f"shipped-{number}"
        folder.mkdir()
        spec = prepare(store, now, jobs, folder)
        lent.append(Credentials.decode((folder / "credentials.json").read_bytes(), "the file"))
        # It was long in coming: it has a successor, and ends when that is first used.
        lent.append(lend(store, now, jobs))
        logs.append(run(spec, tmp_path / f"run-{number}", status))
        shipped.append(repr(spec) + json.dumps(dict(spec.environment)) + (folder / "config.json").read_text())

    def before(key_id: str, method: str, path: str) -> int | None:
        number = [session.key_id for session in gate.lent].index(key_id)
        # After the first run's checkpoint nobody renews: its controller is away.
        if method == "PUT" and "/events/00000005" in path and number == 1:
            gate.lent[1].over = True
        if number in (1, 3):
            gate.lent[number - 1].over = True
        return None

    gate.before = before
    attempt(1, status=2)
    reports = reports_of(store, job)
    # It lies with the machine, not with the customer, who is told nothing.
    assert not [report for report in reports if isinstance(report, Message) and report.level == "error"]
    assert "the credentials are over (ExpiredToken) and were not renewed in time" in logs[0]
    assert "Traceback" not in logs[0]
    attempt(2, status=0)
    reports = reports_of(store, job)
    assert any("Training goes on after step" in report.message for report in reports if isinstance(report, Message))
    require_results(store, job, manifest, tmp_path)

    requests = [passed for passed in gate.seen if passed.key_id != OWNER]
    assert len(requests) > 30
    # What was refused is what came after the first run's end. A job may not delete what it told, so that its claim
    # to be the one that writes goes with the rest.
    ended = {lent[0].access_key_id, lent[1].access_key_id}
    refused = [passed for passed in requests if passed.status >= 300]
    assert {passed.status for passed in refused if passed.key_id in ended} == {400}
    others = {(passed.method, passed.path.rpartition("/")[2]) for passed in refused if passed.key_id not in ended}
    assert others <= {("DELETE", "claim")}
    # The first ones of each run opened the object that held the next, and nothing else.
    for first in lent[::2]:
        assert [passed.path for passed in gate.by(first.access_key_id) if "/credentials/" not in passed.path] == []
    for ships in (tmp_path / "run-1/job", tmp_path / "run-2/job"):
        assert (ships / "credentials.json").stat().st_mode & 0o777 == 0o600

    stored = [store.read(key) for key in store.list(f"jobs/{job.id}") if "/credentials/" not in key]
    told = "".join([*logs, *shipped, *(data.decode("latin-1") for data in stored)])
    for session in lent:
        for secret in (session.access_key_id, session.secret_access_key, session.session_token, "test-secret"):
            assert secret not in told
