"""One raw row to a conversation, or to the list of everything that is wrong with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from easylm.data.turns import (
    CALLS,
    MESSAGES,
    SHAREGPT,
    Conversation,
    Problem,
    check_order,
    check_unicode,
    lost_calls,
    read_list,
    read_system,
    read_text,
    read_texts,
    shorten,
    show,
    unused_turn_fields,
)

_FORMS = (
    "'messages', 'instruction' + 'output' [+ 'input'], 'prompt' + 'completion', or 'conversations'"
)


class Row(NamedTuple):
    """A valid conversation and its place, `file:line` or `path:row N`."""

    messages: Conversation
    where: str


class Form(NamedTuple):
    """What the rows of a source are.

    Attributes:
        name: of the form; what is stored under one is never taken for another.
        read: a value and its place to a row, or to None and everything that is wrong with it. A row
            has `where` and `messages`: all of its texts.
        unused_fields: of the value of a valid row, the fields that the row has nothing of.
    """

    name: str
    read: Callable[[Any, str], tuple[Any, list[Problem]]]
    unused_fields: Callable[[dict[str, Any]], set[str]]


def read_row(value: Any, where: str) -> tuple[Row | None, list[Problem]]:
    """A value as a conversation; see `normal_form`."""
    messages, problems = normal_form(value)
    return None if problems else Row(messages, where), problems


def normal_form(row: Any) -> tuple[Conversation, list[Problem]]:
    """Turns a row into messages.

    Rows are `messages` of `role` and `content`; `instruction` + `output` with an optional `input`,
    which follows the instruction after a blank line, and an optional `history` of pairs of user and
    assistant, which comes before; `prompt` + `completion`; or `conversations` of `from` (human,
    gpt, system) and `value`. A system message may come first, also as the field `system` of the
    row; then user and assistant take turns, user first. Fields that would change what the model
    learns, such as `tools`, are a problem.

    Returns:
        The messages, each with `role` and `content` alone, and the problems. The messages mean
        nothing unless the list of problems is empty.
    """
    if not isinstance(row, dict):
        problem = Problem("not an object", "row", show(row), f"a JSON object with {_FORMS}")
        return [], [problem]
    forms = _forms(row)
    if len(forms) != 1:
        found = shorten(f"fields {', '.join(map(repr, row)) or 'none'}")
        reason = "several forms in one row" if forms else "no known form"
        return [], [Problem(reason, "row", found, f"exactly one of {_FORMS}")]
    messages, problems = _FORM_READERS[forms[0]](row)
    system, wrong = read_system(row, messages)
    return [*system, *messages], [*lost_calls(row, ""), *problems, *wrong]


def unused_fields(row: dict[str, Any]) -> set[str]:
    """The fields of a valid row that its conversation has nothing of: `id`, `messages[].name`.

    Fields that are null or empty where they would be a problem say nothing, and are not named.
    """
    [form] = _forms(row)
    used = {*form, *CALLS, "system", *(("input", "history") if "instruction" in form else ())}
    unused = {name for name, value in row.items() if name not in used and value is not None}
    if form[0] in _SPELLINGS:
        for turn in row[form[0]]:
            unused |= unused_turn_fields(turn, _SPELLINGS[form[0]], f"{form[0]}[]")
    return unused


def _forms(row: dict) -> list[tuple[str, ...]]:
    # A row may carry fields of its own, such as the prompt beside the messages that contain it.
    complete = [form for form in _FORM_READERS if all(name in row for name in form)]
    if len(complete) > 1:
        # A table holds null where a row lacks the fields of another's form.
        complete = [form for form in complete if any(row[name] is not None for name in form)]
    return complete or [form for form in _FORM_READERS if form[0] in row]


def _from_messages(row: dict) -> tuple[Conversation, list[Problem]]:
    return _from_turns(row, "messages")


def _from_conversations(row: dict) -> tuple[Conversation, list[Problem]]:
    return _from_turns(row, "conversations")


def _from_turns(row: dict, field: str) -> tuple[Conversation, list[Problem]]:
    messages, problems = read_list(row[field], field, _SPELLINGS[field])
    if problems:
        return messages, problems
    problems = check_order(messages, [f"{field}[{index}]" for index in range(len(messages))])
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        found = f"roles {', '.join(roles)}"
        problems.append(Problem("no assistant turn", field, found, "an assistant message"))
    return messages, problems


def _from_instruction(row: dict) -> tuple[Conversation, list[Problem]]:
    texts, problems = read_texts(row, ("instruction", "output"))
    context = row.get("input")
    if context is not None and not isinstance(context, str):
        wanted = "text, an empty string or null"
        problems.append(Problem("text is not a string", "input", show(context), wanted))
    elif context and (problem := check_unicode(context, "input")):
        problems.append(problem)
    history, wrong = _history(row.get("history"))
    problems += wrong
    if problems:
        return [], problems
    instruction = texts["instruction"]
    if context and context.strip():
        instruction = f"{instruction.strip()}\n\n{context.strip()}"
    return [*history, *_pair(instruction, texts["output"])], []


def _history(pairs: Any) -> tuple[Conversation, list[Problem]]:
    """The turns before an instruction: `[[user, assistant], ...]`."""
    wanted = "a list of [user, assistant]"
    if pairs is None or pairs == "":
        return [], []
    if not isinstance(pairs, list):
        return [], [Problem("history is not a list", "history", show(pairs), wanted)]
    messages, problems = [], []
    for index, pair in enumerate(pairs):
        where = f"history[{index}]"
        if not isinstance(pair, list) or len(pair) != 2:
            found = f"a list of {len(pair)}" if isinstance(pair, list) else show(pair)
            problems.append(Problem("no pair in history", where, found, "[user, assistant]"))
            continue
        texts, wrong = zip(*(read_text(pair, i, f"{where}[{i}]") for i in (0, 1)), strict=True)
        problems += filter(None, wrong)
        messages += _pair(*texts)
    return messages, problems


def _from_prompt(row: dict) -> tuple[Conversation, list[Problem]]:
    texts, problems = read_texts(row, ("prompt", "completion"))
    return ([], problems) if problems else (_pair(texts["prompt"], texts["completion"]), [])


# Of the forms that list turns: how they are written.
_SPELLINGS = {"messages": MESSAGES, "conversations": SHAREGPT}
_FORM_READERS: dict[tuple[str, ...], Callable[[dict], tuple[Conversation, list[Problem]]]] = {
    ("messages",): _from_messages,
    ("conversations",): _from_conversations,
    ("instruction", "output"): _from_instruction,
    ("prompt", "completion"): _from_prompt,
}
CONVERSATIONS = Form("conversations", read_row, unused_fields)


def _pair(user: str, assistant: str) -> Conversation:
    return [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
