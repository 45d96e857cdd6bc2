"""Measures what asynchronous saving adds to the steps beside which it goes on.

    python -m benchmarks.save_cost [--size=58m|tiny] [--rounds=4] [--folder=DIR] [--output=FILE]

The model and the rows are those of benchmarks/sft_step.py: 58M parameters, 8 rows of 512 tokens, on
a CPU in float32. A round is ten steps that begin with a save and ten that do not, so that a busy
machine slows both; the save is complete before the ten without it begin, and that wait counts too.
The ratio is the median over the rounds, of which the first does not count; more than 1.1 exits 1.
That of the CPU time depends less on what else the machine does.

On a CPU the save and the steps share the cores, so this is more than a TPU's host would show; the
copy from the device, which a TPU's steps wait for, is none on a CPU.

Needs Linux and 8 GB of memory; about 12 minutes on two cores (`--size=tiny`: one, to see that it
works). The figures go to benchmarks/results/save_cost.json.
"""

import argparse
import contextlib
import itertools
import json
import os
import pathlib
import platform
import statistics
import sys
import tempfile
from importlib.metadata import version

os.environ["JAX_PLATFORMS"] = "cpu"

from benchmarks.process import GB, Clock
from benchmarks.sft_workers import SIZES, cycle, full_rows, sft_run
from easylm.saving import Checkpointer

STEPS = 10
MOST = 1.1
RESULTS = pathlib.Path(__file__).resolve().parent / "results" / "save_cost.json"


def main() -> int:
    """Measures, prints a table, and keeps the figures."""
    arguments = _arguments()
    with tempfile.TemporaryDirectory(prefix="save_cost", dir=arguments.folder) as folder:
        rounds, saves = measure(arguments.size, arguments.rounds, folder)
    ratios, cpu_ratios = (
        [with_save[what] / without[what] for with_save, without in rounds[1:]]
        for what in ("seconds", "cpu_seconds")
    )
    saves = saves[1:]  # of the rounds that count
    results = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {name: version(name) for name in ("jax", "orbax-checkpoint")},
        "size": arguments.size,
        "steps_between_saves": STEPS,
        "saved_gb": saves[0].bytes / GB,
        "step_seconds": statistics.median(w["seconds"] for _, w in rounds[1:]) / STEPS,
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "cpu_ratio": statistics.median(cpu_ratios),
        "save_seconds": statistics.median(save.seconds for save in saves),
        "waited_seconds": statistics.median(save.waited for save in saves),
        "peak_gb": rounds[-1][1]["peak"] / GB,
    }
    print_table(results)
    pathlib.Path(arguments.output).write_text(json.dumps(results, indent=2) + "\n")
    return 0 if results["ratio"] <= MOST else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="58m")
    parser.add_argument("--rounds", type=int, default=4, help="two or more")
    parser.add_argument("--folder", help="where checkpoints are written; the default: for /tmp")
    parser.add_argument("--output", default=str(RESULTS), help="a file for the figures")
    return parser.parse_args()


def measure(size: str, count: int, folder: str) -> tuple[list, list]:
    """([(with a save, without) of each round, as `Clock` reads them], what was saved)."""
    model, saves, numbers = SIZES[size], [], itertools.count(1)
    run = sft_run(model, remat="none")
    batches = cycle(full_rows(model))
    compiled = run.compiled(next(batches))

    def ten_steps(*, saving: bool) -> dict:
        clock = Clock()
        checkpointer = Checkpointer(folder, keep=1, saved=saves.append)
        with contextlib.closing(checkpointer):
            if saving:
                checkpointer.save(next(numbers), run.state.params, run.state.opt_state, {})
            for _ in range(STEPS):
                run.step(compiled, next(batches))
        return clock.read()

    rounds = []
    for number in range(count):
        rounds.append((ten_steps(saving=True), ten_steps(saving=False)))
        with_save, without = (taken["seconds"] / STEPS for taken in rounds[-1])
        print(f"round {number}: {with_save:.3f} s a step with a save, {without:.3f} s without")
    return rounds, saves


def print_table(results: dict) -> None:
    """The figures for people."""
    ratios = ", ".join(f"{ratio:.3f}" for ratio in results["ratios"])
    print(
        f"a save of {results['saved_gb']:.2f} GB takes {results['save_seconds']:.2f} s, "
        f"{results['waited_seconds']:.2f} s of them before the next step\n"
        f"a step takes {results['step_seconds']:.3f} s; with a save every {STEPS} steps "
        f"{results['ratio']:.3f} times as long (rounds: {ratios}); wanted at most {MOST}\n"
        f"CPU time: {results['cpu_ratio']:.3f} times as much"
    )


if __name__ == "__main__":
    sys.exit(main())
