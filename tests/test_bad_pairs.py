"""What `python -m easylm.dpo` says to bad pairs: exit code 2, one message, nothing left behind."""

import json
import pathlib
import subprocess
import sys

import pytest

from easylm import dpo
from easylm.command import run_command
from tests import bad_pairs
from tests.runs import COMMON, RANDOM, ROWS
from tests.test_bad_inputs import check_message, check_nothing_left, content

CONFIG = """\
from easylm.config import to_config_dict
from easylm.trainers.config import DpoConfig


def get_config():
    return to_config_dict(DpoConfig)
"""


@pytest.fixture
def folder(tmp_path):
    """With good pairs, and a config."""
    (tmp_path / "config.py").write_text(CONFIG)
    (tmp_path / "pairs.jsonl").write_text(f"{bad_pairs.GOOD}\n" * 3)
    return tmp_path


def arguments(folder: pathlib.Path, options: dict) -> list[str]:
    options = {"data.sources": folder / "pairs.jsonl", **RANDOM, **COMMON, **options}
    options["data.cache"] = folder / "prepared"
    return [
        f"--config={folder / 'config.py'}",
        f"--workdir={folder / 'new'}",
        *(f"--config.{name}={value}" for name, value in options.items()),
    ]


def refuse(folder, options, monkeypatch, capsys) -> str:
    """What the command says as it leaves with 2, with single spaces."""
    monkeypatch.setattr(sys, "argv", ["dpo", *arguments(folder, options)])
    before = content(folder)
    with pytest.raises(SystemExit) as left:
        run_command(dpo.main)
    assert left.value.code == 2
    check_nothing_left(folder, "new", before)
    printed, errors = capsys.readouterr()
    assert printed == ""
    return check_message(errors[errors.index("error:") :])


@pytest.mark.parametrize("field", ["data.sources", "data.eval_sources"])
@pytest.mark.parametrize("case", bad_pairs.ROW)
def test_a_bad_row(folder, monkeypatch, capsys, case, field):
    row, wanted = bad_pairs.ROW[case]
    path = folder / "bad.jsonl"
    path.write_text("\n".join([bad_pairs.GOOD, row, bad_pairs.GOOD, ""]))
    said = refuse(folder, {field: path}, monkeypatch, capsys)
    assert f"1 of 3 rows of {field} are bad:" in said
    assert f"{path}:2: {wanted}" in said
    assert "Repair them, or set data.on_bad_row=skip to leave them out." in said


def test_the_first_problems_and_all_reasons(folder, monkeypatch, capsys):
    path = folder / "bad.jsonl"
    rows = [bad_pairs.GOOD, *(row for row, _ in bad_pairs.ROW.values())]
    path.write_text("".join(f"{row}\n" for row in rows))
    said = refuse(folder, {"data.sources": path}, monkeypatch, capsys)
    count = len(bad_pairs.ROW)
    assert count >= 25 and f"{count} of {count + 1} rows of data.sources are bad:" in said
    assert f"{path}:11: " in said and f"{path}:12: " not in said
    assert "5 prompts differ" in said and "4 margin is no number" in said


def test_conversations_in_place_of_pairs(folder, monkeypatch, capsys):
    path = folder / "rows.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in ROWS))
    said = refuse(folder, {"data.sources": path}, monkeypatch, capsys)
    assert f"{path}:1: row: fields 'instruction', 'input', 'output'; wanted 'chosen' +" in said


def test_a_pair_that_is_too_long(folder, monkeypatch, capsys):
    long = {"prompt": "hi", "chosen": "yes " * 50, "rejected": "no"}
    path = folder / "long.jsonl"
    path.write_text(f"{bad_pairs.GOOD}\n{json.dumps(long)}\n")
    options = {"data.eval_sources": path, "data.too_long": "error"}
    said = refuse(folder, options, monkeypatch, capsys)
    assert f"{path}:2: " in said and "tokens in both sequences; wanted at most data.seq_len" in said


def test_the_real_command_leaves_with_two(folder):
    row, wanted = bad_pairs.ROW["other prompts"]
    path = folder / "bad.jsonl"
    path.write_text(f"{bad_pairs.GOOD}\n{row}\n")
    process = subprocess.run(
        [sys.executable, "-m", "easylm.dpo", *arguments(folder, {"data.sources": path})],
        capture_output=True,
        text=True,
        cwd=pathlib.Path(dpo.__file__).parent.parent,
    )
    assert (process.returncode, process.stdout) == (2, "")
    assert f"{path}:2: {wanted}" in check_message(process.stderr)
