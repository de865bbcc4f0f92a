"""Two lanes in one layer list: [A1 · M · E · A2] runs M without gradients, then E from the same start.

Which layers stand where, and the losses between the lanes, are in distill.py."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ot_ray.model.families import first_of

Setting = Literal["full", "emulated"]
"""One lane alone: the full model [A1 · M · A2] or the emulated model [A1 · E · A2]."""


class Lanes:
    """What the first layer of M was given, and what M and E made of it, within one forward pass.

    Args:
        tuples: whether a layer of this family returns a tuple.
        checkpointing: run E and A2 again in the backward pass instead of keeping their activations.
        middle_only: pass A2 by where both lanes run.
    """

    def __init__(self, tuples: bool, checkpointing: bool, middle_only: bool = False) -> None:
        self._tuples, self.checkpointing, self.middle_only = tuples, checkpointing, middle_only
        self.begin(None)

    def begin(self, setting: Setting | None) -> None:
        """Forget the last pass; the next runs both lanes, or one."""
        self.setting = setting
        self.start: torch.Tensor | None = None
        self.teacher: torch.Tensor | None = None
        self.student: torch.Tensor | None = None

    def passed(self, hidden_states: torch.Tensor) -> Any:
        """What a layer returns that is passed by."""
        return (hidden_states,) if self._tuples else hidden_states


class LaneLayer(nn.Module):
    """A layer of the list that knows whether it is the first or the last of its lane. Letters: as in losses."""

    def __init__(self, layer: nn.Module, lanes: Lanes, first: bool = False, last: bool = False) -> None:
        super().__init__()
        self.layer, self._lanes, self._first, self._last = layer, lanes, first, last

    def _run(self, learns: bool, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if learns and self._lanes.checkpointing and torch.is_grad_enabled():
            return checkpoint(self.layer, hidden_states, *args, use_reentrant=False, **kwargs)
        return self.layer(hidden_states, *args, **kwargs)


class AdapterLayer(LaneLayer):
    """One layer of A1, or `above` E of A2: frozen, but in A2 gradients flow through it to E."""

    def __init__(self, layer: nn.Module, lanes: Lanes, above: bool) -> None:
        super().__init__(layer, lanes)
        self._above = above

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if self._above and self._lanes.middle_only and self._lanes.setting is None:
            return self._lanes.passed(hidden_states)
        return self._run(hidden_states.requires_grad, hidden_states, *args, **kwargs)


class TeacherLayer(LaneLayer):
    """One layer of M, run without gradients on the hidden states as the layer list passes them on."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        lanes = self._lanes
        if lanes.setting == "emulated":
            return lanes.passed(hidden_states)
        if self._first:
            lanes.start = hidden_states
        with torch.no_grad():
            output = self.layer(hidden_states, *args, **kwargs)
        if self._last:
            lanes.teacher = first_of(output)
        return output


class StudentLayer(LaneLayer):
    """One layer of E; the first starts again from what M was given, the last keeps its output."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        lanes = self._lanes
        if lanes.setting == "full":
            return lanes.passed(hidden_states)
        if self._first and lanes.start is not None:
            hidden_states, lanes.start = lanes.start, None
        output = self._run(True, hidden_states, *args, **kwargs)
        if self._last:
            lanes.student = first_of(output)
        return output
