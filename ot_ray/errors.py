"""The one tree of errors a user can meet. Every class is also a standard-library error, takes one
message, and survives pickling, because errors travel between Ray processes.

A message names the field or file, the value, and the way out."""

from __future__ import annotations

from collections.abc import Sequence


class OTRayError(Exception):
    """Base of every error that is the user's to mend; commands print it without a stack trace."""


class ConfigError(OTRayError, ValueError):
    """A configuration holds an unknown key, a wrong type or a value out of range."""


class UnsupportedModelError(OTRayError, ValueError):
    """The architecture is not in the families' table, or uses a variant that cannot be split."""


class SplitError(OTRayError, ValueError):
    """A split plan does not fit the model."""


class DataError(OTRayError, ValueError):
    """A data source is missing, malformed or leaves nothing to train on."""


class StoreError(OTRayError, OSError):
    """The store could not do what was asked."""


class NotFoundError(StoreError, FileNotFoundError):
    """No object stands under this key."""


class AlreadyExistsError(StoreError, FileExistsError):
    """A create-once write met an object that is already there."""


class StoreFullError(StoreError):
    """The disk or bucket has no room left; nothing was written."""


class StoreUnavailableError(StoreError, ConnectionError):
    """The store did not answer, after retries with backoff."""


class CredentialsExpiredError(StoreError):
    """The credentials of a job ran out, and no new ones came in time; its next run gets its own."""


class ArtifactError(OTRayError, ValueError):
    """A bundle or adapter is malformed, incomplete, changed or not meant for this use."""


class SignatureError(ArtifactError):
    """A signature is missing, or does not belong to these bytes and this key."""


class AdapterRejectedError(ArtifactError):
    """An adapter that came back was refused; the message lists every reason found, and so does `reasons`."""

    def __init__(self, message: str, reasons: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.reasons = tuple(reasons) or (message,)


class GradientLearningError(OTRayError, ValueError):
    """Gradient learning was given what does not fit: rows, gradients or an auxiliary of other sites, kind or shape."""


class SiteError(GradientLearningError):
    """A pattern of sites matches nothing, or a module that no auxiliary can stand beside."""


class MergeError(GradientLearningError):
    """An auxiliary cannot become part of the base model's weights."""


class NotFiniteError(GradientLearningError):
    """Inputs, gradients or weights hold NaN or infinity; they were refused, and nothing has changed."""


class ServiceError(OTRayError, ConnectionError):
    """The service over HTTP refused a request, or did not answer; the message is its own where it gave one, and so are
    `status` and `code`."""

    def __init__(self, message: str, status: int | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code = status, code


class TrainingError(OTRayError, RuntimeError):
    """Training cannot go on: a loss that is not finite, a checkpoint that does not fit, and the like."""


class LaunchError(OTRayError, RuntimeError):
    """A Ray cluster, job or worker group could not be started or ended badly."""


class PortInUseError(LaunchError):
    """The port that was asked for belongs to another process."""


class MissingDependencyError(OTRayError, ImportError):
    """A package of an optional extra is needed and not installed."""


class EmulatorRejectedError(OTRayError, RuntimeError):
    """A distilled emulator failed the quality gate; it is kept, and the current release stays."""


class LeaseHeldError(OTRayError, RuntimeError):
    """Another run holds the lease; the message says who and since when."""


class LeaseLostError(OTRayError, RuntimeError):
    """This run's lease was taken over, so that it must not publish."""


class StudyError(OTRayError, RuntimeError):
    """Rows of a study failed; the others are kept, and in its report."""
