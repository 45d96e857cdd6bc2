"""`python -m easylm.dpo` from pairs in a JSON file to a folder that transformers loads."""

import math
import os
import shutil

import matplotlib.image
import numpy as np
import pytest
from safetensors.numpy import load_file

from easylm import dpo, sft
from easylm.checkpoint import find_checkpoint, read_bundle
from easylm.errors import InputError
from easylm.reference import ReferenceTable
from tests.runs import (
    EVAL_PAIRS,
    PAIRS,
    PAIRS_OPTIONS,
    RANDOM,
    arguments,
    logprobs_by_transformers,
    make_folder,
    make_pairs_folder,
    metrics,
    start,
    write_rows,
)

OF_PAIRS = {
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
    "reference/loss",
    "reference/mean_abs_logratio",
    "reference/max_abs_logratio",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_pairs_folder(tmp_path_factory.mktemp("dpo"))


@pytest.fixture(scope="module")
def options(folder):
    """Of the run that most tests look at."""
    held_out = {"data.eval_sources": folder / "eval.jsonl", "eval_every": 6}
    return {**RANDOM, **PAIRS_OPTIONS, **held_out, "steps": 12, "checkpoint.every": 6}


@pytest.fixture(scope="module")
def first_run(folder, options):
    dpo.main(arguments(folder, folder / "first", options))
    return folder / "first"


def test_the_policy_starts_as_the_reference_and_learns_what_is_preferred(first_run):
    lines = metrics(first_run)
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert abs(lines[0]["rewards/chosen"]) < 1e-4 and abs(lines[0]["rewards/rejected"]) < 1e-4
    # Measured: 0.0008 and 16 at last.
    assert lines[-1]["loss"] < 0.1 and lines[-1]["rewards/margins"] > 3
    assert [line["rewards/accuracies"] for line in lines[-4:]] == [1, 1, 1, 1]
    assert lines[-1]["epoch"] == pytest.approx(12 * 3 / 14, rel=0.1)


def test_the_metrics_of_a_step_agree_with_one_another(first_run):
    for line in metrics(first_run):
        evaluated = OF_PAIRS | {"target_tokens", "seconds"} if line["step"] % 6 == 0 else set()
        assert line.keys() > OF_PAIRS
        assert {name for name in line if "eval/" in name} == {f"eval/{name}" for name in evaluated}
        for prefix in ("", "eval/") if evaluated else ("",):
            found = {name: line[prefix + name] for name in OF_PAIRS}
            margin = found["rewards/chosen"] - found["rewards/rejected"]
            assert found["rewards/margins"] == pytest.approx(margin, abs=1e-5)
            assert 0 <= found["rewards/accuracies"] <= 1
            # Jensen: the mean of a convex function is no less than that of the mean.
            assert found["loss"] >= math.log1p(math.exp(-margin)) - 1e-6
            assert found["reference/loss"] == pytest.approx(math.log(2), abs=1e-6)
            assert found["reference/mean_abs_logratio"] <= found["reference/max_abs_logratio"]
            assert found["logps/chosen"] < 0 and found["logps/rejected"] < 0


def test_the_export_says_to_transformers_what_the_run_reported(first_run):
    last = metrics(first_run)[-1]
    logprobs = logprobs_by_transformers(first_run / "hf", EVAL_PAIRS)
    chosen, rejected = logprobs.mean(axis=0)
    assert last["eval/logps/chosen"] == pytest.approx(chosen, rel=1e-5)
    assert last["eval/logps/rejected"] == pytest.approx(rejected, rel=1e-5)


def test_the_table_of_the_run_holds_the_reference_of_all_its_pairs(first_run):
    table = ReferenceTable.load(str(first_run / "reference.npz"))
    assert len(table) == len(PAIRS) + len(EVAL_PAIRS) == 35
    # The reference stays what it was, however far the policy went.
    for answer in ("chosen", "rejected"):
        at_six, at_twelve = (
            line[f"eval/logps/{answer}"] - line[f"eval/rewards/{answer}"] / 0.1
            for line in metrics(first_run)[5::6]
        )
        assert at_six == pytest.approx(at_twelve, abs=1e-3)
        assert table.chosen.min() < at_six < table.rejected.max()


def test_a_run_leaves_plots_and_a_checkpoint_that_needs_nothing_else(first_run):
    plots = first_run / "plots"
    assert sorted(os.listdir(plots)) == ["lengths.png", "loss.png", "preferences.png"]
    for name in os.listdir(plots):
        pixels = matplotlib.image.imread(plots / name)
        assert pixels.std() > 0.05
    bundle = read_bundle(find_checkpoint(str(first_run)))
    assert bundle["run_config"]["dpo"]["loss"] == "sigmoid"
    assert bundle["data"]["examples"] == 30


def test_going_on_from_a_checkpoint_equals_never_having_stopped(
    folder, options, first_run, tmp_path
):
    workdir = tmp_path / "again"
    shutil.copytree(first_run, workdir)
    for part in ("checkpoints/12", "hf", "tokenizer"):
        shutil.rmtree(workdir / part)
    dpo.main(arguments(folder, workdir, options))
    again, wanted = (load_file(run / "hf" / "model.safetensors") for run in (workdir, first_run))
    for name in wanted:
        np.testing.assert_array_equal(again[name], wanted[name], err_msg=name)
    for name in ("loss", "rewards/margins", "logps/rejected"):
        values = [[line[name] for line in metrics(run)] for run in (workdir, first_run)]
        assert values[0] == values[1]


FIRST_LOSSES = {
    "robust": ({"dpo.label_smoothing": 0.2}, math.log(2)),
    "hinge": ({}, 1),
    "ipo": ({"dpo.beta": 0.5}, 1),
    "ipo_sum": ({}, 25),
}


@pytest.mark.parametrize("loss", FIRST_LOSSES)
def test_the_first_loss_is_that_of_no_log_ratio(folder, first_run, tmp_path, loss):
    options, wanted = FIRST_LOSSES[loss]
    options = {**RANDOM, **PAIRS_OPTIONS, **options, "dpo.loss": loss, "steps": 1}
    dpo.main(arguments(folder, tmp_path / "run", options))
    (line,) = metrics(tmp_path / "run")
    assert line["loss"] == pytest.approx(wanted, rel=1e-6)
    assert line["reference/loss"] == pytest.approx(wanted, rel=1e-6)


def test_other_held_out_pairs_are_refused_when_a_run_goes_on(folder, options, first_run, tmp_path):
    workdir = tmp_path / "again"
    shutil.copytree(first_run, workdir)
    for part in ("checkpoints/12", "hf"):
        shutil.rmtree(workdir / part)
    other = write_rows(tmp_path / "other.jsonl", [*EVAL_PAIRS[:3], PAIRS[0] | {"rejected": "Hm."}])
    with pytest.raises(InputError, match=r"data\.eval_sources: 1 of 4 pairs have no reference"):
        dpo.main(arguments(folder, workdir, options | {"data.eval_sources": other}))
    assert not (workdir / "hf").exists()
    # Fewer of the same are no others.
    write_rows(other, EVAL_PAIRS[:3])
    dpo.main(arguments(folder, workdir, options | {"data.eval_sources": other}))
    wanted = logprobs_by_transformers(workdir / "hf", EVAL_PAIRS[:3]).mean(axis=0)
    assert metrics(workdir)[-1]["eval/logps/chosen"] == pytest.approx(wanted[0], rel=1e-5)


def test_other_pairs_to_train_on_are_refused_when_a_run_goes_on(
    folder, options, first_run, tmp_path
):
    workdir = tmp_path / "again"
    shutil.copytree(first_run, workdir)
    fewer = write_rows(tmp_path / "fewer.jsonl", PAIRS[:-1])
    with pytest.raises(InputError, match=r"checkpoints were trained on other data: found 29 pairs"):
        dpo.main(arguments(folder, workdir, options | {"data.sources": fewer}))


def test_configs_of_the_other_command_are_refused(folder, tmp_path):
    conversations = tmp_path / "sft"
    conversations.mkdir()
    make_folder(conversations)
    with pytest.raises(InputError, match=r"found a config of python -m easylm\.dpo"):
        sft.main(arguments(folder, tmp_path / "run", {**RANDOM, **PAIRS_OPTIONS}))
    with pytest.raises(InputError, match=r"found a config of python -m easylm\.sft"):
        dpo.main(arguments(conversations, tmp_path / "run", RANDOM))


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        (["--config.data.sources=BAD"], 2, "wanted another answer"),
        (["--config.dpo.bta=5"], 2, "dpo.beta"),
        (["--config.dpo.loss=simpo", "--config.dpo.reference=x"], 2, "simpo has no reference"),
        (["--help"], 0, "--config.dpo.beta"),
    ],
    ids=["bad row", "misspelt option", "options that clash", "help"],
)
def test_answers_come_before_jax_loads(folder, tmp_path, change, code, message):
    equal = PAIRS[1] | {"rejected": PAIRS[1]["chosen"]}
    bad = write_rows(tmp_path / "bad.jsonl", [PAIRS[0], equal])
    (tmp_path / "jax.py").write_text("raise SystemExit('jax was imported')")
    change = [argument.replace("BAD", str(bad)) for argument in change]
    command = [*arguments(folder, tmp_path / "run", {**RANDOM, **PAIRS_OPTIONS}), *change]
    process = start(command, program=["-m", "easylm.dpo"], PYTHONPATH=str(tmp_path))
    printed = "".join(process.communicate())
    assert process.returncode == code, printed
    assert message in " ".join(printed.split())
    assert "Traceback" not in printed
    assert not (tmp_path / "run").exists()
