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
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TYPE_CHECKING

from tqdm import tqdm

from easylm import storage
from easylm.data.encode import Encoded, Policy, encode_rows
from easylm.data.sources import Row
from easylm.errors import InputError
from easylm.tokenizer import load_tokenizer_files, tokenizer_files, tokenizer_files_in

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Rows that a process takes at once: about half a second of work, so that Ctrl-C is answered soon
# and the last process is not waited for long. The result does not depend on it.
_ROWS = 2048
_CHARACTERS = 1_000_000
# A process needs seconds to start. Where nobody says how many, each should have this much to do.
_CHARACTERS_PER_PROCESS = 8_000_000


def encode_in_parts(
    tokenizer: PreTrainedTokenizerFast,
    rows: Sequence[Row],
    policy: Policy,
    vocab_size: int,
    *,
    processes: int | None = None,
    progress: bool = True,
) -> Iterator[Encoded]:
    """Encodes rows, a part at a time; the parts and their order depend on the rows alone.

    Args:
        tokenizer: with the chat template to train on.
        rows: valid conversations.
        policy: what is done with them.
        vocab_size: the number of ids the model has.
        processes: how many encode; 1: this one does. None: one per core, fewer where there is
            little to do.
        progress: whether to show a progress bar on stderr.

    Raises:
        InputError: as `encode_rows`, for the first row that is wrong.
    """
    if processes is None:
        characters = sum(len(turn["content"]) for row in rows for turn in row.messages)
        processes = min(_cores(), 1 + characters // _CHARACTERS_PER_PROCESS)
    parts = list(_parts(rows))
    if processes == 1:
        encoded = (encode_rows(tokenizer, part, policy, vocab_size) for part in parts)
    else:
        encoded = _by_processes(tokenizer, parts, policy, vocab_size, processes)
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


def _parts(rows: Sequence[Row]) -> Iterator[Sequence[Row]]:
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
    parts: Sequence[Sequence[Row]],
    policy: Policy,
    vocab_size: int,
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
            initargs=(folder, policy, vocab_size),
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


def _submit(pool: ProcessPoolExecutor, part: Sequence[Row]) -> Future[Encoded]:
    """Hands a part to the pool, which may start a process for it.

    Ctrl-C reaches every process of a terminal. Those started here inherit that they do not hear it:
    this one does, and ends them.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return pool.submit(_run, part)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(folder: str, policy: Policy, vocab_size: int) -> None:
    """Runs once in each process: loads the tokenizer, and sees to it that none is left behind."""
    global _work
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # The processes share the cores; threads of the tokenizer would only get in their way.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _work = (load_tokenizer_files(tokenizer_files_in(folder)), policy, vocab_size)


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


_work: tuple[PreTrainedTokenizerFast, Policy, int]


def _run(part: Sequence[Row]) -> Encoded:
    tokenizer, policy, vocab_size = _work
    return encode_rows(tokenizer, part, policy, vocab_size)
