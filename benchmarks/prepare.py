"""Measures easylm.data.prepare on a file of conversations, and the packing of lengths like Tülu's.

    python -m benchmarks.prepare DATA TOKENIZER [--tokens=10_000_000] [--runs=3] [--output=FILE]

Encoding: the conversations of DATA, repeated until there are enough tokens, are prepared as
training does it (rendered, tokenized, masked, written to a cache) by one process and by two. In
the same runs, one process and two at once do nothing but `tokenizer(texts)` on the same rendered
texts, 512 a call. Everywhere the threads of tokenizers itself are switched off. Speed is what a
preparation of all has more tokens than one of a tenth, over what it takes more seconds: starting
the processes and loading the tokenizer in them does not grow with the data. Medians of the runs.

Packing: one plan for as many examples as Tülu 2 has, with its mean, quartiles and longest.
"""

import argparse
import json
import math
import multiprocessing
import os
import pathlib
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

import numpy as np

from easylm.chat import render
from easylm.data.pack import pack
from easylm.data.prepare import open_rows, prepare
from easylm.data.sources import read_rows
from easylm.tokenizer import load_tokenizer

SEQ_LEN = 8192
TEXTS_PER_CALL = 512
TENTH = 10
PROCESSES = (1, 2)
# Of Tülu 2's training data (arXiv:2311.10702) in LLaMA's tokens, cut to 8,192.
TULU2 = {"examples": 326_154, "mean": 1097, "q25": 230, "q75": 1464, "max": SEQ_LEN}


def main() -> None:
    """Measures, prints a table, and writes the numbers as JSON if asked to."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    arguments = _arguments()
    results = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "data": os.path.basename(arguments.data),
        "runs": arguments.runs,
        "encode": measure_encoding(
            arguments.data, arguments.tokenizer, arguments.tokens, arguments.runs
        ),
        "pack": measure_packing(arguments.runs),
    }
    print_table(results)
    if arguments.output:
        pathlib.Path(arguments.output).write_text(json.dumps(results, indent=2) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", help="a source of conversations")
    parser.add_argument("tokenizer", help="a folder, file or hub name")
    parser.add_argument("--tokens", type=int, default=10_000_000)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--output", help="a file for the numbers")
    return parser.parse_args()


def measure_encoding(data: str, tokenizer_path: str, tokens: int, runs: int) -> dict:
    """Tokens a second of preparing and of tokenizing alone, by number of processes."""
    tokenizer = load_tokenizer(tokenizer_path)
    conversations = [row.messages for row in read_rows(data).rows]
    texts = [text for text, _ in render(tokenizer, conversations)]
    once = tokenize(tokenizer, texts)
    times = math.ceil(tokens / once / TENTH) * TENTH
    tokens = times * once
    with tempfile.TemporaryDirectory() as folder:
        write_rows(conversations * times, f"{folder}/all.jsonl")
        write_rows(conversations * (times // TENTH), f"{folder}/tenth.jsonl")
        rows = []
        for _ in range(runs):
            row = {}
            for count in PROCESSES:
                row[f"bare_{count}"] = seconds_of_bare(tokenizer_path, texts * times, count)
                tenth = seconds_to_prepare(f"{folder}/tenth.jsonl", tokenizer, count)
                whole = seconds_to_prepare(f"{folder}/all.jsonl", tokenizer, count)
                row[f"prepare_{count}"] = (whole - tenth) * TENTH / (TENTH - 1)
                row[f"start_{count}"] = whole - row[f"prepare_{count}"]
            rows.append(row)
    medians = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
    result = {"tokens": tokens, "rows": len(conversations) * times}
    for count in PROCESSES:
        bare = tokens * count / medians[f"bare_{count}"]
        prepared = tokens / medians[f"prepare_{count}"]
        result[f"processes_{count}"] = {
            "bare_tokens_per_second": bare,
            "prepare_tokens_per_second": prepared,
            "prepare_over_bare": prepared / bare,
            "start_seconds": medians[f"start_{count}"],
        }
    return result


def write_rows(conversations: list, path: str) -> None:
    """Writes conversations as JSON Lines of `messages`."""
    lines = (json.dumps({"messages": messages}) + "\n" for messages in conversations)
    pathlib.Path(path).write_text("".join(lines))


def seconds_to_prepare(path: str, tokenizer, processes: int) -> float:
    """Seconds to prepare rows that have been read, in a cache that is empty."""
    with tempfile.TemporaryDirectory() as cache:
        rows = open_rows(path, on_bad_row="refuse", seed=0, cache=cache)
        options = {"too_long": "truncate", "eos_newline": "keep", "special_tokens": "text"}
        return timed(
            lambda: prepare(
                rows,
                tokenizer,
                cache=cache,
                seq_len=SEQ_LEN,
                vocab_size=len(tokenizer),
                processes=processes,
                progress=False,
                **options,
            )
        )


def seconds_of_bare(tokenizer_path: str, texts: list[str], processes: int) -> float:
    """Mean seconds in which each of some processes, all at once, tokenizes all texts."""
    spawn = multiprocessing.get_context("spawn")
    ready = spawn.Barrier(processes)
    with ProcessPoolExecutor(processes, spawn, _start_bare, (tokenizer_path, texts, ready)) as pool:
        # Each waits for the others, so every process gets one.
        running = [pool.submit(_run_bare) for _ in range(processes)]
        return statistics.mean(one.result() for one in running)


def _start_bare(tokenizer_path: str, texts: list[str], ready) -> None:
    global _bare
    _bare = (load_tokenizer(tokenizer_path), texts, ready)


def _run_bare() -> float:
    tokenizer, texts, ready = _bare
    ready.wait()
    return timed(lambda: tokenize(tokenizer, texts))


def tokenize(tokenizer, texts: list[str]) -> int:
    """Tokenizes texts and does nothing else; returns the number of tokens."""
    total = 0
    for start in range(0, len(texts), TEXTS_PER_CALL):
        some = texts[start : start + TEXTS_PER_CALL]
        total += sum(map(len, tokenizer(some, add_special_tokens=False)["input_ids"]))
    return total


def measure_packing(runs: int) -> dict:
    """Seconds of one plan, and how full its rows are."""
    lengths = tulu2_lengths()
    plans = []
    seconds = statistics.median(
        timed(lambda: plans.append(pack(lengths, SEQ_LEN, seed=0, epoch=0))) for _ in range(runs)
    )
    rows = len(plans[0])
    q25, median, q75 = np.quantile(lengths, [0.25, 0.5, 0.75])
    return {
        "examples": len(lengths),
        "mean": float(lengths.mean()),
        "q25": q25,
        "median": median,
        "q75": q75,
        "max": int(lengths.max()),
        "seconds": seconds,
        "rows": rows,
        "filled": int(lengths.sum()) / (rows * SEQ_LEN),
        "filled_one_a_row": float(lengths.mean()) / SEQ_LEN,
    }


def tulu2_lengths() -> np.ndarray:
    """Lengths with the mean, quartiles and longest of Tülu 2's, int64 [examples].

    Between the quartiles and from the shortest, 20, to the longest the logarithm of the length
    rises evenly, above the upper quartile by a power of the rank that gives the mean.
    """
    ranks = (np.arange(TULU2["examples"]) + 0.5) / TULU2["examples"]

    def draw(power: float) -> np.ndarray:
        warped = np.where(ranks < 0.75, ranks, 0.75 + 0.25 * (ranks * 4 - 3).clip(min=0) ** power)
        known = [20, TULU2["q25"], TULU2["q75"], TULU2["max"]]
        return np.exp(np.interp(warped, [0, 0.25, 0.75, 1], np.log(known)))

    low, high = 0.5, 4.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if draw(middle).mean() > TULU2["mean"] else (low, middle)
    return np.rint(draw(low)).astype(np.int64)


def timed(action: Callable[[], object]) -> float:
    """Seconds that `action` takes."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def print_table(results: dict) -> None:
    """The numbers for people."""
    encode, packing = results["encode"], results["pack"]
    print(f"{encode['rows']:,} rows of {results['data']}, {encode['tokens']:,} tokens")
    print(f"{'tokens/s':12}{'tokenizer':>12}{'prepare':>12}{'ratio':>8}{'start s':>9}")
    for count in PROCESSES:
        row = encode[f"processes_{count}"]
        print(
            f"{count} process{'es' if count > 1 else '':2} "
            f"{row['bare_tokens_per_second']:12,.0f}{row['prepare_tokens_per_second']:12,.0f}"
            f"{row['prepare_over_bare']:8.1%}{row['start_seconds']:9.1f}"
        )
    print(
        f"{packing['examples']:,} lengths: mean {packing['mean']:,.1f}, quartiles "
        f"{packing['q25']:,.0f} {packing['median']:,.0f} {packing['q75']:,.0f}, max "
        f"{packing['max']:,}"
    )
    print(
        f"packed in {packing['seconds']:.2f} s into {packing['rows']:,} rows of {SEQ_LEN:,}, "
        f"{packing['filled']:.1%} filled; one a row {packing['filled_one_a_row']:.1%}"
    )


if __name__ == "__main__":
    main()
