"""Measures the step of easylm.sft on a CPU, in float32, on a LLaMA of 58M parameters.

    python -m benchmarks.sft_step [--size=58m|tiny] [--steps=10] [--parts=...] [--output=FILE.json]

Medians of `--steps` steps, after two that do not count. Three parts:

- `speed`: 8 full rows of 512 tokens, beside a plain training loop in torch and transformers. The
  step keeps what it needs for the backward pass, as torch does, or is lean: it keeps only the
  input of each block, and the logits of 512 tokens. Each runs in a process of its own and they
  take one step in turn, so that a busy machine slows all of them.
- `packing`: useful tokens a second where lengths are to a row what Tülu 2's are: examples packed;
  one a row, padded to the longest of the batch; one a row, padded to the full row. A batch padded
  to its longest takes as long as rows of that width; widths between four measured ones are
  interpolated, and the mean is that of all batches of an epoch.
- `memory`: peak resident memory of a step with 128,256 ids, with all logits at once and with the
  logits of 512 tokens at a time, and what the process held before the step.

Needs Linux, torch (the extra `bench`) and 16 GB of memory. It takes about 12 minutes on two cores;
`--size=tiny --steps=3` takes one, to see that it works.
"""

import argparse
import contextlib
import json
import os
import pathlib
import platform
import statistics

import numpy as np

from benchmarks.process import GB, Worker
from benchmarks.sft_workers import SIZES, stream, tulu2_examples

WARM_UP = 2
WORKERS = "benchmarks.sft_workers"


def main() -> None:
    """Measures, prints tables, and writes the numbers as JSON if asked to."""
    arguments = _arguments()
    results = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "size": arguments.size,
        "steps": arguments.steps,
    }
    for name in arguments.parts.split(","):
        measure, print_table = PARTS[name]
        results[name] = measure(arguments.size, arguments.steps)
        print_table(results[name])
    if arguments.output:
        pathlib.Path(arguments.output).write_text(json.dumps(results, indent=2) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="58m")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated")
    parser.add_argument("--output", help="a file for the numbers")
    return parser.parse_args()


def measure_speed(size: str, steps: int) -> dict:
    """One step of every contestant in turn."""
    names = ("torch", "easylm", "easylm, lean")
    with contextlib.ExitStack() as stack:
        workers = {
            name: stack.enter_context(contextlib.closing(Worker(WORKERS, name, size)))
            for name in names
        }
        rounds = [
            {name: worker.step() for name, worker in workers.items()}
            for _ in range(WARM_UP + steps)
        ]
    results = {}
    for name, worker in workers.items():
        taken = [answers[name] for answers in rounds]
        seconds = [step["seconds"] for step in taken[WARM_UP:]]
        peer_seconds = [answers["torch"]["seconds"] for answers in rounds[WARM_UP:]]
        results[name] = {
            "threads": worker.first["threads"],
            "seconds": statistics.median(seconds),
            "fastest_seconds": min(seconds),
            "cpu_seconds": statistics.median(step["cpu_seconds"] for step in taken[WARM_UP:]),
            "tokens_per_second": worker.first["tokens"] / statistics.median(seconds),
            # Of the median round: what slows a round slows both sides of the ratio.
            "seconds_over_torch": statistics.median(np.divide(seconds, peer_seconds)),
            "peak_gb": taken[-1]["peak"] / GB,
            "first_loss": taken[0]["loss"],
            "last_loss": taken[-1]["loss"],
        }
    return results


def print_speed(results: dict) -> None:
    """The numbers for people."""
    print("full rows")
    print(
        f"{'':16}{'seconds':>9}{'CPU s':>8}{'tokens/s':>10}{'/ torch':>9}{'peak GB':>9}{'loss':>15}"
    )
    for name, row in results.items():
        print(
            f"{name:16}{row['seconds']:9.2f}{row['cpu_seconds']:8.1f}"
            f"{row['tokens_per_second']:10,.0f}{row['seconds_over_torch']:9.2f}"
            f"{row['peak_gb']:9.2f}{row['first_loss']:8.3f}{row['last_loss']:7.3f}"
        )


def measure_packing(size: str, steps: int) -> dict:
    """Useful tokens a second of packed rows, of rows padded to the longest, and of full rows."""
    seq_len = SIZES[size].max_position_embeddings
    examples = tulu2_examples(SIZES[size])
    lengths = examples.lengths
    packed, padded = (stream(examples, seq_len, packing=packing) for packing in (True, False))
    longest = [lengths[np.concatenate(padded.plan_rows(k))].max() for k in range(len(padded))]
    widths = [seq_len * quarters // 4 for quarters in (1, 2, 3, 4)]
    with contextlib.closing(Worker(WORKERS, "packing", size)) as worker:
        rounds = [
            {what: worker.step(what)["seconds"] for what in ("packed", *map(str, widths))}
            for _ in range(WARM_UP + steps)
        ]
    seconds = {
        what: statistics.median(taken[what] for taken in rounds[WARM_UP:]) for what in rounds[0]
    }
    by_width = [seconds[str(width)] for width in widths]
    layouts = {
        "packed": (len(packed), seconds["packed"]),
        "padded to longest": (len(padded), float(seconds_at(longest, widths, by_width).mean())),
        "full rows": (len(padded), by_width[-1]),
    }
    tokens = int(lengths.sum())
    best = tokens / len(packed) / seconds["packed"]
    return {
        "row_tokens": seq_len,
        "mean_length": float(lengths.mean()),
        "length_quartiles": np.quantile(lengths, [0.25, 0.5, 0.75]).tolist(),
        "mean_longest": float(np.mean(longest)),
        "seconds_by_width": dict(zip(widths, by_width, strict=True)),
        "layouts": {
            name: {
                "useful_tokens": tokens / batches,
                "seconds": step_seconds,
                "useful_tokens_per_second": tokens / batches / step_seconds,
                "packed_over_it": best / (tokens / batches / step_seconds),
            }
            for name, (batches, step_seconds) in layouts.items()
        },
    }


def seconds_at(wanted: list[int], widths: list[int], seconds: list[float]) -> np.ndarray:
    """Seconds of a step on rows of the wanted widths: straight between what was measured and 0."""
    return np.interp(wanted, [0, *widths], [0, *seconds])


def print_packing(results: dict) -> None:
    """The numbers for people."""
    quartiles = " ".join(f"{value:.0f}" for value in results["length_quartiles"])
    print(
        f"rows of {results['row_tokens']}; examples: mean {results['mean_length']:.0f} tokens, "
        f"quartiles {quartiles}, longest of a batch {results['mean_longest']:.0f}"
    )
    print(f"{'a step':20}{'useful tokens':>14}{'seconds':>9}{'useful/s':>10}{'packed is':>11}")
    for name, row in results["layouts"].items():
        print(
            f"{name:20}{row['useful_tokens']:14,.0f}{row['seconds']:9.2f}"
            f"{row['useful_tokens_per_second']:10,.0f}{row['packed_over_it']:10.1f}x"
        )


def measure_memory(size: str, steps: int) -> dict:
    """What a step adds to what the process holds; the second step holds no less than others."""
    del steps
    results = {}
    for name in ("all logits", "chunked"):
        with contextlib.closing(Worker(WORKERS, name, size)) as worker:
            worker.step()
            taken = worker.step()
            results[name] = {
                "before_gb": worker.first["before"] / GB,
                "peak_gb": taken["peak"] / GB,
                "step_gb": (taken["peak"] - worker.first["before"]) / GB,
                "xla_temporary_gb": worker.first["temporary"] / GB,
                "seconds": taken["seconds"],
            }
    return results


def print_memory(results: dict) -> None:
    """The numbers for people."""
    print("128,256 ids, GB")
    print(f"{'':20}{'before':>9}{'peak':>9}{'step':>9}{'XLA temporaries':>18}{'seconds':>9}")
    for name, row in results.items():
        print(
            f"{name:20}{row['before_gb']:9.2f}{row['peak_gb']:9.2f}{row['step_gb']:9.2f}"
            f"{row['xla_temporary_gb']:18.2f}{row['seconds']:9.2f}"
        )


PARTS = {
    "speed": (measure_speed, print_speed),
    "packing": (measure_packing, print_packing),
    "memory": (measure_memory, print_memory),
}

if __name__ == "__main__":
    main()
