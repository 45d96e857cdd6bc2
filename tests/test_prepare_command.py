"""`python -m easylm.prepare`: what it says and writes, and what training finds of it."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from easylm import prepare
from easylm.data.pack import pack
from easylm.tokenizer import load_tokenizer, train_tokenizer

TOPICS = ("sun", "moon", "rain", "snow", "wind", "sea")
ROWS = [
    {"instruction": f"Say {topic} {n} times.", "input": "", "output": " ".join([topic] * n)}
    for topic in TOPICS
    for n in range(1, 9)
]
CONFIG = """\
from easylm.config import to_config_dict
from easylm.trainers.config import SftConfig


def get_config():
    config = to_config_dict(SftConfig)
    config.init_from = "random"
    config.model.preset = "llama_7b"
    config.steps = 1
    config.batch_rows = 1
    config.data.seq_len = 48
    return config
"""
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def command(tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[::7]))
    (tmp_path / "config.py").write_text(CONFIG)
    train_tokenizer([f"<|user|> <|assistant|> {row}" for row in ROWS], 400, tmp_path / "tokenizer")

    def command(*more):
        return [
            f"--config={tmp_path / 'config.py'}",
            f"--config.data.sources={tmp_path / 'rows.jsonl'}",
            f"--config.data.tokenizer={tmp_path / 'tokenizer'}",
            f"--config.data.cache={tmp_path / 'cache'}",
            *more,
        ]

    return command


def test_counts_packing_and_pictures(command, tmp_path, capsys):
    workdir = tmp_path / "work"
    options = [f"--workdir={workdir}", f"--config.data.eval_sources={tmp_path / 'eval.jsonl'}"]
    prepare.main(command(*options))
    said = capsys.readouterr().err
    assert "48 rows: 48 examples, " in said and "7 rows: 7 examples, " in said
    description = json.loads((workdir / "data.json").read_text())
    assert description["manifest"]["rows"] == 48
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    turns = [
        [
            {"role": "user", "content": row["instruction"]},
            {"role": "assistant", "content": row["output"]},
        ]
        for row in ROWS
    ]
    lengths = np.array(
        [len(tokenizer.apply_chat_template(t, return_dict=False)) for t in turns]
    ).clip(max=48)
    assert description["manifest"]["tokens"] == lengths.sum()
    rows = len(pack(lengths, 48, seed=42, epoch=0))
    assert description["packed_rows"] == rows < 48
    assert description["packed_fill"] == pytest.approx(lengths.sum() / (rows * 48))
    assert description["padded_fill"] == pytest.approx(lengths.sum() / (48 * 48))
    assert f"packed: {rows} rows of 48 tokens, {description['packed_fill']:.1%} filled" in said
    assert json.loads((workdir / "eval.json").read_text())["manifest"]["rows"] == 7
    for name in ("data", "eval"):
        assert (workdir / "plots" / f"{name}_lengths.png").read_bytes().startswith(PNG)


def test_without_a_workdir_all_is_beside_the_data(command, tmp_path, capsys):
    prepare.main(command())
    assert "kept for later runs in" in capsys.readouterr().err
    (folder,) = (tmp_path / "cache").glob("*/*")
    assert (folder / "plots" / "data_lengths.png").read_bytes().startswith(PNG)
    assert json.loads((folder / "data.json").read_text())["manifest"]["rows"] == 48
    prepare.main(command())
    assert "prepared before" in capsys.readouterr().err


def test_a_tokenizer_trained_on_the_data(command, tmp_path, capsys):
    options = ["--config.data.tokenizer=", "--config.data.tokenizer_vocab_size=400"]
    prepare.main(command(*options))
    capsys.readouterr()
    prepare.main(command(*options, f"--workdir={tmp_path / 'work'}"))
    # The same data trains the same tokenizer.
    assert "prepared before" in capsys.readouterr().err
    load_tokenizer(tmp_path / "work" / "tokenizer")


def test_pairs(command, tmp_path, capsys):
    config = CONFIG.replace("SftConfig", "DpoConfig").replace("seq_len = 48", "seq_len = 160")
    (tmp_path / "pairs.py").write_text(config)
    rows = [
        {"prompt": row["instruction"], "chosen": row["output"], "rejected": f"No {row['output']}"}
        for row in ROWS
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, *options = command(f"--workdir={tmp_path / 'work'}", "--config.dpo.keep_prompt=start")
    prepare.main([f"--config={tmp_path / 'pairs.py'}", *options])
    said = capsys.readouterr().err
    description = json.loads((tmp_path / "work" / "data.json").read_text())
    manifest = description["manifest"]
    assert (manifest["rows"], manifest["kept"], manifest["keep_prompt"]) == (48, 48, "start")
    assert "48 rows: 48 pairs, " in said and "tokens of a pair: mean " in said
    assert f"packed: {description['packed_rows']} rows of 160 tokens, " in said
    assert "one pair a row: 48 rows, " in said and description["packed_rows"] < 48
    assert description["packed_fill"] == manifest["tokens"] / (description["packed_rows"] * 160)
    assert (tmp_path / "work" / "plots" / "data_lengths.png").read_bytes().startswith(PNG)


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        ([], 0, "48 rows: 48 examples"),
        (["--config.data.sources=BAD"], 2, "bad.jsonl:1: output: missing"),
        (["--config.data.seq_len=1"], 2, "data.seq_len: found 1"),
        (["--config.data.seqlen=5"], 2, "--config.data.seqlen: no such option"),
        (["--help"], 0, "[--workdir=DIR]"),
    ],
    ids=["done", "bad row", "bad value", "misspelt option", "help"],
)
def test_the_command_needs_no_jax(command, tmp_path, more, code, message):
    (tmp_path / "jax.py").write_text("raise SystemExit('jax was imported')")
    (tmp_path / "bad.jsonl").write_text('{"instruction": "Say sun."}\n')
    more = [argument.replace("BAD", str(tmp_path / "bad.jsonl")) for argument in more]
    root = pathlib.Path(prepare.__file__).parent.parent
    result = subprocess.run(
        [sys.executable, "-m", "easylm.prepare", *command(*more)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(root)])},
    )
    assert result.returncode == code, result.stderr
    assert message in " ".join((result.stdout + result.stderr).split())
    assert "Traceback" not in result.stderr
