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
    tokenizer: PreTrainedTokenizerFast,
    conversations: Sequence[Sequence[Message]],
    *,
    eos_newline: str = "keep",
    special_tokens: str = "text",
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Encodes conversations for training.

    The ids equal `tokenizer.apply_chat_template(messages)`, with one exception by default: where a
    content spells a special token (a user writes `</s>`), it is encoded as ordinary text.

    Args:
        tokenizer: a fast tokenizer with a chat template.
        conversations: for each, messages with `role` and `content`.
        eos_newline: `keep`, or `strip` for the ids that Tülu 2 was trained on: white space beside
            special tokens vanishes, as in the slow LLaMA tokenizer of transformers 4.31 and in
            EasyLM's. Inference by the exported template has a newline after `</s>`, then.
        special_tokens: `text`, or `parse`, which makes spellings of special tokens in contents the
            tokens, as `apply_chat_template` does.

    Returns:
        For each conversation `(tokens, loss_mask)`: int32 `[len]`, and uint8 `[len]` that is 1 on
        the tokens the assistant produces, end of turn included.

    Raises:
        InputError: the template cannot render a conversation or does not say what the assistant
            produces, the beginning-of-sequence token would stand twice, or `eos_newline` is `strip`
            where it has no meaning, as in `check_eos_newline`.
    """
    check_eos_newline(tokenizer, eos_newline)
    if special_tokens not in ("text", "parse"):
        raise InputError(f"special_tokens: found {special_tokens!r}; wanted 'text' or 'parse'")
    special = _special_text(tokenizer)
    marked: list[Sequence[Message]] = []
    literal = []
    for index, messages in enumerate(conversations):
        if special_tokens == "text" and any(special.search(m["content"]) for m in messages):
            messages = _mark_literal(special, messages)
            literal.append(index)
        marked.append(messages)
    rendered = render(tokenizer, marked)
    if eos_newline == "strip":
        rendered = [_strip_beside(special, text, spans) for text, spans in rendered]
    encoded = _tokenize(tokenizer.backend_tokenizer, rendered)
    for index in literal:
        encoded[index] = _tokenize_marked(tokenizer, special, *rendered[index])
    for tokens, _ in encoded:
        if len(tokens) > 1 and tokens[0] == tokens[1] == tokenizer.bos_token_id:
            raise InputError(
                f"the chat template writes the beginning-of-sequence token "
                f"{tokenizer.bos_token!r} twice; remove one from the template"
            )
    return encoded


def encode_prompt(tokenizer: PreTrainedTokenizerFast, messages: Sequence[Message]) -> np.ndarray:
    """Encodes a conversation and the generation prompt after it: what an answer follows.

    Returns:
        int32 `[len]`. Text that spells special tokens is ordinary text, as in training.

    Raises:
        InputError: the tokenizer has no chat template, or it cannot render the messages.
    """
    if tokenizer.chat_template is None:
        raise InputError("the tokenizer has no chat template; load it with chat_template='tulu'")
    special = _special_text(tokenizer)
    literal = any(special.search(message["content"]) for message in messages)
    if literal:
        messages = _mark_literal(special, messages)
    [(text, _)] = _render(tokenizer, [messages], add_generation_prompt=True)
    if literal:
        return _tokenize_marked(tokenizer, special, text, [])[0]
    return _tokenize(tokenizer.backend_tokenizer, [(text, [])])[0][0]


def stop_tokens(
    tokenizer: PreTrainedTokenizerFast, eos_token_id: int | tuple[int, ...] | None
) -> int | tuple[int, ...]:
    """The ids that end an answer, as the config of the model to train names them.

    A model may name several (Llama 3: end of text and end of turn). They stay if the tokenizer's
    end-of-sequence token is among them; else it takes their place. The token that ends the
    assistant's turns in the chat template is added: it is what the model learns to end with.

    Args:
        tokenizer: with the chat template to train on.
        eos_token_id: of the model to start from; None for a new one.

    Raises:
        InputError: the template cannot render a question and its answer, or trains none of it.
    """
    known = eos_token_id if isinstance(eos_token_id, tuple) else (eos_token_id,)
    stops = list(known) if tokenizer.eos_token_id in known else [tokenizer.eos_token_id]
    turns = [{"role": "user", "content": "Well?"}, {"role": "assistant", "content": "Well."}]
    tokens, mask = encode_messages(tokenizer, turns)
    if not mask.any():
        raise InputError(
            "the chat template marks nothing that the assistant says as produced by it; put "
            "{% generation %} around the assistant's content and end of turn, or use "
            "chat_template='tulu'"
        )
    last = int(tokens[mask == 1][-1])
    is_special = _special_text(tokenizer).fullmatch(tokenizer.convert_ids_to_tokens(last))
    if is_special and last not in stops:
        stops.append(last)
    return stops[0] if len(stops) == 1 else tuple(stops)


def check_eos_newline(tokenizer: PreTrainedTokenizerFast, eos_newline: str) -> None:
    """Checks that `encode_conversations` can do what is asked of it at ends of turns.

    Raises:
        InputError: `eos_newline` is none of its values, or `strip` with another chat template than
            Tülu's or a tokenizer that is not like LLaMA's of sentencepiece.
    """
    if eos_newline == "keep":
        return
    if eos_newline != "strip":
        raise InputError(f"data.eos_newline: found {eos_newline!r}; wanted 'keep' or 'strip'")
    if tokenizer.chat_template != TULU:
        found = "a chat template that is not Tülu's"
    elif not _is_like_llamas(tokenizer):
        found = "a tokenizer that is not LLaMA's of sentencepiece or like it"
    else:
        return
    raise InputError(
        f"data.eos_newline: found 'strip' with {found}; wanted 'keep': strip repeats what the "
        f"LLaMA tokenizer did with the Tülu template when Tülu 2 was trained"
    )


def _is_like_llamas(tokenizer) -> bool:
    """Whether text after a special token is encoded as if it stood alone, newlines as a byte."""
    after = tokenizer.tokenize(f"{tokenizer.eos_token}<|\n|")
    alone = tokenizer.tokenize("<|\n|")
    return after == [tokenizer.eos_token, *alone] and alone[0].startswith("▁") and "<0x0A>" in alone


def render(
    tokenizer: PreTrainedTokenizerFast, conversations: Sequence[Sequence[Message]]
) -> list[tuple[str, Spans]]:
    """Renders conversations.

    Returns:
        For each, its text and the `(start, end)` character ranges in it that the assistant
        produces.

    Raises:
        InputError: as in `encode_conversations`.
    """
    if tokenizer.chat_template is None:
        raise InputError("the tokenizer has no chat template; load it with chat_template='tulu'")
    if tokenizer.chat_template == TULU:
        return [_render_tulu(tokenizer, messages) for messages in conversations]
    if re.search(r"{%-?\s*generation\s*-?%}", tokenizer.get_chat_template()):
        return _render(tokenizer, conversations, return_assistant_tokens_mask=True)
    return [_render_by_prefix(tokenizer, messages) for messages in conversations]


def _render_tulu(tokenizer, messages) -> tuple[str, Spans]:
    """What jinja makes of `TULU`, which takes it a third of the time of tokenizing a short text."""
    pieces, spans = [tokenizer.bos_token or ""], []
    length = len(pieces[0])
    for index, message in enumerate(messages):
        role, content = message["role"], message["content"].strip()
        if role not in ("system", "user", "assistant"):
            raise InputError(f"the chat template refuses this conversation: unknown role: {role}")
        header = f"\n<|{role}|>\n" if index else f"<|{role}|>\n"
        if role == "assistant":
            content += tokenizer.eos_token
            start = length + len(header)
            spans.append((start, start + len(content)))
        pieces += [header, content]
        length += len(header) + len(content)
    return "".join(pieces), spans


def _render(tokenizer, conversations, **options) -> list[tuple[str, Spans]]:
    import jinja2
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        texts, spans = render_jinja_template(
            conversations=conversations,
            chat_template=tokenizer.get_chat_template(),
            **tokenizer.special_tokens_map,
            **options,
        )
    except jinja2.TemplateError as error:
        raise InputError(f"the chat template refuses this conversation: {error}") from error
    return list(zip(texts, spans or [[]] * len(texts), strict=True))


def _render_by_prefix(tokenizer, messages) -> tuple[str, Spans]:
    [(text, _)] = _render(tokenizer, [messages])
    special = _special_text(tokenizer)
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        [(before, _)] = _render(tokenizer, [messages[:index]], add_generation_prompt=True)
        [(after, _)] = _render(tokenizer, [messages[: index + 1]])
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


def _tokenize(
    backend: Tokenizer, rendered: Sequence[tuple[str, Spans]]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Token ids and masks of texts, special tokens where the texts spell them and nowhere else."""
    backend.no_truncation()
    backend.no_padding()
    encodings = backend.encode_batch([text for text, _ in rendered], add_special_tokens=False)
    return [
        (np.array(encoding.ids, np.int32), _mask(encoding, spans))
        for encoding, (_, spans) in zip(encodings, rendered, strict=True)
    ]


def _mask(encoding: Encoding, spans: Spans) -> np.ndarray:
    mask = np.zeros(len(encoding), np.uint8)
    for start, end in spans:
        # A character that the tokenizer's normalizer drops has no token.
        while start < end and (first := encoding.char_to_token(start)) is None:
            start += 1
        if start == end:
            continue
        while (last := encoding.char_to_token(end - 1)) is None:
            end -= 1
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


def _mark_literal(special: re.Pattern[str], messages: Sequence[Message]) -> list[Message]:
    """The messages with every special token that a content spells between two marks."""
    marked = []
    for message in messages:
        if _LITERAL in message["content"] or _SPECIAL in message["content"]:
            raise InputError("the content has a Unicode noncharacter, U+FDD0 or U+FDD1; remove it")
        content = special.sub(lambda m: f"{_LITERAL}{m[0]}{_LITERAL}", message["content"])
        marked.append({**message, "content": content})
    return marked


def _tokenize_marked(tokenizer, special, text, spans) -> tuple[np.ndarray, np.ndarray]:
    """Encodes a text with special tokens between marks, which become text and not tokens.

    The text goes through one tokenizer call like any other, so that no seam changes its ids: only
    the special tokens that the template writes carry the spelling of the respelled tokenizer.
    """
    respelled, spellings, table = _respelled(tokenizer)
    either = re.compile(f"{_LITERAL}({special.pattern}){_LITERAL}|{special.pattern}")
    edits = [
        (match.start(), match.end(), match[1] or spellings[match[0]])
        for match in either.finditer(text)
    ]
    [(tokens, mask)] = _tokenize(respelled, [_edit(text, spans, edits)])
    return table[tokens], mask


def _strip_beside(special: re.Pattern[str], text: str, spans: Spans) -> tuple[str, Spans]:
    """Takes away the white space on both sides of special tokens; marked ones keep theirs."""
    edits = []
    end = 0  # of the last edit
    for match in special.finditer(text):
        before, after = match.span()
        while before > end and text[before - 1].isspace():
            before -= 1
        while after < len(text) and text[after].isspace():
            after += 1
        edits += [(before, match.start(), ""), (match.end(), after, "")]
        end = after
    return _edit(text, spans, edits)


def _edit(text: str, spans: Spans, edits: Sequence[tuple[int, int, str]]) -> tuple[str, Spans]:
    """Replaces `(start, end, new text)`, given in order, and moves the spans accordingly."""
    pieces: list[str] = []
    seams, shifts = [0], [0]  # shifts[i]: new minus old position, from character seams[i] on
    for start, end, new in edits:
        pieces += [text[seams[-1] : start], new]
        seams.append(end)
        shifts.append(shifts[-1] + len(new) - (end - start))
    pieces.append(text[seams[-1] :])

    def moved(char: int) -> int:
        return char + shifts[bisect.bisect_right(seams, char) - 1]

    return "".join(pieces), [(moved(start), moved(end)) for start, end in spans]
