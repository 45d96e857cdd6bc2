"""What docs/data.md shows of bad rows is what is printed."""

import pathlib
import re

import pytest

from easylm.data.pair_rows import PAIRS
from easylm.data.rows import CONVERSATIONS
from easylm.data.sources import read_rows
from easylm.errors import InputError

PAGE = pathlib.Path(__file__).resolve().parents[2] / "docs" / "data.md"


@pytest.mark.parametrize(
    ("form", "kind", "name"),
    [(CONVERSATIONS, "json", "rows.jsonl"), (PAIRS, "jsonl", "pairs.jsonl")],
    ids=["conversations", "pairs"],
)
def test_the_example_of_bad_rows(tmp_path, monkeypatch, form, kind, name):
    found = re.search(rf"```{kind}\n(.*?)```.*?```text\n(.*?)```", PAGE.read_text(), re.S)
    rows, said = found.groups()
    monkeypatch.chdir(tmp_path)
    pathlib.Path(name).write_text(rows)
    with pytest.raises(InputError) as error:
        read_rows(name, form=form)
    assert f"{error.value}\n" == said
    assert [row.where for row in read_rows(name, "skip", form=form).rows] == [f"{name}:1"]
