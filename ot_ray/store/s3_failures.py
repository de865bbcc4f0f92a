"""What boto3's failures mean, and the one place that tries again.

Which requests are sent is left to `s3`; boto3 is imported before any of its failures can occur."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any, TypeVar

from ot_ray.errors import (
    CredentialsExpiredError,
    MissingDependencyError,
    NotFoundError,
    StoreError,
    StoreFullError,
    StoreUnavailableError,
)

T = TypeVar("T")

_LONGEST_DELAY = 20.0  # seconds

# Answers that a later attempt may change. Any other code with a status of 500 or more counts too.
_TRANSIENT = {
    "ConditionalRequestConflict",
    "InternalError",
    "OperationAborted",
    "RequestLimitExceeded",
    "RequestTimeout",
    "ServiceUnavailable",
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    "TooManyRequests",
    "429",
}
_FULL = {"InsufficientStorage", "QuotaExceeded", "XMinioStorageFull", "507"}
_MISSING = {"404", "NoSuchKey", "NotFound"}
_CREDENTIALS = {
    "ExpiredToken",
    "InvalidAccessKeyId",
    "InvalidToken",
    "SignatureDoesNotMatch",
    "TokenRefreshRequired",
}
# S3 answers so to a HEAD with credentials that are over, which has no body to say it.
_BARE = "400"


class PreconditionFailedError(StoreError):
    """An object stands where a request said none stands, or is not the one that the request named."""


class RangeBeyondEndError(StoreError):
    """A range begins where the object ends, or after."""


def load_boto3() -> Any:
    """The boto3 package. Raises MissingDependencyError."""
    try:
        import boto3
    except ImportError:
        raise MissingDependencyError("an s3:// store needs boto3; pip install 'ot_ray[platform]'") from None
    return boto3


class Retry:
    """Sends a request until it is answered, with exponential backoff and jitter between attempts.

    Args:
        key_id: tells which credentials a request is signed with, where others may take their place at any time; one
            that was refused is then sent again if they did.
    """

    def __init__(self, attempts: int, base_delay: float, key_id: Callable[[], str] | None = None) -> None:
        self._attempts, self._base_delay, self._key_id = attempts, base_delay, key_id

    def __call__(self, request: Callable[[], T], task: str) -> T:
        """The answer to `request`.

        Args:
            task: opens the message, for example "cannot read s3://bucket/key at http://host".

        Raises:
            StoreUnavailableError: every attempt failed for a reason that could have passed.
            CredentialsExpiredError: the credentials are over, and no others took their place.
            StoreError: the answer is final; nothing was tried again.
            MissingDependencyError: boto3 is not installed.
        """
        load_boto3()
        from botocore.exceptions import BotoCoreError, ClientError
        from urllib3.exceptions import HTTPError

        attempt = 1
        while True:
            signed_with = self._key_id and self._key_id()
            try:
                return request()
            except (BotoCoreError, ClientError, HTTPError) as error:
                if self._key_id is not None and _is_refused(error):
                    if self._key_id() == signed_with:
                        raise _expired(error, task) from error
                elif not _is_transient(error):
                    raise _final(error, task) from error
                if attempt == self._attempts:
                    raise _unavailable(error, task, attempt) from error
            # Workers that failed together must not come back together.
            delay = min(self._base_delay * 2 ** (attempt - 1), _LONGEST_DELAY)
            time.sleep(delay * random.uniform(0.5, 1.0))
            attempt += 1


def _is_transient(error: Exception) -> bool:
    from botocore.exceptions import ClientError, ConnectionError, HTTPClientError, IncompleteReadError
    from urllib3.exceptions import HTTPError

    if isinstance(error, ClientError):
        code, status = _code(error), _status(error)
        return code in _TRANSIENT or (status >= 500 and status not in (501, 507) and code not in _FULL)
    return isinstance(error, (ConnectionError, HTTPClientError, IncompleteReadError, HTTPError))


def _is_refused(error: Exception) -> bool:
    """Whether the credentials are not taken, at all or any more."""
    from botocore.exceptions import ClientError

    return isinstance(error, ClientError) and _code(error) in _CREDENTIALS | {_BARE}


def _expired(error: Any, task: str) -> CredentialsExpiredError:
    return CredentialsExpiredError(
        f"{task}: the credentials are over ({_code(error)}) and were not renewed in time; begin again with new ones"
    )


def _unavailable(error: Exception, task: str, attempts: int) -> StoreUnavailableError:
    return StoreUnavailableError(
        f"{task}: {' '.join(str(error).split())} (attempt {attempts} of {attempts}); check that the endpoint "
        "is right, up and reachable from this machine, or allow more with ?attempts=...&timeout=..."
    )


def _final(error: Exception, task: str) -> StoreError:
    from botocore.exceptions import ClientError

    if not isinstance(error, ClientError):
        return StoreError(f"{task}: {' '.join(str(error).split())}; check boto3's credentials and configuration")
    code, status = _code(error), _status(error)
    if code == "NoSuchBucket":
        return StoreError(f"{task}: there is no such bucket; create it, or correct the URL")
    if code in _MISSING:
        return NotFoundError(f"{task}: no object stands there; check the key")
    if status == 412:
        return PreconditionFailedError(f"{task}: the object was replaced meanwhile; start again")
    if status == 416:
        return RangeBeyondEndError(f"{task}: the range begins beyond the object's end; ask for less")
    if code in _FULL or status == 507:
        return StoreFullError(f"{task}: the bucket is full ({code}); free some space or raise the quota")
    if code in _CREDENTIALS:
        return StoreError(f"{task}: the credentials were refused ({code}); renew what boto3 finds on this machine")
    if status == 403:
        return StoreError(f"{task}: access was denied ({code}); check the policy of the bucket and of the credentials")
    return StoreError(f"{task}: the server answered {code} ({status}): {error.response['Error'].get('Message', '')}")


def _code(error: Any) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _status(error: Any) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
