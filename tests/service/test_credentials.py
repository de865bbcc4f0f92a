"""What a job on S3 may do: its policy by an evaluator of its own, its credentials from a token service over HTTP."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from ot_ray.errors import AlreadyExistsError, ConfigError, StoreError
from ot_ray.store import S3Address, S3Store, open_store, scoped
from ot_ray.store.s3_credentials import Grant, assume_role, session_policy
from ot_ray.store.s3_session import Credentials
from serve.catalogue.records import Job
from serve.controller.credentials import job_grant, write_credentials
from serve.settings.jobs import JobsConfig
from tests.service.iam import allowed
from tests.service.job_samples import a_job

ROLE = "arn:aws:iam::123456789012:role/jobs"
BUCKET = "arn:aws:s3:::data"


def policy_of(job: Job, prefix: str = "root") -> dict[str, Any]:
    return session_policy(S3Address(bucket="data", prefix=prefix), job_grant(job))


@pytest.mark.parametrize("prefix", ["root", "", "deep/er"])
def test_a_job_may_do_what_it_needs(prefix: str) -> None:
    job = a_job()
    policy, base = policy_of(job, prefix), f"{prefix}/" if prefix else ""
    own = f"{BUCKET}/{base}jobs/{job.id}"
    read = ("input/train.jsonl", "events/00000001.json", "output/adapter/manifest.json", "checkpoints/tune/x")
    for key in (*read, "credentials/1.json"):
        assert allowed(policy, "s3:GetObject", f"{own}/{key}")
    assert allowed(policy, "s3:GetObject", f"{BUCKET}/{base}bundles/tiny/1/model.safetensors")
    for key in ("events/00000001.json", "output/result.json", "checkpoints/tune/step-1/commit.json"):
        assert allowed(policy, "s3:PutObject", f"{own}/{key}")
    assert allowed(policy, "s3:AbortMultipartUpload", f"{own}/output/adapter/adapter.safetensors")
    assert allowed(policy, "s3:DeleteObject", f"{own}/checkpoints/tune/step-1/commit.json")
    assert allowed(policy, "s3:ListBucket", BUCKET, {"s3:prefix": f"{base}jobs/{job.id}/events/"})


def test_and_nothing_else() -> None:
    job = a_job()
    policy, own = policy_of(job), f"{BUCKET}/root/jobs/{job.id}"
    others = [
        f"root/jobs/{job.id}x/output/result.json",
        f"root/jobs/{job.id[:-1]}/output/result.json",
        "root/jobs/other/input/train.jsonl",
        f"root/files/{job.tenant_id}/{job.training_file}",
        "root/files/other/file",
        "root/bundles/tiny/2/manifest.json",
        "root/bundles/tiny/1x/manifest.json",
        "root/releases/tiny/000001.json",
        "root/plug_ins/x",
        f"jobs/{job.id}/output/result.json",
        f"root/jobs/{job.id}",
    ]
    for key in others:
        for action in ("s3:GetObject", "s3:PutObject", "s3:DeleteObject"):
            assert not allowed(policy, action, f"{BUCKET}/{key}"), (action, key)
    # What it was told, and what it has told, it cannot change afterwards.
    for key in ("input/train.jsonl", "input/config.json", "credentials/1.json", "credentials/2.json"):
        assert not allowed(policy, "s3:PutObject", f"{own}/{key}")
        assert not allowed(policy, "s3:DeleteObject", f"{own}/{key}")
    for key in ("events/00000001.json", "output/result.json"):
        assert not allowed(policy, "s3:DeleteObject", f"{own}/{key}")
    assert not allowed(policy, "s3:PutObject", f"{BUCKET}/root/bundles/tiny/1/manifest.json")
    assert not allowed(policy, "s3:GetObject", f"arn:aws:s3:::other/root/jobs/{job.id}/input/train.jsonl")
    for action in ("s3:PutObjectAcl", "s3:GetBucketPolicy", "s3:PutBucketPolicy", "sts:AssumeRole", "iam:PassRole"):
        for resource in (BUCKET, f"{own}/output/x", "*"):
            assert not allowed(policy, action, resource)


@pytest.mark.parametrize(
    "context",
    [{}, {"s3:prefix": ""}, {"s3:prefix": "root/"}, {"s3:prefix": "root/jobs/"}, {"s3:prefix": "root/files/"}],
    ids=str,
)
def test_only_its_own_keys_are_listed(context: dict[str, str]) -> None:
    job = a_job()
    assert not allowed(policy_of(job), "s3:ListBucket", BUCKET, context)
    assert not allowed(policy_of(job), "s3:ListBucket", BUCKET, {"s3:prefix": f"root/jobs/{job.id}x/"})
    assert not allowed(policy_of(job), "s3:ListBucket", "arn:aws:s3:::other", {"s3:prefix": f"root/jobs/{job.id}/"})


def test_a_policy_is_short_enough_and_takes_no_patterns() -> None:
    # AWS takes 2048 characters.
    address = S3Address(bucket="b" * 63, prefix="p" * 100)
    assert len(json.dumps(session_policy(address, job_grant(a_job())), separators=(",", ":"))) < 2048
    for prefix in ("a*", "a?b", "${aws:username}", "x[1]"):
        with pytest.raises(ConfigError, match="cannot be granted"):
            session_policy(S3Address(bucket="data", prefix=prefix), Grant(read=["jobs/a"]))
    with pytest.raises(ConfigError, match="cannot be granted"):
        session_policy(S3Address(bucket="data"), Grant(read=[""]))
    with pytest.raises(StoreError):
        session_policy(S3Address(bucket="data"), Grant(read=["../a"]))
    china = session_policy(S3Address(bucket="data"), Grant(read=["a"]), "aws-cn")
    assert china["Statement"][0]["Resource"] == ["arn:aws-cn:s3:::data/a/*"]


def test_a_token_service_gives_credentials_of_short_life(s3_url: str, tmp_path: Path) -> None:
    store, job, before = open_store(s3_url), a_job(), time.time()
    assert isinstance(store, S3Store)
    # However long the job may take.
    settings = JobsConfig(role_arn=ROLE, time_limit_s=7 * 24 * 3600)
    write_credentials(store, job, settings, tmp_path / "file")
    first = Credentials.decode((tmp_path / "file").read_bytes(), "the file")
    # Both are of this machine, and the server's clock shows whole seconds.
    assert before + 890 < first.expires_at < time.time() + 910
    # What passes between the making and the answer counts as part of the life.
    assert 600 < first.lasts_s <= 901
    assert first.renewal == scoped(store, f"jobs/{job.id}/credentials/1.json").url
    # The same lie where the next ones will.
    assert store.read(f"jobs/{job.id}/credentials/1.json") == (tmp_path / "file").read_bytes()
    # Not the service's own.
    assert "test-key" not in (tmp_path / "file").read_text()
    with pytest.raises(AlreadyExistsError):
        write_credentials(store, job, settings, tmp_path / "file")
    session = assume_role(store.address, ROLE, job.id, job_grant(job))
    assert session.secret_access_key not in repr(session)
    assert session.session_token not in repr(session)


def test_what_cannot_be_given_is_refused(s3_url: str, tmp_path: Path) -> None:
    store, job, path = open_store(s3_url), a_job(), tmp_path / "file"
    assert isinstance(store, S3Store)
    with pytest.raises(ConfigError, match=r"jobs\.role_arn is not set"):
        write_credentials(store, job, JobsConfig(), path)
    with pytest.raises(ConfigError, match="role_arn is 'jobs'"):
        write_credentials(store, job, JobsConfig(role_arn="jobs"), path)
    with pytest.raises(ConfigError, match="session is"):
        assume_role(store.address, ROLE, "a b", Grant())
    assert not [*tmp_path.iterdir()]
    assert not [*store.list()]
