"""Prepared data: keyed by all that decides it, the same for any number of processes."""

import dataclasses
import functools
import gc
import json
import multiprocessing
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
import weakref

import numpy as np
import pytest

from easylm.chat import TULU
from easylm.data import prepare as prepare_module
from easylm.data.encode import Examples, encode_rows
from easylm.data.parallel import encode_in_parts
from easylm.data.prepare import open_rows, prepare
from easylm.errors import InputError
from easylm.tokenizer import load_tokenizer, train_tokenizer

TEXTS = ["one two three four five six seven", "eight nine ten eleven twelve", "yes no 12 👍"]
WORDS = " ".join(TEXTS).split()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    train_tokenizer(TEXTS, 330, folder)
    return load_tokenizer(folder)


def write_rows(path, count=40, seed=0):
    rng = np.random.default_rng(seed)

    def text(most):
        return " ".join(rng.choice(WORDS, rng.integers(1, most)))

    rows = [{"prompt": text(40), "completion": text(15)} for _ in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def source(tmp_path):
    return write_rows(tmp_path / "rows.jsonl")


@pytest.fixture
def run(tmp_path, tokenizer):
    """`run(sources, ...)`: opens and prepares, in a cache of the test's own."""

    def run(sources, tokenizer=tokenizer, on_bad_row="refuse", seed=0, **options):
        options = {
            "cache": str(tmp_path / "cache"),
            "seq_len": 64,
            "vocab_size": 330,
            "too_long": "truncate",
            "eos_newline": "keep",
            "special_tokens": "text",
            "processes": 1,
            "progress": False,
            **options,
        }
        rows = open_rows(sources, on_bad_row=on_bad_row, seed=seed, cache=options["cache"])
        return prepare(rows, tokenizer, **options)

    return run


def encode_at(seq_len):
    """What `encode_in_parts` does with rows."""
    policy = prepare_module.Policy(seq_len)
    return functools.partial(encode_rows, policy=policy, vocab_size=330)


def no_reading(*arguments):
    raise AssertionError("rows were read")


def test_examples_and_manifest(run, source, tokenizer):
    prepared = run(source)
    rows = prepare_module.read_rows(source).rows
    parts = [tokenizer.apply_chat_template(row.messages, return_dict=False)[:64] for row in rows]
    examples, manifest = prepared.examples, prepared.manifest
    kept = [examples.example(i)[0].tolist() for i in range(len(examples))]
    assert [tokens for tokens in parts if tokens in kept] == kept
    assert isinstance(examples.tokens.base, np.memmap)
    assert manifest.rows == 40 == len(prepared.row_lengths)
    dropped = manifest.dropped["no target left after truncation"]
    assert manifest.kept == len(examples) == 40 - dropped > 20
    assert manifest.truncated == (prepared.row_lengths > 64).sum() - dropped > 0 < dropped
    assert prepared.row_lengths.max() > 64 >= examples.lengths.max() == manifest.length_max
    assert manifest.tokens == len(examples.tokens) == examples.lengths.sum()
    assert manifest.target_tokens == examples.loss_mask.sum()  # the first token is <s>, no target
    assert manifest.largest_token == examples.tokens.max()
    assert manifest.length_mean == examples.lengths.mean()
    assert manifest.length_min == examples.lengths.min()
    quartiles = manifest.length_q25, manifest.length_median, manifest.length_q75
    assert quartiles == tuple(np.rint(np.quantile(examples.lengths, [0.25, 0.5, 0.75])))
    assert [(entry["path"], entry["taken"]) for entry in manifest.sources] == [(source, 40)]
    full, long = prepared.row_lengths, prepared.row_lengths > 64
    assert manifest.row_length_mean == full.mean() and manifest.row_length_max == full.max()
    assert manifest.row_length_q25 == round(np.quantile(full, 0.25))
    assert manifest.tokens + manifest.cut_tokens + manifest.dropped_tokens == full.sum()
    cut = sum(sorted(full[long] - 64))
    assert 0 < manifest.cut_tokens < cut and manifest.dropped_tokens >= dropped * 65
    share = manifest.cut_tokens / full.sum()
    text = str(manifest)
    assert f"40 rows of {source}\n40 rows: {len(examples)} examples, " in text
    assert all(len(line) <= 80 for line in text.splitlines() if source not in line)
    text = " ".join(text.split())
    assert f"{dropped} dropped (no target left after truncation); " in text
    assert f"max {full.max()} {manifest.cut_tokens:,} tokens ({share:.1%}) lost to trunc" in text
    assert f"{manifest.dropped_tokens:,} ({manifest.dropped_tokens / full.sum():.1%}) in " in text
    stored = json.loads(pathlib.Path(prepared.folder, "manifest.json").read_text())
    del stored["arrays"]
    assert stored == dataclasses.asdict(manifest)


def test_the_second_run_reads_no_rows(run, source, monkeypatch, tmp_path):
    first = run(source)
    monkeypatch.setattr(prepare_module, "read_rows", no_reading)
    again = run(source)
    assert again.reused and not first.reused
    assert again.manifest == first.manifest and again.folder == first.folder
    assert again.examples.tokens.tolist() == first.examples.tokens.tolist()
    assert again.examples.loss_mask.tolist() == first.examples.loss_mask.tolist()
    assert again.examples.fingerprint() == first.examples.fingerprint()
    # The content counts, not its name.
    other = shutil.copy(source, f"{tmp_path}/other.jsonl")
    renamed = run(other)
    assert renamed.reused
    assert other in str(renamed.manifest) and source not in str(renamed.manifest)


def test_rows_are_not_kept_in_memory(source, tmp_path, tokenizer):
    options = {"too_long": "truncate", "eos_newline": "keep", "special_tokens": "text"}
    cache = str(tmp_path / "cache")
    rows = open_rows(source, on_bad_row="refuse", seed=0, cache=cache)
    read = weakref.ref(rows.read())
    assert rows.read() is read()
    prepare(rows, tokenizer, cache=cache, seq_len=64, vocab_size=330, processes=1, **options)
    gc.collect()
    assert read() is None and len(rows.read().rows) == 40


def test_fingerprint_needs_no_tokens(run, source):
    fingerprint = run(source).examples.fingerprint()
    nothing = Examples(*[np.zeros(0)] * 3, known_fingerprint=fingerprint)
    assert nothing.fingerprint() == fingerprint


def test_everything_that_decides_is_in_the_key(run, source, tmp_path, tokenizer):
    own = load_tokenizer_with(
        tokenizer, template=tokenizer.chat_template.replace("<|user|>", "<|human|>")
    )
    smaller = tmp_path / "smaller"
    train_tokenizer(TEXTS, 325, smaller)
    second = write_rows(tmp_path / "second.jsonl", seed=1)
    variants = [
        run(source),
        run(second),
        run(f"{source},{second}"),
        run(f"{second},{source}"),
        run(f"{source},{source}"),
        run(f"{source}@20"),
        run(f"{source}@20", seed=1),
        run(f"{source}@0.5", seed=1),
        run(source, on_bad_row="skip"),
        run(source, seq_len=65),
        run(source, too_long="drop"),
        run(source, eos_newline="strip"),
        run(source, special_tokens="parse"),
        run(source, tokenizer=own),
        run(source, tokenizer=load_tokenizer(smaller)),
    ]
    assert not any(prepared.reused for prepared in variants)
    assert len({prepared.folder for prepared in variants}) == len(variants)
    assert run(f"{source}@20").examples.tokens.tolist() == variants[5].examples.tokens.tolist()
    assert run(source, seed=1).reused  # decides nothing here
    assert run(source, processes=2).reused


def load_tokenizer_with(tokenizer, template):
    import copy

    other = copy.deepcopy(tokenizer)
    other.chat_template = template
    return other


def test_bad_rows_are_reported_when_rows_are_opened(source, tmp_path, run):
    with open(source, "a") as file:
        file.write('{"prompt": "one"}\n')
    cache = str(tmp_path / "cache")
    with pytest.raises(InputError, match=r"1 of 41 rows of data\.sources are bad"):
        open_rows(source, on_bad_row="refuse", seed=0, cache=cache)
    manifest = run(source, on_bad_row="skip").manifest
    assert manifest.sources[0]["skipped"] == {"text is missing": 1} and manifest.rows == 40
    assert f"1 row skipped: text is missing, the first is {source}:41" in str(manifest)


def test_fields_that_are_not_used_are_said(source, run):
    with open(source, "a") as file:
        file.write('{"prompt": "one", "completion": "two", "id": 7, "category": null}\n')
    text = str(run(source).manifest)
    assert "  fields not used: id (1 row)" in text and "lost" not in text.replace("lost to", "")


def tokenizer_that_knows(known):
    """Words alone: every other one becomes its padding token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", "<", "|", ">", "|>", "<|", "user", "assistant", "|></", *known]
    words = {word: i for i, word in enumerate(words)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        chat_template=TULU,
    )


def test_a_tokenizer_that_does_not_know_the_text_is_refused(run, source, tmp_path):
    with open(source, "a") as file:
        file.write('{"prompt": "one ?", "completion": "two ?"}\n')
    unknown = run(source, tokenizer=tokenizer_that_knows(WORDS))
    assert unknown.manifest.unknown_tokens == 2
    share = unknown.manifest.unknown_tokens / unknown.row_lengths.sum()
    assert f"({share:.2%}) stand for text that the tokenizer does not" in str(unknown.manifest)
    with pytest.raises(InputError) as error:
        run(source, tokenizer=tokenizer_that_knows(WORDS[:4]))
    assert re.match(r"data\.tokenizer: \d\d\.\d% of the tokens of data", str(error.value))
    assert "are <pad>, which stands for text" in str(error.value)
    knows_all = run(source, tokenizer=tokenizer_that_knows([*WORDS, "?"])).manifest
    assert knows_all.unknown_tokens == 0 and "stand for" not in str(knows_all)


def test_changing_sources_are_refused(source, tmp_path, monkeypatch):
    read = prepare_module.read_rows

    def read_while_it_grows(*arguments):
        rows = read(*arguments)
        with open(source, "a") as file:
            file.write('{"prompt": "one", "completion": "two"}\n')
        return rows

    monkeypatch.setattr(prepare_module, "read_rows", read_while_it_grows)
    with pytest.raises(InputError, match="changed while it was read"):
        open_rows(source, on_bad_row="refuse", seed=0, cache=str(tmp_path / "cache"))


def test_nothing_left_is_an_error_and_leaves_nothing(run, source, tmp_path):
    with pytest.raises(InputError) as error:
        run(source, seq_len=4)
    assert "no example is left of 40 rows at data.seq_len=4" in str(error.value)
    assert "40 no target left after truncation" in str(error.value)
    assert [files for _, _, files in os.walk(tmp_path / "cache") if files] == []


def test_a_smaller_model_is_refused_on_prepared_data_too(run, source, tokenizer):
    for _ in range(2):
        largest = run(source).manifest.largest_token
        with pytest.raises(InputError, match=f"has id {largest}: .* vocab_size={largest}"):
            run(source, vocab_size=largest)


def test_any_number_of_processes_gives_the_same(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("easylm.data.parallel._ROWS", 7)  # several parts for each
    rows = prepare_module.read_rows(write_rows(tmp_path / "rows.jsonl", 100)).rows
    one, two = (
        list(encode_in_parts(tokenizer, rows, encode_at(64), processes=count, progress=False))
        for count in (1, 2)
    )
    assert len(one) == len(two) == 15
    for part, other in zip(one, two, strict=True):
        assert part.examples.tokens.tolist() == other.examples.tokens.tolist()
        assert part.examples.loss_mask.tolist() == other.examples.loss_mask.tolist()
        assert part.examples.offsets.tolist() == other.examples.offsets.tolist()
        assert part.row_lengths.tolist() == other.row_lengths.tolist()
        assert part.lengths.tolist() == other.lengths.tolist() == part.examples.lengths.tolist()
        assert part[2] == other[2] == {} and part[4:] == other[4:]


def test_the_first_bad_row_is_named_by_any_number_of_processes(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("easylm.data.parallel._ROWS", 7)
    path = write_rows(tmp_path / "rows.jsonl", 60)
    rows = prepare_module.read_rows(path).rows
    for place in (30, 50):
        rows[place].messages[0]["content"] = "</s>\ufdd0"
    for count in (1, 2):
        with pytest.raises(InputError, match=r"^.*rows\.jsonl:31: the content has a Unicode non"):
            list(encode_in_parts(tokenizer, rows, encode_at(64), processes=count, progress=False))


def test_a_process_that_is_killed_is_an_error(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("easylm.data.parallel._ROWS", 1)
    rows = prepare_module.read_rows(write_rows(tmp_path / "rows.jsonl", 60)).rows
    parts = encode_in_parts(tokenizer, rows, encode_at(64), processes=2, progress=False)
    next(parts)
    for process in multiprocessing.active_children():
        process.kill()
    with pytest.raises(InputError, match=r"data\.processes: one of the 2 processes .* was killed"):
        list(parts)


ENDLESS = """
import functools
import sys
from easylm.data import parallel
from easylm.data.encode import Policy, encode_rows
from easylm.data.rows import Row
from easylm.tokenizer import load_tokenizer

def main():
    turns = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    rows = [Row(turns, f"f:{i}") for i in range(1_000_000)]
    tokenizer = load_tokenizer(sys.argv[1])
    encode = functools.partial(encode_rows, policy=Policy(64), vocab_size=330)
    parts = parallel.encode_in_parts(tokenizer, rows, encode, processes=2, progress=False)
    if sys.argv[2] == "starting":
        print("started", flush=True)
    for part in parts:
        print("started", flush=True)

if __name__ == "__main__":
    main()
"""


@pytest.mark.parametrize("moment", ["starting", "encoding"])
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_interrupted_processes_end_quietly(tokenizer, tmp_path, sent, moment):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "endless.py").write_text(ENDLESS)
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "endless.py"), str(tmp_path / "tokenizer"), moment],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )
    assert process.stdout.readline() == "started\n"
    if moment == "starting":
        time.sleep(0.3)  # two processes are being started
    if sent == signal.SIGINT:
        os.killpg(process.pid, sent)  # what a terminal does on Ctrl-C
    else:
        process.send_signal(sent)
    # Ends when no process has the pipes open any more: all of them are gone.
    _, errors = process.communicate(timeout=60)
    assert process.returncode == -sent
    assert errors.count("Traceback") == (sent == signal.SIGINT)
