"""What a run reports: metrics.jsonl, the progress bar, and how much of the hardware it uses."""

import json
import math
import os
import sys
import time
from collections.abc import Mapping

import tqdm

from easylm import storage
from easylm.errors import InputError

# Seconds between uploads of metrics.jsonl to a bucket, where an object cannot be appended to.
UPLOAD_SECONDS = 30.0


def model_flops(
    *,
    parameters: int,
    num_hidden_layers: int,
    num_attention_heads: int,
    head_dim: int,
    tokens: float,
    causal_pairs: float,
) -> float:
    """FLOPs of a forward and backward pass that the model itself asks for.

    6 per parameter and token, and per layer and head 12 * head_dim for each pair of a query and a
    key it may see (two products forward, four backward, 2 * head_dim each). Recomputed and masked
    work does not count. Chowdhery et al. 2022, arXiv:2204.02311, appendix B, with the causal half
    of attention only, per segment.

    Args:
      parameters: of the whole model.
      num_hidden_layers, num_attention_heads, head_dim: of the attention.
      tokens: without padding.
      causal_pairs: sum of n * (n + 1) / 2 over segments of n tokens.
    """
    attention = 12 * num_hidden_layers * num_attention_heads * head_dim * causal_pairs
    return 6 * parameters * tokens + attention


def rates(
    *,
    tokens: float,
    target_tokens: float,
    row_tokens: int,
    seconds: float,
    flops: float,
    peak: float | None,
) -> dict[str, float | None]:
    """The fields of metrics.jsonl that come from counting and the clock.

    Args:
      tokens: of the global batch, without padding.
      target_tokens: those with a loss.
      row_tokens: rows * seq_len, with padding.
      seconds: that the step took.
      flops: of the step, see `model_flops`.
      peak: FLOP/s of all devices, or None where it is unknown (then mfu is None).
    """
    return {
        "target_tokens": target_tokens,
        "tokens": tokens,
        "padding_fraction": 1 - tokens / row_tokens,
        "step_seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "target_tokens_per_second": target_tokens / seconds,
        "mfu": None if peak is None else flops / seconds / peak,
    }


class MetricsWriter:
    """Appends to WORKDIR/metrics.jsonl, one JSON object a line.

    On a disk every line is flushed as it is written. In a bucket the object is written again
    whole, at most every UPLOAD_SECONDS, on `store` and on `close`.

    JSON has no NaN or infinity: they are written as the strings "nan", "inf" and "-inf", which
    float() reads back. null means unknown.

    Args:
      workdir: local or gs:// folder of the run.
      last_step: the step the run goes on from, 0 for a new one. Lines of later steps, and a line
        that was cut off, are dropped: the run writes them again.
    Raises:
      InputError: the file cannot be read or written, or a line of it is not an object with a step.
    """

    def __init__(self, workdir: str, last_step: int = 0):
        self._path = f"{workdir.rstrip('/')}/metrics.jsonl"
        self._in_bucket = storage.is_bucket(workdir)
        self._lines = _kept_lines(self._path, last_step)
        self._uploaded = time.monotonic()
        if not self._in_bucket:
            self._file = self._open_local()

    def _open_local(self):
        with storage.explained(self._path):
            os.makedirs(os.path.dirname(self._path), exist_ok=True)
            # Renamed into place, so that a crash here loses no line.
            with open(f"{self._path}.tmp", "w", encoding="utf-8") as file:
                file.writelines(self._lines)
            os.replace(f"{self._path}.tmp", self._path)
            return open(self._path, "a", encoding="utf-8")

    def write(self, record: Mapping[str, float | int | None]) -> None:
        """Adds one line; `record` has at least "step"."""
        line = json.dumps({name: _json_value(value) for name, value in record.items()}) + "\n"
        if not self._in_bucket:
            self._file.write(line)
            self._file.flush()
            return
        self._lines.append(line)
        if time.monotonic() - self._uploaded >= UPLOAD_SECONDS:
            self.store()

    def store(self) -> None:
        """Makes sure that every line so far is stored."""
        if self._in_bucket:
            storage.write_bytes(self._path, "".join(self._lines).encode())
            self._uploaded = time.monotonic()

    def close(self) -> None:
        """Makes sure that every line is stored."""
        self.store()
        if not self._in_bucket:
            self._file.close()


def _json_value(value):
    is_finite = not isinstance(value, float) or math.isfinite(value)
    return value if is_finite else str(value)


def _kept_lines(path: str, last_step: int) -> list[str]:
    if not storage.exists(path):
        return []
    lines = storage.read_bytes(path).decode().splitlines(keepends=True)
    kept = []
    for number, line in enumerate(lines, 1):
        if not line.endswith("\n"):
            break
        try:
            step = json.loads(line)["step"]
        except (json.JSONDecodeError, TypeError, KeyError):
            raise InputError(
                f"{path}:{number}: found {line.strip()!r}; wanted a step's metrics"
            ) from None
        if step <= last_step:
            kept.append(line)
    return kept


class ProgressBar:
    """One line of at most 80 columns on stderr: step, loss, tokens/s, MFU, time left.

    Args:
      last_step: the step the run goes on from, 0 for a new one.
      total_steps: of the run.
    """

    def __init__(self, last_step: int, total_steps: int):
        self._bar = tqdm.tqdm(
            total=total_steps,
            initial=last_step,
            ncols=80,
            # A log file gets a line now and then, not one a step.
            mininterval=0.2 if sys.stderr.isatty() else 30.0,
            bar_format="{n_fmt}/{total_fmt} |{bar}| {desc}{remaining} left",
        )

    def step(self) -> None:
        """One more step is done."""
        self._bar.update()

    def show(self, record: Mapping[str, float | int | None]) -> None:
        """Shows the numbers of a line of metrics.jsonl."""
        rate = tqdm.tqdm.format_sizeof(record["tokens_per_second"])
        mfu = "" if record["mfu"] is None else f" mfu {record['mfu']:.0%}"
        accuracy = record.get("rewards/accuracies")
        right = "" if accuracy is None else f" acc {accuracy:.0%}"
        text = f"loss {record['loss']:.4g}{right} {rate} tok/s{mfu} "
        self._bar.set_description_str(text, refresh=False)

    def note(self, text: str) -> None:
        """Prints a line above the bar."""
        self._bar.write(text, file=sys.stderr)

    def close(self) -> None:
        """Leaves the line as it is."""
        self._bar.close()
