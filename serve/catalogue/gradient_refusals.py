"""Why an operation or a session of gradient learning is not taken in.

How a client is told is left to the routes."""

from __future__ import annotations

from ot_ray.errors import OTRayError


class GroupMismatchError(OTRayError, ValueError):
    """The open sessions of the group have another `field`."""

    def __init__(self, field: str) -> None:
        super().__init__(f"the open sessions of the group have another {field}")
        self.field = field

    def __reduce__(self) -> tuple[type[GroupMismatchError], tuple[str]]:
        return GroupMismatchError, (self.field,)


class NumberTakenError(OTRayError, ValueError):
    """The session has something else under this number."""


class NumberTooHighError(OTRayError, ValueError):
    """Another number is the session's next; it is `awaited`."""

    def __init__(self, awaited: int) -> None:
        super().__init__(f"number {awaited} is the next")
        self.awaited = awaited

    def __reduce__(self) -> tuple[type[NumberTooHighError], tuple[int]]:
        return NumberTooHighError, (self.awaited,)


class TooManyQueuedError(OTRayError, ValueError):
    """As many of the session's operations as may be are not over yet."""


class SessionClosedError(OTRayError, ValueError):
    """The session takes no more operations."""


class VersionError(OTRayError, ValueError):
    """The auxiliary is at another version, `present`, and no operation will bring it to the one that was named."""

    def __init__(self, present: int) -> None:
        super().__init__(f"the auxiliary is at version {present}")
        self.present = present

    def __reduce__(self) -> tuple[type[VersionError], tuple[int]]:
        return VersionError, (self.present,)
