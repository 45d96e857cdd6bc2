"""Kills runs with SIGKILL at random moments, starts them again until they end, and compares.

    python -m benchmarks.faults [--runs=60] [--dpo_runs=20] [--hosts=1] [--seed=0] [--output=FILE]

Runs of easylm.sft and easylm.dpo, tiny ones that save every few steps. Each is killed at least
once; when it is started again, chance decides whether it is killed again. Two thirds of the kills
come at a moment that is uniform over the run, from its first import to its last file; the others
while a save is seen under way. With `--hosts=2` a run is two processes, each a parent and its
child; one of the four is killed, and the other host must end with exit code 76 within a minute.

After each kill the newest complete checkpoint is read, and must hold the bits of that step. In the
end the exported model, the last checkpoint, the losses and the reference's log-probabilities must
be those of a run that nothing disturbed, bit for bit.

Exits 1 if anything differs, cannot be read, or does not end. Needs Linux; with the default numbers
about 20 minutes on two cores. The figures are added to benchmarks/results/faults.json.
"""

import argparse
import collections
import contextlib
import json
import os
import pathlib
import platform
import random
import shutil
import signal
import sys
import tempfile
import time
from importlib.metadata import version

os.environ["JAX_PLATFORMS"] = "cpu"

from benchmarks import fault_runs
from benchmarks.fault_runs import LOST_SECONDS, START_SECONDS, Moment, Start, Task
from easylm.checkpoint import latest_step
from easylm.command import HOST_LOST_CODE, say
from easylm.errors import InputError

RESULTS = fault_runs.ROOT / "benchmarks" / "results" / "faults.json"
SHARE_IN_SAVES = 1 / 3
SHARE_KILLED_AGAIN = 1 / 3


class Failed(Exception):
    """A start that was left alone did not end well."""


class Undisturbed:
    """The run that nothing disturbs: what it leaves, and how long it takes.

    Attributes:
      task: what is run.
      result: what it leaves.
      states: of every step that it saved.
      seconds: that it takes, with all programs compiled, once its hosts have joined.
    """

    def __init__(self, task: Task):
        self.task = task
        workdir = task.folder / "undisturbed"
        finish(Start(task, workdir, **{"checkpoint.keep": fault_runs.KEPT_OF_ALL}))
        self.result = fault_runs.read_result(workdir)
        steps = [int(name) for name in os.listdir(workdir / "checkpoints")]
        self.states = {step: fault_runs.read_checkpoint(workdir, step) for step in steps}
        again = Start(task, task.folder / "again")
        Moment(0, 0).wait(again)
        started = time.monotonic()
        finish(again)
        self.seconds = time.monotonic() - started
        if self.result.differences(fault_runs.read_result(task.folder / "again")):
            raise Failed(f"two undisturbed runs of {task.name} differ: nothing can be compared")


def finish(start: Start) -> None:
    """Lets a start go on to its end."""
    codes = start.wait(START_SECONDS)
    start.kill_all()
    if any(codes):
        raise Failed(f"a start that was left alone ended with {codes}:\n{start.said()}")


class Tally:
    """What has been counted of the runs of one task."""

    def __init__(self):
        self.counts = collections.Counter()
        self.codes = collections.Counter()  # exit codes of hosts that survived another's kill
        self.exit_seconds = []  # until they had ended
        self.differing = collections.Counter()
        self.failures = []

    def summary(self) -> dict:
        """The figures."""
        names = ("runs", "starts", "kills", "kills_in_saves", "unreadable", "wrong_checkpoints")
        return {
            **{name: self.counts[name] for name in names},
            "mismatches": dict(self.differing),
            "survivor_codes": {str(code): count for code, count in self.codes.items()},
            "longest_exit_seconds": max(self.exit_seconds, default=None),
            "failures": self.failures,
        }

    @property
    def is_good(self) -> bool:
        counts = self.counts
        bad = counts["unreadable"] + counts["wrong_checkpoints"] + self.differing.total()
        return not (bad or self.failures or self.codes.keys() - {HOST_LOST_CODE})


def torture(undisturbed: Undisturbed, workdir: pathlib.Path, chance: random.Random, tally: Tally):
    """One run: killed, started again, killed again perhaps, until it ends."""
    kills = 0
    while True:
        spare = kills > 0 and chance.random() >= SHARE_KILLED_AGAIN
        moment = fault_runs.draw_moment(chance, undisturbed.seconds, SHARE_IN_SAVES)
        start = Start(undisturbed.task, workdir)
        tally.counts["starts"] += 1
        if spare or not moment.wait(start):
            finish(start)
            if kills:
                break
            for path in workdir.parent.glob(f"{workdir.name}*"):  # it was faster: once more
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            continue
        kill(start, chance, tally)
        kills += 1
        check_newest(undisturbed, workdir, tally)
    tally.differing.update(undisturbed.result.differences(fault_runs.read_result(workdir)))
    tally.counts["runs"] += 1


def kill(start: Start, chance: random.Random, tally: Tally) -> None:
    """Kills one process of a start, and waits for the end of all."""
    victim = chance.randrange(len(start.hosts))
    processes = start.processes(victim)
    started = time.monotonic()
    os.kill(chance.choice(processes), signal.SIGKILL)
    tally.counts["kills"] += 1
    codes = start.wait(LOST_SECONDS)
    survivors = [code for host, code in enumerate(codes) if host != victim]
    # A run that had ended but for its process is no failure.
    is_over = latest_step(str(start.workdir)) == fault_runs.STEPS
    tally.codes.update(code for code in survivors if code != 0 or not is_over)
    if survivors:
        tally.exit_seconds.append(time.monotonic() - started)
    for process in processes:
        while time.monotonic() < started + LOST_SECONDS and os.path.exists(f"/proc/{process}"):
            time.sleep(fault_runs.POLL_SECONDS)
        if os.path.exists(f"/proc/{process}"):
            tally.failures.append(f"process {process} of the killed host stays")
    start.kill_all()
    tally.counts["kills_in_saves"] += start.is_saving()


def check_newest(undisturbed: Undisturbed, workdir: pathlib.Path, tally: Tally) -> None:
    """Reads the newest complete checkpoint, which must hold what an undisturbed run had there."""
    step = latest_step(str(workdir))
    if step is None:
        return
    try:
        state = fault_runs.read_checkpoint(workdir, step)
    except InputError as error:
        tally.counts["unreadable"] += 1
        tally.failures.append(str(error))
        return
    tally.counts["wrong_checkpoints"] += state != undisturbed.states[step]


def torture_all(undisturbed: Undisturbed, runs: int, seed: int) -> Tally:
    """All runs of a task, with a line on each."""
    task, tally, started = undisturbed.task, Tally(), time.monotonic()
    say(f"{task.name}: undisturbed it takes {undisturbed.seconds:.1f} s")
    for number in range(runs):
        workdir = task.folder / f"run{number}"
        try:
            torture(undisturbed, workdir, random.Random(f"{seed} {task.name} {number}"), tally)
        except Failed as error:
            tally.failures.append(str(error))
            say(str(error))
        else:
            shutil.rmtree(workdir)
        each = (time.monotonic() - started) / (number + 1)
        counts = tally.counts
        say(
            f"{task.name} {number + 1}/{runs}: {counts['kills']} kills, "
            f"{counts['kills_in_saves']} of them in saves, {counts['starts']} starts, "
            f"{tally.differing.total()} differences, survivors' codes {dict(tally.codes)}; "
            f"{each * (runs - number - 1) / 60:.0f} min left"
        )
    return tally


def main() -> int:
    """Runs, kills, prints a table, and keeps the figures."""
    arguments = _arguments()
    wanted = {"sft": arguments.runs, "dpo": arguments.dpo_runs}
    started, tallies = time.monotonic(), {}
    with contextlib.ExitStack() as stack:
        root = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="faults")))
        cache = root / "compiled"
        sft = fault_runs.make_sft(root / "sft", arguments.hosts, cache)
        undisturbed = Undisturbed(sft)
        tallies["sft"] = torture_all(undisturbed, wanted["sft"], arguments.seed)
        if wanted["dpo"]:
            model = sft.folder / "undisturbed" / "hf"
            dpo = fault_runs.make_dpo(root / "dpo", arguments.hosts, cache, model)
            tallies["dpo"] = torture_all(Undisturbed(dpo), wanted["dpo"], arguments.seed)
    results = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("jax", "orbax-checkpoint")},
        },
        "seed": arguments.seed,
        "seconds": time.monotonic() - started,
        **{name: tally.summary() for name, tally in tallies.items()},
    }
    print_table(tallies)
    path = pathlib.Path(arguments.output)
    kept = json.loads(path.read_text()) if path.exists() else {}
    kept[f"{arguments.hosts} {'host' if arguments.hosts == 1 else 'hosts'}"] = results
    path.write_text(json.dumps(kept, indent=2) + "\n")
    return 0 if all(tally.is_good for tally in tallies.values()) else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=60, help="of easylm.sft")
    parser.add_argument("--dpo_runs", type=int, default=20, help="of easylm.dpo")
    parser.add_argument("--hosts", type=int, default=1, help="processes of a run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default=str(RESULTS), help="a file for the figures")
    return parser.parse_args()


def print_table(tallies: dict[str, Tally]) -> None:
    """The figures for people."""
    columns = {name: tally.summary() for name, tally in tallies.items()}
    print(f"{'':24}" + "".join(f"{name:>12}" for name in columns))
    for row in next(iter(columns.values())):
        values = [column[row] for column in columns.values()]
        shown = [len(value) if isinstance(value, list) else value for value in values]
        print(f"{row.replace('_', ' '):24}" + "".join(f"{_shown(value):>12}" for value in shown))
    for tally in tallies.values():
        for failure in tally.failures:
            print(failure)


def _shown(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name}: {count}" for name, count in value.items()) or "0"
    return f"{value:.1f}" if isinstance(value, float) else "-" if value is None else str(value)


if __name__ == "__main__":
    sys.exit(main())
