from __future__ import annotations

import random

import pytest
import torch

from ot_ray.data import PackedSequence, TokenSpan, collate, pack, without_padding
from ot_ray.data.packing import IGNORE, WINDOW
from ot_ray.errors import ConfigError

PAD = 0


def text(*ids: int) -> TokenSpan:
    return TokenSpan(list(ids), [True] * len(ids))


def prompt(*ids: int, learnt: int = 1) -> TokenSpan:
    """A span that must stay whole and learns its last `learnt` tokens."""
    return TokenSpan(list(ids), [False] * (len(ids) - learnt) + [True] * learnt, splittable=False)


def rows(sequences: list[PackedSequence], field: str) -> list[list[int]]:
    return [getattr(sequence, field).tolist() for sequence in sequences]


def pieces(sequence: PackedSequence) -> list[list[int]]:
    """The real tokens, divided where positions restart."""
    found: list[list[int]] = []
    fields = (sequence.input_ids, sequence.position_ids, sequence.real)
    for token, position, real in zip(*(field.tolist() for field in fields), strict=True):
        if real:
            if position == 0:
                found.append([])
            found[-1].append(token)
    return found


def test_text_fills_sequences_to_the_brim() -> None:
    packed = pack([text(1, 2, 3), text(4, 5, 6, 7, 8, 9)], length=4, pad_id=PAD)
    assert rows(packed, "input_ids") == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert rows(packed, "position_ids") == [[0, 1, 2, 0], [0, 1, 2, 3]]
    assert rows(packed, "labels") == [[IGNORE, 2, 3, IGNORE], [IGNORE, 6, 7, 8]]
    assert all(sequence.real.all() for sequence in packed)
    assert {t.dtype for s in packed for t in (s.input_ids, s.position_ids, s.labels)} == {torch.int64}
    assert packed[0].real.dtype == torch.bool


def test_padding_is_a_piece_of_its_own() -> None:
    (packed,) = pack([text(1, 2, 3)], length=6, pad_id=PAD)
    assert packed.input_ids.tolist() == [1, 2, 3, PAD, PAD, PAD]
    assert packed.position_ids.tolist() == [0, 1, 2, 0, 1, 2]
    assert packed.labels.tolist() == [IGNORE, 2, 3, IGNORE, IGNORE, IGNORE]
    assert packed.real.tolist() == [True, True, True, False, False, False]


def test_a_pad_id_that_is_a_real_token_hides_none() -> None:
    (packed,) = pack([text(1, PAD, 3)], length=4, pad_id=PAD)
    assert packed.labels.tolist() == [IGNORE, PAD, 3, IGNORE]


def test_prompts_stay_whole_and_go_where_there_is_room() -> None:
    spans = [prompt(1, 2, 3), prompt(4, 5, 6, 7), prompt(8, 9)]
    packed = pack(spans, length=5, pad_id=PAD)
    assert rows(packed, "input_ids") == [[1, 2, 3, 8, 9], [4, 5, 6, 7, PAD]]
    assert rows(packed, "labels")[0] == [IGNORE, IGNORE, 3, IGNORE, 9]


def test_the_window_of_open_sequences_is_bounded() -> None:
    spans = [prompt(*range(1, 8), learnt=2) for _ in range(WINDOW + 1)] + [prompt(8, 9)]
    packed = pack(spans, length=9, pad_id=PAD)
    # One sequence had to be closed before the short prompt came; it goes into the first still open.
    assert len(packed) == WINDOW + 1
    assert [len(pieces(sequence)) for sequence in packed].index(2) == 1


def test_nothing_is_lost_split_or_doubled() -> None:
    dice = random.Random(3)
    spans, tokens = [], iter(range(1, 100_000))
    for _ in range(300):
        ids = [next(tokens) for _ in range(dice.randint(2, 40))]
        spans.append(text(*ids) if dice.random() < 0.5 else prompt(*ids[:17]))
    packed = pack(spans, length=17, pad_id=PAD)
    found = [piece for sequence in packed for piece in pieces(sequence)]
    kept = sorted(token for piece in found for token in piece)
    assert kept == sorted(token for span in spans for token in span.input_ids)
    for span in spans:
        if not span.splittable:
            assert span.input_ids in found
    for sequence in packed:
        assert sequence.input_ids.shape == (17,)
        assert (sequence.labels[sequence.position_ids == 0] == IGNORE).all()
        learnt = sequence.labels != IGNORE
        assert (sequence.labels[learnt] == sequence.input_ids[learnt]).all()


def test_packing_is_deterministic() -> None:
    spans = [text(*range(1, n)) if n % 2 else prompt(*range(1, n)) for n in range(3, 12)]
    first, second = pack(spans, 11, PAD), pack(spans, 11, PAD)
    assert rows(first, "input_ids") == rows(second, "input_ids")


def test_a_sequence_with_nothing_to_learn_is_dropped() -> None:
    assert pack([text(1, 2, 3, 4, 5)], length=4, pad_id=PAD)[1:] == []
    assert pack([text(1)], length=4, pad_id=PAD) == []
    assert pack([], length=4, pad_id=PAD) == []


def test_what_cannot_be_packed_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"has 5 tokens, but sequences have 4; .*max_length=4"):
        pack([prompt(1, 2, 3, 4, 5)], length=4, pad_id=PAD)
    with pytest.raises(ConfigError, match="length is 1"):
        pack([text(1, 2)], length=1, pad_id=PAD)


def test_collate_stacks_fields() -> None:
    batch = collate(pack([text(*range(1, 13))], length=4, pad_id=PAD))
    assert {name: tuple(tensor.shape) for name, tensor in batch.items()} == dict.fromkeys(
        ("input_ids", "position_ids", "labels", "real"), (3, 4)
    )
    assert batch["input_ids"][2].tolist() == [9, 10, 11, 12]


def test_columns_that_are_padding_everywhere_are_cut() -> None:
    batch = collate([pack([prompt(*ids)], length=5, pad_id=PAD)[0] for ids in ([1, 2, 3], [4, 5, 6, 7, 8])])
    assert batch["real"].sum(1).tolist() == [3, 5]
    assert all(torch.equal(tensor, batch[name]) for name, tensor in without_padding(batch).items())
    short = {name: tensor[:1] for name, tensor in batch.items()}
    assert {name: tensor.tolist() for name, tensor in without_padding(short).items()} == {
        "input_ids": [[1, 2, 3]],
        "position_ids": [[0, 1, 2]],
        "labels": [[IGNORE, IGNORE, 3]],
        "real": [[True] * 3],
    }


def test_a_batch_that_knows_no_padding_is_left_alone() -> None:
    pixels = {"pixel_values": torch.zeros(2, 3, 4, 4), "labels": torch.zeros(2)}
    assert without_padding(pixels) == pixels
