"""A process that makes some rows of every batch ahead of time: `python -m ot_ray.data.streaming.worker`.

It reads its task and one byte a batch wanted from its input, writes frames, and ends when its input ends."""

from __future__ import annotations

import os
import pickle
import sys
import threading
import traceback
from contextlib import suppress
from typing import BinaryIO

import transformers

from ot_ray.data.streaming.lanes import Share, Task
from ot_ray.data.streaming.wire import to_bytes, write_frame
from ot_ray.errors import OTRayError


def main() -> None:
    """Serve the stream whose child this is."""
    output = os.fdopen(os.dup(1), "wb")
    # Whatever a library prints must not get between the frames.
    os.dup2(2, 1)
    # What every tokenizer needs is loaded while the stream still waits for its model.
    _ = transformers.PreTrainedTokenizerFast
    wanted = threading.Semaphore(0)
    try:
        # The bytes come from the process that started this one, by a pipe that no other can write to.
        task: Task = pickle.load(sys.stdin.buffer)
    except EOFError:
        return
    listener = threading.Thread(target=_listen, args=(sys.stdin.buffer, wanted), daemon=True)
    listener.start()
    with suppress(BrokenPipeError):
        _serve(task, wanted, output)
    # The listener holds the input, which the interpreter could not close; it ends the process.
    listener.join()


def _serve(task: Task, wanted: threading.Semaphore, output: BinaryIO) -> None:
    try:
        share = Share(task)
        while True:
            wanted.acquire()
            samples, cursors = share.batch()
            write_frame(output, {"cursors": cursors}, to_bytes(samples))
    except BrokenPipeError:
        raise
    except OTRayError as error:
        write_frame(output, {"error": type(error).__name__, "message": str(error)})
    except Exception as error:
        traceback.print_exc()
        write_frame(output, {"error": None, "message": f"{type(error).__name__}: {error}"})


def _listen(source: BinaryIO, wanted: threading.Semaphore) -> None:
    """Count the batches wanted; the input ends when the stream is closed or its process has died, however it died."""
    while source.read(1):
        wanted.release()
    os._exit(0)


if __name__ == "__main__":
    main()
