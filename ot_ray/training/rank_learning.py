"""Gradient learning by a group of ranks that share one base model: rank 0 has the fitting and the checkpoints, and all
go through the same loop.

The base that they share is deepspeed_base.py's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ot_ray.cola import Pair, Taken, pack_state, unpack_state
from ot_ray.training.gradient_checkpoints import GradientCheckpoints, GradientState
from ot_ray.training.gradient_fitting import Fitting
from ot_ray.training.gradient_parts import join_parts, pack_pairs, unpack_pairs
from ot_ray.training.rank_messages import Message, RankMessages


class RankFitting(Fitting):
    """A fitting to which every rank hands the pairs of its own rows, and which tells every rank what came of them.

    Every rank calls the same methods in the same order.

    Args:
        fitting: on rank 0, where all is fitted; None elsewhere.
    """

    def __init__(self, fitting: Fitting | None, messages: RankMessages) -> None:
        assert (fitting is not None) == (messages.rank == 0), "rank 0 fits, and no other"
        self._fitting, self._messages = fitting, messages

    def submit(self, number: int, pairs: Mapping[str, Mapping[str, Pair] | None], flush: bool = False) -> None:
        tensors, table = pack_pairs(pairs)
        parts = self._messages.gather(Message(table, tensors))
        if self._fitting is not None and parts is not None:
            batch = join_parts([unpack_pairs(part.tensors, part.value) for part in parts])
            self._fitting.submit(number, batch, flush)

    def taken(self, number: int) -> dict[str, Taken]:
        own = None
        if self._fitting is not None:
            own = {owner: vars(taken) for owner, taken in self._fitting.taken(number).items()}
        return {owner: Taken(**taken) for owner, taken in _told(own, self._messages).items()}

    def states(self) -> dict[str, Any]:
        return _told(None if self._fitting is None else self._fitting.states(), self._messages)

    def load(self, states: Mapping[str, Any]) -> None:
        if self._fitting is not None:
            self._fitting.load(states)

    def close(self) -> None:
        if self._fitting is not None:
            self._fitting.close()


class RankCheckpoints(GradientCheckpoints):
    """A run's checkpoints as every rank sees them; rank 0 alone reads and writes.

    Args:
        checkpoints: on rank 0; None elsewhere.
    """

    def __init__(self, checkpoints: GradientCheckpoints | None, messages: RankMessages) -> None:
        assert (checkpoints is not None) == (messages.rank == 0), "rank 0 has the checkpoints, and no other"
        self._checkpoints, self._messages = checkpoints, messages

    def save(self, state: GradientState) -> None:
        if self._checkpoints is not None:
            self._checkpoints.save(state)

    def resume(self) -> GradientState | None:
        state = None if self._checkpoints is None else self._checkpoints.resume()
        own = None if self._checkpoints is None else {"state": None if state is None else vars(state)}
        found = _told(own, self._messages)["state"]
        return None if found is None else GradientState(**found)


def _told(state: Any, messages: RankMessages) -> Any:
    """What rank 0 gives, on every rank."""
    if messages.rank:
        message = messages.broadcast(None)
        return unpack_state({str(number): tensor for number, tensor in enumerate(message.tensors)}, message.value)
    tensors, text = pack_state(state)
    messages.broadcast(Message(text, list(tensors.values())))
    return state
