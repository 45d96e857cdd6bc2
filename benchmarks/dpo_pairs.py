"""Pairs as long as UltraFeedback's, and the batches that training without packing makes of them."""

import statistics

import numpy as np

from easylm.data.batches import Batch, build_rows
from easylm.data.encode import Examples
from easylm.data.pack import shuffled
from easylm.data.pairs import Pairs, Side, cut_pair
from easylm.models.llama.config import LlamaConfig

# Mean tokens of UltraFeedback's binarized pairs in LLaMA's tokenizer. The distributions below agree
# with the spread of a sample: quartiles 30, 94, 264 of prompts and 48, 192, 530 of chosen answers.
MEANS = {"prompt": 205, "chosen": 309, "rejected": 278}
_SPREAD = 1.2  # of the logarithm of a prompt's length
ROW = 2048  # what the lengths are drawn for; another row has them in proportion
PAIRS = 8  # in a batch: TRL's default per device
DRAWN = 1024
END_OF_TURN = 2


def drawn_lengths(seq_len: int) -> dict[str, np.ndarray]:
    """Tokens of prompts and answers, `[DRAWN]` each, before anything is cut.

    Log-normal prompts and exponential answers, at the quantiles of DRAWN equal shares: nothing but
    the order is chance, and the means are those of MEANS.
    """
    shares = (np.arange(DRAWN) + 0.5) / DRAWN
    normal = np.array([statistics.NormalDist().inv_cdf(share) for share in shares])
    answers = -np.log1p(-shares)
    shapes = {"prompt": np.exp(_SPREAD * normal), "chosen": answers, "rejected": answers}
    order = np.random.default_rng(0)
    return {
        name: np.maximum(order.permutation(shape * MEANS[name] / shape.mean()) * seq_len / ROW, 3)
        .round()
        .astype(int)
        for name, shape in shapes.items()
    }


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


def epoch_of_batches(pairs: Pairs) -> np.ndarray:
    """The pairs of each batch without packing, `[batches, PAIRS]`, in a shuffled order."""
    return shuffled(len(pairs), seed=0, epoch=0).reshape(-1, PAIRS)


def longest_of_batches(pairs: Pairs) -> np.ndarray:
    """Tokens of the longest sequence of each of these batches."""
    lengths = pairs.sequences.lengths.reshape(-1, 2).max(axis=1)
    return lengths[epoch_of_batches(pairs)].max(axis=1)


def padded_batch(pairs: Pairs, batch: int, width: int) -> Batch:
    """A sequence a row, padded to `width`: the chosen ones, then the rejected ones.

    Each row counts as one pair of which it holds the first sequence alone.
    """
    ids = epoch_of_batches(pairs)[batch]
    rows = build_rows(pairs.sequences, np.concatenate([2 * ids, 2 * ids + 1])[:, None], width)
    return {**rows, "pair_weights": np.ones((2 * PAIRS, 1), np.float32)}
