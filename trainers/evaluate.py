"""The loss on examples that are not trained on."""

import time
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

    The loss is the sum over all held-out batches divided once by the sum of their weights.

    Args:
      program: of the run.
      loss_fn: the objective; its rng is a constant here.
      batches: gives all held-out batches, on the mesh, at each call.
    Returns:
      params -> {"eval/loss", "eval/target_tokens", "eval/seconds"}.
    """

    def sums(params, batch):
        model, rng = nnx.merge(program.graph, params), jax.random.key(0)
        loss_sum, weight, counts = loss_fn(model, batch, rng)
        return {"loss": loss_sum, "weight": weight, "target_tokens": counts["target_tokens"]}

    jitted = jax.jit(
        sums,
        in_shardings=(program.shardings.params, batch_sharding(program.mesh)),
        out_shardings=replicated(program.mesh),
    )

    def evaluate(params: dict) -> dict[str, float]:
        started = time.perf_counter()
        totals = {"loss": 0.0, "weight": 0.0, "target_tokens": 0.0}  # float64 on the host
        for batch in batches():
            for name, value in jax.device_get(jitted(params, batch)).items():
                totals[name] += float(value)
        return {
            "eval/loss": totals["loss"] / totals["weight"],
            "eval/target_tokens": totals["target_tokens"],
            "eval/seconds": time.perf_counter() - started,
        }

    return evaluate
