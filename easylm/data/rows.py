"""One raw row to a conversation, or to the list of everything that is wrong with it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

Conversation = list[dict[str, str]]

_ROLES = ("system", "user", "assistant")
_SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
}
_FORMS = (
    "'messages', 'instruction' + 'output' [+ 'input'], 'prompt' + 'completion', or 'conversations'"
)

# Fields that say what a text alone does not: the model would learn from half of the conversation.
CALLS = ("tools", "functions", "tool_calls", "function_call")
# What makes a trainer leave out some of the assistant's messages.
_TRAINED = ("weight", "train")


class Problem(NamedTuple):
    """What is wrong with a row: `reason` is what problems are counted by."""

    reason: str
    field: str
    found: str
    wanted: str

    def __str__(self) -> str:
        return f"{self.field}: {self.found}; wanted {self.wanted}"


# What a reader of a source yields: `(where, value, None)`, or `(where, None, problem)` for what
# cannot be read as a value.
Values = Iterator[tuple[str, Any, Problem | None]]


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
        problem = Problem("not an object", "row", _show(row), f"a JSON object with {_FORMS}")
        return [], [problem]
    forms = _forms(row)
    if len(forms) != 1:
        found = _shorten(f"fields {', '.join(map(repr, row)) or 'none'}")
        reason = "several forms in one row" if forms else "no known form"
        return [], [Problem(reason, "row", found, f"exactly one of {_FORMS}")]
    messages, problems = _FORM_READERS[forms[0]](row)
    problems = [*_lost_calls(row, ""), *problems]
    system, problem = _system(row, messages)
    if problem:
        problems.append(problem)
    return [*system, *messages], problems


def unused_fields(row: dict[str, Any]) -> set[str]:
    """The fields of a valid row that its conversation has nothing of: `id`, `messages[].name`.

    Fields that are null or empty where they would be a problem say nothing, and are not named.
    """
    [form] = _forms(row)
    used = {*form, *CALLS, "system", *(("input", "history") if "instruction" in form else ())}
    unused = {name for name, value in row.items() if name not in used and value is not None}
    if form[0] in _TURN_KEYS:
        used = {*_TURN_KEYS[form[0]], *CALLS, *_TRAINED}
        for turn in row[form[0]]:
            for name, value in turn.items():
                if name not in used and value is not None:
                    unused.add(f"{form[0]}[].{name}")
    return unused


def _forms(row: dict) -> list[tuple[str, ...]]:
    # A row may carry fields of its own, such as the prompt beside the messages that contain it.
    complete = [form for form in _FORM_READERS if all(name in row for name in form)]
    if len(complete) > 1:
        # A table holds null where a row lacks the fields of another's form.
        complete = [form for form in complete if any(row[name] is not None for name in form)]
    return complete or [form for form in _FORM_READERS if form[0] in row]


def _lost_calls(owner: dict, where: str) -> list[Problem]:
    return [
        Problem(
            "field that would be lost",
            f"{where}{name}",
            _show(owner[name]),
            "none: what tools can do and are asked is not trained on; write it into the texts",
        )
        for name in CALLS
        if not _is_empty(owner.get(name))
    ]


def _is_empty(value: Any) -> bool:
    """Whether it says nothing; a table may hold a struct of nulls, or JSON as text."""
    if isinstance(value, dict):
        return all(map(_is_empty, value.values()))
    return not value or (isinstance(value, str) and value.strip() in ("", "[]", "{}", "null"))


def _system(row: dict, messages: Conversation) -> tuple[Conversation, Problem | None]:
    """The system message that the row has beside its turns, if any."""
    if row.get("system") in (None, ""):
        return [], None
    text, problem = _text(row, "system", "system")
    if not problem and messages and messages[0]["role"] == "system":
        found = "beside a system message"
        problem = Problem("two system messages", "system", found, "one of them")
    return [{"role": "system", "content": text}], problem


def _from_messages(row: dict) -> tuple[Conversation, list[Problem]]:
    return _from_turns(row, "messages", {role: role for role in _ROLES})


def _from_conversations(row: dict) -> tuple[Conversation, list[Problem]]:
    return _from_turns(row, "conversations", _SHAREGPT_ROLES)


def _from_turns(row: dict, field: str, roles: dict[str, str]) -> tuple[Conversation, list[Problem]]:
    turns = row[field]
    role_key, text_key = _TURN_KEYS[field]
    if not isinstance(turns, list):
        return [], [Problem(f"{field} is not a list", field, _show(turns), "a list of messages")]
    if not turns:
        return [], [Problem(f"{field} is empty", field, "an empty list", "at least two messages")]
    messages, problems = [], []
    for index, turn in enumerate(turns):
        where = f"{field}[{index}]"
        if not isinstance(turn, dict):
            wanted = f"an object with {role_key!r} and {text_key!r}"
            problems.append(Problem("message is not an object", where, _show(turn), wanted))
            continue
        role = turn.get(role_key)
        if not isinstance(role, str) or role not in roles:
            found = _show(role) if role_key in turn else "missing"
            reason = "unknown role" if role_key in turn else "role is missing"
            wanted = f"one of {', '.join(roles)}"
            problems.append(Problem(reason, f"{where}.{role_key}", found, wanted))
        elif roles[role] == "assistant":
            problems += _untrained(turn, where)
        problems += _lost_calls(turn, f"{where}.")
        content, problem = _text(turn, text_key, f"{where}.{text_key}")
        if problem:
            problems.append(problem)
        if not problems:
            messages.append({"role": roles[role], "content": content})
    return messages, problems or _check_turns(messages, field)


def _untrained(turn: dict, where: str) -> Iterable[Problem]:
    for name in _TRAINED:
        if turn.get(name) not in (None, 1):  # True is 1
            wanted = "1 or true: all that the assistant says is trained on"
            yield Problem("field that would be lost", f"{where}.{name}", _show(turn[name]), wanted)


def _check_turns(messages: Conversation, field: str) -> list[Problem]:
    roles = [message["role"] for message in messages]
    problems = []
    expected = "user"
    for index, role in enumerate(roles):
        if index == 0 and role == "system":
            continue
        if role != expected:
            before = f"after {roles[index - 1]}" if index else "first"
            reason = "system is not first" if role == "system" else "turns do not alternate"
            problems.append(Problem(reason, f"{field}[{index}]", f"{role} {before}", expected))
            break
        expected = "assistant" if role == "user" else "user"
    if "assistant" not in roles:
        found = f"roles {', '.join(roles)}"
        problems.append(Problem("no assistant turn", field, found, "an assistant message"))
    return problems


def _from_instruction(row: dict) -> tuple[Conversation, list[Problem]]:
    texts, problems = _texts(row, ("instruction", "output"))
    context = row.get("input")
    if context is not None and not isinstance(context, str):
        wanted = "text, an empty string or null"
        problems.append(Problem("text is not a string", "input", _show(context), wanted))
    elif context and not _is_unicode(context):
        problems.append(_surrogate("input"))
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
        return [], [Problem("history is not a list", "history", _show(pairs), wanted)]
    messages, problems = [], []
    for index, pair in enumerate(pairs):
        where = f"history[{index}]"
        if not isinstance(pair, list) or len(pair) != 2:
            found = f"a list of {len(pair)}" if isinstance(pair, list) else _show(pair)
            problems.append(Problem("no pair in history", where, found, "[user, assistant]"))
            continue
        texts, wrong = zip(*(_text(pair, i, f"{where}[{i}]") for i in (0, 1)), strict=True)
        problems += filter(None, wrong)
        messages += _pair(*texts)
    return messages, problems


def _from_prompt(row: dict) -> tuple[Conversation, list[Problem]]:
    texts, problems = _texts(row, ("prompt", "completion"))
    return ([], problems) if problems else (_pair(texts["prompt"], texts["completion"]), [])


# Of the forms that list turns: where a turn says who speaks, and what.
_TURN_KEYS = {"messages": ("role", "content"), "conversations": ("from", "value")}
_FORM_READERS: dict[tuple[str, ...], Callable[[dict], tuple[Conversation, list[Problem]]]] = {
    ("messages",): _from_messages,
    ("conversations",): _from_conversations,
    ("instruction", "output"): _from_instruction,
    ("prompt", "completion"): _from_prompt,
}


def _pair(user: str, assistant: str) -> Conversation:
    return [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]


def _texts(row: dict, names: tuple[str, ...]) -> tuple[dict[str, str], list[Problem]]:
    checked = {name: _text(row, name, name) for name in names}
    problems = [problem for _, problem in checked.values() if problem]
    return {name: text for name, (text, _) in checked.items()}, problems


def _text(owner: dict | list, key: Any, where: str) -> tuple[str, Problem | None]:
    if isinstance(owner, dict) and key not in owner:
        found = _shorten(f"missing beside {', '.join(map(repr, owner)) or 'nothing'}")
        return "", Problem("text is missing", where, found, "text")
    text = owner[key]
    if not isinstance(text, str):
        return "", Problem("text is not a string", where, _show(text), "text")
    if not text.strip():
        found = "an empty string" if not text else "only white space"
        return "", Problem("text is empty", where, found, "text")
    if not _is_unicode(text):
        return "", _surrogate(where)
    return text, None


def _is_unicode(text: str) -> bool:
    """Whether it can be written as UTF-8: JSON escapes can spell half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _surrogate(where: str) -> Problem:
    return Problem("lone surrogate", where, "half of a \\ud8xx surrogate pair", "valid Unicode")


def _show(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", type(None): "null"}
    return _shorten(kinds.get(type(value)) or repr(value))


def _shorten(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."
