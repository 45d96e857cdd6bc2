"""Saves the checkpoints of a run, beside its training."""

import contextlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import NamedTuple

import jax
import orbax.checkpoint as ocp

from easylm import storage
from easylm.checkpoint import (
    ASYNC_OPTIONS,
    UNFINISHED,
    absolute,
    arrays,
    failure_named,
    failures_unlogged,
    items,
    steps,
)
from easylm.command import say
from easylm.errors import InputError, UnavailableError
from easylm.workdir import COMPLETE

SAID_AFTER_SECONDS = 2


class Saved(NamedTuple):
    """A checkpoint that is complete.

    Attributes:
      step: whose state it holds.
      bytes: of its arrays, on all hosts together.
      seconds: from the call of `save` until it was complete.
      waited: seconds of these in which the caller could do nothing else.
    """

    step: int
    bytes: int
    seconds: float
    waited: float


class Checkpointer:
    """The checkpoints of one run, in WORKDIR/checkpoints.

    All hosts make one and call it alike. What saves that were cut off have left is removed.

    Args:
      workdir: of the run; local or gs://.
      keep: how many of the newest checkpoints stay.
      saved: is told of each complete checkpoint on the first host, in another thread.
    """

    # This does without Orbax's CheckpointManager. With each save, and in its threads, that asks jax
    # whether the run is to stop, by the number of the step, which spoils the answers that the run
    # gets to its own questions. And a host whose save fails hears of it only when the other hosts
    # have stopped waiting for it.

    def __init__(
        self, workdir: str, *, keep: int, saved: Callable[[Saved], None] = lambda saved: None
    ):
        self._folder, self._keep, self._saved = f"{workdir.rstrip('/')}/checkpoints", keep, saved
        self._is_first = jax.process_index() == 0
        if self._is_first:
            _remove_unfinished(self._folder)
        self._writer = ocp.AsyncCheckpointer(
            items(params=arrays(), opt_state=arrays()), async_options=ASYNC_OPTIONS
        )
        self._threads = ThreadPoolExecutor(1, "after_save")
        self._under_way: Future | None = None
        self._until_closed = contextlib.ExitStack()
        self._until_closed.enter_context(failures_unlogged())

    def save(self, step: int, params: dict, opt_state, bundle: dict) -> None:
        """Starts saving; returns as soon as the arrays may be overwritten.

        Raises:
          InputError, UnavailableError: as `check`, after the last save is done; or this one cannot
            start.
        """
        started = time.perf_counter()
        self._wait()
        target = f"{self._folder}/{step}"
        with _what_to_do_said(), failure_named(target):
            self._writer.save(
                absolute(target),
                args=ocp.args.Composite(
                    params=ocp.args.PyTreeSave(params),
                    opt_state=ocp.args.PyTreeSave(opt_state),
                    bundle=ocp.args.JsonSave(bundle),
                ),
            )
        size = sum(leaf.nbytes for leaf in jax.tree.leaves((params, opt_state)))
        waited = time.perf_counter() - started
        self._under_way = self._threads.submit(self._finish, step, size, started, waited)

    def check(self) -> None:
        """Does not wait.

        Raises:
          InputError, UnavailableError: the last save has failed.
        """
        if self._under_way is not None and self._under_way.done():
            self._wait()

    def close(self) -> None:
        """Waits for the save under way.

        Raises:
          InputError, UnavailableError: it has failed.
        """
        with self._until_closed:
            self._wait(say_after=SAID_AFTER_SECONDS)
            with _what_to_do_said(), failure_named(self._folder):  # its own threads may have failed
                self._writer.close()

    def _wait(self, say_after: float | None = None) -> None:
        save, self._under_way = self._under_way, None
        if save is None:
            return
        wait([save], say_after)
        if not save.done() and self._is_first:
            say("finishing the checkpoint")
        save.result()

    def _finish(self, step: int, size: int, started: float, waited: float) -> None:
        """Returns when the save is complete, and what it takes the place of removed."""
        with _what_to_do_said(), failure_named(f"{self._folder}/{step}"):
            self._writer.wait_until_finished()
        if self._is_first:
            self._saved(Saved(step, size, time.perf_counter() - started, waited))
            for old in sorted(steps(self._folder))[: -self._keep]:
                _remove(f"{self._folder}/{old}")


def _remove_unfinished(folder: str) -> None:
    """Removes what is left of saves, and of removals, that were cut off."""
    for name in storage.list_folders(folder) if storage.is_folder(folder) else []:
        # In a bucket, where nothing can be renamed, a step has its name from the start.
        is_step = name.isdigit() and not storage.exists(f"{folder}/{name}/{COMPLETE}")
        if UNFINISHED in name or (is_step and storage.is_bucket(folder)):
            storage.remove_folder(f"{folder}/{name}")


def _remove(step_folder: str) -> None:
    """Removes a checkpoint; half of it never passes for a complete one."""
    path = absolute(step_folder)
    with storage.explained(step_folder):
        if storage.is_bucket(step_folder):
            (path / COMPLETE).unlink()
        else:
            path = path.rename(path.parent / f"{path.name}{UNFINISHED}")
        storage.remove_folder(str(path))


@contextlib.contextmanager
def _what_to_do_said() -> Iterator[None]:
    try:
        yield
    except (InputError, UnavailableError) as error:
        raise type(error)(
            f"{error}. This checkpoint is lost, what was saved before stays: mend what is wrong, "
            "or make room, and start the same command again"
        ) from error
