from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ot_ray.data import PackedSequence, StreamConfig, open_stream, pack, tokenize
from ot_ray.data.documents import Source
from ot_ray.data.streaming import lanes
from ot_ray.data.streaming.dealing import Deal
from ot_ray.data.streaming.lanes import Cursor, Setup, Share, Task
from ot_ray.errors import ConfigError, DataError, TrainingError
from tests.data.corpora import (
    EOS,
    LENGTH,
    Ranks,
    documents,
    jsonl,
    same,
    settings,
    tokens,
    word_tokenizer,
    write_corpus,
)

KINDS = ["jsonl", "jsonl.gz", "jsonl.zst", "text", "parquet", "hub"]


@pytest.fixture
def mixed(tmp_path: Path) -> StreamConfig:
    """Texts, prompts with answers, three files, two passes."""
    return settings(write_corpus(tmp_path / "mixed", "jsonl", documents(60, prompts=True)), passes=2)


def words(row: dict[str, str]) -> list[int]:
    return [int(word[1:]) for word in " ".join(row.values()).split()]


def drained(share: Share) -> Iterator[PackedSequence]:
    """All samples of the one lane of a share."""
    while True:
        try:
            (sample,), _ = share.batch()
        except DataError:
            return
        yield sample


@pytest.mark.parametrize("window", [1, 4, 1000])
def test_a_lane_packs_every_nth_document(tmp_path: Path, window: int) -> None:
    rows = documents(50)
    (tmp_path / "a.jsonl").write_bytes(jsonl(rows))
    config = settings(tmp_path / "a.jsonl", shuffle_window=window)
    source, tokenizer = Source(config), word_tokenizer()
    texts = [source.parse(0, record) for record in source.records(0)]
    with Ranks(config, batch_size=3, seed=7) as ranks:
        batches = ranks.rest()
    assert len(batches) > 5
    for lane in range(3):
        dealt, order = texts[lane::3], []
        for number, start in enumerate(range(0, len(dealt), window)):
            part = dealt[start : start + window]
            if window > 1:
                random.Random(f"7/0/{lane}/{number}").shuffle(part)
            order += part
        spans = [span for text in order if any((span := tokenize(text, tokenizer, LENGTH)).learn[1:])]
        expected = pack(spans, LENGTH, EOS)[: len(batches)]
        for name in ("input_ids", "position_ids", "labels", "real"):
            given = torch.stack([batch[name][lane] for batch in batches])
            assert torch.equal(given, torch.stack([getattr(sequence, name) for sequence in expected]))


@pytest.mark.parametrize("world_size", [2, 3, 4, 8])
def test_the_global_batches_do_not_depend_on_the_number_of_ranks(mixed: StreamConfig, world_size: int) -> None:
    config = mixed.model_copy(update={"passes": 4})
    with Ranks(config, batch_size=8) as alone, Ranks(config, world_size, batch_size=8) as ranks:
        expected = alone.rest()
        assert len(expected) > 10
        assert same(ranks.rest(), expected)


@pytest.mark.parametrize("passes", [1, 3])
def test_every_document_is_seen_once_in_a_pass(tmp_path: Path, passes: int) -> None:
    rows = documents(60, prompts=True)
    source = Source(settings(write_corpus(tmp_path / "corpus", "jsonl", rows)))
    setup = Setup(Deal(source, 1, 4, 4, passes, 1 << 16), word_tokenizer(), LENGTH)
    seen: Counter[int] = Counter()
    for lane in range(4):
        share = Share(Task(setup, {lane: Cursor()}))
        for sample in drained(share):
            seen.update(sample.input_ids[sample.real].tolist())
    ends = seen.pop(EOS)
    assert seen == Counter({word: passes for row in rows for word in words(row)})
    # The last sequence of a lane is dropped where it holds a document's end and nothing else.
    assert passes * len(rows) - 4 <= ends <= passes * len(rows)


def test_no_document_is_seen_twice_in_a_pass(mixed: StreamConfig) -> None:
    with Ranks(mixed.model_copy(update={"passes": 1}), 2) as ranks:
        assert max(Counter(tokens(ranks.rest())).values()) == 1


def test_orders_differ_by_seed_and_pass_and_repeat(mixed: StreamConfig) -> None:
    def first(seed: int, passes: int = 1) -> list[int]:
        with Ranks(mixed.model_copy(update={"passes": passes}), batch_size=1, seed=seed) as ranks:
            return tokens(ranks.rest())

    one, both = first(1), first(1, passes=2)
    assert first(1) == one
    assert first(2) != one
    assert sorted(first(2)) == sorted(one)
    assert sorted(both) == sorted(one * 2)
    assert both[: len(one)] != both[len(one) :]


def test_a_window_of_one_keeps_the_order(tmp_path: Path) -> None:
    rows = documents(30)
    config = settings(write_corpus(tmp_path / "corpus", "jsonl", rows, files=1), shuffle_window=1)
    with Ranks(config, batch_size=1) as ranks:
        assert tokens(ranks.rest()) == [word for row in rows for word in words(row)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_resumed_after_any_batch_goes_on_as_if_undisturbed(tmp_path: Path, kind: str) -> None:
    prompts = kind.startswith("jsonl")
    source = write_corpus(tmp_path / "corpus", kind, documents(40, prompts=prompts))
    config = settings(source, passes=2, document_separator="\f" if kind == "text" else None)
    with Ranks(config, batch_size=3) as undisturbed:
        states, batches = [undisturbed.states()], []
        for batch in undisturbed.until_dry():
            batches.append(batch)
            states.append(undisturbed.states())
    assert len(batches) > 10
    for done in range(len(batches)):
        with Ranks(config, batch_size=3) as resumed:
            resumed.restore(states[done])
            assert resumed.states() == states[done]
            rest = resumed.take(min(3, len(batches) - done))
            assert same(rest, batches[done : done + 3])
            assert resumed.states() == states[done + len(rest)]
    with Ranks(config, batch_size=3) as resumed:
        resumed.restore(states[-1])
        assert resumed.rest() == []


def test_resuming_reads_a_window_anew_and_tokenises_no_more_than_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(write_corpus(tmp_path / "corpus", "jsonl", documents(60), files=1))
    with Ranks(config, batch_size=2) as before:
        done = len(before.rest()) - 2
    with Ranks(config, batch_size=2) as before:
        before.take(done)
        states = before.states()
    calls: list[str] = []
    parsed: list[int] = []
    tokenize, parse = lanes.tokenize, Source.parse

    def counted(document: Any, *rest: Any) -> Any:
        calls.append(document.where)
        return tokenize(document, *rest)

    def watched(self: Source, file: int, record: Any) -> Any:
        parsed.append(record.place.number)
        return parse(self, file, record)

    monkeypatch.setattr(lanes, "tokenize", counted)
    monkeypatch.setattr(Source, "parse", watched)
    with Ranks(config, batch_size=2) as after:
        after.restore(states)
        after.take(1)
    assert 0 < len(calls) <= 6
    assert min(parsed) > 20


def test_ranks_come_and_go(mixed: StreamConfig) -> None:
    with Ranks(mixed) as undisturbed:
        expected = undisturbed.rest()
    seen: list[Any] = []
    states: list[dict[str, Any]] = []
    for world_size, batches in ((2, 3), (1, 4), (3, 2), (6, 3), (4, None)):
        with Ranks(mixed, world_size) as ranks:
            if states:
                ranks.restore(states)
            seen += ranks.rest() if batches is None else ranks.take(batches)
            states = ranks.states()
    assert same(seen, expected)


def test_a_stream_goes_back_to_where_it_was(mixed: StreamConfig) -> None:
    with Ranks(mixed, 2) as ranks:
        ranks.take(2)
        states, batches = ranks.states(), ranks.take(3)
        ranks.restore(states)
        assert same(ranks.take(3), batches)


def test_a_lane_far_behind_the_others_reads_for_itself(mixed: StreamConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    with Ranks(mixed) as ranks:
        expected = ranks.rest()
    monkeypatch.setattr("ot_ray.data.streaming.dealing.WAITING_BYTES", 0)
    with Ranks(mixed) as ranks:
        assert same(ranks.rest(), expected)


def test_a_window_is_bounded_in_bytes(mixed: StreamConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    with Ranks(mixed.model_copy(update={"shuffle_window": 1000})) as ranks:
        whole = tokens(ranks.rest())
    monkeypatch.setattr("ot_ray.data.streaming.dealing.WINDOW_BYTES", 1)
    with Ranks(mixed.model_copy(update={"shuffle_window": 1000}), batch_size=1) as ranks:
        alone = tokens(ranks.rest())
    # Each document is a window of its own, so that only the order of the files is left.
    starts = [index for index in range(1, len(alone)) if alone[index] != alone[index - 1] + 1]
    assert sorted(alone) == sorted(2 * [word for row in documents(60, prompts=True) for word in words(row)])
    assert len(starts) > 50
    assert alone[: len(whole)] != whole


def test_one_small_text_serves_every_row(tmp_path: Path) -> None:
    lines = [" ".join(f"w{line * 10 + word}" for word in range(1, 11)) for line in range(390)]
    (tmp_path / "a.txt").write_text("\n".join(lines) + "\n")
    with Ranks(settings(tmp_path / "a.txt"), batch_size=4) as ranks:
        seen = Counter(tokens(ranks.rest()))
    assert max(seen.values()) == 1
    assert len(seen) > 2000


def test_a_limit_means_the_same_documents_in_every_pass(tmp_path: Path) -> None:
    rows = documents(60)
    source = write_corpus(tmp_path / "corpus", "jsonl", rows)
    with Ranks(settings(source, limit=25, passes=3), batch_size=1) as ranks:
        batches = ranks.rest()
    first = [*rows[0::3], *rows[1::3], *rows[2::3]][:25]
    # Texts of one word, here all the same length as their end, are learnt too: the end is.
    assert Counter(tokens(batches)) == Counter({word: 3 for row in first for word in words(row)})
    with Ranks(settings(source, limit=25, passes=3), batch_size=1) as ranks:
        ranks.take(len(batches) - 3)
        states = ranks.states()
    with Ranks(settings(source, limit=25, passes=3), batch_size=1) as ranks:
        ranks.restore(states)
        assert same(ranks.rest(), batches[-3:])


def test_a_source_that_dries_up_says_so(mixed: StreamConfig) -> None:
    with Ranks(mixed) as ranks:
        count = len(ranks.rest())
        message = rf"mixed dries up: data\.passes is 2, which gives {count} batches of 6; raise data\.passes"
        with pytest.raises(DataError, match=message):
            ranks.next()
        assert {state["batches"] for state in ranks.states()} == {count}


def test_fewer_documents_than_rows(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(documents(5)))
    with (
        Ranks(settings(tmp_path / "a.jsonl", passes=9)) as ranks,
        pytest.raises(
            DataError, match=r"5 documents do not fill training\.batch_size, which is 6.*batch_size of 1\.\.5"
        ),
    ):
        ranks.next()
    with Ranks(settings(tmp_path / "a.jsonl", passes=9), batch_size=5) as ranks:
        assert ranks.take(5)


def test_rows_without_anything_to_learn(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl([{"text": "w1 w2"}, {"text": ""}] * 5))
    for passes, rows in ((1, 2), (1000, 1)):
        if rows == 1:
            path.write_bytes(jsonl([{"text": ""}] * 5))
        message = rf"none of the documents of row {rows - 1}, one of {rows}, has anything to learn"
        with (
            Ranks(settings(path, passes=passes), batch_size=rows) as ranks,
            pytest.raises(DataError, match=message),
        ):
            ranks.next()


def test_a_row_may_find_nothing_in_one_pass(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl([{"text": "w1 w2"}, {"text": ""}] * 5))
    with Ranks(settings(tmp_path / "a.jsonl", passes=8), batch_size=2) as ranks:
        assert set(tokens(ranks.rest())) == {1, 2}


def test_a_bad_document_is_named_when_it_is_reached(tmp_path: Path) -> None:
    rows = documents(30)
    (tmp_path / "a.jsonl").write_bytes(jsonl(rows[:20]) + b'{"text": 7}\n' + jsonl(rows[20:]))
    with Ranks(settings(tmp_path / "a.jsonl", shuffle_window=1), 2, batch_size=2) as ranks:
        ranks.take(2)
        with pytest.raises(DataError, match=r"a\.jsonl, line 21: text is a number"):
            ranks.take(1000)
        with pytest.raises(DataError, match=r"a\.jsonl, line 21"):
            ranks.next()


def test_what_does_not_fit_is_refused(mixed: StreamConfig) -> None:
    tokenizer = word_tokenizer()
    with pytest.raises(ConfigError, match=r"batch_size is 2, which leaves ranks without a row at world_size 3"):
        open_stream(mixed, tokenizer, LENGTH, 2, 0, 0, 3)
    with pytest.raises(ConfigError, match="length is 1"):
        open_stream(mixed, tokenizer, 1, 2, 0)
    with Ranks(mixed, 2) as ranks, pytest.raises(ConfigError, match=r"opened for rank 0 of 2 and is asked for rank 1"):
        ranks.streams[0].next_batch(1, 2)
    with pytest.raises(DataError, match="no such file"):
        open_stream(mixed.model_copy(update={"source": mixed.source + "x"}), tokenizer, LENGTH, 2, 0)


def test_a_closed_stream_gives_nothing(mixed: StreamConfig) -> None:
    with Ranks(mixed) as ranks:
        ranks.next()
    with pytest.raises(TrainingError, match="is closed"):
        ranks.next()
    ranks.streams[0].close()


def test_states_that_do_not_fit_are_refused(mixed: StreamConfig) -> None:
    with Ranks(mixed, 2) as ranks:
        ranks.take(2)
        good = ranks.states()
        ranks.take(1)
        later = ranks.states()
        broken = [
            ([], "of batches"),
            ([{}], "no position in a stream"),
            ([{"batches": 2, "lanes": {"x": {}}}], "no position in a stream"),
            ([{"batches": 2, "lanes": {"0": {"samples": -1}}}], "no position in a stream"),
            ([{"batches": -2, "lanes": {}}], "of batches"),
            ([{"batches": 1, "lanes": {"0": {"position": [0, 0, -1, 1, 0]}}}], "before the beginning"),
            ([{"batches": 1, "lanes": {"0": {"unknown": 1}}}], "no position in a stream"),
            (good[:1], r"has rows \[0, 1, 2\], but training.batch_size is 6"),
            ([good[0], later[1]], "of batches"),
            ([good[0], {**later[1], "batches": 2}], "not at batch 2"),
        ]
        for states, message in broken:
            with pytest.raises(TrainingError, match=message):
                ranks.restore(states)
        assert ranks.states() == later
        assert ranks.take(1)
        # An open sequence is checked where it is opened.
        crooked = json.loads(json.dumps(later))
        for state in crooked:
            for cursor in state["lanes"].values():
                cursor["open"] = [{"ids": [1] * 3, "learn": "11", "pieces": [3]}]
        ranks.restore(crooked)
        with pytest.raises(TrainingError, match=r"row 0 does not fit: an open sequence of 3 tokens"):
            ranks.next()


def test_a_source_that_changed_since_the_checkpoint_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl(documents(30)))
    with Ranks(settings(path), batch_size=1) as ranks:
        ranks.take(3)
        states = ranks.states()
    path.write_bytes(jsonl(documents(1)))
    with Ranks(settings(path), batch_size=1) as ranks:
        ranks.restore(states)
        with pytest.raises(TrainingError, match=r"a\.jsonl is not what it was when the checkpoint was written"):
            ranks.next()


def test_a_position_is_small(mixed: StreamConfig) -> None:
    with Ranks(mixed.model_copy(update={"source": mixed.source})) as ranks:
        ranks.take(5)
        assert len(json.dumps(ranks.states())) < 6 * 2000
