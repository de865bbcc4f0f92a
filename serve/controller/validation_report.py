"""What validation found in a file, and how a customer is told: OpenAI's error, and lines for the job's events."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_MOST_TOLD = 10


@dataclass(frozen=True)
class LineError:
    """One thing that is wrong."""

    line: int
    """Of the file, from 1."""
    message: str
    """What a customer reads, which opens with the line's number."""


@dataclass(frozen=True)
class ValidationReport:
    """What a file holds. Counts say nothing where there are errors."""

    file: str
    """`training_file` or `validation_file`."""
    min_examples: int
    length: int
    """Tokens of a training sequence."""
    examples: int
    """Examples that something is learnt of."""
    tokens: int
    """Tokens that one pass over the file trains with, padding not counted: what a job is charged for an epoch."""
    learnable_tokens: int
    """Tokens of these that enter the loss."""
    sequences: int
    """Training sequences, each of one or several examples."""
    truncated: int
    """Examples of `examples` that were cut at the length."""
    cut_tokens: int
    """Tokens that were cut away from these."""
    dropped: int
    """Examples that are left out: all that is learnt lies beyond the length."""
    duplicates: int
    """Examples that stand in the file before, among the first 500,000 that differ."""
    longest: int
    """Tokens of the longest example, before it is cut."""
    unread_keys: tuple[str, ...]
    """Keys that training does not read; ten at most."""
    errors: tuple[LineError, ...]
    stopped: bool
    """Whether reading stopped at the last error, so that there may be more."""

    @property
    def ok(self) -> bool:
        """Whether a job may train on the file."""
        return self.error is None

    @property
    def error(self) -> dict[str, str] | None:
        """OpenAI's error of a job, `{code, message, param}`, or None."""
        name = self.file.replace("_", " ")
        if self.errors:
            told = [error.message for error in self.errors[:_MOST_TOLD]]
            more = len(self.errors) - len(told)
            if more or self.stopped:
                told.append(f"and {more} more" + (", where reading stopped" if self.stopped else ""))
            return self._error(f"invalid_{self.file}", f"The {name} is invalid. " + "\n".join(told))
        if self.examples < self.min_examples:
            found = f"{name.capitalize()} has {self.examples} example(s)"
            left_out = f" (and {self.dropped} of which nothing is left at {self.length} tokens)" if self.dropped else ""
            message = f"{found}{left_out}, but must have at least {self.min_examples} examples"
            return self._error("invalid_n_examples", message)
        return None

    @property
    def data(self) -> dict[str, Any]:
        """All figures as JSON values, for an event; with the line of every error."""
        figures = ("examples", "tokens", "learnable_tokens", "sequences", "truncated", "cut_tokens", "dropped")
        values: dict[str, Any] = {name: getattr(self, name) for name in (*figures, "duplicates", "longest")}
        values |= {"file": self.file, "sequence_length": self.length}
        if self.errors:
            values["errors"] = [{"line": error.line, "message": error.message} for error in self.errors]
        return values

    @property
    def lines(self) -> list[tuple[str, str]]:
        """Level (`info`, `warn`, `error`) and text of each event that a customer should see."""
        if self.error is not None:
            return [("error", self.error["message"])]
        name, length = self.file.replace("_", " "), self.length
        said = [
            (
                "info",
                f"The {name} holds {self.examples:,} examples with {self.tokens:,} tokens in one pass, "
                f"{self.learnable_tokens:,} of them learnt; the longest example has {self.longest:,} tokens.",
            )
        ]
        notes = {
            f"{self.truncated:,} examples are longer than {length:,} tokens; the {self.cut_tokens:,} tokens beyond are "
            "left out.": self.truncated,
            f"{self.dropped:,} examples are left out: what they teach lies beyond {length:,} tokens.": self.dropped,
            f"{self.duplicates:,} examples stand in the file more than once.": self.duplicates,
            f"Training does not read: {', '.join(self.unread_keys)}.": len(self.unread_keys),
        }
        return said + [("warn", text) for text, count in notes.items() if count]

    def _error(self, code: str, message: str) -> dict[str, str]:
        return {"code": code, "message": message, "param": self.file}
