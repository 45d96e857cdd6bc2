"""Where the metrics of a run can go beside metrics.jsonl: TensorBoard, Weights & Biases."""

import contextlib
import importlib.util
import os
import secrets
import tempfile
import time
from collections.abc import Iterator, Mapping
from typing import Protocol

from easylm import storage
from easylm.errors import InputError

# Seconds between updates of TensorBoard's file, which in a bucket is written again whole.
STORE_SECONDS = 30.0

Record = Mapping[str, float | int | None]


class Tracker(Protocol):
    """Takes the lines of metrics.jsonl."""

    def write(self, record: Record) -> None:
        """Adds one line; `record` has at least "step". A value of None is left out."""

    def store(self) -> None:
        """Makes sure that a crash from now on loses no line so far."""

    def close(self) -> None:
        """Makes sure that every line is stored."""


def check_trackers(*, tensorboard: bool, wandb: str) -> None:
    """Refuses what a run could not be tracked with, before anything is computed.

    Args:
      tensorboard: whether to write for TensorBoard.
      wandb: project of Weights & Biases; empty for none.
    Raises:
      InputError: a library is missing, or Weights & Biases does not know who is asking.
    """
    if tensorboard:
        _require("tensorboardX", "tensorboard", "False")
    if wandb:
        _require("wandb", "wandb", "''")
        _log_in()


def open_trackers(
    workdir: str, last_step: int, *, tensorboard: bool, wandb: str, config: dict
) -> list[Tracker]:
    """The trackers that were asked for, none by default.

    Args:
      workdir: local or gs:// folder of the run.
      last_step: the step the run goes on from, 0 for a new one.
      tensorboard: whether to write to WORKDIR/tensorboard.
      wandb: project of Weights & Biases; empty for none.
      config: of the run, as nested plain values; shown there.
    Raises:
      InputError: the folder cannot be written, or Weights & Biases refuses.
    """
    trackers: list[Tracker] = []
    if tensorboard:
        trackers.append(TensorBoard(workdir, last_step))
    if wandb:
        trackers.append(WeightsAndBiases(workdir, last_step, wandb, config))
    return trackers


class TensorBoard:
    """Event files in WORKDIR/tensorboard, brought up to date every STORE_SECONDS.

    A run that goes on adds a file, which tells TensorBoard to forget the steps after `last_step`:
    the run writes them again. tensorboardX' own SummaryWriter is not used because it writes in a
    thread, and where that fails, on a full disk or a bucket that does not answer, the run hangs.
    """

    def __init__(self, workdir: str, last_step: int):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        self._folder = f"{workdir.rstrip('/')}/tensorboard"
        self._in_bucket = storage.is_bucket(workdir)
        with storage.explained(self._folder), contextlib.ExitStack() as scratch:
            local = self._folder
            if self._in_bucket:
                local = scratch.enter_context(tempfile.TemporaryDirectory())
            os.makedirs(local, exist_ok=True)
            self._file = EventsWriter(f"{local}/events", f".{last_step}")
            if self._in_bucket:
                # Without a name it leaves no trace on the disk, however this process ends.
                (self._name,) = os.listdir(local)
                self._read = storage.open_to_read(f"{local}/{self._name}")
            restart = SessionLog(status=SessionLog.START)
            self._file.write_event(Event(step=last_step + 1, session_log=restart))
        self.store()

    def write(self, record: Record) -> None:
        """As `Tracker.write`."""
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        values = [
            Summary.Value(tag=name, simple_value=value)
            for name, value in record.items()
            if name != "step" and value is not None
        ]
        event = Event(wall_time=time.time(), step=record["step"], summary=Summary(value=values))
        with storage.explained(self._folder):
            self._file.write_event(event)
            if time.monotonic() - self._stored >= STORE_SECONDS:
                self.store()

    def close(self) -> None:
        """As `Tracker.close`."""
        self.store()
        with storage.explained(self._folder):
            self._file.close()
        if self._in_bucket:
            self._read.close()

    def store(self) -> None:
        """As `Tracker.store`."""
        with storage.explained(self._folder):
            self._file.flush()
        if self._in_bucket:
            self._read.seek(0)
            storage.write_bytes(f"{self._folder}/{self._name}", self._read.read())
        self._stored = time.monotonic()


class WeightsAndBiases:
    """A run of Weights & Biases, whose id is kept in WORKDIR/wandb_id.

    A run that goes on is the same run there. It cannot take steps back, but need not: a resumed
    run repeats its numbers, so steps that are there already are left out.
    """

    def __init__(self, workdir: str, last_step: int, project: str, config: dict):
        import wandb

        workdir = workdir.rstrip("/")
        folder = None  # the library's own choice, since its files must lie on a disk
        if not storage.is_bucket(workdir):
            folder = os.path.abspath(os.path.expanduser(workdir))
            with storage.explained(folder):
                os.makedirs(folder, exist_ok=True)
        with _refusals():
            self._run = wandb.init(
                project=project,
                id=_run_id(workdir, last_step),
                name=os.path.basename(workdir),
                resume="allow",
                dir=folder,
                config=config,
                allow_val_change=True,  # the mesh may be another one after a restart
            )

    def write(self, record: Record) -> None:
        """As `Tracker.write`."""
        if record["step"] >= self._run.step:
            values = {name: value for name, value in record.items() if value is not None}
            self._run.log(values, step=record["step"])

    def store(self) -> None:
        """Nothing to do: the library keeps its lines on the disk and sends them by itself."""

    def close(self) -> None:
        """As `Tracker.close`."""
        self._run.finish()


def _run_id(workdir: str, last_step: int) -> str:
    """The id that the run has; a run from its first step on gets a new one."""
    path = f"{workdir}/wandb_id"
    if last_step and storage.exists(path):
        return storage.read_bytes(path).decode().strip()
    run_id = secrets.token_hex(4)
    storage.write_bytes(path, f"{run_id}\n".encode())
    return run_id


def _require(module: str, field: str, off: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise InputError(
            f"{field}: found no {module} in this environment; wanted it installed: "
            f"pip install '.[track]' in the checkout, or set {field}={off}"
        )


def _log_in() -> None:
    import wandb

    if wandb.setup().settings.mode == "online":
        with _refusals():
            wandb.login()


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    """Turns what wandb raises when it cannot log in or start a run into an InputError."""
    import wandb

    try:
        yield
    except wandb.errors.Error as error:
        raise InputError(
            f"wandb: Weights & Biases refused: {error} Usual cures: `wandb login`, or "
            "WANDB_API_KEY in the environment; without a network, WANDB_MODE=offline and "
            "`wandb sync` later"
        ) from error
