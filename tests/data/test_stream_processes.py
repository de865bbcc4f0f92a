from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from ot_ray.data import StreamConfig, open_stream
from ot_ray.data.streaming import processes
from ot_ray.data.streaming.wire import read_frame, write_frame
from ot_ray.errors import ConfigError, DataError, TrainingError
from ot_ray.store import open_store
from ot_ray.training.text_source import files_of
from tests.data.corpora import LENGTH, Ranks, documents, jsonl, same, settings, word_tokenizer, write_corpus

DEADLINE = 120.0
"""Seconds after which something counts as hanging, on a machine however busy."""

PARENT = """
import sys, time
from tests.data.corpora import Ranks, settings
ranks = Ranks(settings(sys.argv[1], passes=100, workers=2))
ranks.next()
print("going", flush=True)
time.sleep(600)
"""


@pytest.fixture
def corpus(tmp_path: Path) -> StreamConfig:
    source = write_corpus(tmp_path / "corpus", "jsonl", documents(60, prompts=True))
    return settings(source, passes=3, workers=2, prefetch=2)


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    yield
    assert makers() == []


def makers(parent: int | None = None) -> list[psutil.Process]:
    """The processes that make batches for a process."""
    found = []
    for child in psutil.Process(parent).children():
        try:
            if "ot_ray.data.streaming.worker" in child.cmdline():
                found.append(child)
        except psutil.Error:
            continue
    return found


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end, "it hangs"
        time.sleep(0.05)


def is_gone(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.mark.slow
def test_processes_make_the_same_batches_and_resume(corpus: StreamConfig) -> None:
    with Ranks(corpus.model_copy(update={"workers": 0})) as here:
        expected = here.rest()
    with Ranks(corpus) as there:
        wait_for(lambda: len(makers()) == 2)
        first = there.take(3)
        # What is made ahead is not yet given, so it is not in the position.
        states, following = there.states(), there.take(4)
        assert same([*first, *following], expected[:7])
        before = makers()
        there.restore(states)
        assert all(is_gone(process) for process in before)
        assert same(there.rest(), expected[3:])
        with pytest.raises(DataError, match="dries up"):
            there.next()
    with Ranks(corpus.model_copy(update={"workers": 0}), 2) as here:
        here.restore(states)
        assert same(here.take(2), expected[3:5])


@pytest.mark.slow
def test_there_are_no_more_processes_than_rows(corpus: StreamConfig) -> None:
    with Ranks(corpus, batch_size=1):
        wait_for(lambda: len(makers()) == 1)


@pytest.mark.slow
def test_an_error_in_a_process_comes_after_the_batches_before_it(tmp_path: Path) -> None:
    rows = documents(40)
    (tmp_path / "a.jsonl").write_bytes(jsonl(rows[:30]) + b'{"text": 7}\n' + jsonl(rows[30:]))
    config = settings(tmp_path / "a.jsonl", shuffle_window=1, workers=1)
    with Ranks(config.model_copy(update={"workers": 0}), batch_size=2) as here:
        expected = here.take(2)
    with Ranks(config, batch_size=2) as there:
        given = there.take(2)
        with pytest.raises(DataError, match=r"a\.jsonl, line 31: text is a number"):
            there.take(1000)
    assert same(given, expected)


@pytest.mark.slow
def test_a_killed_process_is_an_error_and_no_wait(corpus: StreamConfig) -> None:
    with Ranks(corpus.model_copy(update={"passes": 1000})) as ranks:
        ranks.next()
        states = ranks.states()
        following = ranks.next()
        victim = makers()[0]
        victim.send_signal(signal.SIGKILL)
        message = rf"the process {victim.pid} that makes rows [\d, ]+ of the batches ended \(signal 9\); resume"
        with pytest.raises(TrainingError, match=message):
            ranks.take(1000)
        with pytest.raises(TrainingError, match=message):
            ranks.next()
        ranks.restore(states)
        assert same([ranks.next()], [following])


@pytest.mark.slow
def test_processes_end_with_a_parent_that_is_killed(corpus: StreamConfig) -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT, corpus.source], stdout=subprocess.PIPE, cwd=os.getcwd())
    try:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"going\n"
        children = makers(parent.pid)
        assert len(children) == 2
    finally:
        parent.kill()
        parent.communicate()
    wait_for(lambda: all(is_gone(child) for child in children))


@pytest.mark.slow
def test_processes_that_were_never_asked_end_too(corpus: StreamConfig) -> None:
    ranks = Ranks(corpus)
    # A process that was just started has the command of its parent for a moment.
    wait_for(lambda: len(makers()) == 2)
    children = makers()
    ranks.__exit__()
    assert all(is_gone(child) for child in children)
    ranks.__exit__()


@pytest.mark.slow
def test_a_bucket_is_streamed_through_a_process(s3_url: str, corpus: StreamConfig, tmp_path: Path) -> None:
    write_corpus(tmp_path / "packed", "jsonl.zst", documents(60, prompts=True))
    store = open_store(s3_url)
    for path in (tmp_path / "packed").iterdir():
        store.upload(path, f"text/{path.name}")
    address, _, query = s3_url.partition("?")
    there = corpus.model_copy(update={"source": f"{address}/text/*.zst?{query}", "workers": 1})
    with Ranks(corpus.model_copy(update={"workers": 0})) as here:
        expected = here.take(5)
    stream = open_stream(there, word_tokenizer(), LENGTH, 6, 1, files=files_of(there))
    try:
        assert same([stream.next_batch() for _ in range(5)], expected)
        store.delete_prefix("text")
        with pytest.raises(DataError, match=r"s3://.*/root/text/\d\.jsonl\.zst: the file is no longer there"):
            list(iter(stream.next_batch, None))
    finally:
        stream.close()


def test_a_tokenizer_that_cannot_travel_is_refused(corpus: StreamConfig) -> None:
    tokenizer = word_tokenizer()
    tokenizer.hook = lambda: None
    stream = open_stream(corpus, tokenizer, LENGTH, 6, 1)
    try:
        with pytest.raises(ConfigError, match=r"data\.workers: the tokenizer .* cannot travel to another process"):
            stream.next_batch()
    finally:
        stream.close()


@pytest.mark.parametrize(
    ("name", "kind"), [("DataError", DataError), ("ValueError", TrainingError), (None, TrainingError)]
)
def test_only_our_own_errors_are_raised_by_name(name: str | None, kind: type[Exception]) -> None:
    assert type(processes._typed(name, "broken")) is kind


def test_a_frame_that_is_cut_off_is_no_frame(tmp_path: Path) -> None:
    path = tmp_path / "frame"
    with path.open("wb") as file:
        write_frame(file, {"a": 1}, b"12345")
    whole = path.read_bytes()
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        with path.open("rb") as file:
            assert read_frame(file) == (({"a": 1}, b"12345") if size == len(whole) else None)
