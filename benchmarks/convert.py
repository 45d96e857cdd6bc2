"""Measures easylm.convert on a LLaMA of 1.1B parameters in bfloat16, made on the spot.

    python -m benchmarks.convert [--size=1b|tiny] [--runs=3] [--folder=DIR] [--output=FILE.json]

Both directions, each run in a process of its own, medians of the runs:

- peak resident memory against its bound (the parameters, two of the largest tensor, and 1 GB);
- seconds of the whole command, and of the same command on a model of a few kB, which is what
  Python, imports and compilation take; the speed is the bytes over the difference;
- the speed of a plain copy of the same files, in the same run. Before each of the two the files are
  read once and written data is flushed, so both read from memory and write into a clean cache.

Then two processes load the model together, and each says how many bytes it read. Needs 9 GB of
disk in DIR, which is left as it was found.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

import numpy as np

from easylm import storage
from easylm.converters.llama import expected_tensors
from easylm.converters.safetensors_io import SINGLE, SafetensorsSource, SafetensorsWriter
from easylm.converters.tensors import BFLOAT16
from easylm.models.llama.config import LlamaConfig

GB = 1e9
_TINY_LLAMA = LlamaConfig(  # https://huggingface.co/TinyLlama
    vocab_size=32000,
    hidden_size=2048,
    intermediate_size=5632,
    num_hidden_layers=22,
    num_attention_heads=32,
    num_key_value_heads=4,
    head_dim=64,
    max_position_embeddings=2048,
)
_SMALLER = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "head_dim": 2}
SIZES = {"1b": _TINY_LLAMA, "tiny": dataclasses.replace(_TINY_LLAMA, **_SMALLER)}
# Without a TPU's or GPU's library, whose memory is not what is measured.
ENVIRONMENT = {**os.environ, "JAX_PLATFORMS": "cpu"}


def main() -> None:
    """Measures, prints a table, and writes the numbers as JSON if asked to."""
    arguments = _arguments()
    if arguments.share_of is not None:
        print(bytes_read(arguments.share_of, arguments.port, arguments.folder))
        return
    config = SIZES[arguments.size]
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        for name, sizes in {"model": config, "start": SIZES["tiny"]}.items():
            make_model(sizes, f"{folder}/{name}/hf")
            run(command(f"{folder}/{name}/hf", f"{folder}/{name}/native", "native"))
            run(command(f"{folder}/{name}/native", f"{folder}/{name}/back", "hf"))
        results = {
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "parameters": sum(int(np.prod(s)) for s in expected_tensors(config).values()),
            "runs": arguments.runs,
            "bound_gb": bound(config) / GB,
            "hf_to_native": measure(folder, "hf", "native", arguments.runs),
            "native_to_hf": measure(folder, "native", "hf", arguments.runs),
            "same_bits": same_bits(f"{folder}/model/hf", f"{folder}/model/back"),
            "share_of_two_processes": shares_of_two(f"{folder}/model/hf"),
        }
    print_table(results)
    if arguments.output:
        pathlib.Path(arguments.output).write_text(json.dumps(results, indent=2) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="1b")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--folder", help="where to work; the system's temporary folder by default")
    parser.add_argument("--output", help="a file for the numbers")
    parser.add_argument("--share_of", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def bound(config: LlamaConfig) -> float:
    """Bytes that a conversion may hold: the parameters, two of the largest tensor, and 1 GB."""
    sizes = [int(np.prod(shape)) * 2 for shape in expected_tensors(config).values()]
    return sum(sizes) + 2 * max(sizes) + GB


def make_model(config: LlamaConfig, folder: str) -> None:
    """Writes a Hugging Face folder of random bfloat16 values, all between 2^-7 and 4."""
    shapes = expected_tensors(config)
    plan = [(name, shape, BFLOAT16) for name, shape in shapes.items()]
    bits = np.random.default_rng(0)
    with storage.write_folder(folder) as place, SafetensorsWriter(place, plan) as writer:
        for name, shape in shapes.items():
            # A random sign, lower exponent and mantissa; drawing normal numbers takes minutes.
            values = bits.integers(0, 1 << 16, shape, np.uint16) & 0x83FF | 0x3C00
            writer.write(name, values.view(BFLOAT16))
        config_json = json.dumps(config.to_hf("bfloat16"))
        storage.write_bytes(f"{place}/config.json", config_json.encode())


def measure(folder: str, source: str, to: str, runs: int) -> dict:
    """Medians of one direction; what it writes is deleted."""
    files = f"{folder}/model/{source}"
    rows = []
    for _ in range(runs):
        settle(files)
        copy_seconds = timed(lambda: shutil.copytree(files, f"{folder}/copy"))
        shutil.rmtree(f"{folder}/copy")
        settle(files)
        row = {"copy_seconds": copy_seconds}
        for name in ("model", "start"):
            target = f"{folder}/{name}/out"
            started = time.perf_counter()
            peak = run(command(f"{folder}/{name}/{source}", target, to))
            row[f"{name}_seconds"] = time.perf_counter() - started
            row[f"{name}_peak_gb"] = peak / GB
            shutil.rmtree(target)
        rows.append(row)
    result = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
    size = sum(path.stat().st_size for path in files_below(files)) / GB
    result["gb_per_second"] = size / (result["model_seconds"] - result["start_seconds"])
    result["copy_gb_per_second"] = size / result["copy_seconds"]
    return result


def timed(action: Callable[[], object]) -> float:
    """Seconds that `action` takes."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def settle(folder: str) -> None:
    """Brings files into the page cache, and what was written before onto the disk."""
    for path in files_below(folder):
        with path.open("rb", buffering=0) as file:
            while file.read(1 << 24):
                pass
    os.sync()


def files_below(folder: str) -> Iterator[pathlib.Path]:
    return (path for path in pathlib.Path(folder).rglob("*") if path.is_file())


def command(source: str, target: str, to: str) -> list[str]:
    """What is typed after `python`."""
    return ["-m", "easylm.convert", f"--source={source}", f"--target={target}", f"--to={to}"]


def run(arguments: list[str]) -> int:
    """Runs Python; returns its peak resident memory in bytes."""
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen([sys.executable, *arguments], env=ENVIRONMENT, stderr=errors)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        errors.seek(0)
        if status:
            raise RuntimeError(f"{arguments} failed:\n{errors.read()}")
    return usage.ru_maxrss * 1024


def same_bits(folder: str, other: str) -> bool:
    """Whether two Hugging Face folders hold the same tensors."""
    sources = [SafetensorsSource(place, None, "config.json") for place in (folder, other)]
    first, second = sources
    return first.tensors.keys() == second.tensors.keys() and all(
        np.array_equal(first.read(name).view(np.uint16), second.read(name).view(np.uint16))
        for name in first.tensors
    )


def shares_of_two(folder: str) -> list[float]:
    """Two processes load one model; the share of its file that each of them read."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "benchmarks.convert", f"--port={port}", f"--folder={folder}"]
    processes = [
        subprocess.Popen(
            [*command, f"--share_of={number}"], env=ENVIRONMENT, stdout=subprocess.PIPE, text=True
        )
        for number in range(2)
    ]
    said = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise RuntimeError("loading with two processes failed")
    size = storage.file_size(f"{folder}/{SINGLE}")
    return [int(text.split()[-1]) / size for text in said]


class CountingSource(SafetensorsSource):
    """Counts the bytes that are read."""

    nbytes = 0

    def read(self, name: str, start_row: int = 0, end_row: int | None = None) -> np.ndarray:
        """Reads and counts."""
        rows = super().read(name, start_row, end_row)
        self.nbytes += rows.nbytes
        return rows


def bytes_read(process: int, port: int, folder: str) -> int:
    """Loads the model as one of two processes; returns the bytes that this one read."""
    import jax
    import jax.numpy as jnp

    from easylm.converters.load import load_params
    from easylm.converters.sources import read_config
    from easylm.models.llama.sharding import param_shardings
    from easylm.sharding import make_mesh

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", 2, process)
    source = CountingSource(folder, None, "config.json")
    config = LlamaConfig.from_hf(read_config(f"{folder}/config.json"), folder)
    shardings = param_shardings(config, make_mesh("1,-1,1"))
    load_params(source, config, shardings, jnp.bfloat16, progress=False)
    return source.nbytes


def print_table(results: dict) -> None:
    """The numbers for people."""
    print(f"{results['parameters']:,} parameters in bfloat16; bound {results['bound_gb']:.2f} GB")
    print(f"{'':14}{'peak GB':>9}{'seconds':>9}{'start':>7}{'GB/s':>7}{'copy GB/s':>11}")
    for name in ("hf_to_native", "native_to_hf"):
        row = results[name]
        print(
            f"{name:14}{row['model_peak_gb']:9.2f}{row['model_seconds']:9.1f}"
            f"{row['start_seconds']:7.1f}{row['gb_per_second']:7.2f}"
            f"{row['copy_gb_per_second']:11.2f}"
        )
    shares = " and ".join(f"{share:.1%}" for share in results["share_of_two_processes"])
    print(f"there and back: {'the same bits' if results['same_bits'] else 'DIFFERENT BITS'}")
    print(f"two processes read {shares} of the bytes")


if __name__ == "__main__":
    main()
