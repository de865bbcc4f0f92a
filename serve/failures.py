"""What can go wrong with a request, and how a client is told: status, OpenAI's error body, headers.

Turning a failure into an HTTP answer is left to api.py."""

from __future__ import annotations

from typing import Any

from ot_ray.errors import OTRayError, StoreUnavailableError

_RETRIED = frozenset({408, 429, 500, 503})


class BusyError(OTRayError, TimeoutError):
    """Everything that could serve the request stayed in use for longer than requests wait."""


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
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """Tell clients whether to try again: their own rule would repeat some errors that stay."""
        if self.retry_after_s is not None:
            return {"retry-after": str(self.retry_after_s)}
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
    if isinstance(error, StoreUnavailableError):
        return ApiError(
            "The registry of models cannot be read at the moment; try again.", 503, "unavailable", retry_after_s=5
        )
    return ApiError("The server failed to answer this request; try again, or report its x-request-id.", 500)
