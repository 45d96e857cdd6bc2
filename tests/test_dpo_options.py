"""What options do to a run of `python -m easylm.dpo`, from start to export."""

import json
import math
import os
import shutil
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from easylm import dpo
from easylm.command import run_command
from easylm.errors import InputError
from easylm.reference import ReferenceParts, ReferenceTable
from easylm.storage import list_files
from tests.bucket import running_bucket
from tests.runs import (
    EVAL_PAIRS,
    PAIRS,
    PAIRS_OPTIONS,
    RANDOM,
    arguments,
    logprobs_by_transformers,
    make_pairs_folder,
    metrics,
    start,
    write_rows,
)

BETA = 0.1
# One step sees all pairs, in 15 rows where packed.
ALL_AT_ONCE = {
    "data.seq_len": 240,
    "batch_rows": "none",
    "batch_examples": len(PAIRS),
    "steps": 1,
    "optimizer.eps": 1e-4,
}
SAME = (
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
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_pairs_folder(tmp_path_factory.mktemp("dpo_options"))


@pytest.fixture(scope="module")
def first(folder):
    """A run that exports what it is in the middle, too."""
    options = {**RANDOM, **PAIRS_OPTIONS, "export.every": 3, "checkpoint.keep": 2}
    dpo.main(arguments(folder, folder / "first", options))
    return folder / "first" / "hf"


@pytest.fixture(scope="module")
def compared(folder, first):
    """Options of a step that compares the trained model with what it was half-way."""
    return {**ALL_AT_ONCE, "init_from": first / "6", "dpo.reference": first / "3"}


@pytest.fixture(scope="module")
def first_step(folder, compared):
    dpo.main(arguments(folder, folder / "compared", compared))
    (line,) = metrics(folder / "compared")
    return line


@pytest.fixture(scope="module")
def logprobs(first):
    """(policy, reference) of `compared` by transformers, float64 [pairs, 2] each."""
    return tuple(logprobs_by_transformers(first / step, PAIRS) for step in ("6", "3"))


def test_another_model_as_the_reference_gives_what_torch_computes(first, first_step, logprobs):
    policy, reference = logprobs
    ratios = policy - reference
    margins = BETA * (ratios[:, 0] - ratios[:, 1])
    loss = np.log1p(np.exp(-margins)).mean()
    # As many pairs as batch_examples says: all.
    assert first_step["target_tokens"] == total_scored(first)
    assert abs(loss - math.log(2)) > 0.1
    assert first_step["loss"] == pytest.approx(loss, abs=1e-5)
    assert first_step["reference/loss"] == pytest.approx(math.log(2), abs=1e-6)
    chosen, rejected = ratios.mean(axis=0) * BETA
    assert first_step["rewards/chosen"] == pytest.approx(chosen, abs=1e-5)
    assert first_step["rewards/rejected"] == pytest.approx(rejected, abs=1e-5)
    assert first_step["rewards/margins"] == pytest.approx(margins.mean(), abs=1e-5)
    assert first_step["rewards/accuracies"] == pytest.approx((margins > 0).mean())
    for place, answer in enumerate(("chosen", "rejected")):
        assert first_step[f"logps/{answer}"] == pytest.approx(policy[:, place].mean(), rel=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"data.packing": False, "micro_batches": 2},
        {"mesh": "1,4,2", "remat": "none", "loss_chunk": 17},
    ],
    ids=["padded, micro-batches", "tensor, no remat, chunks"],
)
def test_rows_meshes_and_micro_batches_change_nothing(
    folder, compared, first_step, tmp_path, options
):
    dpo.main(arguments(folder, tmp_path / "run", {**compared, **options}))
    (line,) = metrics(tmp_path / "run")
    check_same(line, first_step)


def test_one_device_computes_the_same(folder, compared, first_step, tmp_path):
    command = arguments(folder, tmp_path / "run", {**compared, "data.cache": tmp_path / "cache"})
    program = ["-m", "easylm.dpo"]
    process = start(command, program=program, without="XLA_FLAGS")
    printed = process.communicate()[1]
    assert process.returncode == 0, printed
    assert "mesh      data 1, fsdp 1, tensor 1" in printed
    (line,) = metrics(tmp_path / "run")
    check_same(line, first_step)


def check_same(line, wanted):
    """Of two first steps on all pairs; their answers are about 40 nats."""
    assert line["target_tokens"] == wanted["target_tokens"]
    for name in SAME:
        assert line[name] == pytest.approx(wanted[name], rel=1e-5, abs=4e-6), name
    assert line["loss"] == pytest.approx(wanted["loss"], rel=4e-6)
    assert line["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-4)


def scored_tokens(model, answer):
    """How many tokens of each pair's answer are scored: what it says, and the end of turn."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    counts = []
    for pair in PAIRS:
        turns = [
            {"role": "user", "content": pair["prompt"]},
            {"role": "assistant", "content": pair[answer]},
        ]
        encoded = tokenizer.apply_chat_template(
            turns, return_dict=True, return_assistant_tokens_mask=True
        )
        counts.append(sum(encoded["assistant_masks"]))
    return np.array(counts)


def total_scored(model):
    return scored_tokens(model / "6", "chosen").sum() + scored_tokens(model / "6", "rejected").sum()


@pytest.mark.parametrize("loss", ["simpo", "orpo"])
def test_losses_without_a_reference_ask_none(folder, first, logprobs, tmp_path, loss):
    options = {**ALL_AT_ONCE, "init_from": first / "6", "dpo.loss": loss, "dpo.beta": 2}
    cache = {"data.cache": tmp_path / "cache"}
    dpo.main(arguments(folder, tmp_path / "run", {**options, **cache}))
    assert not (tmp_path / "run" / "reference.npz").exists()
    assert not (tmp_path / "cache" / "reference").exists()
    (line,) = metrics(tmp_path / "run")
    assert not any(name.startswith("reference/") for name in line)
    chosen, rejected = (
        logprobs[0][:, place] / scored_tokens(first / "6", answer)
        for place, answer in enumerate(("chosen", "rejected"))
    )
    if loss == "simpo":
        wanted = np.log1p(np.exp(0.5 - 2 * (chosen - rejected)))
    else:
        odds = [mean - np.log1p(-np.exp(mean)) for mean in (chosen, rejected)]
        wanted = 2 * np.log1p(np.exp(odds[1] - odds[0])) - chosen
    assert line["loss"] == pytest.approx(wanted.mean(), rel=1e-5)
    assert line["rewards/chosen"] == pytest.approx(2 * chosen.mean(), rel=1e-5)
    assert line["rewards/rejected"] == pytest.approx(2 * rejected.mean(), rel=1e-5)


def test_margins_and_the_sft_term_are_added_to_the_loss(folder, compared, logprobs, tmp_path):
    amounts = np.linspace(0, 2, len(PAIRS))
    rows = [{**pair, "margin": margin} for pair, margin in zip(PAIRS, amounts, strict=True)]
    options = {**compared, "data.sources": write_rows(tmp_path / "rows.jsonl", rows)}
    options |= {"dpo.margin_weight": 0.5, "dpo.sft_weight": 0.3}
    dpo.main(arguments(folder, tmp_path / "run", options))
    policy, reference = logprobs
    ratios = policy - reference
    logits = BETA * (ratios[:, 0] - ratios[:, 1]) - 0.5 * amounts
    losses = np.log1p(np.exp(-logits))
    losses -= 0.3 * policy[:, 0] / scored_tokens(compared["init_from"], "chosen")
    assert metrics(tmp_path / "run")[0]["loss"] == pytest.approx(losses.mean(), rel=1e-5)

    for row in rows[3:5]:
        del row["margin"]
    write_rows(tmp_path / "rows.jsonl", rows)
    message = r"found 2 of the 30 pairs of data\.sources without a margin; wanted a field 'margin'"
    with pytest.raises(InputError, match=message):
        dpo.main(arguments(folder, tmp_path / "other", options))
    assert not (tmp_path / "other").exists()


def change_model(model, target, vocab_size=320, **fields):
    """A copy of an export with so many ids, whose config.json says what `fields` do."""
    shutil.copytree(model, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | fields | {"vocab_size": vocab_size}))
    weights = load_file(target / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = weights[name][:vocab_size]
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})


def test_references_that_cannot_be_asked_are_refused(folder, first, compared, tmp_path):
    change_model(first / "3", tmp_path / "short", max_position_embeddings=128)
    change_model(first / "3", tmp_path / "small", vocab_size=200)
    for name, message in {
        "absent": r"absent",
        "short": r"data\.seq_len: found 240; wanted at most 128",
        "small": r"small has vocab_size=200, and the pairs hold the id 3\d\d; wanted",
    }.items():
        with pytest.raises(InputError, match=rf"^dpo\.reference: [\s\S]*{message}"):
            options = {**compared, "dpo.reference": tmp_path / name}
            dpo.main(arguments(folder, tmp_path / "run", options))
        assert not (tmp_path / "run").exists()


def known(cache):
    """{name of a model: what is known of it} of what runs keep in `cache`."""
    folder = cache / "reference"
    return {name: ReferenceParts(f"{folder}/{name}").load() for name in os.listdir(folder)}


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def asked(request, folder, first):
    """(options, what its reference is kept by, workdir) of a run in a dtype."""
    dtype, cache = request.param, folder / "cache"
    options = {**ALL_AT_ONCE, "init_from": first / "6", "compute_dtype": dtype, "data.cache": cache}
    before = set(known(cache)) if cache.exists() else set()
    dpo.main(arguments(folder, folder / dtype, options))
    (name,) = set(known(cache)) - before
    return options, name, folder / dtype


def test_the_first_step_agrees_in_either_dtype(folder, asked, first_step):
    options, name, workdir = asked
    (line,) = metrics(workdir)
    if options["compute_dtype"] == "float32":
        assert line["loss"] == pytest.approx(math.log(2), abs=1e-6)
    else:
        assert line["loss"] == pytest.approx(math.log(2), abs=1e-2)
        assert line["reference/mean_abs_logratio"] < 0.01
    # Other weights have names and numbers of their own.
    table = known(options["data.cache"])[name]
    for other_name, other in known(folder / "prepared").items():
        assert other_name != name
        assert (other.lookup(table.ids)[0] != table.chosen).mean() > 0.9


def test_a_table_that_is_not_of_these_pairs_stops_the_first_step(
    folder, asked, tmp_path, monkeypatch, capsys
):
    options, name, _ = asked
    cache, workdir = tmp_path / "cache", tmp_path / "run"
    shutil.copytree(options["data.cache"], cache)
    table = known(cache)[name]
    (part,) = os.listdir(cache / "reference" / name)
    # Everyone has the numbers of a neighbour: what reading them by place would give.
    shifted = ReferenceTable(table.ids, np.roll(table.chosen, 1), np.roll(table.rejected, 1))
    shifted.save(str(cache / "reference" / name / part))

    options = {**options, "data.cache": cache, "checkpoint.every": 1}
    monkeypatch.setattr(sys, "argv", ["easylm.dpo", *arguments(folder, workdir, options)])
    with pytest.raises(SystemExit) as left:
        run_command(dpo.main)
    printed = " ".join(capsys.readouterr().err.split())
    assert left.value.code == 1
    assert "error: step 1: the policy is still the reference, but the loss is" in printed
    assert "/reference to have them computed again" in " ".join(printed.split())
    assert list((workdir / "checkpoints").glob("*")) == []
    assert not (workdir / "hf").exists()
    # As the message says.
    shutil.rmtree(cache / "reference")
    dpo.main(arguments(folder, workdir, options))
    assert (workdir / "hf" / "COMPLETE").exists()


def test_rows_may_go_move_and_come_between_runs(folder, first, tmp_path, capsys):
    cache, rows = tmp_path / "cache", tmp_path / "rows.jsonl"
    options = {**ALL_AT_ONCE, "init_from": first / "6", "data.cache": cache, "data.sources": rows}
    options |= {"batch_rows": 8, "batch_examples": "none"}
    write_rows(rows, PAIRS)
    dpo.main(arguments(folder, tmp_path / "first", options))
    ((name, before),) = known(cache).items()
    # Marks what is known in a way that the loss of the first step does not see.
    parts = cache / "reference" / name
    (part,) = os.listdir(parts)
    marked = ReferenceTable(before.ids, before.chosen - 0.25, before.rejected - 0.25)
    marked.save(str(parts / part))

    write_rows(rows, PAIRS[:4:-2])
    capsys.readouterr()
    dpo.main(arguments(folder, tmp_path / "fewer", options))
    printed = capsys.readouterr().err
    assert "of 13 pairs, 13 of them computed before" in printed
    assert "reference:" not in printed  # no pass, so no bar
    assert os.listdir(parts) == [part]

    write_rows(rows, [*EVAL_PAIRS, *PAIRS[::-3]])
    dpo.main(arguments(folder, tmp_path / "mixed", options))
    assert "of 15 pairs, 10 of them computed before" in capsys.readouterr().err
    assert len(os.listdir(parts)) == 2
    assert len(known(cache)[name]) == 35

    for run, old, new in (("fewer", 13, 0), ("mixed", 10, 5)):
        table = ReferenceTable.load(str(tmp_path / run / "reference.npz"))
        is_old = marked.has(table.ids)
        assert (is_old.sum(), (~is_old).sum()) == (old, new)
        found = table.lookup(table.ids[is_old])
        for values, wanted in zip(found, marked.lookup(table.ids[is_old]), strict=True):
            np.testing.assert_array_equal(values, wanted)
        assert metrics(tmp_path / run)[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_a_bucket_keeps_what_the_reference_says(folder, first, first_step, compared, capsys):
    with running_bucket() as bucket:
        options = {**compared, "data.cache": f"{bucket}/cache"}
        for run, before in (("one", 0), ("two", 30)):
            dpo.main(arguments(folder, f"{bucket}/{run}", options))
            printed = capsys.readouterr().err
            assert f"of 30 pairs, {before} of them computed before" in printed
        tables = [ReferenceTable.load(f"{bucket}/{run}/reference.npz") for run in ("one", "two")]
        np.testing.assert_array_equal(tables[0].chosen, tables[1].chosen)
        here = ReferenceTable.load(str(folder / "compared" / "reference.npz"))
        np.testing.assert_array_equal(tables[0].ids, here.ids)
        np.testing.assert_array_equal(tables[0].rejected, here.rejected)
        assert "COMPLETE" in list_files(f"{bucket}/two/hf")
        # The run is finished; it says so, and asks nobody again.
        dpo.main(arguments(folder, f"{bucket}/two", options))
        assert "computed before" not in capsys.readouterr().err
