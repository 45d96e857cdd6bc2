"""Bad data for `python -m easylm.sft`: rows, and files of rows."""

import gzip
import json
import pathlib

import datasets
import pyarrow as pa
from pyarrow import parquet

from tests.runs import ROWS

GOOD = json.dumps(ROWS[0])


def messages(*turns, field="messages", role="role", content="content"):
    """A row as JSON; a turn is (role, content)."""
    return json.dumps({field: [{role: who, content: text} for who, text in turns]})


def sharegpt(*turns):
    return messages(*turns, field="conversations", role="from", content="value")


# What the second line of a file holds -> what the message says behind "FILE:2: ".
ROW = {
    "unknown role": (
        messages(("user", "hi"), ("robot", "beep")),
        "messages[1].role: 'robot'; wanted one of system, user, assistant",
    ),
    "role missing": (
        '{"messages": [{"content": "hi"}, {"role": "assistant", "content": "yes"}]}',
        "messages[0].role: missing; wanted one of system, user, assistant",
    ),
    "user twice": (
        messages(("user", "hi"), ("user", "hi?"), ("assistant", "yes")),
        "messages[1]: user after user; wanted assistant",
    ),
    "assistant first": (
        messages(("assistant", "hi"), ("user", "hi")),
        "messages[0]: assistant first; wanted user",
    ),
    "system in between": (
        messages(("user", "hi"), ("system", "be kind"), ("assistant", "yes")),
        "messages[1]: system after user; wanted assistant",
    ),
    "no assistant": (
        messages(("system", "be kind"), ("user", "hi")),
        "messages: roles system, user; wanted an assistant message",
    ),
    "no messages": ('{"messages": []}', "messages: an empty list; wanted at least two messages"),
    "messages are text": ('{"messages": "hi"}', "messages: 'hi'; wanted a list of messages"),
    "message is text": (
        '{"messages": ["hi", "yes"]}',
        "messages[0]: 'hi'; wanted an object with 'role' and 'content'",
    ),
    "content empty": (
        messages(("user", "hi"), ("assistant", "")),
        "messages[1].content: an empty string; wanted text",
    ),
    "content white": (
        messages(("user", " \n\t"), ("assistant", "yes")),
        "messages[0].content: only white space; wanted text",
    ),
    "content missing": (
        '{"messages": [{"role": "user"}, {"role": "assistant", "content": "yes"}]}',
        "messages[0].content: missing beside 'role'; wanted text",
    ),
    "content is a number": (
        messages(("user", 7), ("assistant", "yes")),
        "messages[0].content: 7; wanted text",
    ),
    "content is null": (
        messages(("user", "hi"), ("assistant", None)),
        "messages[1].content: null; wanted text",
    ),
    "half a surrogate pair": (
        '{"prompt": "hi", "completion": "\\ud83d"}',
        "completion: half of a \\ud8xx surrogate pair; wanted valid Unicode",
    ),
    "output missing": (
        '{"instruction": "hi", "input": ""}',
        "output: missing beside 'instruction', 'input'; wanted text",
    ),
    "input is a list": (
        '{"instruction": "hi", "input": ["a"], "output": "yes"}',
        "input: a list; wanted text, an empty string or null",
    ),
    "completion empty": (
        '{"prompt": "hi", "completion": ""}',
        "completion: an empty string; wanted text",
    ),
    "ShareGPT role": (
        sharegpt(("human", "hi"), ("observation", "42")),
        "conversations[1].from: 'observation'; wanted one of system, human, user, gpt",
    ),
    "ShareGPT order": (
        sharegpt(("gpt", "hi"), ("human", "hi")),
        "conversations[0]: assistant first; wanted user",
    ),
    "ShareGPT value": (
        '{"conversations": [{"from": "human", "text": "hi"}, {"from": "gpt", "value": "yes"}]}',
        "conversations[0].value: missing beside 'from', 'text'; wanted text",
    ),
    "several forms": (
        '{"prompt": "hi", "completion": "yes", "instruction": "hi", "output": "yes"}',
        "row: fields 'prompt', 'completion', 'instruction', 'output'; wanted exactly one of",
    ),
    "no known form": (
        '{"question": "hi", "answer": "yes"}',
        "row: fields 'question', 'answer'; wanted exactly one of 'messages', 'instruction'",
    ),
    "no object": ('["hi", "yes"]', "row: a list; wanted a JSON object with 'messages'"),
    "broken JSON": (
        '{"prompt": "hi", "completion": "yes"',
        "line: Expecting ',' delimiter at column 38; wanted one JSON object a line",
    ),
    "duplicate key": (
        '{"prompt": "hi", "prompt": "hello", "completion": "yes"}',
        "row: key 'prompt' twice in one object; wanted every key once",
    ),
    "not UTF-8": (
        '{"prompt": "Grüße", "completion": "yes"}'.encode("latin-1"),
        "line: byte 0xfc at byte 15; wanted UTF-8 text",
    ),
    "endless number": (
        '{"prompt": ' + "9" * 6000 + ', "completion": "yes"}',
        "line: a number of thousands of digits; wanted one JSON object a line",
    ),
}


def file_of(row: str | bytes) -> bytes:
    """A file whose second row is `row`."""
    row = row if isinstance(row, bytes) else row.encode()
    return b"\n".join([GOOD.encode(), row, GOOD.encode(), b""])


# The cases below write into a folder; each gives what is named as the source, and what is said.


def no_such_file(folder: pathlib.Path):
    path = folder / "row.jsonl"
    return path, [f"{path}: no such file; did you mean {folder}/rows.jsonl?", "Wanted a file of"]


def no_such_folder(folder):
    path = f"{folder}/data/rows.jsonl"
    return path, [f"{path}: no such file; nor is there a folder {folder}/data; wanted"]


def an_empty_file(folder):
    path = folder / "empty.jsonl"
    path.touch()
    return path, [f"{path}: is empty; wanted a file of JSON Lines"]


def blank_lines(folder):
    path = folder / "blank.jsonl"
    path.write_text("\n\n \n")
    return path, [f"no rows in {path}", "wanted"]


def a_folder_without_data(folder):
    path = folder / "data"
    path.mkdir()
    (path / "notes.md").write_text("# Data\n")
    (path / "SOURCE.txt").write_text("https://example.org\n")
    return path, [f"{path}: is a folder without rows (it holds"]


def a_folder_of_files(folder):
    path = folder / "data"
    path.mkdir()
    (path / "a.jsonl").write_text(GOOD)
    return path, [f"{path}: is a folder with files of rows; name the files: {path}/a.jsonl"]


def a_zip_file(folder):
    path = folder / "rows.jsonl.zip"
    path.write_bytes(b"PK\x03\x04" + bytes(40))
    return path, [f"{path}: is a zip file; wanted JSON Lines", "`unzip` unpacks it"]


def a_csv_file(folder):
    path = folder / "rows.csv"
    path.write_text("instruction,output\nSay hi,hi\n")
    return path, [f"{path}:1: line: Expecting value at column 1; wanted one JSON object a line"]


def utf_16(folder):
    path = folder / "other.jsonl"
    path.write_text(GOOD, "utf-16")
    return path, [f"{path}: is UTF-16; wanted", "UTF-8", "`iconv -f UTF-16 -t UTF-8` converts it"]


def an_object_over_several_lines(folder):
    path = folder / "rows.json"
    path.write_text(json.dumps({"data": ROWS}, indent=1))
    return path, [f"{path}:1: is an object over several lines; wanted", "`jq -c '.FIELD[]'`"]


def a_broken_array(folder):
    path = folder / "rows.json"
    path.write_text(f"[\n{GOOD},\n{GOOD}\n{GOOD}\n]")
    return path, [f"{path}:4: the JSON array is broken: Expecting ',' or ']'"]


def a_cut_gzip(folder):
    path = folder / "rows.jsonl.gz"
    path.write_bytes(gzip.compress((GOOD + "\n").encode() * 100)[:-20])
    return path, [f"{path}: the gzip file is broken", "copy it again"]


def a_broken_parquet(folder):
    path = folder / "rows.parquet"
    parquet.write_table(pa.Table.from_pylist(ROWS[:5]), path)
    path.write_bytes(path.read_bytes()[:-30])
    return path, [f"{path}: cannot be read (", "if it is damaged or cut, copy it again"]


def bad_rows_of_parquet(folder):
    path = folder / "rows.parquet"
    rows = [{"prompt": "hi", "completion": text} for text in ("yes", "no", "", None)]
    parquet.write_table(pa.Table.from_pylist(rows), path)
    return path, [
        "2 of 4 rows",
        f"{path}:row 3: completion: an empty string; wanted text",
        f"{path}:row 4: completion: null; wanted text",
    ]


def no_such_split(folder):
    path = folder / "saved"
    rows = datasets.Dataset.from_list(ROWS[:5])
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(path)
    return f"{path}:validation", [
        f"{path}: no split 'validation'; it has 'test', 'train'. Write {path}:test"
    ]


def a_saved_folder_without_its_rows(folder):
    path = folder / "saved"
    datasets.Dataset.from_list(ROWS[:5]).save_to_disk(path)
    (arrow,) = path.glob("*.arrow")
    arrow.unlink()
    return path, [f"{arrow}: no such file, though state.json beside it names it"]


def a_hub_that_does_not_answer(folder):
    return "easylm/no-such-data", [
        "easylm/no-such-data: no such file or folder here, and the Hugging Face hub gave no",
        "Check the spelling (owner/name[/config][:split]), the network",
    ]


def no_such_tfds(folder):
    return "tfds:no_such_data:1.0.0", [
        "tfds:no_such_data:1.0.0: not prepared here",
        "TFDS_DATA_DIR",
    ]


def more_rows_than_there_are(folder):
    path = folder / "rows.jsonl"
    return f"{path}@1000", [f"{path}@1000: wanted 1,000 rows; found {len(ROWS)} valid ones"]


def a_fraction_of_nothing(folder):
    path = folder / "rows.jsonl"
    return f"{path}@0.001", [f"{path}@0.001: wanted 0 rows; found {len(ROWS)} valid ones"]


def a_percentage(folder):
    path = folder / "rows.jsonl"
    return f"{path}@50%", [f"found '{path}@50%'; wanted PATH, PATH@count", "like 0.25"]


def more_than_everything(folder):
    path = folder / "rows.jsonl"
    return f"{path}@1.5", [f"found '{path}@1.5'; wanted PATH, PATH@count", "at most 1.0"]


def a_comma_too_many(folder):
    path = f"{folder}/rows.jsonl,"
    return path, [f"found '{path}'; wanted PATH[@count|@fraction],..."]


FILES = [
    no_such_file, no_such_folder, an_empty_file, blank_lines, a_folder_without_data,
    a_folder_of_files, a_zip_file, a_csv_file, utf_16, an_object_over_several_lines,
    a_broken_array, a_cut_gzip, a_broken_parquet, bad_rows_of_parquet, no_such_split,
    a_saved_folder_without_its_rows, a_hub_that_does_not_answer, no_such_tfds,
    more_rows_than_there_are, a_fraction_of_nothing, a_percentage, more_than_everything,
    a_comma_too_many,
]  # fmt: skip
