"""A request that fits the model, and how far its answer is.

Checking requests is generation.py's part, carrying them out batching.py's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from serve.engine.choice import GrowingChoice, Piece, joined
from serve.engine.plug_ins import PlugIn
from serve.engine.residency import Resident
from serve.engine.sampling import Sampler, Sampling
from serve.engine.scoring import TokenScore
from serve.failures import ApiError
from serve.wire.base import Usage


@dataclass(frozen=True)
class Job:
    """What to generate."""

    model: str
    """The name that the client asked for."""
    plug_in: PlugIn | None
    """Whose adapter runs; None for the base model."""
    prompts: list[list[int]]
    texts: list[str]
    """The prompts as text, for `echo`."""
    n: int
    """Choices of each prompt."""
    max_tokens: int
    sampling: Sampling
    seed: int
    stops: tuple[str, ...] = ()
    top: int | None = None
    """How many of the likeliest tokens to tell beside each; None tells no log-probabilities."""
    echo: bool = False
    stream: bool = False

    @property
    def choices(self) -> int:
        """How many there are in all."""
        return len(self.prompts) * self.n


BEGUN = object()
"""Told when the first choice of a request gets its turn."""
Told = tuple[Piece, Usage | None] | BaseException | object
"""What a request's listener hears: `BEGUN`, pieces with the usage beside the last one, or the error that ended it."""


class Ticket:
    """A request that was handed in.

    Args:
        tell: called from the batch's thread; it must not block.
        wake: called when the ticket is cancelled.
    """

    def __init__(self, job: Job, tell: Callable[[Told], None], wake: Callable[[], None]) -> None:
        self.job, self._tell, self._wake = job, tell, wake
        self.resident: Resident | None = None
        self.begun = self.over = False
        """`over`: answered, failed or cancelled; nothing more is told."""
        self.next_choice = 0
        self.prompt_scores: dict[int, list[TokenScore]] = {}
        """Of each prompt that was echoed, by number."""
        self._left, self._made = job.choices, 0

    def cancel(self) -> None:
        """Nobody listens any more: its rows are freed before the next token."""
        self.over = True
        self._wake()

    def begin(self) -> None:
        """A choice gets its turn."""
        if not self.begun:
            self.begun = True
            self._say(BEGUN)

    def tell(self, piece: Piece, tokens: int) -> None:
        """Pass a piece on; `tokens` were made for it.

        The piece that ends the last choice takes the usage along."""
        self._made += tokens
        self._left -= piece.reason is not None
        if self._left == 0:
            self._say((piece, self._usage()))
            self.over = True
        elif not piece.is_silent:
            self._say((piece, None))

    def fail(self, error: BaseException) -> None:
        """End the request with an error."""
        if not self.over:
            self._say(error)
            self.over = True

    def _say(self, told: Told) -> None:
        if self.over:
            return
        try:
            self._tell(told)
        except RuntimeError:
            # The listener's event loop was closed.
            self.over = True

    def _usage(self) -> Usage:
        given = sum(map(len, self.job.prompts))
        return Usage(prompt_tokens=given, completion_tokens=self._made, total_tokens=given + self._made)


class Row:
    """One choice from its turn to its end, most of the time with a row in the batch.

    Args:
        number: grows from one that begins to the next.
    """

    def __init__(self, ticket: Ticket, index: int, growing: GrowingChoice, number: int = 0) -> None:
        job, place = ticket.job, index // ticket.job.n
        self.ticket, self.index, self.number = ticket, index, number
        self.prompt, self.text = job.prompts[place], job.texts[place]
        self.read = self.prompt
        """The tokens that are read when it joins the batch."""
        self.sampler = Sampler(job.sampling, (job.seed + index) % 2**63)
        self.growing = growing
        self._tokens: list[int] = []
        self._kept: list[Piece] = []
        self._kept_tokens = 0

    @property
    def token(self) -> int:
        """The last one that was made."""
        return self._tokens[-1]

    @property
    def made(self) -> int:
        """How many tokens were made."""
        return len(self._tokens)

    @property
    def length(self) -> int:
        """Tokens of the prompt and the answer as far as it is."""
        return len(self.prompt) + len(self._tokens)

    @property
    def left(self) -> int:
        """How many tokens may still be made."""
        return self.ticket.job.max_tokens - len(self._tokens)

    def reread(self) -> None:
        """Leave the batch for a while: what was made is read with the prompt when it joins again."""
        self.read = [*self.prompt, *self._tokens]

    @property
    def adapter(self) -> int:
        """The index of its adapter, 0 for the base model."""
        return self.ticket.resident.adapter if self.ticket.resident is not None else 0

    def take(self, token: int, score: TokenScore | None, ends: frozenset[int]) -> bool:
        """Take the next token; whether the choice ends with it."""
        self._tokens.append(token)
        if token in ends:
            self.pass_on(self.growing.finish("stop"), 1)
            return True
        self.pass_on(self.growing.push(token, score), 1)
        if self.growing.stopped or self.made >= self.ticket.job.max_tokens:
            self.pass_on(self.growing.finish("length"), 0)
            return True
        return False

    def pass_on(self, piece: Piece, tokens: int) -> None:
        """Tell a piece: at once in a stream, and else with the end of the choice."""
        if self.ticket.job.stream:
            self.ticket.tell(piece, tokens)
            return
        self._kept.append(piece)
        self._kept_tokens += tokens
        if piece.reason is not None:
            self.ticket.tell(joined(self._kept), self._kept_tokens)
            self._kept = []


def lost(error: BaseException) -> ApiError:
    """What a request hears that ended with a failure of the engine, an object of its own."""
    told = ApiError("The model failed while it answered; try again.", 500)
    told.__cause__ = error
    return told
