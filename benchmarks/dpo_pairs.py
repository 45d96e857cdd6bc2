"""Pairs as long as UltraFeedback's, and the batches that training without packing makes of them."""

import statistics

import numpy as np

from easylm.data.batches import Batch, build_rows
from easylm.data.encode import Examples
from easylm.data.pack import shuffled
from easylm.data.pairs import Pairs, Side, cut_pair
from easylm.models.llama.config import LlamaConfig

# Mean tokens of UltraFeedback's binarized pairs in LLaMA's tokenizer.
MEANS = {"prompt": 205, "chosen": 309, "rejected": 278}
LONGEST_ANSWER = 1024  # UltraFeedback's models were stopped there
LOG_SPREAD = 1.2  # standard deviation of the logarithm of a prompt's length
# Of normal variables behind the lengths: long prompts have shorter answers, of similar length.
PROMPT_TO_CHOSEN, CHOSEN_TO_REJECTED = -0.3, 0.45
ROW = 2048  # what the lengths are drawn for; another row has them in proportion
PAIRS = 8  # in a batch: TRL's default per device
DRAWN = 1024
END_OF_TURN = 2


def drawn_lengths(seq_len: int) -> dict[str, np.ndarray]:
    """Tokens of prompts and answers, `[DRAWN]` each, before anything is cut.

    Log-normal prompts, and exponential answers up to LONGEST_ANSWER, at the quantiles of DRAWN
    equal shares; chance only decides which go together. In a sample of 300 of UltraFeedback's own
    pairs, cut to rows of 2,048, a pair has 955 tokens and the longest sequence of 8 pairs 1,049;
    here it is 948 and 1,040.
    """
    shares = (np.arange(DRAWN) + 0.5) / DRAWN
    normal = np.array([statistics.NormalDist().inv_cdf(share) for share in shares])
    answers = -np.log1p(-shares)
    values = (
        _with_mean(np.exp(LOG_SPREAD * normal), MEANS["prompt"], ROW),
        _with_mean(answers, MEANS["chosen"], LONGEST_ANSWER),
        _with_mean(answers, MEANS["rejected"], LONGEST_ANSWER),
    )
    return {
        name: np.maximum(sorted_values[ranks] * seq_len / ROW, 3).round().astype(int)
        for name, sorted_values, ranks in zip(MEANS, values, _ranks(), strict=True)
    }


def _with_mean(values: np.ndarray, mean: float, most: float) -> np.ndarray:
    """The values times a factor, none above `most`, such that this is their mean."""
    scaled = values
    for _ in range(50):  # each time closer; a few are enough
        scaled = np.minimum(scaled * mean / scaled.mean(), most)
    return scaled


def _ranks() -> tuple[np.ndarray, ...]:
    """The places of each pair's prompt, chosen and rejected answer among all, shortest first."""
    prompt, chosen, rejected = np.random.default_rng(0).standard_normal((3, DRAWN))
    chosen = _correlated(chosen, prompt, PROMPT_TO_CHOSEN)
    rejected = _correlated(rejected, chosen, CHOSEN_TO_REJECTED)
    return tuple(np.argsort(np.argsort(values)) for values in (prompt, chosen, rejected))


def _correlated(values: np.ndarray, others: np.ndarray, correlation: float) -> np.ndarray:
    return correlation * others + np.sqrt(1 - correlation**2) * values


def ultrafeedback_pairs(model: LlamaConfig) -> Pairs:
    """Pairs of random ids, cut to the model's row as training cuts them."""
    seq_len = model.max_position_embeddings
    ids = np.random.default_rng(1)

    def text(length: int) -> np.ndarray:
        return ids.integers(END_OF_TURN + 1, model.vocab_size, length, np.int32)

    sequences = []
    for prompt_length, *answer_lengths in zip(*drawn_lengths(seq_len).values(), strict=True):
        prompt = text(prompt_length)
        pair = tuple(_side(prompt, text(length)) for length in answer_lengths)
        if sum(len(side.tokens) for side in pair) > seq_len:
            pair = cut_pair(pair, seq_len, None, None)
        for side in pair:
            side.tokens[-1] = END_OF_TURN  # of cut ones too: TRL's own tokenization has it
        sequences += [(side.tokens, side.mask) for side in pair]
    no_margins = np.full(DRAWN, np.nan, np.float32)
    return Pairs(Examples.concatenate(sequences), np.arange(DRAWN, dtype=np.uint64), no_margins)


def _side(prompt: np.ndarray, answer: np.ndarray) -> Side:
    tokens = np.concatenate([prompt, answer])
    return Side(tokens, (np.arange(len(tokens)) >= len(prompt)).astype(np.uint8), len(prompt))


def epoch_of_batches(pairs: Pairs, size: int = PAIRS) -> np.ndarray:
    """The pairs of each batch without packing, `[batches, size]`, in a shuffled order."""
    return shuffled(len(pairs), seed=0, epoch=0).reshape(-1, size)


def longest_of_batches(pairs: Pairs, size: int = PAIRS) -> np.ndarray:
    """Tokens of the longest sequence of each of these batches."""
    lengths = pairs.sequences.lengths.reshape(-1, 2).max(axis=1)
    return lengths[epoch_of_batches(pairs, size)].max(axis=1)


def padded_batch(pairs: Pairs, batch: int, width: int) -> Batch:
    """A sequence a row, padded to `width`: the chosen ones, then the rejected ones.

    Each row counts as one pair of which it holds the first sequence alone.
    """
    ids = epoch_of_batches(pairs)[batch]
    rows = build_rows(pairs.sequences, np.concatenate([2 * ids, 2 * ids + 1])[:, None], width)
    return {**rows, "pair_weights": np.ones((2 * PAIRS, 1), np.float32)}
