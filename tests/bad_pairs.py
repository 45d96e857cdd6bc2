"""Bad rows of preference pairs for `python -m easylm.dpo`."""

import json

PROMPT = "Do you like rain?"
GOOD = json.dumps({"prompt": PROMPT, "chosen": "Yes, I do.", "rejected": "No."})


def turns(*texts, first="user"):
    """Messages of user and assistant in turns."""
    roles = ("user", "assistant") if first == "user" else ("assistant", "user")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


def pair(chosen, rejected, **beside):
    return json.dumps({**beside, "chosen": chosen, "rejected": rejected})


def transcript(*texts):
    """The same as a text of Human and Assistant."""
    speakers = ("Human", "Assistant")
    return "".join(f"\n\n{speakers[i % 2]}: {text}" for i, text in enumerate(texts))


# What the second line of a file holds -> what the message says behind "FILE:2: ".
ROW = {
    "no object": (
        '["hi", "yes"]',
        "row: a list; wanted a JSON object with 'chosen' + 'rejected', either as whole",
    ),
    "a conversation": (
        json.dumps({"messages": turns("hi", "yes")}),
        "row: fields 'messages'; wanted 'chosen' + 'rejected', either as whole conversations or",
    ),
    "an empty object": ("{}", "row: fields none; wanted 'chosen' + 'rejected'"),
    "rejected missing": (
        json.dumps({"prompt": PROMPT, "chosen": "yes"}),
        "rejected: missing beside 'prompt', 'chosen'; wanted an answer in both",
    ),
    "chosen is null": (pair(None, "no", prompt=PROMPT), "chosen: null; wanted an answer in both"),
    "prompt missing": (
        pair("yes", "no"),
        "row: fields 'chosen', 'rejected'; wanted what they answer in 'prompt' or 'conversations'",
    ),
    "two prompts": (
        pair("yes", "no", prompt="hi", conversations=[{"from": "human", "value": "hi"}]),
        "row: fields 'prompt', 'conversations', 'chosen', 'rejected'; wanted one of 'prompt' and",
    ),
    "prompt empty": (pair("yes", "no", prompt=""), "prompt: an empty string; wanted text"),
    "prompt is a number": (
        pair("yes", "no", prompt=7),
        "prompt: 7; wanted a list of messages",
    ),
    "prompt is an empty list": (
        pair("yes", "no", prompt=[]),
        "prompt: an empty list; wanted at least one message",
    ),
    "prompt answers itself": (
        pair("yes", "no", prompt=turns("hi", "hello")),
        "chosen: assistant after assistant; wanted user",
    ),
    "prompt begins with the assistant": (
        pair("yes", "no", prompt=turns("hello", "hi", first="assistant")),
        "prompt[0]: assistant first; wanted user",
    ),
    "an unknown role in the prompt": (
        pair("yes", "no", prompt=[{"role": "robot", "content": "beep"}]),
        "prompt[0].role: 'robot'; wanted one of system, user, assistant",
    ),
    "an answer is empty": (
        pair("yes", " \n", prompt=PROMPT),
        "rejected: only white space; wanted text",
    ),
    "an answer is a number": (
        pair(1, 0, prompt=PROMPT),
        "chosen: 1; wanted text, a message or a list of messages",
    ),
    "an answer of the user": (
        pair({"role": "user", "content": "yes"}, {"role": "user", "content": "no"}, prompt=PROMPT),
        "chosen: user after user; wanted assistant",
    ),
    "a message without content": (
        pair({"role": "assistant"}, {"role": "assistant", "content": "no"}, prompt=PROMPT),
        "chosen.content: missing beside 'role'; wanted text",
    ),
    "a message without a role": (
        pair({"content": "yes"}, {"content": "no"}, prompt=PROMPT),
        "chosen.role: missing; wanted one of system, user, assistant",
    ),
    "equal answers": (
        pair("Yes.", "Yes. \n", prompt=PROMPT),
        "rejected: the same as the answer of 'chosen', 'Yes.'; wanted another answer",
    ),
    "two kinds of answers": (
        pair(turns("hi", "yes"), "no", prompt="hi"),
        "rejected: an answer alone beside a whole conversation in 'chosen'; wanted the same in",
    ),
    "other prompts": (
        pair(turns("hi", "yes"), turns("ho", "no")),
        "rejected[0]: 'ho'; wanted what chosen[0] says: 'hi'",
    ),
    "other systems": (
        pair(
            [{"role": "system", "content": "Be kind."}, *turns("hi", "yes")],
            [{"role": "system", "content": "Be rude."}, *turns("hi", "no")],
        ),
        "rejected[0]: 'Be rude.'; wanted what chosen[0] says: 'Be kind.'",
    ),
    "another prompt beside": (
        pair(turns("hi", "yes"), turns("hi", "no"), prompt=turns("ho")),
        "prompt: other messages; wanted those before the last of 'chosen', or no 'prompt'",
    ),
    "one is longer": (
        pair(turns("hi", "yes"), turns("hi", "no", "why", "so")),
        "rejected: 4 messages beside 2 in 'chosen'; wanted the same messages before the answer",
    ),
    "the user ends": (
        pair(turns("hi", "yes", "so"), turns("hi", "yes", "why")),
        "chosen[2]: user last; wanted assistant",
    ),
    "the user twice": (
        pair([*turns("hi"), *turns("hi", "yes")], [*turns("hi"), *turns("hi", "no")]),
        "chosen[1]: user after user; wanted assistant",
    ),
    "system in between": (
        pair(
            [*turns("hi"), {"role": "system", "content": "Go."}, *turns("yes", first="assistant")],
            turns("hi", "no"),
        ),
        "chosen[1]: system after user; wanted assistant",
    ),
    "two system messages": (
        pair(
            *([{"role": "system", "content": "Be kind."}, *turns("hi", x)] for x in ("yes", "no")),
            system="Be brief.",
        ),
        "system: beside a system message; wanted one of them",
    ),
    "a list of texts": (
        pair(["hi", "yes"], ["hi", "no"]),
        "chosen[0]: 'hi'; wanted an object with 'role' and 'content'",
    ),
    "an empty list": (
        pair([], [], prompt=PROMPT),
        "chosen: an empty list; wanted at least one message",
    ),
    "a transcript with a blank turn": (
        pair(transcript("hi", "yes"), transcript("hi", "")),
        "rejected, turn 2: an empty string; wanted text",
    ),
    "a transcript that ends with the user": (
        pair(transcript("hi", "yes", "so"), transcript("hi", "no", "so")),
        "chosen, turn 3: user last; wanted assistant",
    ),
    "other transcripts": (
        pair(transcript("Say hi", "hi"), transcript("Say ho", "ho")),
        "rejected, turn 1: 'Say ho'; wanted what chosen, turn 1 says: 'Say hi'",
    ),
    "a ShareGPT answer of nobody": (
        pair(
            {"from": "observation", "value": "42"},
            {"from": "gpt", "value": "no"},
            conversations=[{"from": "human", "value": "hi"}],
        ),
        "chosen.from: 'observation'; wanted one of system, human, user, gpt, chatgpt, assistant",
    ),
    "a ShareGPT value missing": (
        pair("yes", "no", conversations=[{"from": "human", "text": "hi"}]),
        "conversations[0].value: missing beside 'from', 'text'; wanted text",
    ),
    "tools": (
        pair("yes", "no", prompt=PROMPT, tools='[{"name": "weather"}]'),
        'tools: \'[{"name": "weather"}]\'; wanted none: what tools can do',
    ),
    "an answer of weight 0": (
        pair(
            turns("hi", "yes"), [*turns("hi"), {**turns("no", first="assistant")[0], "weight": 0}]
        ),
        "rejected[1].weight: 0; wanted 1 or true: all that the assistant says is trained on",
    ),
    "margin is text": (
        pair("yes", "no", prompt=PROMPT, margin="2"),
        "margin: '2'; wanted a finite number",
    ),
    "margin is NaN": (
        pair("yes", "no", prompt=PROMPT, margin=float("nan")),
        "margin: nan; wanted a finite number",
    ),
    "margin is true": (
        pair("yes", "no", prompt=PROMPT, margin=True),
        "margin: True; wanted a finite number",
    ),
    "margin is too large": (
        pair("yes", "no", prompt=PROMPT, margin=1e39),
        "margin: 1e+39; wanted a finite number",
    ),
    "half a surrogate pair": (
        '{"prompt": "hi", "chosen": "yes", "rejected": "\\ud83d"}',
        "rejected: half of a \\ud8xx surrogate pair; wanted valid Unicode",
    ),
    "broken JSON": (
        '{"prompt": "hi", "chosen": "yes", "rejected": "no"',
        "line: Expecting ',' delimiter at column 52; wanted one JSON object a line",
    ),
    "a key twice": (
        '{"prompt": "hi", "chosen": "yes", "chosen": "no"}',
        "row: key 'chosen' twice in one object; wanted every key once",
    ),
}
