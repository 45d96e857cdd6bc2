"""Direct preference optimization on packed pairs, with a reference that was computed before."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from easylm.data.pair_batches import PAIR_ARRAYS
from easylm.losses import token_logprobs
from easylm.models.llama.model import Llama
from easylm.trainers.config import DpoConfig
from easylm.trainers.objective import Objective, nothing_to_check
from easylm.trainers.options import DpoOptions
from easylm.trainers.preference_losses import Logprobs, pair_losses, rewards
from easylm.trainers.sft import token_counts
from easylm.trainers.step import Batch, LossFn, Metrics, abstract_batch

# How far the loss of the first step may be from that of policy = reference, in float32.
LOSS_TOLERANCE = 1e-5
# And the mean absolute log-ratio per target token, in nats. In float32 too it decides where the
# loss does not agree: a loss of long sums, or of a large beta, amplifies their rounding.
LOGRATIO_TOLERANCE = {"float32": 1e-5, "bfloat16": 0.05}


def dpo_objective(config: DpoConfig, rows: int, pairs_per_row: int) -> Objective:
    """What preference optimization trains for, on batches of `rows` rows of `pairs_per_row`."""
    options = config.dpo
    is_reference = options.needs_reference and options.reference == "policy"
    return Objective(
        loss_fn=dpo_loss(options, loss_chunk=config.loss_chunk),
        batch=abstract_pairs(rows, config.data.seq_len, pairs_per_row),
        noun="pair",
        description=describe(options),
        check_first=check_first_step(config) if is_reference else nothing_to_check,
    )


def describe(options: DpoOptions) -> str:
    """The loss in a line."""
    parts = [f"{options.loss}, beta {options.beta:g}"]
    if options.loss == "simpo":
        parts.append(f"gamma {options.simpo_gamma:g}")
    for field in ("label_smoothing", "margin_weight", "sft_weight"):
        if value := getattr(options, field):
            parts.append(f"{field} {value:g}")
    return ", ".join(parts) + "; mean over the pairs of a step"


def abstract_pairs(rows: int, seq_len: int, pairs_per_row: int) -> Batch:
    """The shapes and dtypes of a batch of pairs; see easylm/data/pair_batches.py."""
    of_pairs = jax.ShapeDtypeStruct((rows, pairs_per_row), jnp.float32)
    return {**abstract_batch(rows, seq_len), **dict.fromkeys(PAIR_ARRAYS, of_pairs)}


def dpo_loss(options: DpoOptions, *, loss_chunk: int) -> LossFn:
    """The loss of a packed batch of pairs, as sums.

    Args:
      options: name the loss; see trainers/preference_losses.py.
      loss_chunk: positions of a row whose logits exist at once.
    Returns:
      loss_fn(model, batch, rng) -> (sum of the pairs' losses, number of pairs, metrics). The means
      are TRL's, and for losses with a reference also `reference/loss`, which the loss would be if
      the policy were the reference, and `reference/mean_abs_logratio`, the absolute log-ratio of an
      answer per scored token; `reference/max_abs_logratio` is the largest of a batch.
    """
    losses, reward = pair_losses(options), rewards(options)

    def loss_fn(model: Llama, batch: Batch, rng: jax.Array):
        policy = pair_logprobs(model, batch, loss_chunk)
        weights = batch["pair_weights"]
        reference = batch["reference_chosen"], batch["reference_rejected"]
        margins = batch["margins"]

        def total(values):
            return jnp.sum(weights * values)

        chosen, rejected = reward(policy, *reference)
        means = {
            "rewards/chosen": total(chosen),
            "rewards/rejected": total(rejected),
            "rewards/accuracies": total(chosen > rejected),
            "rewards/margins": total(chosen - rejected),
            "logps/chosen": total(policy.chosen),
            "logps/rejected": total(policy.rejected),
        }
        maxima = {}
        if options.needs_reference:
            same = policy._replace(chosen=reference[0], rejected=reference[1])
            ratios = [
                jnp.abs(mine - its) / jnp.maximum(tokens, 1)
                for mine, its, tokens in zip(policy[:2], reference, policy[2:], strict=True)
            ]
            means["reference/loss"] = total(losses(same, *reference, margins))
            means["reference/mean_abs_logratio"] = total(ratios[0] + ratios[1]) / 2
            maxima["reference/max_abs_logratio"] = jnp.max(weights * jnp.maximum(*ratios))
        loss_sum = total(losses(policy, *reference, margins))
        return loss_sum, jnp.sum(weights), Metrics(token_counts(batch), means, maxima)

    return loss_fn


def pair_logprobs(model: Llama, batch: Batch, loss_chunk: int) -> Logprobs:
    """Sums of log-probabilities over the scored tokens of both answers of each pair.

    Args:
      model: the policy, or the reference.
      batch: as of `pair_stream` in easylm/data/pair_batches.py.
      loss_chunk: positions of a row whose logits exist at once.
    Returns:
      Logprobs of float32 [rows, pairs]; zeros where a row has fewer pairs.
    """
    hidden = model.hidden_states(batch["tokens"], batch["positions"], batch["segment_ids"])
    vocab_size = model.config.vocab_size
    logprobs = token_logprobs(hidden, model.head(), batch["targets"], vocab_size, loss_chunk)
    is_scored = batch["loss_weights"] > 0
    pairs = batch["pair_weights"].shape[1]

    def by_segment(values: jax.Array) -> tuple[jax.Array, jax.Array]:
        # Sums over a mask, not a scatter: exact float32, and local to the row's device.
        segments = jnp.arange(1, 2 * pairs + 1)[None, None]
        is_in = batch["segment_ids"][..., None] == segments
        sums = jnp.sum(jnp.where(is_in, values[..., None], 0.0), axis=1)
        return sums[:, 0::2], sums[:, 1::2]

    # A position without a target may hold any finite value; it must not reach the sum.
    chosen, rejected = by_segment(jnp.where(is_scored, logprobs, 0.0))
    return Logprobs(chosen, rejected, *by_segment(is_scored.astype(jnp.float32)))


def check_first_step(config: DpoConfig) -> Callable[[dict[str, float]], None]:
    """A check of the first step's metrics where the policy starts as the reference.

    The log-ratios are zero then, and the loss is known. In float32 it must agree, or the log-ratios
    be nothing but rounding; in bfloat16 they must be small.
    """
    is_exact = config.compute_dtype == "float32"
    tolerance = LOGRATIO_TOLERANCE[config.compute_dtype]

    def check(metrics: dict[str, float]) -> None:
        loss, wanted = metrics["loss"], metrics["reference/loss"]
        ratio = metrics["reference/mean_abs_logratio"]
        same_loss = is_exact and abs(loss - wanted) <= LOSS_TOLERANCE
        if not same_loss and ratio > tolerance:
            raise FloatingPointError(
                f"step 1: the policy is still the reference, but the loss is {loss:.7g}; wanted "
                f"{wanted:.7g}, or a mean absolute log-ratio per token of at most {tolerance:g}, "
                f"not {ratio:.2g}. The stored log-probabilities are not those of this model and "
                f"data; delete {config.data.cache}/reference to have them computed again"
            )

    return check
