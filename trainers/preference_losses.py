"""Losses of preferences: from log-probabilities of two answers to one number per pair.

Names used in the formulas, for a chosen answer c and a rejected answer r to one prompt:

    pi(y), ref(y)  sum of the log-probabilities of y's scored tokens, by policy and reference
    |y|            number of these tokens
    ratio(y)       pi(y) - ref(y)
    sigma          the logistic function

Everything is float32 and elementwise over arrays of any one shape. A place without a pair holds
zeros: its loss and its gradients mean nothing, but they are finite, so that a weight of 0 removes
them.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid

from easylm.trainers.options import DpoOptions


class Logprobs(NamedTuple):
    """What the policy says of pairs; arrays of one shape.

    Attributes:
      chosen, rejected: float32, sums over the scored tokens of each answer, in nats.
      chosen_tokens, rejected_tokens: how many tokens these are; 0 where there is no pair.
    """

    chosen: jax.Array
    rejected: jax.Array
    chosen_tokens: jax.Array
    rejected_tokens: jax.Array

    @property
    def chosen_mean(self) -> jax.Array:
        """Log-probability per token of the chosen answer; 0 where it has no tokens."""
        return _per_token(self.chosen, self.chosen_tokens)

    @property
    def rejected_mean(self) -> jax.Array:
        """Log-probability per token of the rejected answer; 0 where it has no tokens."""
        return _per_token(self.rejected, self.rejected_tokens)


# (policy, ref(c), ref(r), margins) -> the loss of each pair. What a loss has no use for is unread.
PairLosses = Callable[[Logprobs, jax.Array, jax.Array, jax.Array], jax.Array]
# (policy, ref(c), ref(r)) -> the rewards of chosen and rejected answers.
Rewards = Callable[[Logprobs, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


def pair_losses(options: DpoOptions) -> PairLosses:
    """The loss that `options` describe, to be averaged over pairs.

    With sft_weight it is the loss of the preference + sft_weight * -pi(c) / |c|: the preference
    alone is about differences, and leaves the probability of both answers free to fall.
    """

    def losses(policy, reference_chosen, reference_rejected, margins):
        reference = reference_chosen, reference_rejected
        preference = _preference_losses(options, policy, *reference, margins)
        if not options.sft_weight:
            return preference
        return preference - options.sft_weight * policy.chosen_mean

    return losses


def rewards(options: DpoOptions) -> Rewards:
    """The rewards to report, by the convention of TRL.

    beta * ratio(y), of sums whatever the loss; beta * pi(y) / |y| where there is no reference.
    """

    def of_ratios(policy, reference_chosen, reference_rejected):
        chosen, rejected = policy.chosen - reference_chosen, policy.rejected - reference_rejected
        return options.beta * chosen, options.beta * rejected

    def of_policy(policy, _reference_chosen, _reference_rejected):
        return options.beta * policy.chosen_mean, options.beta * policy.rejected_mean

    return of_ratios if options.needs_reference else of_policy


def _preference_losses(
    options: DpoOptions, policy: Logprobs, reference_chosen, reference_rejected, margins
) -> jax.Array:
    beta, smoothing = options.beta, options.label_smoothing
    if options.loss == "simpo":
        difference = policy.chosen_mean - policy.rejected_mean
        return simpo_loss(difference, beta=beta, gamma=options.simpo_gamma)
    if options.loss == "orpo":
        return orpo_loss(policy.chosen_mean, policy.rejected_mean, beta=beta)

    # Policy minus reference first: they are close, so float32 loses nothing of the difference.
    chosen, rejected = policy.chosen - reference_chosen, policy.rejected - reference_rejected
    if options.loss in ("ipo", "sigmoid_norm"):
        chosen = _per_token(chosen, policy.chosen_tokens)
        rejected = _per_token(rejected, policy.rejected_tokens)
    difference = chosen - rejected
    match options.loss:
        case "sigmoid" if options.margin_weight:
            offset = options.margin_weight * margins
            return sigmoid_loss(difference, offset, beta=beta, label_smoothing=smoothing)
        case "sigmoid" | "sigmoid_norm":
            return sigmoid_loss(difference, beta=beta, label_smoothing=smoothing)
        case "robust":
            return robust_loss(difference, beta=beta, label_smoothing=smoothing)
        case "hinge":
            return hinge_loss(difference, beta=beta)
        case "ipo" | "ipo_sum":
            return ipo_loss(difference, beta=beta)


def sigmoid_loss(
    difference: jax.Array,
    offset: jax.Array | float = 0.0,
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> jax.Array:
    """-(1 - e) log sigma(h) - e log sigma(-h), with h = beta * difference - offset.

    e = offset = 0: DPO (Rafailov et al. 2023, arXiv:2305.18290, eq. 7). e > 0: conservative DPO,
    which takes a share e of the labels for wrong (Mitchell 2023, ericmitchell.ai/cdpo.pdf). An
    offset: ODPO, whose rewards must differ by it (Amini et al. 2024, arXiv:2402.10571).

    Args:
      difference: ratio(c) - ratio(r); for length-normalised DPO (Lambert et al. 2024, Tulu 3,
        arXiv:2411.15124) ratio(c) / |c| - ratio(r) / |r|.
      offset: of the shape of difference, or one number.
      beta: strength of the bond to the reference.
      label_smoothing: e, from 0 to below 0.5.
    """
    logits = beta * difference - offset
    return _mixed(logits, 1 - label_smoothing, label_smoothing)


def robust_loss(difference: jax.Array, *, beta: float, label_smoothing: float) -> jax.Array:
    """(-(1 - e) log sigma(h) + e log sigma(-h)) / (1 - 2e), with h = beta * difference.

    Its mean over labels of which a share e is flipped at random is the DPO loss of the true ones;
    a single value may be negative (Chowdhury et al. 2024, arXiv:2403.00409).

    Args:
      difference: ratio(c) - ratio(r).
      beta: strength of the bond to the reference.
      label_smoothing: e, from 0 to below 0.5.
    """
    scale = 1 / (1 - 2 * label_smoothing)
    return scale * _mixed(beta * difference, 1 - label_smoothing, -label_smoothing)


def hinge_loss(difference: jax.Array, *, beta: float) -> jax.Array:
    """max(0, 1 - beta * difference), with difference = ratio(c) - ratio(r).

    SLiC's loss (Zhao et al. 2023, arXiv:2305.10425) on DPO's rewards, as in RSO (Liu et al. 2023,
    arXiv:2309.06657).
    """
    return jax.nn.relu(1 - beta * difference)


def ipo_loss(difference: jax.Array, *, beta: float) -> jax.Array:
    """(difference - 1 / (2 beta))^2 (Azar et al. 2023, arXiv:2310.12036, eq. 17, beta for tau).

    Args:
      difference: ratio(c) - ratio(r), as the paper writes it, or ratio(c) / |c| - ratio(r) / |r|,
        as TRL computes it with the agreement of the paper's authors.
      beta: the paper's tau; the difference aimed at is 1 / (2 beta).
    """
    return jnp.square(difference - 1 / (2 * beta))


def simpo_loss(difference: jax.Array, *, beta: float, gamma: float) -> jax.Array:
    """-log sigma(beta * difference - gamma) (Meng et al. 2024, arXiv:2405.14734, eq. 6).

    Args:
      difference: pi(c) / |c| - pi(r) / |r|.
      beta: scale of the rewards; the paper uses 2 to 10.
      gamma: what the rewards must differ by.
    """
    return -log_sigmoid(beta * difference - gamma)


def orpo_loss(chosen_mean: jax.Array, rejected_mean: jax.Array, *, beta: float) -> jax.Array:
    """-log P(c) - beta * log sigma(log odds(c) - log odds(r)), odds(y) = P(y) / (1 - P(y)).

    P(y) = exp(pi(y) / |y|) (Hong et al. 2024, arXiv:2403.07691, eq. 6 and 7).

    Args:
      chosen_mean, rejected_mean: pi(c) / |c|, pi(r) / |r|.
      beta: the paper's lambda.
    """
    log_odds_ratio = _log_odds(chosen_mean) - _log_odds(rejected_mean)
    return -chosen_mean - beta * log_sigmoid(log_odds_ratio)


def _mixed(logits: jax.Array, as_labelled: float, flipped: float) -> jax.Array:
    """-as_labelled * log sigma(logits) - flipped * log sigma(-logits)."""
    loss = -as_labelled * log_sigmoid(logits)
    return loss - flipped * log_sigmoid(-logits) if flipped else loss


def _log_odds(logprob: jax.Array) -> jax.Array:
    """log(p / (1 - p)) of log p."""
    # Rounding can put log p at 0 or above, where the odds are infinite: 1e-6 is the resolution of
    # a log-probability that float32 logits give.
    return logprob - jax.nn.log1mexp(jnp.maximum(-logprob, 1e-6))


def _per_token(total: jax.Array, tokens: jax.Array) -> jax.Array:
    return total / jnp.maximum(tokens, 1)
