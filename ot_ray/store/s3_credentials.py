"""Credentials of short life for a few folders of an S3 store, made by assuming a role under a session policy.

Who gets them, and for which folders, is left to the caller; boto3 finds the caller's own as ever."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

from ot_ray.errors import ConfigError
from ot_ray.store.base import check_prefix, join_key
from ot_ray.store.s3_address import S3Address
from ot_ray.store.s3_failures import Retry
from ot_ray.store.s3_session import Credentials, CredentialsFile, boto_session

SESSION_S = 900
"""Seconds that a session lasts: the shortest that AWS gives, which every role allows."""

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
    address: S3Address, role_arn: str, session: str, grant: Grant, endpoint_url: str | None = None
) -> Credentials:
    """Credentials that allow what the grant and the role both do, for `SESSION_S` seconds.

    Args:
        session: a name for it in the provider's records, such as a job's id.
        endpoint_url: of the token service; unset, that of the address, as servers other than Amazon's have it.

    Raises:
        ConfigError: the role's or the session's name is none.
        StoreError: the role is refused; StoreUnavailableError: nobody answers.
        MissingDependencyError: boto3 is not installed.
    """
    match = _ROLE.fullmatch(role_arn)
    if match is None:
        raise ConfigError(f"role_arn is {role_arn!r}; write arn:aws:iam::123456789012:role/name")
    if not _SESSION.fullmatch(session):
        raise ConfigError(f"session is {session[:80]!r}; use 2 to 64 letters, digits and any of _+=,.@-")
    policy = session_policy(address, grant, match["partition"])
    task = f"cannot assume {role_arn} for {session}"
    retry = Retry(address.attempts, address.base_delay)
    client = retry(lambda: _client(address, endpoint_url), task)
    answer = retry(
        lambda: client.assume_role(
            RoleArn=role_arn,
            RoleSessionName=session,
            Policy=json.dumps(policy, separators=(",", ":")),
            DurationSeconds=SESSION_S,
        ),
        task,
    )
    given = answer["Credentials"]
    ends = given["Expiration"].timestamp()
    return Credentials(
        given["AccessKeyId"],
        given["SecretAccessKey"],
        given["SessionToken"],
        expires_at=int(ends),
        lasts_s=_life(ends, answer["ResponseMetadata"]["HTTPHeaders"]),
    )


def _life(ends: float, headers: Mapping[str, str]) -> float:
    """Seconds of a session by the clock of the server that made it; this machine's may differ."""
    try:
        life = ends - parsedate_to_datetime(headers.get("date", "")).timestamp()
    except ValueError:
        return float(SESSION_S)
    return life if life > 0 else float(SESSION_S)


def _client(address: S3Address, endpoint_url: str | None) -> Any:
    from botocore.config import Config

    options = Config(connect_timeout=10, read_timeout=address.timeout, retries={"total_max_attempts": 1})
    file = CredentialsFile(address.credentials) if address.credentials else None
    return boto_session(file).client(
        "sts", endpoint_url=endpoint_url or address.endpoint_url, region_name=address.region, config=options
    )


def _patterns(address: S3Address, prefixes: Sequence[str]) -> list[str]:
    folders = [join_key(address.prefix, check_prefix(prefix)) for prefix in prefixes]
    for folder in folders:
        if not folder or _WILD.search(folder):
            raise ConfigError(f"folder {folder!r} cannot be granted by a policy; use one without * ? $ [ ]")
    return [f"{folder}/*" for folder in folders]
