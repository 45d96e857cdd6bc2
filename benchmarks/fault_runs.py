"""Tiny runs that benchmarks/faults.py starts, kills and looks into."""

import json
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import time
from typing import NamedTuple

import jax
import numpy as np
from safetensors.numpy import load_file

from easylm.checkpoint import (
    UNFINISHED,
    abstract_state_in,
    latest_step,
    read_bundle,
    read_state,
)
from easylm.errors import InputError

ROOT = pathlib.Path(__file__).resolve().parent.parent
STEPS, EVERY = 60, 4
KEPT_OF_ALL = 1000
TOPICS = ("sun", "moon", "rain", "snow", "wind", "sea")
# A kill waits no longer for a save to begin than runs take; hosts are given up after so long.
START_SECONDS, LOST_SECONDS = 300.0, 60.0
POLL_SECONDS = 0.001
CONFIG = """\
from easylm.config import to_config_dict
from easylm.trainers.config import {name}


def get_config():
    return to_config_dict({name})
"""
COMMON = {
    "steps": STEPS,
    "batch_rows": 4,
    "compute_dtype": "float32",
    "optimizer.learning_rate": 1e-2,
    "checkpoint.every": EVERY,
    "export.dtype": "float32",
    "data.processes": 1,
}
RANDOM = {
    "init_from": "random",
    "model.hidden_size": 32,
    "model.intermediate_size": 64,
    "model.num_hidden_layers": 2,
    "model.num_attention_heads": 4,
    "model.num_key_value_heads": 2,
    "model.max_position_embeddings": 256,
    "data.tokenizer_vocab_size": 320,
    "data.seq_len": 80,
}


class Task(NamedTuple):
    """What is run: a command with its options, on so many hosts.

    Attributes:
      name: sft or dpo.
      folder: holds its config, its rows, and its workdirs.
      options: of the config, by name.
      hosts: processes that run it together.
      cache: of compiled programs.
    """

    name: str
    folder: pathlib.Path
    options: dict
    hosts: int
    cache: pathlib.Path

    def command(self, workdir: pathlib.Path, **options: object) -> list[str]:
        """The command line of one host, but for its place among the hosts."""
        places = {
            "data.sources": self.folder / "rows.jsonl",
            # Each run prepares its data itself, and may be killed there.
            "data.cache": workdir.with_suffix(".cache"),
        }
        options = {**COMMON, **self.options, **places, **options}
        return [
            sys.executable,
            *("-m", f"easylm.{self.name}"),
            f"--config={self.folder / 'config.py'}",
            f"--workdir={workdir}",
            *(f"--config.{name}={value}" for name, value in options.items()),
        ]


def make_sft(folder: pathlib.Path, hosts: int, cache: pathlib.Path) -> Task:
    """Fine-tuning of random weights on a few rows."""
    rows = [
        {"prompt": f"Say {topic} {n} times.", "completion": " ".join([topic] * n)}
        for topic in TOPICS
        for n in range(1, 7)
    ]
    _write(folder, rows, "SftConfig")
    return Task("sft", folder, RANDOM, hosts, cache)


def make_dpo(folder: pathlib.Path, hosts: int, cache: pathlib.Path, model: pathlib.Path) -> Task:
    """Preference optimization of a model that fine-tuning has left."""
    rows = [
        {"prompt": f"Is the {topic} {n}?", "chosen": f"Yes, the {topic}. " * n, "rejected": "No."}
        for topic in TOPICS
        for n in range(1, 7)
    ]
    _write(folder, rows, "DpoConfig")
    return Task("dpo", folder, {"init_from": model, "data.seq_len": 240}, hosts, cache)


def _write(folder: pathlib.Path, rows: list[dict], config: str) -> None:
    folder.mkdir(parents=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.py").write_text(CONFIG.format(name=config))


class Start:
    """The command started once, on all its hosts.

    Args:
      task, workdir: what and where.
      **options: of the config, beside those of the task.

    Attributes:
      hosts: the process of each host's command.
    """

    def __init__(self, task: Task, workdir: pathlib.Path, **options: object):
        self.task, self.workdir = task, workdir
        self._logs = [workdir.with_suffix(f".host{index}.log") for index in range(task.hosts)]
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(task.cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
        }
        command, port = task.command(workdir, **options), _free_port()
        self.hosts = []
        for index, log in enumerate(self._logs):
            place = [f"--coordinator=localhost:{port}", f"--processes={task.hosts}"]
            place = [*place, f"--process={index}"] if task.hosts > 1 else []
            with open(log, "w") as output:
                self.hosts.append(
                    subprocess.Popen(
                        [*command, *place],
                        env=environment,
                        cwd=ROOT,
                        stdout=output,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                )

    def processes(self, host: int) -> list[int]:
        """The ids of a host's command and of the child that it may have."""
        pid = self.hosts[host].pid
        try:
            children = pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text()
        except FileNotFoundError:
            children = ""
        return [pid, *map(int, children.split())]

    def is_running(self) -> bool:
        """Whether no host has ended."""
        return all(host.poll() is None for host in self.hosts)

    def has_joined(self) -> bool:
        """Whether the hosts have found each other."""
        return self.task.hosts == 1 or f"{self.task.hosts} hosts, " in self._logs[0].read_text()

    def is_saving(self) -> bool:
        """Whether a save is under way, or what a killed start left of one is still there."""
        return bool(unfinished(self.workdir))

    def wait(self, seconds: float) -> list[int | None]:
        """The exit codes of the hosts; None for those that have not ended within `seconds`."""
        until = time.monotonic() + seconds
        while any(host.poll() is None for host in self.hosts) and time.monotonic() < until:
            time.sleep(POLL_SECONDS)
        return [host.poll() for host in self.hosts]

    def kill_all(self) -> None:
        """Ends whatever is left."""
        for host in self.hosts:
            try:
                os.killpg(host.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
            host.wait()

    def said(self) -> str:
        """What the hosts printed last."""
        return "\n".join(f"{log}:\n{log.read_text()[-2000:]}" for log in self._logs)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def unfinished(workdir: pathlib.Path) -> list[str]:
    """What is there of saves, and of removals, that are not finished."""
    folder = workdir / "checkpoints"
    return [name for name in _names(folder) if UNFINISHED in name]


def _names(folder: pathlib.Path) -> list[str]:
    return os.listdir(folder) if folder.exists() else []


class Moment(NamedTuple):
    """When to kill: so long after the start, or after the beginning of a save.

    Attributes:
      seconds: after that.
      save: which one that the start makes, from 1; 0: of the start, once the hosts have joined.
    """

    seconds: float
    save: int

    def wait(self, start: Start) -> bool:
        """Waits for it; False if a host has ended before."""
        while not start.has_joined() and start.is_running():
            time.sleep(POLL_SECONDS)
        for _ in range(self.save):
            for wanted in (False, True):
                while start.is_saving() != wanted and start.is_running():
                    time.sleep(POLL_SECONDS)
        until = time.monotonic() + self.seconds
        while time.monotonic() < until and start.is_running():
            time.sleep(POLL_SECONDS)
        return start.is_running()


def draw_moment(chance: random.Random, duration: float, share_in_saves: float) -> Moment:
    """A moment of a run that takes `duration` seconds."""
    if chance.random() < share_in_saves:
        return Moment(chance.uniform(0, 0.1), chance.randint(1, STEPS // EVERY - 1))
    return Moment(chance.uniform(0, duration), 0)


class Result(NamedTuple):
    """All that a run leaves that must not depend on how often it was killed."""

    model: dict[str, bytes]
    state: dict[str, bytes]
    metrics: list[dict]
    reference: bytes

    def differences(self, other: "Result") -> list[str]:
        """Which parts differ."""
        return [name for name in self._fields if getattr(self, name) != getattr(other, name)]


def read_result(workdir: pathlib.Path) -> Result:
    """What a finished run has left."""
    model = load_file(workdir / "hf" / "model.safetensors")
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    table = workdir / "reference.npz"
    return Result(
        {name: array.tobytes() for name, array in model.items()},
        read_checkpoint(workdir, latest_step(str(workdir))),
        # Without how long steps took.
        [
            {name: value for name, value in json.loads(line).items() if name in ("step", "loss")}
            for line in lines
        ],
        table.read_bytes() if table.exists() else b"",
    )


def read_checkpoint(workdir: pathlib.Path, step: int) -> dict[str, bytes]:
    """All arrays of a checkpoint.

    Raises:
      InputError: it cannot be read.
    """
    folder = f"{workdir}/checkpoints/{step}"
    if read_bundle(folder)["step"] != step:
        raise InputError(f"{folder}: is of another step")
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here),
        abstract_state_in(folder),
    )
    state = read_state(folder, *abstract)
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in leaves}
