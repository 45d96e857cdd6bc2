"""Conversations to token ids and loss masks, exactly as `apply_chat_template` writes them.

A conversation is rendered by the tokenizer's own chat template and tokenized once, so the training
ids are the ids that inference sees. The template says what the assistant produces, either with
`{% generation %}` or by being a prefix code: the text of the first turns plus the generation prompt
is how the text of one turn more begins.
"""

from __future__ import annotations

import bisect
import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from easylm.errors import InputError

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer
    from transformers import PreTrainedTokenizerFast

Message = Mapping[str, str]
Spans = list[tuple[int, int]]

# The Tülu format of Wang et al. 2023, arXiv:2306.04751. Contents are stripped and the last turn
# ends at the end-of-sequence token: a rendered conversation never ends in white space.
TULU = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}"
    "{{ '<|system|>\\n' + message['content'] | trim }}"
    "{% elif message['role'] == 'user' %}"
    "{{ '<|user|>\\n' + message['content'] | trim }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ '<|assistant|>\\n' }}"
    "{% generation %}{{ message['content'] | trim + eos_token }}{% endgeneration %}"
    "{% else %}{{ raise_exception('unknown role: ' + message['role']) }}"
    "{% endif %}"
    "{% if not loop.last or add_generation_prompt %}{{ '\\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)

# Unicode noncharacters, reserved for a program's internal use: no text may contain them.
_LITERAL = "\ufdd0"
_SPECIAL = "\ufdd1"


def encode_messages(
    tokenizer: PreTrainedTokenizerFast, messages: Sequence[Message]
) -> tuple[np.ndarray, np.ndarray]:
    """Encodes one conversation; see `encode_conversations`."""
    return encode_conversations(tokenizer, [messages])[0]


def encode_conversations(
    tokenizer: PreTrainedTokenizerFast, conversations: Sequence[Sequence[Message]]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Encodes conversations for training.

    The ids equal `tokenizer.apply_chat_template(messages)`, with one exception: where a content
    spells a special token (a user writes `</s>`), it is encoded as ordinary text.

    Args:
        tokenizer: a fast tokenizer with a chat template.
        conversations: for each, messages with `role` and `content`.

    Returns:
        For each conversation `(tokens, loss_mask)`: int32 `[len]`, and uint8 `[len]` that is 1 on
        the tokens the assistant produces, end of turn included.

    Raises:
        InputError: the template cannot render a conversation or does not say what the assistant
            produces, or the beginning-of-sequence token would stand twice.
    """
    special = _special_text(tokenizer)
    encoded: list[tuple[np.ndarray, np.ndarray] | None] = [None] * len(conversations)
    ordinary, texts, spans = [], [], []
    for index, messages in enumerate(conversations):
        if any(special.search(message["content"]) for message in messages):
            encoded[index] = _encode_literally(tokenizer, special, messages)
            continue
        text, produced = render(tokenizer, messages)
        ordinary.append(index)
        texts.append(text)
        spans.append(produced)
    if texts:
        encodings = tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, verbose=False
        ).encodings
        for index, encoding, produced in zip(ordinary, encodings, spans, strict=True):
            encoded[index] = (np.array(encoding.ids, np.int32), _mask(encoding, produced))
    for tokens, _ in encoded:
        if len(tokens) > 1 and tokens[0] == tokens[1] == tokenizer.bos_token_id:
            raise InputError(
                f"the chat template writes the beginning-of-sequence token "
                f"{tokenizer.bos_token!r} twice; remove one from the template"
            )
    return encoded


def render(tokenizer: PreTrainedTokenizerFast, messages: Sequence[Message]) -> tuple[str, Spans]:
    """Renders a conversation.

    Returns:
        The text of the conversation, and the `(start, end)` character ranges in it that the
        assistant produces.

    Raises:
        InputError: as in `encode_conversations`.
    """
    if tokenizer.chat_template is None:
        raise InputError("the tokenizer has no chat template; load it with chat_template='tulu'")
    if re.search(r"{%-?\s*generation\s*-?%}", tokenizer.get_chat_template()):
        return _render(tokenizer, messages, return_assistant_tokens_mask=True)
    return _render_by_prefix(tokenizer, messages)


def _render(tokenizer, messages, **options) -> tuple[str, Spans]:
    import jinja2
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        texts, spans = render_jinja_template(
            conversations=[messages],
            chat_template=tokenizer.get_chat_template(),
            **tokenizer.special_tokens_map,
            **options,
        )
    except jinja2.TemplateError as error:
        raise InputError(f"the chat template refuses this conversation: {error}") from error
    return texts[0], [tuple(span) for span in spans[0]] if spans else []


def _render_by_prefix(tokenizer, messages) -> tuple[str, Spans]:
    text, _ = _render(tokenizer, messages)
    special = _special_text(tokenizer)
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, _ = _render(tokenizer, messages[:index], add_generation_prompt=True)
        after, _ = _render(tokenizer, messages[: index + 1])
        if not (text.startswith(after) and after.startswith(before)):
            raise InputError(
                f"the chat template does not say what the assistant produces: it has no "
                f"{{% generation %}} block, and the text up to message {index + 1} changes when "
                f"more follows. Add {{% generation %}} around the assistant's content and end of "
                f"turn, or use chat_template='tulu'"
            )
        # What follows the end-of-turn token belongs to the template, not to the assistant.
        produced = after[len(before) :]
        stripped = produced.rstrip()
        ends = [match.end() for match in special.finditer(stripped)]
        if ends and ends[-1] == len(stripped):
            produced = stripped
        spans.append((len(before), len(before) + len(produced)))
    return text, spans


def _mask(encoding: Encoding, spans: Spans) -> np.ndarray:
    mask = np.zeros(len(encoding.ids), np.uint8)
    for start, end in spans:
        # A character that the tokenizer's normalizer drops has no token.
        inside = (encoding.char_to_token(char) for char in range(start, end))
        first = next((token for token in inside if token is not None), None)
        if first is None:
            continue
        inside = (encoding.char_to_token(char) for char in range(end - 1, start - 1, -1))
        last = next(token for token in inside if token is not None)
        # Several tokens may spell one character (bytes of an emoji): take all of the last one.
        offset = encoding.token_to_chars(last)
        while last + 1 < len(mask) and encoding.token_to_chars(last + 1) == offset:
            last += 1
        mask[first : last + 1] = 1
    return mask


@functools.lru_cache(maxsize=8)
def _special_text(tokenizer: PreTrainedTokenizerFast) -> re.Pattern[str]:
    """Matches every spelling of a special token, the longest first."""
    spellings = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
    longest_first = sorted(spellings, key=lambda spelling: (-len(spelling), spelling))
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


@functools.lru_cache(maxsize=2)
def _respelled(tokenizer: PreTrainedTokenizerFast) -> tuple[Tokenizer, dict[str, str], np.ndarray]:
    """The same tokenizer with its special tokens under spellings that no text contains.

    Returns:
        The tokenizer, the map from spelling to new spelling, and an int32 table that takes its ids
        to the ids of `tokenizer`.
    """
    from tokenizers import Tokenizer

    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["post_processor"] = state["truncation"] = state["padding"] = None
    spellings, ids = {}, {}
    for token in state["added_tokens"]:
        if token["special"]:
            spelling = f"{_SPECIAL}{token['id']}{_SPECIAL}"
            spellings[token["content"]], ids[spelling] = spelling, token["id"]
            token["content"] = spelling
    respelled = Tokenizer.from_str(json.dumps(state))
    table = np.arange(max(respelled.get_vocab().values()) + 1, dtype=np.int32)
    for spelling, token_id in ids.items():
        table[respelled.token_to_id(spelling)] = token_id
    return respelled, spellings, table


def _encode_literally(tokenizer, special, messages) -> tuple[np.ndarray, np.ndarray]:
    """Encodes a conversation whose contents spell special tokens, as text and not as tokens.

    The text goes through one tokenizer call like any other, so that no seam changes its ids: only
    the special tokens that the template writes carry the spelling of the respelled tokenizer.
    """
    marked = []
    for message in messages:
        if _LITERAL in message["content"] or _SPECIAL in message["content"]:
            raise InputError("the content has a Unicode noncharacter, U+FDD0 or U+FDD1; remove it")
        content = special.sub(lambda m: f"{_LITERAL}{m[0]}{_LITERAL}", message["content"])
        marked.append({**message, "content": content})
    text, spans = render(tokenizer, marked)

    respelled, spellings, table = _respelled(tokenizer)
    pieces: list[str] = []
    seams, shifts = [0], [0]  # shifts[i]: new minus old position, from character seams[i] on
    position = 0
    either = re.compile(f"{_LITERAL}({special.pattern}){_LITERAL}|{special.pattern}")
    for match in either.finditer(text):
        replacement = match[1] or spellings[match[0]]
        pieces += [text[position : match.start()], replacement]
        position = match.end()
        seams.append(position)
        shifts.append(shifts[-1] + len(replacement) - len(match[0]))
    pieces.append(text[position:])

    def moved(char: int) -> int:
        return char + shifts[bisect.bisect_right(seams, char) - 1]

    encoding = respelled.encode("".join(pieces), add_special_tokens=False)
    mask = _mask(encoding, [(moved(start), moved(end)) for start, end in spans])
    return table[encoding.ids], mask
