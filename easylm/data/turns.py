"""What the rows of every form have in common: texts, turns, and what can be wrong with them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

Conversation = list[dict[str, str]]

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


class Spelling(NamedTuple):
    """How a turn says who speaks, and what: two keys, and the role that each name stands for."""

    role: str
    text: str
    roles: Mapping[str, str]


MESSAGES = Spelling("role", "content", {role: role for role in ("system", "user", "assistant")})
SHAREGPT = Spelling(
    "from",
    "value",
    {
        "system": "system",
        "human": "user",
        "user": "user",
        "gpt": "assistant",
        "chatgpt": "assistant",
        "assistant": "assistant",
    },
)


def read_list(
    turns: Any, field: str, spelling: Spelling, least: str = "at least two messages"
) -> tuple[Conversation, list[Problem]]:
    """Reads the turns that a field lists, whatever their order; each is named `field[index]`."""
    if not isinstance(turns, list):
        return [], [Problem(f"{field} is not a list", field, show(turns), "a list of messages")]
    if not turns:
        return [], [Problem(f"{field} is empty", field, "an empty list", least)]
    messages, problems = [], []
    for index, turn in enumerate(turns):
        read, wrong = read_turn(turn, f"{field}[{index}]", spelling)
        messages += read
        problems += wrong
    return messages, problems


def read_turn(turn: Any, where: str, spelling: Spelling) -> tuple[Conversation, list[Problem]]:
    """Reads one turn; returns one message, or none and what is wrong with it."""
    if not isinstance(turn, dict):
        wanted = f"an object with {spelling.role!r} and {spelling.text!r}"
        return [], [Problem("message is not an object", where, show(turn), wanted)]
    problems = []
    role = turn.get(spelling.role)
    if not isinstance(role, str) or role not in spelling.roles:
        found = show(role) if spelling.role in turn else "missing"
        reason = "unknown role" if spelling.role in turn else "role is missing"
        wanted = f"one of {', '.join(spelling.roles)}"
        problems.append(Problem(reason, f"{where}.{spelling.role}", found, wanted))
    elif spelling.roles[role] == "assistant":
        problems += _untrained(turn, where)
    problems += lost_calls(turn, f"{where}.")
    content, problem = read_text(turn, spelling.text, f"{where}.{spelling.text}")
    if problem:
        problems.append(problem)
    return ([] if problems else [{"role": spelling.roles[role], "content": content}]), problems


def check_order(messages: Conversation, places: Iterable[str]) -> list[Problem]:
    """Checks that a system message is first, and that then user and assistant take turns.

    Args:
        messages: of a conversation.
        places: of each message in the row.
    """
    roles = [message["role"] for message in messages]
    expected = "user"
    for index, (role, place) in enumerate(zip(roles, places, strict=True)):
        if index == 0 and role == "system":
            continue
        if role != expected:
            before = f"after {roles[index - 1]}" if index else "first"
            reason = "system is not first" if role == "system" else "turns do not alternate"
            return [Problem(reason, place, f"{role} {before}", expected)]
        expected = "assistant" if role == "user" else "user"
    return []


def read_system(row: dict, messages: Conversation) -> tuple[Conversation, list[Problem]]:
    """The system message that the row has beside its turns, if any."""
    if row.get("system") in (None, ""):
        return [], []
    text, problem = read_text(row, "system", "system")
    if not problem and messages and messages[0]["role"] == "system":
        found = "beside a system message"
        problem = Problem("two system messages", "system", found, "one of them")
    return [{"role": "system", "content": text}], [problem] if problem else []


def read_texts(row: dict, names: tuple[str, ...]) -> tuple[dict[str, str], list[Problem]]:
    """The texts of some fields of a row, by name."""
    checked = {name: read_text(row, name, name) for name in names}
    problems = [problem for _, problem in checked.values() if problem]
    return {name: text for name, (text, _) in checked.items()}, problems


def read_text(owner: dict | list, key: Any, where: str) -> tuple[str, Problem | None]:
    """The text that `owner` has at `key`, or what is wrong with it."""
    if isinstance(owner, dict) and key not in owner:
        found = shorten(f"missing beside {', '.join(map(repr, owner)) or 'nothing'}")
        return "", Problem("text is missing", where, found, "text")
    text = owner[key]
    if not isinstance(text, str):
        return "", Problem("text is not a string", where, show(text), "text")
    if not text.strip():
        found = "an empty string" if not text else "only white space"
        return "", Problem("text is empty", where, found, "text")
    problem = check_unicode(text, where)
    return ("", problem) if problem else (text, None)


def check_unicode(text: str, where: str) -> Problem | None:
    """What is wrong where a text is not Unicode: JSON can spell half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        found = "half of a \\ud8xx surrogate pair"
        return Problem("lone surrogate", where, found, "valid Unicode")
    return None


def lost_calls(owner: dict, where: str) -> list[Problem]:
    """The fields of a row or turn, below `where`, without which its texts make no sense."""
    return [
        Problem(
            "field that would be lost",
            f"{where}{name}",
            show(owner[name]),
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


def _untrained(turn: dict, where: str) -> Iterable[Problem]:
    for name in _TRAINED:
        if turn.get(name) not in (None, 1):  # True is 1
            wanted = "1 or true: all that the assistant says is trained on"
            yield Problem("field that would be lost", f"{where}.{name}", show(turn[name]), wanted)


def unused_turn_fields(turn: dict, spelling: Spelling, field: str) -> set[str]:
    """The fields of a valid turn that its message has nothing of, as `field.name`."""
    used = {spelling.role, spelling.text, *CALLS, *_TRAINED}
    return {
        f"{field}.{name}" for name, value in turn.items() if name not in used and value is not None
    }


def show(value: Any) -> str:
    """A value in few words, for a message."""
    kinds = {dict: "an object", list: "a list", type(None): "null"}
    return shorten(kinds.get(type(value)) or repr(value))


def shorten(text: str) -> str:
    """The text, cut to 80 characters."""
    return text if len(text) <= 80 else f"{text[:77]}..."
