from __future__ import annotations

from collections import Counter

import pytest
import torch

from ot_ray.data import BatchStream, PackedSequence, TokenSpan, pack, rows_of
from ot_ray.errors import ConfigError, DataError, TrainingError


def numbered(count: int) -> list[PackedSequence]:
    """Sequences whose tokens all are their own number."""
    return [pack([TokenSpan([n] * 3, [True] * 3)], 3, 0)[0] for n in range(count)]


def names(batch: dict[str, torch.Tensor]) -> list[int]:
    return batch["input_ids"][:, 0].tolist()


def order(stream: BatchStream, batches: int, world_size: int = 1) -> list[int]:
    """What all ranks together see, in the order of the global batches."""
    seen: list[int] = []
    for _ in range(batches):
        state = stream.state()
        for rank in range(world_size):
            stream.restore([state])
            seen += names(stream.next_batch(rank, world_size))
    return seen


@pytest.mark.parametrize(("count", "batch_size"), [(10, 4), (7, 3), (5, 8), (6, 6), (1, 3)])
def test_each_sequence_is_seen_once_in_each_epoch(count: int, batch_size: int) -> None:
    epochs = 3 * batch_size
    seen = order(BatchStream(numbered(count), batch_size, seed=1), batches=3 * count)
    assert len(seen) == epochs * count
    for epoch in range(epochs):
        assert sorted(seen[epoch * count : (epoch + 1) * count]) == list(range(count))


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    seen = order(BatchStream(numbered(20), 20, seed=1), batches=4)
    epochs = {tuple(seen[start : start + 20]) for start in range(0, 80, 20)}
    assert len(epochs) == 4
    assert tuple(order(BatchStream(numbered(20), 20, seed=2), batches=1)) not in epochs
    assert order(BatchStream(numbered(20), 20, seed=1), batches=4) == seen


@pytest.mark.parametrize("world_size", [2, 3, 4, 6])
def test_the_global_batch_does_not_depend_on_the_world_size(world_size: int) -> None:
    alone = order(BatchStream(numbered(10), 6, seed=5), batches=7)
    assert order(BatchStream(numbered(10), 6, seed=5), batches=7, world_size=world_size) == alone


def test_each_rank_steps_by_itself() -> None:
    alone = BatchStream(numbered(10), 4, seed=5)
    ranks = [BatchStream(numbered(10), 4, seed=5) for _ in range(2)]
    for _ in range(6):
        together = [name for rank, stream in enumerate(ranks) for name in names(stream.next_batch(rank, 2))]
        assert together == names(alone.next_batch())
    assert {stream.state()["position"] for stream in [*ranks, alone]} == {24}


def test_resume_in_the_middle_of_an_epoch_with_another_world_size() -> None:
    whole = order(BatchStream(numbered(10), 4, seed=3), batches=10)
    first = BatchStream(numbered(10), 4, seed=3)
    seen = order(first, batches=3, world_size=4)
    second = BatchStream(numbered(10), 4, seed=3)
    second.restore([first.state()])
    seen += order(second, batches=3, world_size=1)
    third = BatchStream(numbered(10), 4, seed=3)
    third.restore([second.state()])
    seen += order(third, batches=4, world_size=2)
    assert seen == whole
    assert Counter(seen) == dict.fromkeys(range(10), 4)


def test_resume_with_another_batch_size_still_shows_everything_once() -> None:
    first = BatchStream(numbered(12), 4, seed=3)
    seen = order(first, batches=2)
    second = BatchStream(numbered(12), 2, seed=3)
    second.restore([first.state()])
    assert sorted(seen + order(second, batches=2)) == list(range(12))


def test_rows_are_collated() -> None:
    batch = BatchStream(numbered(4), 4, seed=0).next_batch(1, 2)
    assert {tuple(tensor.shape) for tensor in batch.values()} == {(2, 3)}


def test_what_does_not_fit_is_refused() -> None:
    stream = BatchStream(numbered(4), 4, seed=0)
    with pytest.raises(ConfigError, match="batch_size is 4, which leaves ranks without a row at world_size 5"):
        stream.next_batch(0, 5)
    with pytest.raises(ConfigError, match=r"rank is 2; with world_size 2 use 0\.\.1"):
        stream.next_batch(2, 2)
    with pytest.raises(ConfigError, match="batch_size is 0"):
        BatchStream(numbered(4), 0, seed=0)
    with pytest.raises(DataError, match="no sequences"):
        BatchStream([], 4, seed=0)
    assert stream.state() == {"position": 0}


@pytest.mark.parametrize("state", [{}, {"position": -1}, {"position": "4"}, {"position": True}])
def test_a_broken_state_is_refused(state: dict[str, int]) -> None:
    stream = BatchStream(numbered(4), 4, seed=0)
    with pytest.raises(TrainingError, match="data position is"):
        stream.restore([state])
    with pytest.raises(TrainingError, match="data position is None"):
        stream.restore([])
    assert stream.state() == {"position": 0}


@pytest.mark.parametrize("batch_size", [1, 2, 5, 8, 13])
def test_ranks_share_the_rows(batch_size: int) -> None:
    for world_size in range(1, batch_size + 1):
        shares = [rows_of(batch_size, rank, world_size) for rank in range(world_size)]
        assert [row for share in shares for row in share] == list(range(batch_size))
        sizes = [len(share) for share in shares]
        assert sizes == sorted(sizes, reverse=True)
        assert sizes[0] - sizes[-1] <= 1


def test_every_batch_has_the_sequences_whole_length() -> None:
    spans = [TokenSpan(list(range(1, size + 1)), [True] * size, splittable=False) for size in (2, 3, 4, 5)]
    sequences = [pack([span], 10, pad_id=0)[0] for span in spans]
    alone = BatchStream(sequences, 1, seed=0)
    seen = [alone.next_batch() for _ in spans]
    assert {tensor.shape for batch in seen for tensor in batch.values()} == {(1, 10)}
    assert sorted(int(batch["real"].sum()) for batch in seen) == [2, 3, 4, 5]
