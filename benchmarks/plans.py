"""Plans every recipe with easylm.plan, on the pod it is meant for and on other slices.

    python -m benchmarks.plans [--only=NAME ...]

Each plan is made twice, by processes of their own, one after the other: with nothing compiled
before, and with what the first left on disk. Measured are the seconds of both, those of the
compiler, and the most memory that each held.

A plan is added to benchmarks/results/plans.json as soon as it is made, in place of an earlier one
of the same recipe and slice, and the table of docs/plan.md is written anew; so `--only`, with a
recipe, a slice or both (`--only=sft/tulu2_7b@v3-8`), mends a part or goes on where it ended.
Exits 1, after all is done, if a step does not fit or takes more than 95% of what a program may
use, if a bound lies below an MFU that was reached, or if a plan fails.

Needs Linux, libtpu (`pip install '.[tpu]'`) and 12 GB of memory; about half a minute a plan on two
cores.
"""

import argparse
import json
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from typing import NamedTuple

from benchmarks.plans_page import costs, faults, in_order, line, name_of, page, placed
from easylm.config import CONFIGS, load

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "plans.json"
PAGE = ROOT / "docs" / "plan.md"
FITS, DOES_NOT_FIT = 0, 3  # exit codes of easylm.plan


class Row(NamedTuple):
    """A plan to make: a config by its name, a slice, and what is set beside the config."""

    recipe: str
    topology: str
    overrides: dict[str, str | int]

    @property
    def name(self) -> str:
        return name_of(*self)


def row(recipe: str, topology: str, mesh: str, micro_batches: int, remat: str, **others) -> Row:
    """A plan of a recipe with another mesh, as another slice needs it."""
    overrides = {"mesh": mesh, "micro_batches": micro_batches, "remat": remat, **others}
    return Row(recipe, topology, overrides)


def full(recipe: str, topology: str, mesh: str, rows: int, micro_batches: int) -> Row:
    """A plan with so many rows a step that none of the slice is idle."""
    batch = {"batch_examples": "none", "batch_rows": rows}
    return row(recipe, topology, mesh, micro_batches, "block_sharded", **batch)


# Beside the recipes as they are. Of each recipe the smallest slice that it fits comes first.
OTHERS = [
    row("sft/tulu1_7b", "v3-8", "1,1,8", 45, "block_sharded"),
    row("sft/tulu1_65b", "v3-128", "1,8,16", 3, "block_sharded"),
    row("sft/tulu2_7b", "v3-8", "1,1,8", 17, "block_sharded"),
    row("sft/tulu2_7b", "v3-32", "1,4,8", 5, "dots"),
    row("sft/tulu2_13b", "v3-32", "1,4,8", 5, "block_sharded"),
    row("sft/tulu2_13b", "v3-64", "1,8,8", 3, "dots"),
    row("sft/tulu2_70b", "v3-128", "1,4,32", 5, "block_sharded"),
    row("sft/tulu2_70b", "v4-128", "1,4,16", 5, "block_sharded"),
    row("sft/tulu2_70b", "v5p-64", "1,4,8", 5, "dots"),
    row("sft/tulu2_70b", "v6e-64", "1,4,16", 5, "block_sharded"),
    row("sft/code_tulu2_34b", "v3-64", "1,4,16", 5, "block_sharded"),
    row("sft/code_tulu2_34b", "v3-128", "1,8,16", 3, "block_sharded"),
    row("dpo/tulu2_7b", "v3-8", "1,1,8", 4, "block_sharded"),
    row("dpo/tulu2_7b", "v3-256", "1,8,32", 1, "block_sharded"),
    row("dpo/tulu2_13b", "v3-64", "1,8,8", 1, "dots"),
    row("dpo/tulu2_13b", "v3-256", "1,32,8", 1, "dots"),
    row("dpo/tulu2_70b", "v3-128", "1,4,32", 1, "block_sharded"),
    row("dpo/tulu2_70b", "v3-512", "1,8,64", 1, "block_sharded"),
    full("sft/tulu2_7b", "v3-256", "1,32,8", 128, 4),
    full("sft/tulu2_13b", "v3-256", "1,32,8", 128, 4),
    full("sft/tulu1_65b", "v3-256", "1,32,8", 512, 4),
    full("sft/tulu2_70b", "v6e-64", "1,8,8", 32, 4),
]


def main() -> int:
    """Makes the plans and writes what they say; returns the exit code."""
    rows = [*recipes_as_they_are(), *OTHERS]
    chosen = _chosen(rows)
    wrong = []
    for one in chosen:
        made = measure(one)
        if isinstance(made, str):
            wrong.append(f"{one.name}: {made}")
            print(wrong[-1], flush=True)
            continue
        _write(known(_read(), rows) | {one.name: made}, rows)
        wrong += [f"{one.name}: {what}" for what in faults(made)]
        print(line(made), costs(made), sep="\n    ", flush=True)
    print("\n".join(wrong) or f"{len(chosen)} plans, all fit")
    return 1 if wrong else 0


def recipes_as_they_are() -> list[Row]:
    """Every config but the quickstarts, on its own pod."""
    names = sorted(
        f"{folder}/{path.stem}"
        for folder in ("sft", "dpo")
        for path in (CONFIGS / folder).glob("*.py")
        if path.stem not in ("__init__", "quickstart")
    )
    return [Row(name, load(name).config.pod, {}) for name in sorted(names, key=in_order)]


def _chosen(rows: list[Row]) -> list[Row]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only",
        action="append",
        metavar="NAME",
        help="a recipe, a slice, or both as RECIPE@SLICE; may be given several times",
    )
    only = parser.parse_args().only
    if only is None:
        return rows
    names = {name for one in rows for name in (one.recipe, one.topology, one.name)}
    if unknown := set(only) - names:
        parser.error(f"--only={unknown.pop()}: wanted one of {', '.join(sorted(names))}")
    return [one for one in rows if {one.recipe, one.topology, one.name} & set(only)]


def measure(one: Row) -> dict | str:
    """Makes a plan twice: what it says and what it took, or why there is none."""
    command = [sys.executable, "-m", "easylm.plan", f"--config={one.recipe}", "--json"]
    command.append(f"--topology={one.topology}")
    command += [f"--config.{field}={value}" for field, value in one.overrides.items()]
    load_average = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as home:  # what was compiled before is kept in it
        runs = [run(command, home) for _ in range(2)]
    for ended in runs:
        if ended["exit_code"] not in (FITS, DOES_NOT_FIT):
            return f"exit code {ended['exit_code']}: {ended['stderr'].strip()}"
    plans = [json.loads(ended["stdout"]) for ended in runs]
    if [plan["compiled_before"] for plan in plans] != [False, True]:
        return "the second plan was not made from what the first had compiled"
    plan = plans[0]
    del plan["compiled_before"]
    return {
        "recipe": one.recipe,
        "topology": one.topology,
        "overrides": one.overrides,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "load_average": load_average,
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("jax", "jaxlib", "libtpu")},
        },
        "first": {name: runs[0][name] for name in ("seconds", "peak")},
        "again": {name: runs[1][name] for name in ("seconds", "peak")},
        "plan": plan,
    }


def run(command: list[str], home: str) -> dict:
    """Runs a command to its end: what it says, its wall seconds, and its peak memory in bytes.

    A process begins as a copy of this one, so no peak is below what this one holds: it has to be
    small, and is, without jax.

    Args:
      command: and its arguments.
      home: its HOME.
    """
    out, err = pathlib.Path(home, "stdout"), pathlib.Path(home, "stderr")
    started = time.perf_counter()
    with out.open("w") as stdout, err.open("w") as stderr:
        process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, "HOME": home}, stdout=stdout, stderr=stderr
        )
        _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)  # it is gone, and Popen did not see it
    return {
        "exit_code": process.returncode,
        "stdout": out.read_text(),
        "stderr": err.read_text(),
        "seconds": seconds,
        "peak": usage.ru_maxrss * 1024,
    }


def _read() -> list[dict]:
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else []


def known(results: list[dict], rows: list[Row]) -> dict[str, dict]:
    """The results by name, without those of plans that are no longer asked for."""
    asked = {one.name: one.overrides for one in rows}
    named = {name_of(**made): made for made in results}
    return {name: made for name, made in named.items() if asked.get(name) == made["overrides"]}


def _write(results: dict[str, dict], rows: list[Row]) -> None:
    made = [results[one.name] for one in rows if one.name in results]
    RESULTS.write_text(json.dumps(made, indent=2) + "\n")
    PAGE.write_text(placed(PAGE.read_text(), page(made)))


if __name__ == "__main__":
    sys.exit(main())
