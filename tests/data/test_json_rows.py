"""Every bad row is named with file, line, field, what was found and what is wanted."""

import gzip
import json

import pytest

from easylm import storage
from easylm.data.rows import normal_form
from easylm.data.sources import Found, Source, parse_sources, read_rows
from easylm.errors import InputError
from tests import bucket

USER = {"role": "user", "content": "Hi"}
ASSISTANT = {"role": "assistant", "content": "Hello!"}
SYSTEM = {"role": "system", "content": "Be brief."}
GOOD = {"messages": [USER, ASSISTANT]}


def messages(*turns):
    return {"messages": list(turns)}


def without(message, key):
    return {name: value for name, value in message.items() if name != key}


# What is wrong with a line -> the line (JSON value, or bytes as they stand), parts of the message.
BAD_ROWS = {
    "not an object": ([USER, ASSISTANT][0]["content"], ["row: 'Hi'; wanted a JSON object"]),
    "a number": (5, ["row: 5; wanted a JSON object"]),
    "null": (None, ["row: null; wanted a JSON object"]),
    "no known form": ({"text": "x"}, ["row: fields 'text'; wanted exactly one of 'messages'"]),
    "no field": ({}, ["row: fields none; wanted exactly one of"]),
    "two forms": (
        {**GOOD, "instruction": "x", "output": "y"},
        ["row: fields 'messages', 'instruction', 'output'; wanted exactly one of"],
    ),
    "messages null": ({"messages": None}, ["messages: null; wanted a list of messages"]),
    "messages text": ({"messages": "hi"}, ["messages: 'hi'; wanted a list of messages"]),
    "messages object": ({"messages": USER}, ["messages: an object; wanted a list of messages"]),
    "messages empty": (messages(), ["messages: an empty list; wanted at least two messages"]),
    "message not an object": (
        messages("Hi", ASSISTANT),
        ["messages[0]: 'Hi'; wanted an object with 'role' and 'content'"],
    ),
    "unknown role": (
        messages(USER, {"role": "bot", "content": "x"}),
        ["messages[1].role: 'bot'; wanted one of system, user, assistant"],
    ),
    "ShareGPT role in messages": (
        messages({"role": "human", "content": "x"}, ASSISTANT),
        ["messages[0].role: 'human'; wanted one of system, user, assistant"],
    ),
    "role missing": (
        messages(without(USER, "role"), ASSISTANT),
        ["messages[0].role: missing; wanted one of"],
    ),
    "role null": (messages({**USER, "role": None}, ASSISTANT), ["messages[0].role: null; wanted"]),
    "role a list": (
        messages({**USER, "role": []}, ASSISTANT),
        ["messages[0].role: a list; wanted"],
    ),
    "content missing": (
        messages(USER, without(ASSISTANT, "content")),
        ["messages[1].content: missing beside 'role'; wanted text"],
    ),
    "content null": (
        messages(USER, {**ASSISTANT, "content": None}),
        ["messages[1].content: null; wanted text"],
    ),
    "content a list of parts": (
        messages({**USER, "content": [{"type": "text", "text": "Hi"}]}, ASSISTANT),
        ["messages[0].content: a list; wanted text"],
    ),
    "content a number": (messages(USER, {**ASSISTANT, "content": 4}), ["messages[1].content: 4;"]),
    "content empty": (
        messages(USER, {**ASSISTANT, "content": ""}),
        ["messages[1].content: an empty string; wanted text"],
    ),
    "content only space": (
        messages({**USER, "content": " \n\t"}, ASSISTANT),
        ["messages[0].content: only white space; wanted text"],
    ),
    "lone surrogate": (
        b'{"messages": [{"role": "user", "content": "\\ud83d"}, '
        b'{"role": "assistant", "content": "x"}]}',
        ["messages[0].content: half of a \\ud8xx surrogate pair; wanted valid Unicode"],
    ),
    "two problems in one row": (
        messages({"role": "bot", "content": ""}, ASSISTANT),
        ["messages[0].role: 'bot'", "messages[0].content: an empty string"],
    ),
    "assistant first": (messages(ASSISTANT, USER), ["messages[0]: assistant first; wanted user"]),
    "two users in a row": (
        messages(USER, USER, ASSISTANT),
        ["messages[1]: user after user; wanted assistant"],
    ),
    "two assistants in a row": (
        messages(USER, ASSISTANT, ASSISTANT),
        ["messages[2]: assistant after assistant; wanted user"],
    ),
    "system in the middle": (
        messages(USER, SYSTEM, ASSISTANT),
        ["messages[1]: system after user; wanted assistant"],
    ),
    "two systems": (
        messages(SYSTEM, SYSTEM, USER, ASSISTANT),
        ["messages[1]: system after system; wanted user"],
    ),
    "no assistant": (messages(USER), ["messages: roles user; wanted an assistant message"]),
    "only system": (messages(SYSTEM), ["messages: roles system; wanted an assistant message"]),
    "instruction without output": (
        {"instruction": "x", "input": ""},
        ["output: missing beside 'instruction', 'input'; wanted text"],
    ),
    "instruction empty": (
        {"instruction": "", "output": "y"},
        ["instruction: an empty string; wanted text"],
    ),
    "output null": ({"instruction": "x", "output": None}, ["output: null; wanted text"]),
    "input a list": (
        {"instruction": "x", "input": ["a"], "output": "y"},
        ["input: a list; wanted text, an empty string or null"],
    ),
    "prompt without completion": (
        {"prompt": "x"},
        ["completion: missing beside 'prompt'; wanted text"],
    ),
    "conversations with a role of another kind": (
        {"conversations": [{"from": "human", "value": "x"}, {"from": "bing", "value": "y"}]},
        ["conversations[1].from: 'bing'; wanted one of system, human, user, gpt, chatgpt"],
    ),
    "conversations without value": (
        {"conversations": [{"from": "human", "text": "x"}, {"from": "gpt", "value": "y"}]},
        ["conversations[0].value: missing beside 'from', 'text'; wanted text"],
    ),
    "tools": (
        {**GOOD, "tools": [{"name": "search"}]},
        ["tools: a list; wanted none: what tools can do"],
    ),
    "functions as text": ({**GOOD, "functions": '[{"name": 1}]'}, ["functions: '[{\"name\": 1}]'"]),
    "tool calls": (
        messages(USER, {**ASSISTANT, "tool_calls": [{"name": "search"}]}),
        ["messages[1].tool_calls: a list; wanted none"],
    ),
    "function call": (
        messages(USER, {**ASSISTANT, "function_call": {"name": "search"}}),
        ["messages[1].function_call: an object; wanted none"],
    ),
    "weight": (
        messages(USER, {**ASSISTANT, "weight": 0}),
        ["messages[1].weight: 0; wanted 1 or true: all that the assistant says"],
    ),
    "not to be trained": (
        messages(USER, {**ASSISTANT, "train": False}),
        ["messages[1].train: False; wanted 1 or true"],
    ),
    "two system messages": (
        {**messages(SYSTEM, USER, ASSISTANT), "system": "Be brief."},
        ["system: beside a system message; wanted one of them"],
    ),
    "system a list": ({**GOOD, "system": ["x"]}, ["system: a list; wanted text"]),
    "history not a list": (
        {"instruction": "x", "output": "y", "history": {}},
        ["history: an object; wanted a list of [user, assistant]"],
    ),
    "history not of pairs": (
        {"instruction": "x", "output": "y", "history": [["a", "b"], ["c"], "d"]},
        ["history[1]: a list of 1; wanted [user, assistant]", "history[2]: 'd'; wanted [user"],
    ),
    "history empty": (
        {"instruction": "x", "output": "y", "history": [["a", ""]]},
        ["history[0][1]: an empty string; wanted text"],
    ),
    "broken JSON": (b'{"messages": [}', ["line: Expecting value at column 15; wanted one JSON"]),
    "cut line": (b'{"messages": [{"role"', ["line: Expecting ':' delimiter at column"]),
    "two objects on a line": (b'{"a": 1} {"b": 2}', ["line: Extra data at column 10"]),
    "endless nesting": (b"[" * 99999, ["line: brackets nested too deeply; wanted one JSON"]),
    "a number of 6,000 digits": (
        b'{"instruction": ' + b"9" * 6000 + b"}",
        ["line: a number of thousands of digits; wanted one JSON object"],
    ),
    "not UTF-8": (
        b'{"instruction": "caf\xe9", "output": "x"}',
        ["line: byte 0xe9 at byte 21; wanted UTF-8 text"],
    ),
    "duplicate key": (
        b'{"instruction": "a", "output": "b", "output": "c"}',
        ["row: key 'output' twice in one object; wanted every key once"],
    ),
    "duplicate key in a message": (
        b'{"messages": [{"role": "user", "role": "assistant", "content": "x"}]}',
        ["row: key 'role' twice in one object"],
    ),
}


def line_of(row):
    return row if isinstance(row, bytes) else json.dumps(row).encode()


@pytest.mark.parametrize("row, parts", BAD_ROWS.values(), ids=BAD_ROWS)
def test_bad_row_is_named(row, parts, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join([line_of(GOOD), b"", line_of(row), line_of(GOOD)]) + b"\n")
    with pytest.raises(InputError) as error:
        read_rows(str(path))
    text = str(error.value)
    assert text.startswith("1 of 3 rows of data.sources are bad:")
    for part in parts:
        assert f"{path}:3: {part}" in text
    skipped = read_rows(str(path), on_bad_row="skip")
    assert [row.where for row in skipped.rows] == [f"{path}:1", f"{path}:4"]
    assert skipped.skipped.total() == 1


def test_the_same_in_a_json_array_has_the_line_of_the_element(tmp_path):
    path = tmp_path / "rows.json"
    good = json.dumps(GOOD, indent=1)
    duplicate = '{"instruction": "a",\n "instruction": "b"}'
    number = f'{{"a": {{"b": [{"9" * 6000}]}},\n "a": 1}}'
    bad = f'{{"instruction": 5, "output": "x"}},\n{duplicate},\n{number}'
    path.write_text(f"[\n{good},\n{bad},\n{good}]\n")
    second = 2 + good.count("\n") + 1
    with pytest.raises(InputError) as error:
        read_rows(str(path))
    assert f"{path}:{second}: instruction: 5; wanted text" in str(error.value)
    assert f"{path}:{second + 1}: row: key 'instruction' twice" in str(error.value)
    assert f"{path}:{second + 3}: row: a number of thousands of digits" in str(error.value)
    read = read_rows(str(path), on_bad_row="skip")
    assert [row.where for row in read.rows] == [f"{path}:2", f"{path}:{second + 5}"]
    assert read.skipped == {"text is not a string": 1, "duplicate key": 1, "broken JSON": 1}


BROKEN_ARRAYS = {
    "cut": ("[\n{}},\n{{", ":3: the JSON array is broken: Expecting property name"),
    "no comma": ("[\n{}}\n{}}]", ":3: the JSON array is broken: Expecting ',' or ']'"),
    "trailing comma": ("[\n{}},\n]", ":3: the JSON array is broken: Expecting value"),
    "not closed": ("[\n{}}\n", ":3: the JSON array is broken: Expecting ',' or ']'"),
    "endless nesting": ("[\n{}},\n" + "[" * 99999, ":3: the JSON array is broken: brackets nested"),
    "something after it": ("[\n{}}]\n\n[]", ":4: the JSON array is broken: Extra data"),
}


@pytest.mark.parametrize("text, part", BROKEN_ARRAYS.values(), ids=BROKEN_ARRAYS)
def test_broken_array_is_refused_even_when_bad_rows_are_skipped(text, part, tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(text.replace("{}}", json.dumps(GOOD)).replace("{{", "{"))
    for policy in ("refuse", "skip"):
        with pytest.raises(InputError) as error:
            read_rows(str(path), on_bad_row=policy)
        assert f"{path}{part}" in str(error.value)


def test_first_ten_problems_and_the_totals(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [messages(USER)] * 9 + [5] * 4 + [GOOD] * 2
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(InputError) as error:
        read_rows(str(path))
    text = str(error.value)
    assert text.startswith("13 of 15 rows")
    assert f"{path}:10: row: 5" in text and f"{path}:11:" not in text
    assert "... and 3 more problems" in text
    assert "9  no assistant turn\n" in text and "4  not an object\n" in text
    assert "data.on_bad_row=skip" in text


def test_a_source_without_a_good_row_is_refused(tmp_path):
    good = tmp_path / "good.jsonl"
    good.write_text(json.dumps(GOOD))
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(messages(USER)) + "\n5\n")
    with pytest.raises(InputError) as error:
        read_rows(f"{good},{path}", on_bad_row="skip")
    assert f"no good row in {path} (2 read); wanted at least one" in str(error.value)
    assert f"{path}:2: row: 5; wanted a JSON object" in str(error.value)
    assert "1  no assistant turn" in str(error.value) and "1  not an object" in str(error.value)
    path.write_text("\n \n")
    with pytest.raises(InputError, match=f"data.sources: no rows in {path}"):
        read_rows(str(path))


FORMS = {
    "instruction": (
        {"instruction": " Add.\n", "input": "", "output": "3"},
        [(" Add.\n", "3")],
    ),
    "instruction with input": (
        {"instruction": "Add. ", "input": "\n1 and 2\n", "output": "3"},
        [("Add.\n\n1 and 2", "3")],
    ),
    "input null": ({"instruction": "Add.", "input": None, "output": "3"}, [("Add.", "3")]),
    "input only space": ({"instruction": "Add.", "input": " ", "output": "3"}, [("Add.", "3")]),
    "prompt": ({"prompt": "Add.", "completion": "3", "id": 7}, [("Add.", "3")]),
    "ShareGPT": (
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}] * 2},
        [("a", "b"), ("a", "b")],
    ),
    "prompt beside messages": ({**GOOD, "prompt": "Hi"}, [("Hi", "Hello!")]),
    "other fields of a message": (
        messages({**USER, "name": "x"}, {**ASSISTANT, "weight": 1}),
        [("Hi", "Hello!")],
    ),
    "nothing that is lost": (
        {
            **messages(
                {**USER, "train": False},
                {**ASSISTANT, "train": True, "function_call": {"name": None}, "tool_calls": []},
            ),
            "tools": "[]",
            "system": "",
        },
        [("Hi", "Hello!")],
    ),
    "history": (
        {"instruction": "c", "output": "d", "history": [["a", "b"]]},
        [("a", "b"), ("c", "d")],
    ),
    "no history": ({"instruction": "c", "output": "d", "history": []}, [("c", "d")]),
}


@pytest.mark.parametrize("row, pairs", FORMS.values(), ids=FORMS)
def test_normal_form(row, pairs):
    found, problems = normal_form(row)
    assert not problems
    assert found == [
        {"role": role, "content": content}
        for pair in pairs
        for role, content in zip(("user", "assistant"), pair, strict=True)
    ]


def test_system_first_and_user_last_are_fine():
    row = messages(SYSTEM, USER, ASSISTANT, USER)
    assert normal_form(row) == (row["messages"], [])


@pytest.mark.parametrize("name", FORMS)
def test_the_field_system_comes_first(name):
    row = FORMS[name][0]
    found, problems = normal_form({**row, "system": "Be brief."})
    assert not problems and found == [SYSTEM, *normal_form(row)[0]]


def named_row(name):
    return {"instruction": name, "output": "x"}


def names(read):
    return [row.messages[0]["content"] for row in read.rows]


def test_every_kind_of_file(tmp_path):
    rows = [named_row(f"é{i}") for i in range(3)]
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()
    array = json.dumps(rows, indent=2).encode()
    files = {
        "a.jsonl": lines,
        "b.jsonl.gz": gzip.compress(lines),
        "c.json": array,
        "d.json.gz": gzip.compress(array),
        "e.jsonl": b"\xef\xbb\xbf" + lines.replace(b"\n", b"\r\n\r\n"),
        "f.json": b"\n\n  " + array,
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        assert names(read_rows(str(tmp_path / name))) == ["é0", "é1", "é2"], name
    (tmp_path / "g.json").write_bytes(b"[]")
    with pytest.raises(InputError, match="no rows"):
        read_rows(str(tmp_path / "g.json"))


BAD_FILES = {
    "missing": (None, "no such file; its folder holds nothing. Wanted a file of JSON Lines"),
    "empty": (b"", "is empty; wanted a file of JSON Lines"),
    "empty gzip": (gzip.compress(b""), "is empty; wanted JSON Lines"),
    "UTF-16": ("{}".encode("utf-16"), "is UTF-16; wanted JSON Lines or a JSON array in UTF-8"),
    "UTF-16 without a mark": ("{}".encode("utf-16-le"), "`iconv -f UTF-16 -t UTF-8` converts it"),
    "UTF-16 in gzip": (gzip.compress("{}".encode("utf-16")), "is UTF-16; wanted JSON Lines"),
    "UTF-32": ("{}".encode("utf-32"), "is UTF-32; wanted JSON Lines"),
    "cut parquet": (b"PAR1\x00\x00", "cannot be read (Parquet file size is 6 bytes"),
    "parquet in gzip": (gzip.compress(b"PAR1"), "is a parquet file inside a .gz; wanted JSON Lin"),
    "zip": (b"PK\x03\x04xx", "is a zip file; wanted JSON Lines"),
    "zstd": (b"\x28\xb5\x2f\xfdxx", "is a zstd file; wanted JSON Lines"),
    "one object over lines": (b'\n{\n"a": 1}', ":2: is an object over several lines; wanted JSON"),
    "cut gzip": (gzip.compress(b"5\n" * 999)[:-20], "the gzip file is broken"),
    "corrupt gzip": (b"\x1f\x8b\x08\x00aaaaaaaaaaaaaaaaaa", "the gzip file is broken"),
    "array not UTF-8": (b'["a",\n"\xff"]', ":2: found byte 0xff; wanted UTF-8 text"),
}


@pytest.mark.parametrize("content, message", BAD_FILES.values(), ids=BAD_FILES)
def test_bad_file_is_named(content, message, tmp_path):
    path = tmp_path / "rows.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError) as error:
        read_rows(str(path), on_bad_row="skip")
    assert str(error.value).startswith(str(path)) and message in str(error.value)


def test_rows_in_a_bucket():
    lines = "\n".join(json.dumps(named_row(f"row{i}")) for i in range(3)).encode()
    with bucket.running_bucket() as url:
        storage.write_bytes(f"{url}/a.jsonl", lines)
        storage.write_bytes(f"{url}/b.jsonl.gz", gzip.compress(lines + b"\n5"))
        assert names(read_rows(f"{url}/a.jsonl@2,{url}/a.jsonl"))[2:] == ["row0", "row1", "row2"]
        with pytest.raises(InputError, match=f"{url}/b.jsonl.gz:4: row: 5; wanted"):
            read_rows(f"{url}/b.jsonl.gz")
        with pytest.raises(InputError, match=f"{url}/c.jsonl: no such file"):
            read_rows(f"{url}/c.jsonl")


def test_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match=f"{tmp_path}: is a folder"):
        read_rows(str(tmp_path))


def test_several_sources_with_counts_and_fractions(tmp_path):
    for name in "ab":
        rows = [json.dumps(named_row(f"{name}{i}")) for i in range(10)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    a, b = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    everything = read_rows(f"{a}, {b}")
    assert names(everything) == [f"a{i}" for i in range(10)] + [f"b{i}" for i in range(10)]
    assert [found.taken for found in everything.found] == [10, 10]
    part = read_rows(f"{a}@3,{b}@0.5", seed=1)
    assert [found.taken for found in part.found] == [3, 5]
    assert len(set(names(part))) == 8 and names(part) == sorted(names(part))
    assert names(part) == names(read_rows(f"{a}@3,{b}@0.5", seed=1))
    assert names(part) != names(read_rows(f"{a}@3,{b}@0.5", seed=2))
    # What is taken of one source does not depend on how much another has.
    assert names(part)[3:] == names(read_rows(f"{a}@7,{b}@0.5", seed=1))[7:]
    # Nor is the same place chosen in every source.
    half = [name[1:] for name in names(read_rows(f"{a}@5,{b}@5"))]
    assert half[:5] != half[5:]
    with pytest.raises(InputError, match=r"a.jsonl@11: wanted 11 rows; found 10 valid ones"):
        read_rows(f"{a}@11")
    with pytest.raises(InputError, match=r"a.jsonl@0.01: wanted 0 rows; found 10 valid ones"):
        read_rows(f"{a}@0.01,{b}")
    a.write_text(json.dumps(named_row("a")))
    with pytest.raises(InputError, match=r"found 1 valid one. Ask for 1, or for no amount"):
        read_rows(f"{a}@2")


def test_what_became_of_each_source(tmp_path):
    a, b = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    calls = messages(USER, {**ASSISTANT, "name": "x", "weight": 1, "tool_calls": []})
    rows = [GOOD, 5, {**GOOD, "prompt_id": 7, "prompt": "Hi"}, 6, {**calls, "prompt_id": 8}]
    a.write_text("\n".join(map(json.dumps, [*rows, messages(USER)])))
    b.write_text(json.dumps({**GOOD, "id": None, "tools": ""}))
    read = read_rows(f"{a}@1,{b}", on_bad_row="skip")
    assert read.found == [
        Found(
            taken=1,
            skipped={"not an object": 2, "no assistant turn": 1},
            first={"not an object": "2", "no assistant turn": "6"},
            unused={"messages[].name": 1, "prompt": 1, "prompt_id": 2},
        ),
        Found(taken=1, skipped={}, first={}, unused={}),
    ]
    assert read.skipped == {"not an object": 2, "no assistant turn": 1}


def test_source_grammar(tmp_path):
    named = tmp_path / "x@2.jsonl"
    named.touch()
    assert parse_sources(f"gs://b@c/a.jsonl,gs://b@c/a.jsonl@10,b@0.25 ,{named}, {named}@1.0") == [
        Source("gs://b@c/a.jsonl"),
        Source("gs://b@c/a.jsonl", 10),
        Source("b", 0.25),
        Source(str(named)),
        Source(str(named), 1.0),
    ]
    for wrong in ("", "a,,b", "a@0", "a@x", "a@1.5", "a@-1", "@3", "a@"):
        with pytest.raises(InputError, match=r"data\.sources: found .*wanted PATH"):
            parse_sources(wrong)


def test_policy_is_checked(tmp_path):
    with pytest.raises(InputError, match="found 'ignore'; wanted 'refuse' or 'skip'"):
        read_rows(str(tmp_path / "x"), on_bad_row="ignore")
