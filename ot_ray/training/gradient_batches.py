"""The rows of many customers, batch by batch: each customer's own sequences in an order of its own.

What a sequence is, is data's affair."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ot_ray.cola import CustomerRows
from ot_ray.data import PackedSequence
from ot_ray.data.order import EpochOrder
from ot_ray.data.packing import collate, without_padding
from ot_ray.errors import ConfigError, DataError


class CustomerBatches:
    """Batches by their number, without end; each of a customer's epochs shows every sequence of its own once.

    A customer's rows are the same whoever else is there.

    Args:
        sequences: by customer, all of one length.
        rows: of each customer in a batch.
        seed: with the epoch's number, decides the order.

    Raises:
        DataError: a customer has no sequences, or there are no customers.
        ConfigError: `rows` is below 1.
    """

    def __init__(self, sequences: Mapping[str, Sequence[PackedSequence]], rows: int, seed: int) -> None:
        empty = [name for name, own in sequences.items() if not own]
        if empty or not sequences:
            who = f"customer {empty[0]} has no sequences" if empty else "there are no customers"
            raise DataError(f"{who}, so that there is nothing to learn; check the data")
        if rows < 1:
            raise ConfigError(f"rows is {rows}; use 1 or more")
        self._sequences, self._rows = dict(sequences), rows
        self._orders = {name: EpochOrder(len(own), seed) for name, own in self._sequences.items()}

    def __getitem__(self, number: int) -> CustomerRows:
        """Batch `number`, counted from 0: `rows` of each customer, padding that all have cut off."""
        chosen: list[PackedSequence] = []
        for name, own in self._sequences.items():
            order = self._orders[name]
            chosen += [own[order.at(number * self._rows + row)] for row in range(self._rows)]
        return customer_rows(chosen, [name for name in self._sequences for _ in range(self._rows)])


def customer_rows(sequences: Sequence[PackedSequence], customers: Sequence[str | None]) -> CustomerRows:
    """Sequences of one length as rows of a pass, each a customer's."""
    batch = without_padding(collate(sequences))
    real = batch["real"]
    return CustomerRows(
        batch["input_ids"],
        tuple(customers),
        batch["labels"],
        None if bool(real.all()) else real,
        batch["position_ids"],
    )
