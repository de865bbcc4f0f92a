"""The key-value cache of a batch whose rows come and go: all end in the same column, and begin where their prompt did.

Which rows there are, and what they hold, is the batch's business. Letters: B rows, H heads, C columns, D head width."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import Cache, DynamicCache, DynamicLayer

# Columns that are set aside at a time, so that a token costs a write and no copy.
_ROOM = 64


class _Layer(DynamicLayer):
    """Keys and values in buffers with room for more columns; `keys` and `values` are the part in use."""

    def __init__(self) -> None:
        super().__init__()
        self.room: tuple[torch.Tensor, torch.Tensor] | None = None
        self.used = 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.room is not None
        end = self.used + key_states.shape[-2]
        if end > self.room[0].shape[-2]:
            self.room = (_widened(self.room[0], end + _ROOM), _widened(self.room[1], end + _ROOM))
        for buffer, new in zip(self.room, (key_states, value_states), strict=True):
            buffer[:, :, self.used : end] = new
        self.show(end)
        return self.keys, self.values  # type: ignore[return-value]

    def show(self, used: int) -> None:
        """Have the first `used` columns be those in use."""
        assert self.room is not None
        self.used, self.is_initialized = used, True
        self.keys, self.values = (buffer[:, :, :used] for buffer in self.room)

    def append(self, other: DynamicLayer, rows: torch.Tensor, begins: Sequence[int], wide: int) -> None:
        """Add rows of another layer, int64 [N], which begin in these columns of the `wide` ones that all end in."""
        assert other.keys is not None
        assert other.values is not None
        shift, before = wide - self.used, 0 if self.room is None else self.room[0].shape[0]
        room = tuple(
            _joined(None if self.room is None else self.room[i], self.used, shift, new[rows])
            for i, new in enumerate((other.keys, other.values))
        )
        for buffer in room:
            for row, begin in enumerate(begins, before):
                # Whatever stands in padding is weighted by 0, and 0 times what is not finite is not 0.
                if begin:
                    buffer[row, :, :begin] = 0
        self.room = room  # type: ignore[assignment]
        self.show(wide)

    def get_seq_length(self) -> int:
        return self.used


class RowCache:
    """The cache of a batch. Rows are numbered 0 to B - 1; where one leaves, the last one takes its number.

    Every layer keeps all columns, those with a sliding window too: the mask leaves out what lies before the window.
    """

    def __init__(self, layers: int, device: torch.device) -> None:
        self._device, self._count = device, layers
        self.clear()

    def clear(self) -> None:
        """Forget every row."""
        self._layers = [_Layer() for _ in range(self._count)]
        self.cache = Cache(layers=list(self._layers))
        """What the model takes as `past_key_values`."""
        self._begins: list[int] = []
        self._begins_B = torch.empty(0, dtype=torch.long, device=self._device)

    def __len__(self) -> int:
        return len(self._begins)

    @property
    def columns(self) -> int:
        """Columns in use, padding included."""
        return self._layers[0].used

    def step(self) -> tuple[torch.Tensor | None, torch.Tensor]:
        """What the model needs to know for one more token a row.

        Returns:
            The attention mask, int64 [B, C + 1], None where nothing is padding; and position ids, int64 [B, 1].
        """
        positions = (self.columns - self._begins_B)[:, None]
        if not any(self._begins):
            return None, positions
        columns = torch.arange(self.columns + 1, device=self._device)
        return (columns >= self._begins_B[:, None]).long(), positions

    def join(self, prefilled: DynamicCache, lengths: Sequence[int], rows: Sequence[int]) -> None:
        """Add rows at the end; where that fails, as for lack of memory, the cache is left as it was.

        Args:
            prefilled: a cache of plain layers, in which every row ends in the last column.
            lengths: tokens of each of its rows.
            rows: the rows of it to add, by number; one may come several times.
        """
        if not self._begins:
            # The columns of those who left before would be padding.
            self.clear()
        wide = max(prefilled.get_seq_length(), self.columns)
        shift = wide - self.columns
        begins = [wide - lengths[row] for row in rows]
        try:
            chosen = torch.tensor(rows, device=self._device)
            for mine, theirs in zip(self._layers, prefilled.layers, strict=True):
                assert isinstance(theirs, DynamicLayer)
                mine.append(theirs, chosen, begins, wide)
            self._set([begin + shift for begin in self._begins] + begins)
        except BaseException:
            self._undo(shift)
            raise

    def _undo(self, shift: int) -> None:
        """Have every layer hold the rows of before again, some of which stand `shift` columns further right."""
        if not self._begins:
            self.clear()
            return
        for layer in self._layers:
            assert layer.room is not None
            if layer.room[0].shape[0] > len(self):
                # Views, since there may be no memory for copies.
                layer.room = tuple(buffer[: len(self), :, shift:] for buffer in layer.room)  # type: ignore[assignment]
                layer.show(layer.used - shift)

    def leave(self, row: int) -> None:
        """Take a row out; the last one gets its number."""
        last = len(self) - 1
        if not last:
            self.clear()
            return
        for layer in self._layers:
            assert layer.room is not None
            if row != last:
                for buffer in layer.room:
                    buffer[row] = buffer[last]
            layer.room = tuple(buffer[:last] for buffer in layer.room)  # type: ignore[assignment]
            layer.show(layer.used)
        begins = list(self._begins)
        begins[row] = begins[last]
        self._set(begins[:last])

    def trim(self) -> None:
        """Leave out columns that are padding in every row, once they are many."""
        spare = min(self._begins, default=self.columns)
        if not self._begins:
            self.clear()
        elif spare >= _ROOM:
            for layer in self._layers:
                assert layer.room is not None
                used = layer.used - spare
                # A copy with room of its own: source and target would overlap, and rows that left give memory back.
                layer.room = tuple(_widened(old[:, :, spare : layer.used], used + _ROOM) for old in layer.room)  # type: ignore[assignment]
                layer.show(used)
            self._set([begin - spare for begin in self._begins])

    def _set(self, begins: list[int]) -> None:
        begins_B = torch.tensor(begins, dtype=torch.long, device=self._device)
        self._begins, self._begins_B = begins, begins_B


def _widened(old: torch.Tensor, columns: int) -> torch.Tensor:
    """A copy, float [B, H, columns, D], with zeros behind what there was."""
    new = old.new_zeros(*old.shape[:2], columns, old.shape[3])
    new[:, :, : old.shape[2]] = old
    return new


def _joined(old: torch.Tensor | None, used: int, shift: int, new: torch.Tensor) -> torch.Tensor:
    """The rows of both: those there were moved `shift` columns to the right, the new ones ending where they end."""
    before = old.shape[0] if old is not None else 0
    wide = used + shift
    rows = new.new_zeros(before + new.shape[0], new.shape[1], wide + _ROOM, new.shape[3])
    if old is not None:
        rows[:before, :, shift:wide] = old[:, :, :used]
    rows[before:, :, wide - new.shape[2] : wide] = new
    return rows
