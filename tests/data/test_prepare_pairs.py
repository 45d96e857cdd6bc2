"""Pairs are prepared once, kept whole, and the same whoever encodes them."""

import dataclasses
import functools
import json
import pathlib

import numpy as np
import pytest

from easylm.data import prepare as prepare_module
from easylm.data.pair_rows import PAIRS
from easylm.data.pairs import PairPolicy, encode_pairs
from easylm.data.parallel import encode_in_parts
from easylm.data.prepare import open_rows, prepare_pairs
from easylm.data.show import format_pair
from easylm.data.sources import read_rows
from easylm.errors import InputError
from easylm.tokenizer import load_tokenizer, train_tokenizer

TEXTS = ["one two three four five six seven", "eight nine ten eleven twelve", "yes no 12 👍"]
WORDS = " ".join(TEXTS).split()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    train_tokenizer(TEXTS, 330, folder)
    return load_tokenizer(folder)


def write_pairs(path, count=40, seed=0):
    rng = np.random.default_rng(seed)

    def text(most):
        return " ".join(rng.choice(WORDS, rng.integers(1, most)))

    rows = [
        {"prompt": text(40), "chosen": f"yes {text(20)}", "rejected": f"no {text(20)}", "margin": i}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def source(tmp_path):
    return write_pairs(tmp_path / "pairs.jsonl")


@pytest.fixture
def run(tmp_path, tokenizer):
    """`run(sources, ...)`: opens and prepares, in a cache of the test's own."""

    def run(sources, **options):
        options = {
            "cache": str(tmp_path / "cache"),
            "seq_len": 128,
            "vocab_size": 330,
            "too_long": "truncate",
            "keep_prompt": "end",
            "scored_turns": "last",
            "eos_newline": "keep",
            "special_tokens": "text",
            "processes": 1,
            "progress": False,
            **options,
        }
        cache = options["cache"]
        rows = open_rows(sources, on_bad_row="refuse", seed=0, cache=cache, form=PAIRS)
        return prepare_pairs(rows, tokenizer, **options)

    return run


def encode_at(seq_len):
    """What `encode_in_parts` does with rows."""
    return functools.partial(encode_pairs, policy=PairPolicy(seq_len), vocab_size=330)


def test_pairs_and_manifest(run, source, tokenizer):
    prepared = run(source)
    encoded = encode_at(128)(tokenizer, read_rows(source, form=PAIRS).rows)
    pairs, manifest = prepared.pairs, prepared.manifest
    for name in ("tokens", "loss_mask", "offsets"):
        assert getattr(pairs.sequences, name).tolist() == getattr(encoded.examples, name).tolist()
    assert pairs.ids.tolist() == encoded.columns["ids"].tolist()
    assert pairs.margins.tolist() == encoded.columns["margins"].tolist()
    assert isinstance(pairs.ids.base, np.memmap)
    assert prepared.row_lengths.tolist() == encoded.row_lengths.tolist()
    assert prepared.lengths.tolist() == encoded.lengths.tolist()
    assert (manifest.rows, manifest.kept) == (40, len(pairs))
    assert manifest.truncated == encoded.truncated > 0
    assert manifest.cut_tokens == encoded.cut_tokens > 0
    assert manifest.tokens == len(pairs.sequences.tokens)
    assert manifest.target_tokens == pairs.sequences.loss_mask.sum()
    assert manifest.length_max == encoded.lengths.max() <= 128 < manifest.row_length_max
    assert (manifest.keep_prompt, manifest.scored_turns) == ("end", "last")
    said = str(manifest)
    assert f"40 rows: {len(pairs)} pairs, {encoded.truncated} of them truncated" in said
    assert f"tokens of a pair: mean {encoded.lengths.mean():,.0f}" in said
    stored = json.loads(pathlib.Path(prepared.folder, "manifest.json").read_text())
    del stored["arrays"]
    assert stored == dataclasses.asdict(manifest)


def test_the_second_run_reads_no_rows(run, source, monkeypatch):
    first = run(source)

    def no_reading(*arguments):
        raise AssertionError("rows were read")

    monkeypatch.setattr(prepare_module, "read_rows", no_reading)
    again = run(source)
    assert again.reused and not first.reused and again.manifest == first.manifest
    assert again.pairs.fingerprint() == first.pairs.fingerprint()
    assert again.pairs.ids.tolist() == first.pairs.ids.tolist()


def test_everything_that_decides_is_in_the_key(run, source, tmp_path):
    variants = [
        run(source),
        run(write_pairs(tmp_path / "other.jsonl", seed=1)),
        run(f"{source}@20"),
        run(source, seq_len=127),
        run(source, too_long="drop"),
        run(source, keep_prompt="start"),
        run(source, scored_turns="all"),
        run(source, special_tokens="parse"),
    ]
    assert not any(prepared.reused for prepared in variants)
    assert len({prepared.folder for prepared in variants}) == len(variants)
    assert len({prepared.pairs.fingerprint() for prepared in variants[:6]}) == 6
    assert run(source, processes=2).reused


def test_any_number_of_processes_gives_the_same(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("easylm.data.parallel._ROWS", 7)  # several parts for each
    rows = read_rows(write_pairs(tmp_path / "pairs.jsonl"), form=PAIRS).rows
    one, two = (
        list(encode_in_parts(tokenizer, rows, encode_at(96), processes=count, progress=False))
        for count in (1, 2)
    )
    assert len(one) == len(two) == 6
    for part, other in zip(one, two, strict=True):
        assert part.examples.tokens.tolist() == other.examples.tokens.tolist()
        assert part.examples.loss_mask.tolist() == other.examples.loss_mask.tolist()
        assert part.columns["ids"].tolist() == other.columns["ids"].tolist()
        assert part.columns["margins"].tolist() == other.columns["margins"].tolist()
        assert part[3].tolist() == other[3].tolist() and part[4:] == other[4:]


def test_nothing_left_is_an_error(run, source):
    with pytest.raises(InputError) as error:
        run(source, seq_len=8, too_long="drop")
    assert "no pair is left of 40 rows at data.seq_len=8; wanted at least one" in str(error.value)
    assert "Dropped: 40 too long" in str(error.value)


def test_both_answers_are_shown(run, tmp_path, tokenizer):
    row = {"prompt": "one?", "chosen": "yes", "rejected": "no"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    pairs = run(str(tmp_path / "pairs.jsonl")).pairs
    before = "<s> <|user|>\none?\n<|assistant|>\n"
    assert format_pair(tokenizer, pairs, 0, color=False) == (
        f"chosen:\n{before}[[yes</s>]]\nrejected:\n{before}[[no</s>]]"
    )
    assert "\x1b[32mno" in format_pair(tokenizer, pairs, 0, color=True)
