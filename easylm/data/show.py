"""An encoded example, or a pair, as a person reads it."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np

from easylm.data.pairs import Pairs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_GREEN, _PLAIN = "\x1b[32m", "\x1b[0m"
_UNDERLINED, _NOT_UNDERLINED = "\x1b[4m", "\x1b[24m"


def format_example(
    tokenizer: PreTrainedTokenizerFast, tokens: np.ndarray, loss_mask: np.ndarray, color: bool
) -> str:
    """The text of an example with the trained part marked.

    Args:
        tokenizer: that encoded it.
        tokens: int `[len]`.
        loss_mask: `[len]`, 1 on tokens the model is trained to produce.
        color: for a terminal: mark the trained part green, and underline special tokens, which
            tells them from text that spells them; else put the trained part in `[[` and `]]`.
    """
    opening, closing = (_GREEN, _PLAIN) if color else ("[[", "]]")
    special = np.isin(tokens, tokenizer.all_special_ids) & color
    changes = np.flatnonzero(np.diff(loss_mask) | np.diff(special)) + 1
    text, shown = "", []
    trained = False
    for start, end in itertools.pairwise([0, *changes.tolist(), len(tokens)]):
        # Decoded from the beginning: a tokenizer drops the space before the first word it sees.
        longer = tokenizer.decode(tokens[:end], clean_up_tokenization_spaces=False)
        piece, text = longer[len(text) :], longer
        if loss_mask[start] != trained:
            trained = not trained
            shown.append(opening if trained else closing)
        shown.append(f"{_UNDERLINED}{piece}{_NOT_UNDERLINED}" if special[start] else piece)
    return "".join(shown) + (closing if trained else "")


def format_pair(tokenizer: PreTrainedTokenizerFast, pairs: Pairs, index: int, color: bool) -> str:
    """The texts of both sequences of a pair with the scored parts marked, as in `format_example`.

    Args:
        tokenizer: that encoded them.
        pairs: encoded pairs.
        index: of the pair.
        color: for a terminal.
    """
    lines = []
    for name, number in (("chosen", 2 * index), ("rejected", 2 * index + 1)):
        example = pairs.sequences.example(number)
        lines += [f"{name}:", format_example(tokenizer, *example, color=color)]
    return "\n".join(lines)
