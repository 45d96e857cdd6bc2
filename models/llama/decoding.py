"""What a generator is asked and what it answers; see `generate.py` for how."""

import dataclasses
from typing import Literal, NamedTuple

from easylm.errors import InputError
from easylm.models.llama.config import LlamaConfig


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How prompts are continued.

    Attributes:
      max_new_tokens: a completion ends after so many, or at the model's last position.
      stop_ids: tokens that end a completion; they are no part of it.
      temperature: 0 takes the likeliest token; above, tokens are drawn, logits divided by it.
      top_p: tokens are drawn from the nucleus of this mass; 1 is all.
      seed: of the draws; together with the prompt's index it decides them.
    """

    max_new_tokens: int
    stop_ids: tuple[int, ...] = ()
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


class Completion(NamedTuple):
    """What follows a prompt, and whether a stop token or the length ended it."""

    tokens: list[int]
    finish_reason: Literal["stop", "length"]


def check_prompt(config: LlamaConfig, length: int, where: str) -> None:
    """Refuses a prompt of `length` tokens that is empty or leaves no position for an answer.

    Raises:
      InputError: as said; `where` names the prompt.
    """
    positions = config.max_position_embeddings
    if not 0 < length < positions:
        raise InputError(
            f"{where}: found {length:,} tokens; wanted 1 to {positions - 1:,}, for the model has "
            f"{positions:,} positions (max_position_embeddings) and an answer needs one"
        )
