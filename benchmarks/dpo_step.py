"""Measures the step of easylm.dpo on a CPU, in float32, on a LLaMA of 58M parameters.

    python -m benchmarks.dpo_step [--size=58m|tiny] [--steps=3] [--trl] [--output=FILE.json]

Pairs a second of one epoch of 1,024 pairs as long as UltraFeedback's, cut to rows of 2,048 tokens,
and the memory of each contestant, a process of its own:

- `packed`: the step of training, on rows that hold whole pairs, about 8 a batch; what the reference
  says is stored. `reference`: the pass that computes it, on as many rows.
- `padded to longest`: 8 pairs are 16 rows as wide as their longest sequence, and a second model in
  memory is asked in every step: what TRL does.
- `padded to row`: the same in rows of 2,048: what EasyLM did.
- `trl`, with `--trl`: DPOTrainer of TRL in torch, with its defaults, on the same pairs.

All but `trl` are the same code but for the layout and the second model, with training's defaults:
backward passes that keep only the input of each block, which is TRL's default too, and the logits
of 512 tokens of a row. They take one step in turn, so that a busy machine slows all of them. Of
every ratio it is the median of the rounds, after one that does not count.

An epoch of `padded to longest` has 128 widths. The batch of median width is timed, at its width
rounded up to 128 tokens; other batches lie straight between it, 0 and what comes next in width: the
row for our own step, the widest batch for TRL's. So it pays for neither a program a width nor
widths rounded up for fewer programs. Its widest batch is run once, for its memory. Larger batches
have longer longest sequences: from the same steps, with their widths and as many times the rows,
follows what it would be for batches of 16 and of 32 pairs.

Needs Linux and 16 GB of memory. It takes about 14 minutes on two cores, with `--trl` (which needs
torch and trl, the extra `bench`) about twice as long; `--size=tiny` takes half a minute.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import pathlib
import platform
import statistics

import numpy as np

from benchmarks.dpo_pairs import PAIRS, drawn_lengths, longest_of_batches, ultrafeedback_pairs
from benchmarks.dpo_workers import ROWS, model_of, packed_stream
from benchmarks.process import GB, Worker
from benchmarks.sft_step import seconds_at
from easylm.data.pairs import Pairs

WARM_UP = 1
EPOCHS = 3  # that one pass of the reference serves
LARGER = (16, 32)  # pairs of a batch; what these would make of it is estimated
WORKERS = "benchmarks.dpo_workers"
WITH_PASS = "packed, the reference's pass included"


def main() -> None:
    """Measures, prints tables, and writes the numbers as JSON if asked to."""
    arguments = _arguments()
    pairs = ultrafeedback_pairs(model_of(arguments.size))
    results = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "size": arguments.size,
        "steps": arguments.steps,
        "pairs": describe_pairs(pairs, ROWS[arguments.size]),
    }
    print_pairs(results["pairs"])
    results["contestants"] = measure(
        pairs, results["pairs"], arguments.size, arguments.steps, trl=arguments.trl
    )
    print_contestants(results["contestants"])
    if arguments.output:
        pathlib.Path(arguments.output).write_text(json.dumps(results, indent=2) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=ROWS, default="58m")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--trl", action="store_true", help="also time TRL's DPOTrainer")
    parser.add_argument("--output", help="a file for the numbers")
    arguments = parser.parse_args()
    missing = [name for name in ("torch", "trl") if importlib.util.find_spec(name) is None]
    if arguments.trl and missing:
        parser.error(
            f"--trl: {' and '.join(missing)} cannot be imported; wanted torch and trl: "
            "pip install 'easylm[bench]', or leave --trl out"
        )
    return arguments


def describe_pairs(pairs: Pairs, seq_len: int) -> dict:
    """What was drawn, and what batches it makes."""
    drawn = drawn_lengths(seq_len)
    whole = 2 * drawn["prompt"] + drawn["chosen"] + drawn["rejected"]
    longest = longest_of_batches(pairs)
    packed = packed_stream(pairs, seq_len)
    return {
        "row_tokens": seq_len,
        "drawn_mean": {name: float(lengths.mean()) for name, lengths in drawn.items()},
        "drawn_pair_mean": float(whole.mean()),
        "cut_share": float((whole > seq_len).mean()),
        "pair_mean": float(pairs.lengths.mean()),
        "packed_fill": packed.fill,
        "packed_rows": packed.batch_rows,
        # Of full batches: the last one of an epoch has rows to spare.
        "packed_pairs": float(
            np.mean([sum(map(len, packed.plan_rows(step))) for step in range(len(packed) - 1)])
        ),
        "longest_mean": float(longest.mean()),
        "longest_median": float(np.median(longest)),
        "longest_max": int(longest.max()),
    }


def print_pairs(found: dict) -> None:
    """The numbers for people."""
    drawn = ", ".join(f"{name} {mean:.0f}" for name, mean in found["drawn_mean"].items())
    print(
        f"rows of {found['row_tokens']}; mean tokens: {drawn}, pair {found['drawn_pair_mean']:.0f}"
    )
    print(
        f"{found['cut_share']:.1%} of the pairs are cut, to a mean of {found['pair_mean']:.0f}; "
        f"{found['packed_rows']} packed rows hold {found['packed_pairs']:.1f} pairs, "
        f"{found['packed_fill']:.0%} full"
    )
    print(
        f"longest sequence of {PAIRS} pairs: mean {found['longest_mean']:.0f}, "
        f"median {found['longest_median']:.0f}, largest {found['longest_max']}",
        flush=True,
    )


def measure(pairs: Pairs, found: dict, size: str, steps: int, *, trl: bool) -> dict:
    """One step of every contestant in turn."""
    longest = longest_of_batches(pairs)
    by_width = np.argsort(longest, kind="stable")
    median, widest = int(by_width[len(by_width) // 2]), int(by_width[-1])
    rounds, row_tokens = WARM_UP + steps, found["row_tokens"]
    asked = {
        "packed": {"reference": "reference", "step": "step"},
        "padded to longest": {"median": f"{median} {rounded_up(longest[median], row_tokens)}"},
        "padded to row": {"median": f"{median} {row_tokens}"},
    }
    known = {}
    if trl:
        asked["trl"] = {"median": "", "widest": ""}
        known["trl"] = [",".join(map(str, [median, widest] * rounds))]
    with contextlib.ExitStack() as stack:
        workers = {
            name: stack.enter_context(
                contextlib.closing(Worker(WORKERS, name, size, *known.get(name, [])))
            )
            for name in asked
        }
        taken = [
            {
                name: {label: workers[name].step(what) for label, what in steps_of.items()}
                for name, steps_of in asked.items()
            }
            for _ in range(rounds)
        ]
        at_widest = workers["padded to longest"].step(
            f"{widest} {rounded_up(longest[widest], row_tokens)}"
        )
        before = {name: worker.first["before"] for name, worker in workers.items()}
    rates = [pairs_per_second(pairs, found, steps_of) for steps_of in taken[WARM_UP:]]
    results = {name: _summary(name, taken, rates, before[name]) for name in asked}
    results["padded to longest"] |= {
        "widest_peak_gb": at_widest["peak"] / GB,
        "widest_xla_gb": at_widest["xla"] / GB,
        "packed_over_larger_batches": {
            count: statistics.median(rate["packed"] / rate[of_larger(count)] for rate in rates)
            for count in LARGER
        },
    }
    if trl:
        # Of the first round: later ones come after a widest batch.
        results["trl"]["peak_gb"] = taken[0]["trl"]["median"]["peak"] / GB
        results["trl"]["widest_peak_gb"] = taken[-1]["trl"]["widest"]["peak"] / GB
    return results


def rounded_up(width: int, row_tokens: int) -> int:
    """The width at which batches of this one are timed: a multiple of a 16th of the row."""
    multiple = row_tokens // 16
    return -(-int(width) // multiple) * multiple


def of_larger(size: int) -> str:
    """What the estimate for batches of so many pairs is called."""
    return f"padded to longest of {size}"


def pairs_per_second(pairs: Pairs, found: dict, taken: dict) -> dict[str, float]:
    """Of an epoch, by contestant, from the steps of one round.

    Args:
      pairs: those of the epoch.
      found: what `describe_pairs` gives.
      taken: by contestant and kind of step, what the worker answered.
    """
    seconds = {
        name: {label: step["seconds"] for label, step in steps_of.items()}
        for name, steps_of in taken.items()
    }
    packed, row = seconds["packed"], seconds["padded to row"]["median"]
    longest, row_tokens = np.sort(longest_of_batches(pairs)), found["row_tokens"]
    median = int(longest[len(longest) // 2])
    anchors = [rounded_up(median, row_tokens), row_tokens]
    measured = [seconds["padded to longest"]["median"], row]

    def padded(size: int) -> float:
        # A step on PAIRS pairs of each batch's width: more pairs take as many times as long.
        return PAIRS / seconds_at(longest_of_batches(pairs, size), anchors, measured).mean()

    rates = {
        "packed": found["packed_pairs"] / packed["step"],
        WITH_PASS: found["packed_pairs"] / (packed["step"] + packed["reference"] / EPOCHS),
        "padded to longest": padded(PAIRS),
        "padded to row": PAIRS / row,
        **{of_larger(size): padded(size) for size in LARGER},
    }
    if "trl" in seconds:
        both = [seconds["trl"]["median"], seconds["trl"]["widest"]]
        rates["trl"] = PAIRS / seconds_at(longest, [median, longest[-1]], both).mean()
    return {name: float(rate) for name, rate in rates.items()}


def _summary(name: str, taken: list[dict], rates: list[dict], before: int) -> dict:
    """Medians of the rounds that count; ratios are of what was taken in the same round."""
    steps = [
        step for steps_of in taken for label, step in steps_of[name].items() if label != "reference"
    ]
    seconds = {
        f"{label}_seconds": statistics.median(
            steps_of[name][label]["seconds"] for steps_of in taken[WARM_UP:]
        )
        for label in taken[0][name]
    }

    def median(value) -> float:
        return statistics.median(map(value, rates))

    summary = {
        **seconds,
        "pairs_per_second": median(lambda rate: rate[name]),
        "packed_over_it": median(lambda rate: rate["packed"] / rate[name]),
        "packed_with_pass_over_it": median(lambda rate: rate[WITH_PASS] / rate[name]),
        "before_gb": before / GB,
        "peak_gb": steps[-1]["peak"] / GB,
        "first_loss": steps[0]["loss"],
        "last_loss": steps[-1]["loss"],
    }
    return summary | ({"xla_gb": steps[-1]["xla"] / GB} if "xla" in steps[-1] else {})


def print_contestants(results: dict) -> None:
    """The numbers for people."""
    print(f"{'':18}{'seconds':>8}{'pairs/s':>9}{'packed is':>11}{'with pass':>11}", end="")
    print(f"{'peak GB':>9}{'XLA GB':>8}{'loss':>14}")
    for name, row in results.items():
        seconds = row.get("step_seconds", row.get("median_seconds"))
        xla = f"{row['xla_gb']:8.2f}" if "xla_gb" in row else f"{'':8}"
        print(
            f"{name:18}{seconds:8.1f}{row['pairs_per_second']:9.3f}{row['packed_over_it']:10.2f}x"
            f"{row['packed_with_pass_over_it']:10.2f}x{row['peak_gb']:9.2f}{xla}"
            f"{row['first_loss']:8.3f}{row['last_loss']:6.3f}"
        )
        if "widest_peak_gb" in row:
            xla = f"{row['widest_xla_gb']:8.2f}" if "widest_xla_gb" in row else ""
            print(f"{'  its widest batch':57}{row['widest_peak_gb']:9.2f}{xla}")
    print(
        f"the pass of the reference takes {results['packed']['reference_seconds']:.1f} seconds a "
        f"batch, once; 'with pass' adds its share of {EPOCHS} epochs"
    )
    larger = results["padded to longest"]["packed_over_larger_batches"]
    estimates = ", ".join(f"{ratio:.2f}x of {count} pairs" for count, ratio in larger.items())
    print(f"estimated from these steps, packed beside larger batches: {estimates}")


if __name__ == "__main__":
    main()
