"""`python -m easylm.sft` from a JSON file to a folder that transformers loads; and its refusals."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file

from easylm import sft
from easylm.checkpoint import find_checkpoint, read_bundle, tokenizer_files_of
from easylm.errors import InputError
from tests.runs import (
    RANDOM,
    ROWS,
    arguments,
    conversations,
    loss_by_transformers,
    make_folder,
    metrics,
    start,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("sft"))


@pytest.fixture(scope="module")
def first_run(folder):
    workdir = folder / "first"
    sft.main(arguments(folder, workdir, {**RANDOM, "data.eval_sources": folder / "rows.jsonl"}))
    return workdir


def test_the_loss_falls_and_every_step_is_reported(first_run):
    lines = metrics(first_run)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    # About ln(320) = 5.77 at first; measured: 5.13 at last.
    assert 5.5 < lines[0]["loss"] < 6.1
    assert lines[-1]["loss"] < 5.3
    rates = [line["learning_rate"] for line in lines]
    np.testing.assert_allclose(rates, 1e-2 * (1 - np.arange(6) / 6), rtol=1e-6)
    for line in lines:
        assert 0 < line["target_tokens"] < line["tokens"] <= 3 * 80
        assert line["padding_fraction"] == pytest.approx(1 - line["tokens"] / (8 * 80))
        assert line["tokens_per_second"] == pytest.approx(line["tokens"] / line["step_seconds"])
        assert line["mfu"] is None  # a CPU has no known peak
    assert lines[-1]["epoch"] == pytest.approx(6 * 3 / 21)  # 36 examples in 21 rows


def test_the_checkpoint_needs_nothing_else(first_run):
    step_folder = find_checkpoint(str(first_run))
    assert step_folder == str(first_run / "checkpoints" / "6")
    bundle = read_bundle(step_folder)
    assert bundle["step"] == 6
    assert bundle["model_config"]["hidden_size"] == 32
    assert bundle["run_config"] == json.loads((first_run / "config.json").read_text())
    exported = {name: (first_run / "hf" / name).read_bytes() for name in tokenizer_files_of(bundle)}
    assert exported == tokenizer_files_of(bundle)


def test_the_export_has_the_loss_of_the_run_to_transformers(first_run):
    loss, tokens = loss_by_transformers(first_run / "hf", conversations(ROWS))
    last = metrics(first_run)[-1]
    assert last["eval/target_tokens"] == tokens == 228
    assert last["eval/loss"] == pytest.approx(loss, abs=1e-4)


def test_going_on_from_a_checkpoint_equals_never_having_stopped(folder, first_run, tmp_path):
    workdir = tmp_path / "again"
    shutil.copytree(first_run, workdir)
    shutil.rmtree(workdir / "checkpoints" / "6")
    shutil.rmtree(workdir / "hf")
    shutil.rmtree(workdir / "tokenizer")  # the checkpoint has it too
    sft.main(arguments(folder, workdir, RANDOM))
    again, wanted = (load_file(run / "hf" / "model.safetensors") for run in (workdir, first_run))
    assert again.keys() == wanted.keys()
    for name in wanted:
        np.testing.assert_array_equal(again[name], wanted[name], err_msg=name)
    losses = [[line["loss"] for line in metrics(run)] for run in (workdir, first_run)]
    assert losses[0] == losses[1]


def test_a_finished_run_does_nothing_again(folder, first_run, capsys):
    before = (first_run / "hf" / "model.safetensors").stat().st_mtime_ns
    sft.main(arguments(folder, first_run, RANDOM))
    assert "is there already" in capsys.readouterr().err
    assert (first_run / "hf" / "model.safetensors").stat().st_mtime_ns == before


def test_a_run_goes_on_upon_another_mesh(folder, first_run, tmp_path):
    workdir = tmp_path / "again"
    shutil.copytree(first_run, workdir)
    shutil.rmtree(workdir / "checkpoints" / "6")
    shutil.rmtree(workdir / "hf")
    elsewhere = {"mesh": "2,1,4", "remat": "block_sharded", "micro_batches": 3, "loss_chunk": 9}
    sft.main(arguments(folder, workdir, {**RANDOM, **elsewhere}))
    losses = [[line["loss"] for line in metrics(run)] for run in (workdir, first_run)]
    assert losses[0][:3] == losses[1][:3]
    assert losses[0][3] == pytest.approx(losses[1][3], rel=2e-6)
    assert losses[0][4:] == pytest.approx(losses[1][4:], rel=1e-3)


def test_going_on_with_other_data_is_refused(folder, first_run, tmp_path):
    workdir, source = tmp_path / "again", folder / "rows.jsonl"
    shutil.copytree(first_run, workdir)
    rows = source.read_text()
    first, *_, last = rows.splitlines()
    source.write_text(rows.replace(last, first))
    try:
        with pytest.raises(InputError, match=r"checkpoints were trained on other data"):
            sft.main(arguments(folder, workdir, RANDOM))
    finally:
        source.write_text(rows)


def test_an_export_that_was_cut_off_is_written_again(folder, first_run, tmp_path, capsys):
    workdir = tmp_path / "again"
    shutil.copytree(first_run, workdir)
    whole = (workdir / "hf" / "model.safetensors").read_bytes()
    (workdir / "hf" / "COMPLETE").unlink()
    (workdir / "hf" / "model.safetensors").write_bytes(whole[:1000])
    sft.main(arguments(folder, workdir, RANDOM))
    assert "was not finished; it is written again" in capsys.readouterr().err
    assert (workdir / "hf" / "model.safetensors").read_bytes() == whole
    assert (workdir / "hf" / "COMPLETE").exists()


def test_an_export_of_a_run_that_is_gone_is_not_taken_for_the_new_one(folder, first_run, tmp_path):
    workdir = tmp_path / "again"
    shutil.copytree(first_run, workdir)
    shutil.rmtree(workdir / "checkpoints")
    with pytest.raises(InputError, match=r"again/hf: found a model, but .* has none of the run"):
        sft.main(arguments(folder, workdir, {**RANDOM, "seed": 7}))
    assert (workdir / "hf" / "COMPLETE").exists()


@pytest.mark.parametrize("line", ['{"messages": ' + "9" * 6000 + "}", "[" * 100 + "{"])
def test_json_beyond_the_limits_is_a_bad_row(folder, tmp_path, line):
    path = tmp_path / "odd.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n" + line + "\n")
    with pytest.raises(InputError, match=r"odd.jsonl:2: line: .*one JSON object a line"):
        sft.main(arguments(folder, tmp_path / "run", {**RANDOM, "data.sources": str(path)}))


def test_a_start_that_failed_stands_in_nobodys_way(folder, tmp_path):
    workdir = tmp_path / "run"
    with pytest.raises(InputError, match=r"tensor=8"):
        sft.main(arguments(folder, workdir, {**RANDOM, "mesh": "1,1,8"}))
    options = {**RANDOM, "data.tokenizer_vocab_size": 330, "steps": 1}
    sft.main(arguments(folder, workdir, options))
    assert json.loads((workdir / "hf" / "config.json").read_text())["vocab_size"] == 330


@pytest.mark.parametrize(
    "options",
    [
        {"mesh": "1,2,4", "remat": "block_sharded"},
        {"mesh": "2,4,1", "micro_batches": 3, "loss_chunk": 7, "attention": "reference"},
    ],
    ids=["tensor", "micro-batches"],
)
def test_meshes_and_micro_batches_give_the_same_losses(folder, first_run, tmp_path, options):
    sft.main(arguments(folder, tmp_path / "run", {**RANDOM, **options, "optimizer.eps": 1e-4}))
    # eps apart, since Adam turns the rounding of near-zero gradients into whole steps.
    wanted = metrics(first_run)[0]
    assert metrics(tmp_path / "run")[0]["loss"] == pytest.approx(wanted["loss"], rel=1e-6)
    assert metrics(tmp_path / "run")[0]["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-5)


@pytest.mark.parametrize("start", ["hf", "checkpoints/3"])
def test_training_goes_on_from_what_was_trained(folder, first_run, tmp_path, start):
    options = {"init_from": str(first_run / start), "steps": 2, "batch_rows": 8}
    sft.main(arguments(folder, tmp_path / "run", options))
    assert metrics(tmp_path / "run")[0]["loss"] < 5.3


def test_examples_are_counted_into_rows(folder, tmp_path, capsys):
    options = {**RANDOM, "batch_rows": "none", "batch_examples": 16, "steps": 1}
    sft.main(arguments(folder, tmp_path / "run", options))
    assert "16 examples fill" in capsys.readouterr().err


REFUSALS = {
    "another config in the workdir": (
        {**RANDOM, "seed": 7},
        "first",
        r"holds a run of another config[\s\S]*config\.seed: .*42.*7",
    ),
    "a mesh that does not fit": ({**RANDOM, "mesh": "3,1,1"}, "new", r"mesh: found '3,1,1' on 8"),
    "a tensor axis that does not divide": (
        {**RANDOM, "mesh": "1,1,8"},
        "new",
        r"mesh: found tensor=8.*attention heads 4.*wanted tensor in 1, 2, 4",
    ),
    "no such weights": (
        {"init_from": "/no/such/folder"},
        "new",
        r"/no/such/folder",
    ),
    "rows longer than the model": ({**RANDOM, "data.seq_len": 256}, "new", r"data\.seq_len: .*256"),
    "a new tokenizer for old weights": (
        {"init_from": "FIRST/hf", "data.tokenizer_vocab_size": 320},
        "new",
        r"data\.tokenizer_vocab_size: found 320; wanted none",
    ),
    "no template of its own": (
        {"init_from": "BASE", "data.chat_template": "own"},
        "new",
        r"the tokenizer has no chat template; use chat_template='tulu'",
    ),
    "a file for a workdir": (RANDOM, "first/config.json", r"--workdir: .*config.json is a file"),
    "no such tokenizer": (
        {**RANDOM, "data.tokenizer_vocab_size": "none", "data.tokenizer": "/no/tokenizer"},
        "new",
        r"/no/tokenizer",
    ),
    "no such template": (
        {"init_from": "FIRST/hf", "data.chat_template": "chatlm"},
        "new",
        r"chat_template: found 'chatlm'; wanted 'tulu', 'own'",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_leave_no_trace(folder, first_run, tmp_path, case):
    options, workdir, message = REFUSALS[case]
    workdir = folder / workdir if workdir.startswith("first") else tmp_path / workdir
    if options["init_from"] == "BASE":  # a base model, whose tokenizer has no chat template
        shutil.copytree(first_run / "hf", tmp_path / "base")
        file = tmp_path / "base" / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": None}))
        options = {**options, "init_from": str(tmp_path / "base")}
    options = {**options, "init_from": options["init_from"].replace("FIRST", str(first_run))}
    with pytest.raises(InputError, match=message):
        sft.main(arguments(folder, workdir, options))
    if workdir.name == "new":
        assert not (workdir / "checkpoints").exists()
        assert not (workdir / "metrics.jsonl").exists()


def test_a_tokenizer_larger_than_the_model_is_refused_or_resized(folder, first_run, tmp_path):
    larger = tmp_path / "larger"
    shutil.copytree(first_run / "hf", larger)
    config = json.loads((larger / "tokenizer.json").read_text())
    token = {"id": 320, "content": "<new>", "special": True, "single_word": False}
    token |= {"lstrip": False, "rstrip": False, "normalized": False}
    config["added_tokens"].append(token)
    (larger / "tokenizer.json").write_text(json.dumps(config))
    options = {"init_from": str(first_run / "hf"), "data.tokenizer": str(larger), "steps": 1}
    with pytest.raises(InputError, match=r"found 321 ids; the model has vocab_size=320"):
        sft.main(arguments(folder, tmp_path / "run", options))
    sft.main(arguments(folder, tmp_path / "run", {**options, "model.resize_vocab": True}))
    weights = load_file(tmp_path / "run" / "hf" / "model.safetensors")
    assert weights["model.embed_tokens.weight"].shape == (321, 32)
    exported = json.loads((tmp_path / "run" / "hf" / "config.json").read_text())
    assert exported["vocab_size"] == 321


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        (["--config.data.sources=BAD"], 2, "'robot'; wanted one of system, user, assistant"),
        (["--config.data.seqlen=5"], 2, "data.seq_len"),
        (["--config.batch_rows=0"], 2, "batch_rows: found 0"),
        (["--help"], 0, "--config.optimizer.learning_rate"),
    ],
    ids=["bad row", "misspelt option", "bad value", "help"],
)
def test_answers_come_before_jax_loads(folder, tmp_path, change, code, message):
    bad = tmp_path / "bad.jsonl"
    good = json.dumps(ROWS[0])
    wrong = {"messages": [{"role": "robot", "content": "beep"}]}
    bad.write_text(f"{good}\n{json.dumps(wrong)}\n")
    (tmp_path / "jax.py").write_text("raise SystemExit('jax was imported')")
    change = [argument.replace("BAD", str(bad)) for argument in change]
    command = [*arguments(folder, tmp_path / "run", RANDOM), *change]
    process = start(command, PYTHONPATH=str(tmp_path))
    printed = "".join(process.communicate())
    assert process.returncode == code, printed
    # The message is wrapped at 80 columns.
    assert message in " ".join(printed.split())
    assert "Traceback" not in printed
    assert not (tmp_path / "run").exists()
