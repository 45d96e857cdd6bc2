"""What each step of a run leaves behind: a line of metrics.jsonl and the progress bar."""

from collections.abc import Sequence

import optax
from jax.sharding import Mesh

from easylm.data.batches import BatchStream
from easylm.devices import peak_flops
from easylm.metrics import MetricsWriter, ProgressBar, model_flops, rates
from easylm.models.llama.config import LlamaConfig
from easylm.models.llama.model import count_parameters
from easylm.track import Tracker
from easylm.trainers.loop import not_finite


class Reporter:
    """Writes and shows the steps of one run.

    Args:
      workdir: of the run.
      model: sizes of the model, from which FLOPs are counted.
      mesh: where it runs.
      stream: the run's batches.
      schedule: learning rate of step i, counted from 0.
      last_step: the step the run goes on from.
      every: steps between lines of metrics.jsonl; the last step always has one, and so has one
        with an evaluation.
      trackers: get every line too.
    """

    def __init__(
        self,
        workdir: str,
        *,
        model: LlamaConfig,
        mesh: Mesh,
        stream: BatchStream,
        schedule: optax.Schedule,
        last_step: int,
        every: int,
        trackers: Sequence[Tracker],
    ):
        self._model, self._stream, self._schedule, self._every = model, stream, schedule, every
        self._parameters = count_parameters(model)
        self._peak = peak_flops(mesh.devices.flat[0].device_kind, mesh.size)
        self._writers = [MetricsWriter(workdir, last_step), *trackers]
        self._bar = ProgressBar(last_step, len(stream))

    def __call__(self, step: int, metrics: dict[str, float], seconds: float) -> None:
        """Reports step `step`, which took `seconds`; metrics as the train step gives them."""
        record = self._record(step, metrics, seconds)
        is_last = step == len(self._stream) or bool(not_finite(metrics))
        if step % self._every == 0 or is_last or "eval/loss" in record:
            for writer in self._writers:
                writer.write(record)
        if "eval/loss" in record:
            self._bar.note(f"step {step}: {_evaluation(record)}")
        self._bar.show(record)
        self._bar.step()

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
        """Leaves the bar as it is and makes sure that every line is stored."""
        self._bar.close()
        for writer in self._writers:
            writer.close()


def _evaluation(record: dict) -> str:
    """What it found, in a line."""
    accuracy = record.get("eval/rewards/accuracies")  # preferences alone have one
    right = "" if accuracy is None else f", accuracy {accuracy:.1%}"
    seconds = record["eval/seconds"]
    return f"loss {record['eval/loss']:.4f}{right} on held-out data, evaluated in {seconds:.1f} s"
