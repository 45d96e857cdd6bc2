"""Runs on two hosts and on four beside runs of one process: same numbers, and all is done once."""

import json
import math
import pathlib
import re
import shutil
from collections import Counter
from typing import NamedTuple

import numpy as np
import pytest

from easylm import dpo, sft
from easylm.reference import ReferenceTable
from easylm.tokenizer import train_tokenizer
from tests.hosts import ends, start_hosts
from tests.noted import read_notes
from tests.runs import (
    EVAL_PAIRS,
    PAIRS_OPTIONS,
    RANDOM,
    ROWS,
    arguments,
    conversations,
    logprobs_by_transformers,
    loss_by_transformers,
    make_folder,
    make_pairs_folder,
    metrics,
)
from tests.tiny import hf_llama

pytestmark = pytest.mark.slow

# Two rows fill up a step; each of four hosts has some that hold examples.
COMMON = {
    "steps": 20,
    "batch_rows": 14,
    "eval_every": 10,
    "checkpoint.every": 20,
    "data.cache": "",
}
# Hosts -> mesh, micro-batches, learning rate, how far losses may drift apart in so many steps.
CASES = {2: ("1,8,1", 2, 1e-3, 1e-3), 4: ("2,2,2", 1, 2e-5, 2e-5)}
# How lines of the C++ libraries begin.
OF_LIBRARIES = re.compile(r"[IWEF]\d{4} |WARNING: All log messages")


class Runs(NamedTuple):
    """One run twice: the workdirs, and what the hosts said and noted."""

    alone: pathlib.Path
    together: pathlib.Path
    ends: list[tuple[int, str]]
    notes: pathlib.Path
    tolerance: float


def run_twice(folder: pathlib.Path, command: str, hosts: int, options: dict) -> Runs:
    """A run in this process, upon the default mesh, and the same on so many hosts."""
    mesh, micro_batches, learning_rate, tolerance = CASES[hosts]
    options = {
        **COMMON,
        "micro_batches": micro_batches,
        "optimizer.learning_rate": learning_rate,
        **options,
    }
    alone, together, notes = (folder / f"{name}{hosts}" for name in ("alone", "together", "notes"))
    main = {"sft": sft.main, "dpo": dpo.main}[command]
    main(arguments(folder, alone, {**options, "data.cache": folder / "prepared"}))
    notes.mkdir()
    found = ends(
        start_hosts(
            [command, *arguments(folder, together, {**options, "mesh": mesh})],
            hosts,
            devices=8 // hosts,
            module="tests.noted",
            NOTES=str(notes),
        )
    )
    assert [code for code, _ in found] == [0] * hosts, found
    return Runs(alone, together, found, notes, tolerance)


@pytest.fixture(scope="module")
def sft_folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("sft"))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two folders with weights and one tokenizer; those of the first are in several files."""
    folder = tmp_path_factory.mktemp("models")
    texts = [turn["content"] for messages in conversations(ROWS) for turn in messages]
    train_tokenizer(texts, 320, folder / "tokenizer")
    for seed, (name, size) in enumerate({"several": "40KB", "other": "1GB"}.items()):
        model = hf_llama(seed, vocab_size=320, max_position_embeddings=256)
        model.save_pretrained(folder / name, max_shard_size=size)
        shutil.copytree(folder / "tokenizer", folder / name, dirs_exist_ok=True)
    assert len(list((folder / "several").glob("*.safetensors"))) > 3
    return folder / "several", folder / "other"


@pytest.fixture(scope="module", params=CASES, ids="{} hosts".format)
def sft_runs(request, sft_folder, models):
    """Two hosts start from nothing, with a tokenizer of their own, four from weights."""
    start = {2: RANDOM, 4: {"init_from": models[1]}}[request.param]
    options = {**start, "data.eval_sources": sft_folder / "rows.jsonl"}
    return run_twice(sft_folder, "sft", request.param, options)


@pytest.fixture(scope="module", params=CASES, ids="{} hosts".format)
def dpo_runs(request, tmp_path_factory, models):
    """Two hosts take the policy as it starts for the reference, four another model."""
    folder = make_pairs_folder(tmp_path_factory.mktemp("dpo"))
    options = {
        "data.seq_len": PAIRS_OPTIONS["data.seq_len"],
        "init_from": models[0],
        "dpo.reference": {2: "policy", 4: models[1]}[request.param],
        "data.eval_sources": folder / "eval.jsonl",
    }
    return run_twice(folder, "dpo", request.param, options)


def check_same_numbers(runs: Runs) -> tuple[list[dict], list[dict]]:
    """The lines of both, of which what SFT and DPO have in common is checked."""
    found, wanted = metrics(runs.together), metrics(runs.alone)
    assert [line["step"] for line in found] == list(range(1, 21))
    assert found[0]["loss"] == pytest.approx(wanted[0]["loss"], rel=1e-6)
    assert found[0]["grad_norm"] == pytest.approx(wanted[0]["grad_norm"], rel=1e-5)
    for name in ("loss", "eval/loss"):
        values = [[line[name] for line in lines if name in line] for lines in (found, wanted)]
        assert len(values[0]) == (20 if name == "loss" else 2)
        np.testing.assert_allclose(*values, rtol=0, atol=runs.tolerance)
    for name in ("epoch", "tokens", "target_tokens", "learning_rate"):
        assert [line[name] for line in found] == [line[name] for line in wanted]
    return found, wanted


def check_work_is_done_once(runs: Runs, *, parsed: int, encoded: int) -> None:
    """The first host did it; beside it, hosts wrote nothing but their arrays of checkpoints."""
    first, *others = (
        Counter(name for (path,) in of_host for name in names_in(runs.together, path))
        for of_host in read_notes(runs.notes, "written")
    )
    files = [path for path in runs.together.rglob("*") if path.is_file()]
    first.pop(".running", None)  # it is gone when the run ends
    assert first.keys() == {name for path in files for name in names_in(runs.together, str(path))}
    assert {name for name, times in first.items() if times > 1} == {"metrics.jsonl"}
    assert first["metrics.jsonl"] == 2  # begun, and added to
    changed = read_notes(runs.notes, "changed")[1:]
    assert others == [Counter()] * len(changed)
    assert [
        path for of_host in changed for (path,) in of_host if names_in(runs.together, path)
    ] == []
    for kind, times in {"parsed": parsed, "encoded": encoded}.items():
        found = [len(of_host) for of_host in read_notes(runs.notes, kind)]
        assert found == [times] + [0] * len(others)
    for _, printed in runs.ends[1:]:
        lines = [line for line in printed.splitlines() if not OF_LIBRARIES.match(line)]
        # As long as they have not met, each speaks for itself.
        assert all(line.startswith("meeting the other hosts at") for line in lines), printed
    assert runs.ends[0][1].count("exported to") == 1


def names_in(workdir: pathlib.Path, path: str) -> list[str]:
    """The name in the workdir that a file has when it is whole; none of files elsewhere."""
    below = path.removeprefix(f"{workdir}/")
    if below == path or below.startswith("checkpoints"):
        return []
    return [re.sub(r"\.([\w.]+)\.\w{8}\.incomplete", r"\1", below).removesuffix(".tmp")]


def test_conversations_train_as_in_one_process(sft_runs):
    check_same_numbers(sft_runs)


def test_the_export_has_the_last_loss_to_transformers(sft_runs):
    loss, tokens = loss_by_transformers(sft_runs.together / "hf", conversations(ROWS))
    last = metrics(sft_runs.together)[-1]
    assert last["eval/target_tokens"] == tokens
    assert last["eval/loss"] == pytest.approx(loss, abs=1e-4)


def test_one_host_prepares_and_writes_and_the_others_say_nothing(sft_runs):
    check_work_is_done_once(sft_runs, parsed=2, encoded=1)  # both sources are one file
    config = json.loads((sft_runs.together / "config.json").read_text())
    assert config["data"]["cache"] == f"{sft_runs.together}/prepared"


def test_pairs_train_as_in_one_process(dpo_runs):
    found, wanted = check_same_numbers(dpo_runs)
    assert (found[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)) == (len(dpo_runs.ends) == 2)
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "eval/rewards/margins"):
        values = [[line[name] for line in lines if name in line] for lines in (found, wanted)]
        np.testing.assert_allclose(*values, rtol=1e-3, atol=1e-4)
    assert found[0]["logps/chosen"] == pytest.approx(wanted[0]["logps/chosen"], rel=1e-6)


def test_the_hosts_store_the_same_reference(dpo_runs):
    found, wanted = (
        ReferenceTable.load(f"{run}/reference.npz") for run in (dpo_runs.together, dpo_runs.alone)
    )
    assert found.ids.tolist() == wanted.ids.tolist()
    np.testing.assert_allclose(found.chosen, wanted.chosen, rtol=1e-5)
    np.testing.assert_allclose(found.rejected, wanted.rejected, rtol=1e-5)


def test_the_exported_policy_says_to_transformers_what_the_hosts_reported(dpo_runs):
    last = metrics(dpo_runs.together)[-1]
    chosen, rejected = logprobs_by_transformers(dpo_runs.together / "hf", EVAL_PAIRS).mean(axis=0)
    assert last["eval/logps/chosen"] == pytest.approx(chosen, rel=1e-5)
    assert last["eval/logps/rejected"] == pytest.approx(rejected, rel=1e-5)


def test_one_host_prepares_pairs_and_writes(dpo_runs):
    check_work_is_done_once(dpo_runs, parsed=2, encoded=2)


def test_each_byte_of_the_weights_is_read_by_one_host(dpo_runs, models):
    for folder in models[: 1 if len(dpo_runs.ends) == 2 else 2]:
        spans = {str(path): tensor_bytes(path) for path in folder.glob("*.safetensors")}
        own = [
            [
                (path, start, start + size)
                for path, start, size in notes
                if is_in(spans, path, start)
            ]
            for notes in read_notes(dpo_runs.notes, "read")
        ]
        assert sum(map(bool, own)) > 1  # what is small is not worth a second reader
        # One after another they cover all files.
        reads = sorted(read for of_host in own for read in of_host)
        for path, (start, end) in spans.items():
            of_file = [(first, last) for name, first, last in reads if name == path]
            firsts, lasts = ([*column] for column in zip(*of_file, strict=True))
            assert (firsts, lasts[-1]) == ([start, *lasts[:-1]], end)


def tensor_bytes(path: pathlib.Path) -> tuple[int, int]:
    """Where the tensors of a safetensors file begin and end."""
    with open(path, "rb") as file:
        return 8 + int.from_bytes(file.read(8), "little"), path.stat().st_size


def is_in(spans: dict[str, tuple[int, int]], path: str, start: int) -> bool:
    return path in spans and start >= spans[path][0]
