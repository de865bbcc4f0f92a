"""What is asked in a session of gradient learning: operations, which wait for their turn, and how they ended.

Carrying them out is serve/gradients/'s; auxiliaries and gradients as files are in gradient_files.py."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import anyio
from fastapi import APIRouter, Path, Query, Request, Response

from ot_ray.errors import NotFoundError
from serve.catalogue.audit import Note
from serve.catalogue.gradient_refusals import (
    NumberTakenError,
    NumberTooHighError,
    SessionClosedError,
    TooManyQueuedError,
    VersionError,
)
from serve.catalogue.records import GradientKind, GradientOperation, GradientSession
from serve.failures import ApiError
from serve.routes.gradient_model import model_of
from serve.routes.gradients import Asker, catalogue_of, find_session, gradients_of
from serve.routes.identity import noted
from serve.routes.once import OnceRoute
from serve.routes.transfers import in_thread
from serve.wire.gradients import (
    ForwardBackwardRequest,
    OperationObject,
    QueueState,
    Row,
    SampleRequest,
    StepRequest,
)

router = APIRouter(prefix="/v1/cola/sessions/{session_id}", tags=["Gradient learning"], route_class=OnceRoute)

Number = Annotated[int, Path(ge=0, le=2**31 - 1, description="The operation's number")]
ENDED = frozenset({"succeeded", "failed"})
TAKEN: dict[int | str, dict[str, Any]] = {
    200: {"description": "The operation was taken in before"},
    409: {"description": "The number belongs to something else, or another one is the next"},
    429: {"description": "Too many of the session's operations are not over"},
}
_FLOAT_BYTES = 4
_FIRST_PAUSE_S, _LONGEST_PAUSE_S, _PAUSE_GROWS = 0.05, 1.0, 1.5


@router.post("/forward_backward", status_code=202, summary="Run forward and backward", responses=TAKEN)
def forward_backward(
    request: Request, response: Response, session_id: str, body: ForwardBackwardRequest, identity: Asker
) -> OperationObject:
    """Have the base model learn from rows: the loss, and at each site the gradients, or the server's fit of them."""
    session = find_session(request, identity, session_id)
    _check_rows(request, session, body)
    asked = body.model_dump(mode="json", exclude={"number"})
    return _submit(request, response, session, "forward_backward", body.number, asked, rows=len(body.rows))


@router.post("/step", status_code=202, summary="Fit what was collected", responses=TAKEN)
def step_session(
    request: Request, response: Response, session_id: str, body: StepRequest, identity: Asker
) -> OperationObject:
    """Have the server fit the auxiliary to the batches since its last fit; for sessions with `fit: server`."""
    session = find_session(request, identity, session_id)
    if session.settings["fit"] != "server":
        raise ApiError(
            "The auxiliary of this session is fitted by its client; send it with PUT .../auxiliary.", code="wrong_fit"
        )
    return _submit(request, response, session, "step", body.number, {})


@router.post("/sample", status_code=202, summary="Continue a text", responses=TAKEN)
def sample_session(
    request: Request, response: Response, session_id: str, body: SampleRequest, identity: Asker
) -> OperationObject:
    """Have the base model write on, as the session's rows go through it."""
    session = find_session(request, identity, session_id)
    _check_prompt(request, body)
    asked = body.model_dump(mode="json", exclude={"number"})
    drawn = {"seed": secrets.randbits(62)} if body.seed is None else {}
    return _submit(request, response, session, "sample", body.number, asked, drawn)


@router.post("/save", status_code=202, summary="Save the auxiliary", responses=TAKEN)
def save_session(
    request: Request, response: Response, session_id: str, body: StepRequest, identity: Asker
) -> OperationObject:
    """Write the auxiliary as files that other tools read: a PEFT LoRA, or its tensors and their description."""
    session = find_session(request, identity, session_id)
    line = noted(request, identity, "cola.save", number=body.number)
    return _submit(request, response, session, "save", body.number, {}, audit=line)


@router.get("/operations/{number}", summary="Retrieve an operation")
async def get_operation(
    request: Request,
    response: Response,
    session_id: str,
    number: Number,
    identity: Asker,
    wait_s: Annotated[float, Query(ge=0, le=30, description="Seconds to wait for its end")] = 0,
) -> OperationObject:
    """How an operation ended, or what is before it; the answer waits for its end, if it is asked to."""
    session = await in_thread(find_session, request, identity, session_id)
    deadline, pause = anyio.current_time() + wait_s, _FIRST_PAUSE_S
    operation = await in_thread(find_operation, request, session, number)
    while operation.status not in ENDED and (left := deadline - anyio.current_time()) > 0:
        await anyio.sleep(min(pause, left))
        pause = min(pause * _PAUSE_GROWS, _LONGEST_PAUSE_S)
        operation = await in_thread(find_operation, request, session, number)
        if await request.is_disconnected():
            break
    return await in_thread(told, request, response, operation)


def find_operation(request: Request, session: GradientSession, number: int) -> GradientOperation:
    """An operation of a session. Raises ApiError, 404, or 410 where it was removed with the session's files."""
    try:
        return catalogue_of(request).gradient_operations.find(session.id, number)
    except NotFoundError:
        if number < session.next_number:
            raise session_gone(session) from None
        raise ApiError(f"Session {session.id} has no operation {number}.", 404, param="number") from None


def session_gone(session: GradientSession) -> ApiError:
    """The answer to a request for what a session had that is closed."""
    return ApiError(f"Session {session.id} is closed, and what it left is removed.", 410, "session_closed")


def told(request: Request, response: Response, operation: GradientOperation) -> OperationObject:
    """An operation as clients see it; while it is not over, with what is before it and when to ask again."""
    queue = None
    if operation.status not in ENDED:
        found = catalogue_of(request).gradient_operations.ahead(operation)
        queue = QueueState(ahead=found.ahead, rows=found.rows, position=found.position)
        response.headers["retry-after"] = "1"
    return OperationObject(
        session=operation.session_id,
        number=operation.number,
        kind=operation.kind,
        status=operation.status,
        version=operation.version,
        result=operation.result,
        error=operation.error,
        queue=queue,
        created_at=operation.created_at,
        finished_at=operation.finished_at,
    )


def digest_of(kind: GradientKind, asked: dict[str, Any]) -> str:
    """What tells a request from another one under the same number."""
    return hashlib.sha256(json.dumps([kind, asked], sort_keys=True).encode()).hexdigest()


@contextmanager
def refusals(session: GradientSession, number: int) -> Iterator[None]:
    """Why an operation is not taken in, in the words of the API."""
    try:
        yield
    except NumberTakenError:
        raise ApiError(
            f"Operation {number} of session {session.id} is another one; repeat exactly what was sent, or go on with "
            "a new number.",
            409,
            "number_taken",
            "number",
        ) from None
    except NumberTooHighError as error:
        raise ApiError(
            f"number is {number}, but {error.awaited} is the next one of this session.", 409, "wrong_number", "number"
        ) from None
    except SessionClosedError:
        raise ApiError(f"Session {session.id} is closed; open another one.", 409, "session_closed") from None
    except TooManyQueuedError as error:
        raise ApiError(f"{error}; wait until one is.", 429, "rate_limit_exceeded", retry_after_s=1) from None
    except VersionError as error:
        raise ApiError(
            f"The auxiliary is at version {error.present}; fit from that one, and send it again.",
            409,
            "version_conflict",
            "version",
        ) from None


def _submit(
    request: Request,
    response: Response,
    session: GradientSession,
    kind: GradientKind,
    number: int,
    asked: dict[str, Any],
    drawn: dict[str, Any] | None = None,
    *,
    rows: int = 0,
    audit: Note | None = None,
) -> OperationObject:
    """Take an operation in, once.

    Args:
        drawn: what the service decided itself, which is not compared when the request comes again.
    """
    most, digest = gradients_of(request).queued_operations, digest_of(kind, asked)
    with refusals(session, number):
        operation, is_new = catalogue_of(request).gradient_operations.submit(
            session, kind, number, digest, {**asked, **(drawn or {})}, most, rows=rows, audit=audit
        )
    if not is_new:
        response.status_code = 200
    return told(request, response, operation)


def _check_rows(request: Request, session: GradientSession, body: ForwardBackwardRequest) -> None:
    settings, model = gradients_of(request), model_of(request)
    if body.coding not in settings.codings:
        raise ApiError(f"coding is {body.coding}; use one of {', '.join(settings.codings)}.", param="coding")
    if len(body.rows) > settings.operation_rows:
        raise ApiError(f"There are {len(body.rows)} rows; send at most {settings.operation_rows}.", param="rows")
    for index, row in enumerate(body.rows):
        _check_tokens(row.tokens, model.vocabulary, model.context, f"rows.{index}.tokens")
        if row.loss_mask is not None and len(row.loss_mask) != len(row.tokens):
            raise ApiError(
                f"rows.{index}.loss_mask has {len(row.loss_mask)} entries for {len(row.tokens)} tokens; give one each.",
                param=f"rows.{index}.loss_mask",
            )
    padded = len(body.rows) * max(len(row.tokens) for row in body.rows)
    if padded > settings.operation_tokens:
        raise ApiError(
            f"The rows take {padded} tokens, each as long as the longest; send at most {settings.operation_tokens}.",
            param="rows",
        )
    if not any(map(_learns, body.rows)):
        raise ApiError("Nothing is learnt: no token after a row's first has loss_mask 1.", param="rows")
    size = _yielded_bytes(session) * sum(len(row.tokens) for row in body.rows)
    if size > settings.operation_bytes:
        raise ApiError(
            f"The rows would yield {size} bytes at the session's sites; at most {settings.operation_bytes} are made at "
            "a time. Send fewer rows, or choose fewer sites.",
            param="rows",
        )


def _yielded_bytes(session: GradientSession) -> int:
    """Bytes of x and g at all sites, for one token."""
    inputs = sum(2 if site["layout"] == "embedding" else site["inputs"] for site in session.settings["sites"])
    return _FLOAT_BYTES * (inputs + sum(site["outputs"] for site in session.settings["sites"]))


def _learns(row: Row) -> bool:
    return len(row.tokens) > 1 if row.loss_mask is None else 1 in row.loss_mask[1:]


def _check_prompt(request: Request, body: SampleRequest) -> None:
    settings, model = gradients_of(request), model_of(request)
    if body.max_tokens > settings.sample_tokens:
        raise ApiError(
            f"max_tokens is {body.max_tokens}; ask for at most {settings.sample_tokens}.", param="max_tokens"
        )
    if isinstance(body.prompt, list):
        _check_tokens(body.prompt, model.vocabulary, model.context - body.max_tokens, "prompt")


def _check_tokens(tokens: list[int], vocabulary: int, longest: int, param: str) -> None:
    if len(tokens) > longest:
        raise ApiError(
            f"{param} has {len(tokens)} tokens; there is room for {longest}.", 400, "context_length_exceeded", param
        )
    highest = max(tokens)
    if highest >= vocabulary:
        raise ApiError(f"{param} holds token {highest}; the model knows 0 to {vocabulary - 1}.", param=param)
