"""What options do to a run of `python -m easylm.sft`, from start to export."""

import json
import os
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file

from easylm import convert, sft
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
    path = make_folder(tmp_path_factory.mktemp("sft_options"))
    held_out = [
        {"prompt": "Say sun 6 times.", "completion": "sun sun sun sun sun sun"},
        {"prompt": "Say ice twice.", "completion": "ice ice"},
    ]
    (path / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held_out))
    return path


@pytest.fixture(scope="module")
def first(folder):
    """A run with evaluations and exports."""
    options = {"data.eval_sources": folder / "eval.jsonl", "eval_every": 4, "export.every": 4}
    sft.main(arguments(folder, folder / "first", {**RANDOM, **options}))
    return folder / "first"


def test_held_out_loss_is_that_of_transformers(folder, first):
    lines = metrics(first)
    assert [line["step"] for line in lines if "eval/loss" in line] == [4, 6]
    rows = map(json.loads, (folder / "eval.jsonl").read_text().splitlines())
    loss, tokens = loss_by_transformers(first / "hf" / "4", conversations(rows))
    (at_four,) = (line for line in lines if line["step"] == 4)
    assert at_four["eval/target_tokens"] == tokens
    assert at_four["eval/loss"] == pytest.approx(loss, rel=1e-5)


def test_an_export_every_so_often_and_after_the_last_step(first):
    assert sorted(os.listdir(first / "hf")) == ["4", "6"]
    weights = [load_file(first / "hf" / step / "model.safetensors") for step in ("4", "6")]
    assert any((weights[0][name] != weights[1][name]).any() for name in weights[0])
    assert "- trained for: 4 steps of 6\n" in (first / "hf" / "4" / "README.md").read_text()
    assert "- trained for: 6 steps\n" in (first / "hf" / "6" / "README.md").read_text()


def test_the_last_step_is_exported_once_and_without_a_word_about_dtypes(folder, tmp_path, capsys):
    options = {**RANDOM, "steps": 2, "export.every": 2}
    sft.main(arguments(folder, tmp_path / "run", options))
    assert "is there already" not in capsys.readouterr().err
    sft.main(arguments(folder, tmp_path / "run", options))
    assert f"{tmp_path}/run/hf/2 is there already\n" in capsys.readouterr().err
    sft.main(arguments(folder, tmp_path / "run", {**options, "export.dtype": "bfloat16"}))
    hint = "hf/2 is there already, in float32; easylm.convert writes it in bfloat16"
    assert hint in capsys.readouterr().err


def test_half_a_model_does_not_stay_beside_exports_by_step(folder, tmp_path, capsys):
    workdir, options = tmp_path / "run", {**RANDOM, "steps": 2}
    sft.main(arguments(folder, workdir, options))
    (workdir / "hf" / "COMPLETE").unlink()
    shutil.copytree(workdir / "hf", tmp_path / "half")
    sft.main(arguments(folder, workdir, {**options, "export.every": 2}))
    assert "was not finished; it is removed" in capsys.readouterr().err
    assert os.listdir(workdir / "hf") == ["2"]
    # Beside whole models nothing is removed.
    shutil.copytree(tmp_path / "half", workdir / "hf", dirs_exist_ok=True)
    with pytest.raises(InputError, match=r"an unfinished model beside those after step 2; wanted"):
        sft.main(arguments(folder, workdir, {**options, "export.every": 2}))
    assert (workdir / "hf" / "2" / "COMPLETE").exists()


def test_a_converted_checkpoint_has_the_recipe_of_the_run(first, tmp_path):
    convert.main([f"--source={first}", f"--target={tmp_path / 'native'}", "--to=native"])
    convert.main([f"--source={tmp_path / 'native'}", f"--target={tmp_path / 'hf'}", "--to=hf"])
    recipes = []
    for folder in (first / "hf" / "6", tmp_path / "hf"):
        _, start, recipe = (folder / "README.md").read_text().partition("- started from:")
        assert start
        recipes.append(recipe)
    assert recipes[0] == recipes[1]


def test_an_export_that_was_cut_off_while_training_is_written_again(folder, first, tmp_path):
    workdir = tmp_path / "again"
    shutil.copytree(first, workdir)
    shutil.rmtree(workdir / "checkpoints" / "6")
    shutil.rmtree(workdir / "hf" / "6")
    (workdir / "hf" / "4" / "COMPLETE").unlink()
    options = {"data.eval_sources": folder / "eval.jsonl", "eval_every": 4, "export.every": 4}
    sft.main(arguments(folder, workdir, {**RANDOM, **options}))
    for step in ("4", "6"):
        found, wanted = (
            load_file(run / "hf" / step / "model.safetensors") for run in (workdir, first)
        )
        for name in wanted:
            np.testing.assert_array_equal(found[name], wanted[name], err_msg=name)


def test_a_run_leaves_plots_and_says_how_to_talk_to_it(folder, tmp_path, capsys):
    sft.main(arguments(folder, tmp_path / "run", RANDOM))
    printed = capsys.readouterr().err
    assert sorted(os.listdir(tmp_path / "run" / "plots")) == ["lengths.png", "loss.png"]
    assert f"python -m easylm.generate --model={tmp_path}/run/hf" in printed
    for said in (
        "39,072 parameters",
        "36 examples",
        "% filled",
        "at least",
        "temporaries a device",
    ):
        assert said in printed


def test_packed_padded_and_sharded_steps_have_the_same_loss(folder, tmp_path):
    """One step sees every example once, so only rows and mesh differ."""
    lines = {}
    for name, options in {
        "packed": {"batch_rows": 21},
        "padded": {"batch_rows": 36, "data.packing": False},
        "sharded": {"batch_rows": 21, "mesh": "2,1,4", "micro_batches": 3},
        "by token": {"batch_rows": 21, "loss_weighting": "token"},
    }.items():
        options = {"loss_weighting": "microbatch", "loss_group": 5, **options, "steps": 1}
        sft.main(arguments(folder, tmp_path / name, {**RANDOM, **options}))
        (lines[name],) = metrics(tmp_path / name)
    wanted = lines["packed"]
    for name in ("padded", "sharded"):
        assert lines[name]["target_tokens"] == wanted["target_tokens"] == 228
        assert lines[name]["loss"] == pytest.approx(wanted["loss"], rel=1e-6)
        assert lines[name]["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-5)
    assert lines["by token"]["loss"] != pytest.approx(wanted["loss"], rel=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {
            "optimizer.name": "lion",
            "optimizer.learning_rate": 1e-3,
            "optimizer.mu_dtype": "bfloat16",
        },
        {"optimizer.name": "adafactor", "model.hidden_size": 128, "model.intermediate_size": 128},
        {"optimizer.schedule": "cosine", "param_dtype": "bfloat16", "optimizer.warmup_steps": 2},
    ],
    ids=["lion", "adafactor", "bfloat16"],
)
def test_every_optimizer_learns_and_goes_on_from_its_checkpoint(folder, tmp_path, options):
    options = {**RANDOM, **options, "mesh": "1,2,4", "steps": 12, "checkpoint.every": 6}
    sft.main(arguments(folder, tmp_path / "run", options))
    lines = metrics(tmp_path / "run")
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.1
    whole = load_file(tmp_path / "run" / "hf" / "model.safetensors")
    for part in ("checkpoints/12", "hf"):
        shutil.rmtree(tmp_path / "run" / part)
    sft.main(arguments(folder, tmp_path / "run", options))
    again = load_file(tmp_path / "run" / "hf" / "model.safetensors")
    for name in whole:
        np.testing.assert_array_equal(again[name], whole[name], err_msg=name)


def test_rows_longer_than_the_weights_were_made_for(folder, first, tmp_path):
    options = {"init_from": first / "hf" / "6", "data.seq_len": 200, "steps": 1}
    with pytest.raises(InputError, match=r"data\.seq_len: found 200; wanted at most 128"):
        sft.main(arguments(folder, tmp_path / "run", options))
    options |= {"model.max_position_embeddings": 256}
    sft.main(arguments(folder, tmp_path / "run", options))
    exported = json.loads((tmp_path / "run" / "hf" / "config.json").read_text())
    assert exported["max_position_embeddings"] == 256


def test_the_model_card_owns_up_to_stripped_newlines(folder, first, tmp_path, capsys):
    options = {"init_from": first / "hf", "data.eos_newline": "strip", "steps": 1}
    sft.main(arguments(folder, tmp_path / "run", options))
    assert f"newest in {first}/hf/6\n" in capsys.readouterr().err
    assert "inference sees tokens there that training did not" in (
        tmp_path / "run" / "hf" / "README.md"
    ).read_text().replace("\n", " ")
    assert "inference sees" not in (first / "hf" / "6" / "README.md").read_text()


def test_other_data_is_refused_with_its_counts_and_leaves_the_config(folder, first, tmp_path):
    workdir, other = tmp_path / "again", tmp_path / "other.jsonl"
    shutil.copytree(first, workdir)
    other.write_text("".join(json.dumps(row) + "\n" for row in ROWS[:-1]))
    before = (workdir / "config.json").read_bytes()
    options = {**RANDOM, "data.sources": other, "log_every": 2, "export.every": 4}
    with pytest.raises(InputError, match=r"found 35 examples of .* wanted 36 examples of"):
        sft.main(arguments(folder, workdir, options))
    assert (workdir / "config.json").read_bytes() == before
    # The same data under another name is the same data.
    shutil.copy(folder / "rows.jsonl", other)
    sft.main(arguments(folder, workdir, options))


def test_compiled_steps_and_encoded_data_are_kept_for_later_starts(folder, tmp_path):
    options = {**RANDOM, "compilation_cache": tmp_path / "xla", "data.cache": tmp_path / "prepared"}
    names = []
    for run in ("one", "two"):
        command = arguments(folder, tmp_path / run, {**options, "steps": 1})
        process = start(command, without="JAX_COMPILATION_CACHE_DIR")
        printed = process.communicate()[1]
        assert process.returncode == 0, printed
        assert ("prepared before in" in printed) == (run == "two")
        names.append(sorted(os.listdir(tmp_path / "xla")))
    compiled = [{name for name in run if name.startswith("jit_step-")} for run in names]
    assert compiled[0] and compiled[0] == compiled[1]


def test_metrics_go_to_tensorboard_too(folder, tmp_path):
    sft.main(arguments(folder, tmp_path / "run", {**RANDOM, "steps": 1, "tensorboard": True}))
    (events,) = os.listdir(tmp_path / "run" / "tensorboard")
    assert events.startswith("events.out.tfevents")


def test_a_loss_that_is_not_finite_ends_the_run_after_its_last_good_checkpoint(folder, tmp_path):
    workdir = tmp_path / "run"
    # The updates of the second and third step make the weights overflow.
    options = {**RANDOM, "optimizer.learning_rate": 1e30, "checkpoint.every": 1}
    options |= {"optimizer.schedule": "constant", "optimizer.warmup_steps": 1}
    with pytest.raises(FloatingPointError, match=r"step (\d): (loss|grad_norm) is (nan|inf)"):
        sft.main(arguments(folder, workdir, options))
    *good, bad = metrics(workdir)
    assert not np.isfinite([float(bad["loss"]), float(bad["grad_norm"])]).all()
    assert str(good[-1]["step"]) in os.listdir(workdir / "checkpoints")
    assert str(bad["step"]) not in os.listdir(workdir / "checkpoints")
    assert (workdir / "plots" / "loss.png").exists()
    assert not (workdir / "hf").exists()


def test_a_run_goes_on_without_what_it_started_from(folder, first, tmp_path):
    shutil.copytree(first / "hf" / "6", tmp_path / "start")
    workdir = tmp_path / "run"
    options = {"init_from": tmp_path / "start", "steps": 6}
    sft.main(arguments(folder, workdir, options))
    whole = load_file(workdir / "hf" / "model.safetensors")
    shutil.rmtree(tmp_path / "start")
    for part in ("checkpoints/6", "hf"):
        shutil.rmtree(workdir / part)
    sft.main(arguments(folder, workdir, options))
    again = load_file(workdir / "hf" / "model.safetensors")
    for name in whole:
        np.testing.assert_array_equal(again[name], whole[name], err_msg=name)


def test_a_run_of_a_version_with_other_options_goes_on(folder, first, tmp_path):
    workdir = tmp_path / "again"
    shutil.copytree(first, workdir)
    values = json.loads((workdir / "config.json").read_text())
    del values["loss_group"], values["optimizer"]["mu_dtype"]
    (workdir / "config.json").write_text(json.dumps(values))
    options = {**RANDOM, "data.eval_sources": folder / "eval.jsonl", "export.every": 4}
    sft.main(arguments(folder, workdir, options))
    (workdir / "config.json").write_text(json.dumps({**values, "gone": 1, "loss_group": 5}))
    with pytest.raises(InputError, match=r"config\.gone: 1 before, absent now") as error:
        sft.main(arguments(folder, workdir, options))
    assert "config.loss_group: 5 before, 32 now" in str(error.value)
