"""One raw row to a prompt with two answers, or to the list of everything that is wrong with it."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from easylm.data.rows import Form
from easylm.data.turns import (
    CALLS,
    MESSAGES,
    SHAREGPT,
    Conversation,
    Problem,
    Spelling,
    check_order,
    lost_calls,
    read_list,
    read_system,
    read_text,
    read_turn,
    shorten,
    show,
    unused_turn_fields,
)

_SIDES = ("chosen", "rejected")
_FORMS = (
    "'chosen' + 'rejected', either as whole conversations or as answers to a 'prompt' or to "
    "'conversations'"
)
# A float32 holds no more.
_LARGEST_MARGIN = 3e38
# How Anthropic's preference data writes a conversation.
_TRANSCRIPT = "\n\nHuman:"
_SPEAKERS = {"Human": "user", "Assistant": "assistant"}


class PairRow(NamedTuple):
    """A valid pair.

    Attributes:
        prompt: the messages that both conversations begin with; the last one is the user's.
        chosen, rejected: the two answers of the assistant.
        margin: by how much the chosen one is better; NaN where the row does not say.
        where: its place, `file:line` or `path:row N`.
    """

    prompt: Conversation
    chosen: str
    rejected: str
    margin: float
    where: str

    @property
    def messages(self) -> Conversation:
        """Every text once: the prompt and both answers."""
        return [*self.conversation(self.chosen), _assistant(self.rejected)]

    def conversation(self, answer: str) -> Conversation:
        """The prompt with an answer."""
        return [*self.prompt, _assistant(answer)]


def _assistant(answer: str) -> dict[str, str]:
    return {"role": "assistant", "content": answer}


class _Turns(NamedTuple):
    """Messages of a row, the place of each in it, and what is wrong with them."""

    messages: Conversation
    places: list[str]
    problems: list[Problem]


def read_pair(row: Any, where: str) -> tuple[PairRow | None, list[Problem]]:
    """A row as a pair of conversations that share all but their last message.

    `chosen` and `rejected` are whole conversations, as lists of messages or as texts in which
    `\\n\\nHuman:` and `\\n\\nAssistant:` begin the turns; or they are answers, as
    texts, messages or lists of messages, to what is in `prompt` (a text or a list of messages) or
    `conversations` (of `from` and `value`).
    `margin`, a number, may say by how much the chosen one is better. The rest is as in
    `easylm.data.rows.normal_form`.

    Returns:
        The pair and no problems, or None and the problems.
    """
    problems = _check_fields(row)
    if problems:
        return None, problems
    prompt = _read_prompt(row) if _answers(row) else _Turns([], [], [])
    read = [_read_side(row[side], side) for side in _SIDES]
    margin, wrong = _margin(row)
    problems = [*lost_calls(row, ""), *prompt.problems]
    problems += [problem for side in read for problem in side.problems] + wrong
    if problems:
        return None, problems
    chosen, rejected = (_joined(prompt, side) for side in read)
    system, problems = read_system(row, chosen.messages)
    # What is wrong with what both share is said once.
    problems += dict.fromkeys([*_check_turns(chosen), *_check_turns(rejected)])
    problems = problems or _compare(chosen, rejected) or _check_prompt_beside(row, chosen.messages)
    if problems:
        return None, problems
    *shared, answer = chosen.messages
    other = rejected.messages[-1]
    pair = PairRow([*system, *shared], answer["content"], other["content"], margin, where)
    return pair, []


def unused_fields(row: dict[str, Any]) -> set[str]:
    """The fields of a valid row that its pair has nothing of: `id`, `chosen[].name`."""
    used = {*_SIDES, *CALLS, "system", "margin"}
    fields = [*_SIDES]
    if _answers(row):
        fields += _prompts(row)
    elif isinstance(row.get("prompt"), list) or _says(row, row.get("prompt")):
        used.add("prompt")
    unused = {
        name
        for name, value in row.items()
        if name not in used and name not in fields and value is not None
    }
    for field in fields:
        turns, each = (row[field], "[]") if isinstance(row[field], list) else ([row[field]], "")
        for turn in turns:
            if isinstance(turn, dict):
                unused |= unused_turn_fields(turn, _spelling(turn), f"{field}{each}")
    return unused


PAIRS = Form("pairs", read_pair, unused_fields)


def _check_fields(row: Any) -> list[Problem]:
    """Whether the row has two answers of one kind, and what they answer."""
    if not isinstance(row, dict):
        return [Problem("not an object", "row", show(row), f"a JSON object with {_FORMS}")]
    fields = shorten(f"fields {', '.join(map(repr, row)) or 'none'}")
    missing = [side for side in _SIDES if row.get(side) is None]
    if len(missing) == 2:
        return [Problem("no known form", "row", fields, _FORMS)]
    if missing:
        found = "null" if missing[0] in row else fields.replace("fields", "missing beside")
        return [Problem("answer is missing", missing[0], found, "an answer in both")]
    whole = [_is_whole(row[side]) for side in _SIDES]
    if whole[0] != whole[1]:
        kinds = ("an answer alone", "a whole conversation")
        found = f"{kinds[whole[1]]} beside {kinds[whole[0]]} in 'chosen'"
        return [Problem("answers of two kinds", "rejected", found, "the same in both")]
    if len(_prompts(row)) > 1 and _answers(row):
        wanted = "one of 'prompt' and 'conversations'"
        return [Problem("several prompts", "row", fields, wanted)]
    if not whole[0] and not _prompts(row):
        wanted = "what they answer in 'prompt' or 'conversations', or whole conversations in both"
        return [Problem("prompt is missing", "row", fields, wanted)]
    return []


def _prompts(row: dict) -> list[str]:
    """The fields with what is answered, where 'chosen' and 'rejected' are answers alone."""
    return [name for name in ("prompt", "conversations") if row.get(name) is not None]


def _answers(row: dict) -> bool:
    """Whether 'chosen' and 'rejected' are answers alone."""
    return not _is_whole(row["chosen"])


def _is_whole(side: Any) -> bool:
    """Whether it is a conversation from its first turn on."""
    if isinstance(side, str):
        return side.startswith(_TRANSCRIPT)
    if not isinstance(side, list):
        return False
    if not side or not isinstance(side[0], dict):
        return True
    spelling = _spelling(side[0])
    role = side[0].get(spelling.role)
    return not isinstance(role, str) or spelling.roles.get(role) != "assistant"


def _margin(row: dict) -> tuple[float, list[Problem]]:
    margin = row.get("margin")
    if margin is None:
        return math.nan, []
    is_number = isinstance(margin, int | float) and not isinstance(margin, bool)
    if not is_number or not abs(margin) < _LARGEST_MARGIN:  # NaN is not below either
        return math.nan, [Problem("margin is no number", "margin", show(margin), "a finite number")]
    return float(margin), []


def _read_prompt(row: dict) -> _Turns:
    [field] = _prompts(row)
    prompt = row[field]
    if not isinstance(prompt, str) or field == "conversations":
        return _read_list(prompt, field)
    if prompt.startswith(_TRANSCRIPT):
        return _read_transcript(re.sub(r"\n\nAssistant:\s*$", "", prompt), field)
    text, problem = read_text(row, field, field)
    return _Turns([{"role": "user", "content": text}], [field], [problem] if problem else [])


def _read_side(side: Any, field: str) -> _Turns:
    if isinstance(side, list):
        return _read_list(side, field)
    if isinstance(side, dict):
        messages, problems = read_turn(side, field, _spelling(side))
        return _Turns(messages, [field], problems)
    if isinstance(side, str) and side.startswith(_TRANSCRIPT):
        return _read_transcript(side, field)
    if not isinstance(side, str):
        wanted = "text, a message or a list of messages"
        return _Turns([], [], [Problem("answer is no text", field, show(side), wanted)])
    text, problem = read_text([side], 0, field)
    return _Turns([_assistant(text)], [field], [problem] if problem else [])


def _read_list(turns: Any, field: str) -> _Turns:
    first = turns[0] if isinstance(turns, list) and turns else None
    messages, problems = read_list(turns, field, _spelling(first), "at least one message")
    return _Turns(messages, [f"{field}[{index}]" for index in range(len(messages))], problems)


def _read_transcript(text: str, field: str) -> _Turns:
    _, *parts = re.split(rf"\n\n({'|'.join(_SPEAKERS)}):", text)
    speakers, texts = parts[::2], [text.strip() for text in parts[1::2]]
    places = [f"{field}, turn {number}" for number in range(1, len(texts) + 1)]
    checked = [read_text(texts, index, place) for index, place in enumerate(places)]
    messages = [
        {"role": _SPEAKERS[speaker], "content": content}
        for speaker, (content, _) in zip(speakers, checked, strict=True)
    ]
    return _Turns(messages, places, [problem for _, problem in checked if problem])


def _spelling(turn: Any) -> Spelling:
    is_sharegpt = isinstance(turn, dict) and SHAREGPT.role in turn
    return SHAREGPT if is_sharegpt else MESSAGES


def _joined(prompt: _Turns, side: _Turns) -> _Turns:
    return _Turns([*prompt.messages, *side.messages], [*prompt.places, *side.places], [])


def _check_turns(side: _Turns) -> list[Problem]:
    problems = check_order(side.messages, side.places)
    role = side.messages[-1]["role"]
    if not problems and role != "assistant":
        reason = "last turn is not the assistant's"
        problems = [Problem(reason, side.places[-1], f"{role} last", "assistant")]
    return problems


def _compare(chosen: _Turns, rejected: _Turns) -> list[Problem]:
    """Whether both begin with the same prompt, and end with different answers.

    White space around a text does not count: templates strip it.
    """
    turns = [len(side.messages) for side in (chosen, rejected)]
    if turns[0] != turns[1]:
        found = f"{turns[1]} messages beside {turns[0]} in 'chosen'"
        return [Problem("prompts differ", "rejected", found, "the same messages before the answer")]
    texts = [[turn["content"].strip() for turn in side.messages] for side in (chosen, rejected)]
    for index, (text, other) in enumerate(zip(*texts, strict=True)):
        is_answer = index == turns[0] - 1
        if is_answer and text == other:
            found = f"the same as the answer of 'chosen', {show(other)}"
            return [Problem("equal answers", rejected.places[index], found, "another answer")]
        if not is_answer and text != other:
            common = common_length(text, other)
            found, wanted = (show(text[max(0, common - 20) :]) for text in (other, text))
            wanted = f"what {chosen.places[index]} says: {wanted}"
            return [Problem("prompts differ", rejected.places[index], found, wanted)]
    return []


def common_length(first: Sequence[Any], second: Sequence[Any]) -> int:
    """How many elements two sequences have in common from their beginning on."""
    differ = (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    return next(differ, min(len(first), len(second)))


def _check_prompt_beside(row: dict, messages: Conversation) -> list[Problem]:
    """Whether a list of messages in 'prompt' is what whole conversations begin with."""
    if _answers(row) or not isinstance(row.get("prompt"), list):
        return []
    read = _read_list(row["prompt"], "prompt")
    if not read.problems and _stripped(read.messages) == _stripped(messages[:-1]):
        return []
    wanted = "those before the last of 'chosen', or no 'prompt'"
    return [Problem("prompts differ", "prompt", "other messages", wanted)]


def _stripped(messages: Conversation) -> list[tuple[str, str]]:
    return [(turn["role"], turn["content"].strip()) for turn in messages]


def _says(row: dict, text: Any) -> bool:
    """Whether a conversation of the row says this text, so that nothing of it is lost."""
    turns = _read_side(row["chosen"], "chosen").messages
    return isinstance(text, str) and text.strip() in (turn["content"].strip() for turn in turns)
