"""What each step of a run leaves behind: a line of metrics.jsonl and the progress bar."""

from collections.abc import Sequence

import optax
from jax.sharding import Mesh

from easylm.command import wrap_line
from easylm.data.batches import BatchStream
from easylm.devices import peak_flops
from easylm.metrics import ProgressBar, model_flops, rates
from easylm.models.llama.config import LlamaConfig
from easylm.models.llama.model import count_parameters
from easylm.track import Tracker
from easylm.trainers.loop import not_finite
from easylm.trainers.memory import device_memory, process_memory


class Reporter:
    """Writes and shows the steps of one run.

    Args:
      model: sizes of the model, from which FLOPs are counted.
      mesh: where it runs.
      stream: the run's batches.
      schedule: learning rate of step i, counted from 0.
      last_step: the step the run goes on from.
      every: steps between lines of metrics.jsonl; the last step always has one, and so has one
        with an evaluation.
      expected: bytes that the compiler expects the step to take of each device; None: not known.
      writers: get every line: metrics.jsonl and trackers; none on hosts that do not write.
    """

    def __init__(
        self,
        *,
        model: LlamaConfig,
        mesh: Mesh,
        stream: BatchStream,
        schedule: optax.Schedule,
        last_step: int,
        every: int,
        expected: int | None,
        writers: Sequence[Tracker],
    ):
        self._model, self._stream, self._schedule, self._every = model, stream, schedule, every
        self._parameters = count_parameters(model)
        self._peak = peak_flops(mesh.devices.flat[0].device_kind, mesh.size)
        self._writers = writers
        self._bar = ProgressBar(last_step, len(stream))
        self._first_step, self._expected = last_step + 1, expected

    def __call__(self, step: int, metrics: dict[str, float], seconds: float) -> None:
        """Reports step `step`, which took `seconds`; metrics as the train step gives them."""
        record = self._record(step, metrics, seconds)
        is_last = step == len(self._stream) or bool(not_finite(metrics))
        if step % self._every == 0 or is_last or "eval/loss" in record:
            for writer in self._writers:
                writer.write(record)
        if "eval/loss" in record:
            self.note(f"step {step}: {_evaluation(record)}")
        if step == self._first_step:
            memory = device_memory() or process_memory()
            if memory is not None:
                self.note(f"memory after step {step}: {memory.describe(self._expected)}")
        self._bar.show(record)
        self._bar.step()

    def store(self) -> None:
        """Makes sure that every line so far is stored."""
        for writer in self._writers:
            writer.store()

    def note(self, text: str) -> None:
        """Says a line to people, above the progress bar; any thread may."""
        self._bar.note(wrap_line(text))

    def _record(self, step: int, metrics: dict[str, float], seconds: float) -> dict:
        model, stream = self._model, self._stream
        flops = model_flops(
            parameters=self._parameters,
            num_hidden_layers=model.num_hidden_layers,
            num_attention_heads=model.num_attention_heads,
            head_dim=model.head_dim,
            tokens=metrics["tokens"],
            causal_pairs=metrics["causal_pairs"],
        )
        counted = rates(
            tokens=int(metrics["tokens"]),
            target_tokens=int(metrics["target_tokens"]),
            row_tokens=stream.rows_per_batch * stream.seq_len,
            seconds=seconds,
            flops=flops,
            peak=self._peak,
        )
        memory = device_memory()
        if memory is not None:
            counted["memory_peak_bytes"] = memory.peak
        return {
            "step": step,
            "epoch": stream.epoch(step),
            "loss": metrics["loss"],
            "learning_rate": float(self._schedule(step - 1)),
            "grad_norm": metrics["grad_norm"],
            **counted,
            **{name: value for name, value in metrics.items() if "/" in name},
        }

    def close(self) -> None:
        """Says what memory it took, and makes sure that every line is stored."""
        memory = device_memory() or process_memory()
        if memory is not None:
            self.note(f"memory at the peak: {memory.describe_peak()}")
        self._bar.close()
        for writer in self._writers:
            writer.close()


def _evaluation(record: dict) -> str:
    """What it found, in a line."""
    accuracy = record.get("eval/rewards/accuracies")  # preferences alone have one
    right = "" if accuracy is None else f", accuracy {accuracy:.1%}"
    seconds = record["eval/seconds"]
    return f"loss {record['eval/loss']:.4f}{right} on held-out data, evaluated in {seconds:.1f} s"
