"""An encoded example as a person reads it."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_GREEN, _PLAIN = "\x1b[32m", "\x1b[0m"


def format_example(
    tokenizer: PreTrainedTokenizerFast, tokens: np.ndarray, loss_mask: np.ndarray, color: bool
) -> str:
    """The text of an example with the trained part marked.

    Args:
        tokenizer: that encoded it.
        tokens: int `[len]`.
        loss_mask: `[len]`, 1 on tokens the model is trained to produce.
        color: mark the trained part green, for a terminal; else put it in `[[` and `]]`.
    """
    opening, closing = (_GREEN, _PLAIN) if color else ("[[", "]]")
    seams = [0, *(np.flatnonzero(np.diff(loss_mask)) + 1).tolist(), len(tokens)]
    text, shown = "", []
    for start, end in itertools.pairwise(seams):
        # Decoded from the beginning: a tokenizer drops the space before the first word it sees.
        longer = tokenizer.decode(tokens[:end], clean_up_tokenization_spaces=False)
        piece, text = longer[len(text) :], longer
        shown.append(f"{opening}{piece}{closing}" if loss_mask[start] else piece)
    return "".join(shown)
