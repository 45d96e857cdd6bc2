"""The loss on examples that are not trained on."""

import time
from collections import Counter
from collections.abc import Callable, Iterator

import jax
from flax import nnx

from easylm.sharding import batch_sharding, replicated
from easylm.trainers.build import Program
from easylm.trainers.step import Batch, LossFn


def evaluator(
    program: Program, loss_fn: LossFn, batches: Callable[[], Iterator[Batch]]
) -> Callable[[dict], dict[str, float]]:
    """A function from parameters to metrics, compiled at its first call.

    The loss is the sum over all held-out batches divided once by the sum of their weights, and so
    are the means.

    Args:
      program: of the run.
      loss_fn: the objective; its rng is a constant here.
      batches: gives all held-out batches, on the mesh, at each call.
    Returns:
      params -> {"eval/loss", "eval/target_tokens", "eval/seconds", and the objective's means and
      maxima as "eval/..."}.
    """

    def sums(params, batch):
        model, rng = nnx.merge(program.graph, params), jax.random.key(0)
        return loss_fn(model, batch, rng)

    jitted = jax.jit(
        sums,
        in_shardings=(program.shardings.params, batch_sharding(program.mesh)),
        out_shardings=replicated(program.mesh),
    )

    def evaluate(params: dict) -> dict[str, float]:
        started = time.perf_counter()
        loss = weight = targets = 0.0  # float64 on the host
        means, maxima = Counter(), {}
        for batch in batches():
            batch_loss, batch_weight, metrics = jax.device_get(jitted(params, batch))
            loss, weight = loss + float(batch_loss), weight + float(batch_weight)
            targets += float(metrics.counts["target_tokens"])
            means.update({name: float(value) for name, value in metrics.means.items()})
            for name, value in metrics.maxima.items():
                maxima[name] = max(maxima.get(name, 0.0), float(value))
        values = {"loss": loss / weight, "target_tokens": targets, **maxima}
        values |= {name: value / weight for name, value in means.items()}
        values["seconds"] = time.perf_counter() - started
        return {f"eval/{name}": value for name, value in values.items()}

    return evaluate
