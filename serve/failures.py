"""What can go wrong with a request, and how a client is told: status, OpenAI's error body, headers.

Turning a failure into an HTTP answer is left to api.py."""

from __future__ import annotations

from typing import Any

from ot_ray.errors import OTRayError, StoreFullError, StoreUnavailableError

_RETRIED = frozenset({408, 429, 500, 503})
_LONGEST = 4000


class BusyError(OTRayError, TimeoutError):
    """Everything that could serve the request stayed in use for longer than requests wait."""


class DatabaseUnavailableError(OTRayError, ConnectionError):
    """The service's database did not answer."""


class ApiError(OTRayError, RuntimeError):
    """A failure in the words of OpenAI's API.

    Args:
        message: what is wrong and the way out; the client sees it.
        status: the HTTP status.
        code: OpenAI's code for a program to act on, such as `model_not_found`.
        param: the request field at fault.
        retry_after_s: whole seconds after which another try makes sense.
    """

    def __init__(
        self,
        message: str,
        status: int = 400,
        code: str | None = None,
        param: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message, self.status, self.code, self.param = message, status, code, param
        self.retry_after_s = retry_after_s

    @property
    def body(self) -> dict[str, Any]:
        """OpenAI's error body."""
        kind = {429: "rate_limit_error"}.get(
            self.status, "server_error" if self.status >= 500 else "invalid_request_error"
        )
        param = None if self.param is None else _plain(self.param)
        return {"error": {"message": _plain(self.message), "type": kind, "param": param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """Tell clients whether to try again: their own rule would repeat some errors that stay."""
        if self.retry_after_s is not None:
            return {"retry-after": str(self.retry_after_s)}
        if self.status == 401:
            return {"www-authenticate": "Bearer", "x-should-retry": "false"}
        return {} if self.status in _RETRIED else {"x-should-retry": "false"}


def model_not_found(model_id: str) -> ApiError:
    """The answer to an id that names no model, or one that was withdrawn."""
    return ApiError(
        f"The model `{model_id}` does not exist or you do not have access to it.",
        status=404,
        code="model_not_found",
    )


def api_error(error: BaseException) -> ApiError:
    """The answer to any exception; one that is not the client's to know about tells nothing of itself."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, BusyError):
        return ApiError(str(error), status=503, code="overloaded", retry_after_s=2)
    if isinstance(error, DatabaseUnavailableError):
        return ApiError(str(error), 503, "unavailable", retry_after_s=2)
    if isinstance(error, StoreUnavailableError):
        return ApiError(
            "The service's store does not answer at the moment; try again.", 503, "unavailable", retry_after_s=5
        )
    if isinstance(error, StoreFullError):
        return ApiError("The service's store is full at the moment; try again.", 503, "unavailable", retry_after_s=30)
    return ApiError("The server failed to answer this request; try again, or report its x-request-id.", 500)


def _plain(text: str) -> str:
    """A text that may quote a request: of bounded length, and without what acts on a terminal or is no UTF-8."""
    cut = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
    return "".join(letter if letter.isprintable() or letter == "\n" else ascii(letter)[1:-1] for letter in cut)
