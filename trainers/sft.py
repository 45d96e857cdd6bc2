"""Supervised fine-tuning: the mean negative log-probability of what the assistant says."""

import jax
import jax.numpy as jnp

from easylm.losses import cross_entropy_of_states
from easylm.models.llama.model import Llama
from easylm.trainers.config import SftConfig
from easylm.trainers.objective import Objective
from easylm.trainers.step import Batch, LossFn, Metrics, abstract_batch

_WEIGHTING = {
    "token": "mean over the trained tokens of a step",
    "example": "mean over the examples of a step, each the mean over its trained tokens",
    "microbatch": "mean over groups of {} examples, each the mean over its trained tokens",
}


def sft_objective(config: SftConfig, rows: int) -> Objective:
    """What supervised fine-tuning trains for, on batches of `rows` rows."""
    return Objective(
        loss_fn=sft_loss(loss_chunk=config.loss_chunk),
        batch=abstract_batch(rows, config.data.seq_len),
        noun="example",
        description=_WEIGHTING[config.loss_weighting].format(config.loss_group),
    )


def sft_loss(*, loss_chunk: int) -> LossFn:
    """The loss of a packed batch, as sums.

    Args:
      loss_chunk: positions of a row whose logits exist at once.
    Returns:
      loss_fn(model, batch, rng) -> (sum of -weight * log p(target), sum of weights, metrics).
      The batch holds tokens, targets, loss_weights, segment_ids and positions, [batch, seq].
    """

    def loss_fn(model: Llama, batch: Batch, rng: jax.Array):
        hidden = model.hidden_states(batch["tokens"], batch["positions"], batch["segment_ids"])
        targets, weights = batch["targets"], batch["loss_weights"]
        loss_sum = cross_entropy_of_states(
            hidden, model.head(), targets, weights, model.config.vocab_size, loss_chunk
        )
        return loss_sum, jnp.sum(weights), Metrics(token_counts(batch), means={}, maxima={})

    return loss_fn


def token_counts(batch: Batch) -> dict[str, jax.Array]:
    """What a batch holds, as float32 sums over it.

    tokens: not padding. target_tokens: with a loss. causal_pairs: (query, key) pairs of
    attention, i + 1 for the i-th token of a segment.
    """
    is_token = batch["segment_ids"] > 0
    return {
        "tokens": jnp.sum(is_token, dtype=jnp.float32),
        "target_tokens": jnp.sum(batch["loss_weights"] > 0, dtype=jnp.float32),
        "causal_pairs": jnp.sum(jnp.where(is_token, batch["positions"] + 1.0, 0.0)),
    }
