"""Rows that ask for an answer: what they hold beside their turns counts as in training."""

import json

import pytest

from easylm.data.prompts import read_prompts
from easylm.errors import InputError

USER = {"role": "user", "content": "Hi"}
SYSTEM = {"role": "system", "content": "Be brief."}


def write(tmp_path, row):
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps(row))
    return str(path)


@pytest.mark.parametrize("row", [{"prompt": "Hi"}, {"messages": [USER]}])
def test_the_field_system_comes_first(row, tmp_path):
    [prompt] = read_prompts(write(tmp_path, {**row, "system": "Be brief."}), raw=False)
    assert prompt.messages == [SYSTEM, USER]
    [prompt] = read_prompts(write(tmp_path, {**row, "system": ""}), raw=False)
    assert prompt.messages == [USER]


def test_what_would_be_lost_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"prompts\.jsonl:1: tools: a list; wanted none"):
        read_prompts(write(tmp_path, {"prompt": "Hi", "tools": [{"name": "x"}]}), raw=False)
    with pytest.raises(InputError, match=r"prompts\.jsonl:1: system: text; wanted none with --raw"):
        read_prompts(write(tmp_path, {"prompt": "Hi", "system": "Be brief."}), raw=True)
