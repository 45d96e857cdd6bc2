"""Encoding by several processes, in the order of the rows."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from easylm import storage
from easylm.data.encode import Encoded
from easylm.errors import InputError
from easylm.tokenizer import load_tokenizer_files, tokenizer_files, tokenizer_files_in

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Of a tokenizer and rows; it must be one that a process can be sent.
Encode = Callable[[Any, Sequence[Any]], Encoded]

# Rows that a process takes at once: about half a second of work, so that Ctrl-C is answered soon
# and the last process is not waited for long. The result does not depend on it.
_ROWS = 2048
_CHARACTERS = 1_000_000
# A process needs seconds to start. Where nobody says how many, each should have this much to do.
_CHARACTERS_PER_PROCESS = 8_000_000


def encode_in_parts(
    tokenizer: PreTrainedTokenizerFast,
    rows: Sequence[Any],
    encode: Encode,
    *,
    processes: int | None = None,
    progress: bool = True,
) -> Iterator[Encoded]:
    """Encodes rows, a part at a time; the parts and their order depend on the rows alone.

    Args:
        tokenizer: with the chat template to train on.
        rows: valid ones; `messages` are the texts of one.
        encode: what is done with them, such as `encode_rows` with its policy.
        processes: how many encode; 1: this one does. None: one per core, fewer where there is
            little to do.
        progress: whether to show a progress bar on stderr.

    Raises:
        InputError: as `encode`, for the first row that is wrong.
    """
    if processes is None:
        characters = sum(len(turn["content"]) for row in rows for turn in row.messages)
        processes = min(_cores(), 1 + characters // _CHARACTERS_PER_PROCESS)
    parts = list(_parts(rows))
    if processes == 1:
        encoded = (encode(tokenizer, part) for part in parts)
    else:
        encoded = _by_processes(tokenizer, parts, encode, processes)
    with (
        contextlib.closing(encoded),
        tqdm(total=len(rows), desc="encode", unit=" rows", disable=not progress) as bar,
    ):
        for part, result in zip(parts, encoded, strict=True):
            yield result
            bar.update(len(part))


def _cores() -> int:
    # Linux knows how many this process may use.
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _parts(rows: Sequence[Any]) -> Iterator[Sequence[Any]]:
    start = characters = 0
    for end, row in enumerate(rows):
        if end - start == _ROWS or characters > _CHARACTERS:
            yield rows[start:end]
            start, characters = end, 0
        characters += sum(len(turn["content"]) for turn in row.messages)
    if start < len(rows):
        yield rows[start:]


def _by_processes(
    tokenizer: PreTrainedTokenizerFast,
    parts: Sequence[Sequence[Any]],
    encode: Encode,
    processes: int,
) -> Iterator[Encoded]:
    with tempfile.TemporaryDirectory() as folder:
        # Through a file: what a starting process is given by pipe, its parent waits for.
        for name, content in tokenizer_files(tokenizer).items():
            storage.write_bytes(f"{folder}/{name}", content)
        pool = ProcessPoolExecutor(
            processes,
            # A fork would copy the threads' locks of this process but not the threads.
            multiprocessing.get_context("spawn"),
            initializer=_start_worker,
            initargs=(folder, encode),
        )
        try:
            waiting: deque[Future[Encoded]] = deque()
            for part in parts:
                waiting.append(_submit(pool, part))
                # Enough that no process waits, few enough that results do not pile up.
                if len(waiting) > 3 * processes:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise InputError(
                f"data.processes: one of the {processes} processes that encode was killed, most "
                "often because memory ran out; set fewer"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def _submit(pool: ProcessPoolExecutor, part: Sequence[Any]) -> Future[Encoded]:
    """Hands a part to the pool, which may start a process for it.

    Ctrl-C reaches every process of a terminal. Those started here inherit that they do not hear it:
    this one does, and ends them.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return pool.submit(_run, part)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(folder: str, encode: Encode) -> None:
    """Runs once in each process: loads the tokenizer, and sees to it that none is left behind."""
    global _work
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # The processes share the cores; threads of the tokenizer would only get in their way.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _work = (load_tokenizer_files(tokenizer_files_in(folder)), encode)


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


_work: tuple[PreTrainedTokenizerFast, Encode]


def _run(part: Sequence[Any]) -> Encoded:
    tokenizer, encode = _work
    return encode(tokenizer, part)
