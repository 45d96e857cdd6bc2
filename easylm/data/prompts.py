"""Rows that ask for an answer: a prompt, or messages of which the user's is last."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

from easylm.data.rows import normal_form
from easylm.data.sources import read_values
from easylm.data.turns import CALLS, Conversation, Problem
from easylm.errors import InputError

# What a row gets when it is answered.
ANSWER_FIELDS = ("completion", "finish_reason")

_SHOWN_PROBLEMS = 10
# A prompt is checked as the training row that it becomes with an answer.
_ANSWER = "Yes."


class Prompt(NamedTuple):
    """What is asked.

    Attributes:
        messages: the last one is the user's.
        row: the row as it was read; empty for a prompt that came in no file.
        where: its place, for messages.
    """

    messages: Conversation
    row: dict[str, Any]
    where: str


def read_prompts(path: str, *, raw: bool) -> list[Prompt]:
    """Reads and checks every row of a source: `prompt`, or `messages` that end with the user's.

    Args:
        path: as in `read_values`.
        raw: rows are texts to continue, so `messages` are refused.

    Raises:
        InputError: the source cannot be read, has no rows, or rows are bad: the first ten problems
            and how often each occurs.
    """
    prompts: list[Prompt] = []
    problems: list[tuple[str, Problem]] = []
    for where, row, broken in read_values(path):
        messages, problem = ([], broken) if broken else _messages(row, raw)
        if problem:
            problems.append((where, problem))
        else:
            prompts.append(Prompt(messages, row, where))
    if problems:
        reasons = Counter(problem.reason for _, problem in problems)
        raise InputError(
            f"{len(problems):,} of {len(prompts) + len(problems):,} rows of {path} are bad:\n"
            f"{list_problems([f'{where}: {problem}' for where, problem in problems])}\n"
            + "\n".join(f"  {count:>9,}  {reason}" for reason, count in reasons.most_common())
        )
    if not prompts:
        raise InputError(f"{path}: found no rows; wanted one a prompt")
    return prompts


def text_prompt(text: str, where: str) -> Prompt:
    """A prompt that came in no file.

    Raises:
        InputError: it is empty, or not Unicode.
    """
    messages, problem = _messages({"prompt": text}, raw=False)
    if problem:
        raise InputError(f"{where}: found {problem.found}; wanted {problem.wanted}")
    return Prompt(messages, {}, where)


def list_problems(problems: list[str]) -> str:
    """The first ten of several lines, and how many more there are."""
    lines = [f"  {problem}" for problem in problems[:_SHOWN_PROBLEMS]]
    more = len(problems) - len(lines)
    return "\n".join([*lines, *([f"  ... and {more:,} more"] if more else [])])


def _messages(row: Any, raw: bool) -> tuple[Conversation, Problem | None]:
    wanted = "'prompt'" if raw else "'prompt', or 'messages' that end with the user's,"
    if not isinstance(row, dict):
        return [], Problem("not an object", "row", type(row).__name__, f"an object with {wanted}")
    for field in ANSWER_FIELDS:
        if row.get(field) is not None:
            found = "in the row already"
            return [], Problem(f"{field} is there", field, found, "it left out, or renamed")
    forms = [field for field in ("prompt", "messages") if row.get(field) is not None]
    if len(forms) != 1 or (raw and forms == ["messages"]):
        found = f"fields {', '.join(map(repr, row)) or 'none'}"
        return [], Problem("no prompt" if not forms else "another form", "row", found, wanted)
    if forms == ["prompt"]:
        answered = {"prompt": row["prompt"], "completion": _ANSWER}
    else:
        turns = row["messages"]
        if isinstance(turns, list) and turns:
            last = turns[-1]
            if isinstance(last, dict) and last.get("role") == "assistant":
                where = f"messages[{len(turns) - 1}].role"
                return [], Problem(
                    "answered already", where, "'assistant'", "the last to be 'user'"
                )
            turns = [*turns, {"role": "assistant", "content": _ANSWER}]
        answered = {"messages": turns}
    # What a row has beside its turns counts as in training.
    beside = {name: row[name] for name in ("system", *CALLS) if name in row}
    messages, problems = normal_form({**answered, **beside})
    if raw and len(messages) > 2:
        return [], Problem("field that would be lost", "system", "text", "none with --raw")
    return messages[:-1], problems[0] if problems else None
