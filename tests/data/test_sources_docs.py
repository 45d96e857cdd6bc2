"""What docs/data.md shows of bad rows is what is printed."""

import pathlib
import re

import pytest

from easylm.data.sources import read_rows
from easylm.errors import InputError

PAGE = pathlib.Path(__file__).resolve().parents[2] / "docs" / "data.md"


def test_the_example_of_bad_rows(tmp_path, monkeypatch):
    text = PAGE.read_text()
    rows, said = (re.search(rf"```{kind}\n(.*?)```", text, re.S)[1] for kind in ("json", "text"))
    monkeypatch.chdir(tmp_path)
    pathlib.Path("rows.jsonl").write_text(rows)
    with pytest.raises(InputError) as error:
        read_rows("rows.jsonl")
    assert f"{error.value}\n" == said
    assert [row.where for row in read_rows("rows.jsonl", "skip").rows] == ["rows.jsonl:1"]
