"""Credentials of short life for a few folders of an S3 store, made by assuming a role under a session policy.

Who gets them, and for which folders, is left to the caller; boto3 finds the caller's own as ever."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ot_ray.errors import ConfigError
from ot_ray.store.base import check_prefix, join_key
from ot_ray.store.partial import disk_errors
from ot_ray.store.s3_address import S3Address
from ot_ray.store.s3_failures import Retry, load_boto3

SHORTEST_S, LONGEST_S = 900, 43_200
"""Seconds that a session may last, as AWS has it; a role may allow less than the longest."""

_ROLE = re.compile(r"arn:(?P<partition>aws[a-z-]*):iam::[0-9]{12}:role/[\w+=,.@/-]{1,512}", re.ASCII)
_SESSION = re.compile(r"[\w+=,.@-]{2,64}", re.ASCII)
_WILD = re.compile(r"[*?$\[\]]")


@dataclass(frozen=True)
class Grant:
    """Folders of a store, as prefixes, and what may be done in them; everything else is denied."""

    read: Sequence[str] = ()
    """Objects may be read."""
    write: Sequence[str] = ()
    """Objects may be made and replaced."""
    delete: Sequence[str] = ()
    """Objects may be deleted."""
    list: Sequence[str] = ()
    """Keys may be listed."""


@dataclass(frozen=True)
class Credentials:
    """An AWS session. The secrets stay out of its text form."""

    access_key_id: str
    secret_access_key: str = field(repr=False)
    session_token: str = field(repr=False)
    expires_at: int
    """Seconds since 1970."""

    def write(self, path: Path) -> None:
        """Make a credentials file as AWS tools read it, for its owner's eyes only.

        Raises:
            AlreadyExistsError: the file is there.
        """
        text = (
            f"[default]\naws_access_key_id = {self.access_key_id}\naws_secret_access_key = {self.secret_access_key}\n"
            f"aws_session_token = {self.session_token}\n"
        )
        with disk_errors(f"cannot write {path}"):
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(handle, "w", encoding="ascii") as file:
                file.write(text)


def session_policy(address: S3Address, grant: Grant, partition: str = "aws") -> dict[str, Any]:
    """The policy document that allows just the grant.

    Keys are listed under a prefix only: a listing of the whole bucket, or of a folder's neighbours, is denied. So an
    object that is not there is answered 403 and not 404, as S3 does for whoever may not list all.

    Raises:
        StoreError: a prefix is none.
        ConfigError: a prefix holds a character that policies take for a pattern.
    """
    bucket = f"arn:{partition}:s3:::{address.bucket}"
    actions = {
        "Read": (["s3:GetObject"], grant.read),
        "Write": (["s3:PutObject", "s3:AbortMultipartUpload"], grant.write),
        "Delete": (["s3:DeleteObject"], grant.delete),
    }
    statements: list[dict[str, Any]] = [
        {
            "Sid": name,
            "Effect": "Allow",
            "Action": allowed,
            "Resource": [f"{bucket}/{pattern}" for pattern in _patterns(address, prefixes)],
        }
        for name, (allowed, prefixes) in actions.items()
        if prefixes
    ]
    if grant.list:
        condition = {"StringLike": {"s3:prefix": _patterns(address, grant.list)}}
        statements.append(
            {"Sid": "List", "Effect": "Allow", "Action": ["s3:ListBucket"], "Resource": bucket, "Condition": condition}
        )
    return {"Version": "2012-10-17", "Statement": statements}


def assume_role(
    address: S3Address, role_arn: str, session: str, grant: Grant, seconds: float, endpoint_url: str | None = None
) -> Credentials:
    """Credentials that allow what the grant and the role both do.

    Args:
        session: a name for it in the provider's records, such as a job's id.
        seconds: how long they are good for; at least 15 minutes, which is the shortest there is.
        endpoint_url: of the token service; unset, that of the address, as servers other than Amazon's have it.

    Raises:
        ConfigError: the role's or the session's name is none, or the seconds are more than AWS gives.
        StoreError: the role is refused; StoreUnavailableError: nobody answers.
        MissingDependencyError: boto3 is not installed.
    """
    match = _ROLE.fullmatch(role_arn)
    if match is None:
        raise ConfigError(f"role_arn is {role_arn!r}; write arn:aws:iam::123456789012:role/name")
    if not _SESSION.fullmatch(session):
        raise ConfigError(f"session is {session[:80]!r}; use 2 to 64 letters, digits and any of _+=,.@-")
    if seconds > LONGEST_S:
        raise ConfigError(f"credentials for {seconds:g} s are wanted, and last {LONGEST_S} s at most; shorten the time")
    boto3 = load_boto3()
    policy = session_policy(address, grant, match["partition"])
    task = f"cannot assume {role_arn} for {session}"
    retry = Retry(address.attempts, address.base_delay)
    client = retry(lambda: _client(boto3, address, endpoint_url), task)
    answer = retry(
        lambda: client.assume_role(
            RoleArn=role_arn,
            RoleSessionName=session,
            Policy=json.dumps(policy, separators=(",", ":")),
            DurationSeconds=max(SHORTEST_S, math.ceil(seconds)),
        ),
        task,
    )
    given = answer["Credentials"]
    return Credentials(
        given["AccessKeyId"], given["SecretAccessKey"], given["SessionToken"], int(given["Expiration"].timestamp())
    )


def _client(boto3: Any, address: S3Address, endpoint_url: str | None) -> Any:
    from botocore.config import Config

    options = Config(connect_timeout=10, read_timeout=address.timeout, retries={"total_max_attempts": 1})
    return boto3.session.Session().client(
        "sts", endpoint_url=endpoint_url or address.endpoint_url, region_name=address.region, config=options
    )


def _patterns(address: S3Address, prefixes: Sequence[str]) -> list[str]:
    folders = [join_key(address.prefix, check_prefix(prefix)) for prefix in prefixes]
    for folder in folders:
        if not folder or _WILD.search(folder):
            raise ConfigError(f"folder {folder!r} cannot be granted by a policy; use one without * ? $ [ ]")
    return [f"{folder}/*" for folder in folders]
