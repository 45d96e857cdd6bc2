"""Bad options and workdirs for `python -m easylm.sft`, made as in tests/bad_models.py."""

import json
import os
import shutil

from tests.bad_models import MODELS, Case, copied, edit
from tests.runs import RANDOM, ROWS


def option(options, *wanted):
    def case(folder, run):
        given = {"init_from": run / "hf"} | options
        return Case(given, [text.replace("RUN", str(run)) for text in wanted])

    return case


OPTIONS = {
    "an unknown field": option(
        {"data.seqlen": 5},
        "--config.data.seqlen: no such option; wanted",
        "Did you mean --config.data.seq_len?",
    ),
    "text for a number": option(
        {"steps": "many"}, "--config.steps: found 'many'; wanted an integer, or none"
    ),
    "a number that is not finite": option(
        {"optimizer.learning_rate": "nan"},
        "config.optimizer.learning_rate: found nan; wanted a finite number",
    ),
    "an unknown choice": option(
        {"optimizer.name": "sgd"},
        "config.optimizer.name: found 'sgd'; wanted one of adamw, adafactor, lion",
    ),
    "a section": option(
        {"data": "x.jsonl"}, "--config.data: found a section; wanted --config.data."
    ),
    "steps and epochs": option(
        {"epochs": 1}, "config.steps: found steps=6 and epochs=1; wanted exactly one of the two"
    ),
    "neither steps nor epochs": option(
        {"steps": "none"},
        "config.steps: found steps=None and epochs=None; wanted exactly one of the two",
    ),
    "rows and examples": option(
        {"batch_examples": 4},
        "config.batch_examples: found batch_examples=4 and batch_rows=3; wanted exactly one",
    ),
    "no rows": option({"batch_rows": 0}, "config.batch_rows: found 0; wanted at least 1"),
    "parts that do not divide the rows": option(
        {"micro_batches": 2}, "config.micro_batches: found 2; wanted a divisor of batch_rows (3)"
    ),
    "a warm-up longer than the run": option(
        {"optimizer.warmup_steps": 9},
        "config.optimizer.warmup_steps: found 9; wanted at most steps (6)",
    ),
    "rows longer than the model": option(
        {"data.seq_len": 129},
        "data.seq_len: found 129; wanted at most 128, the max_position_embeddings of the model",
    ),
    "rows longer than a new model": option(
        {**RANDOM, "data.seq_len": 129},
        "config.data.seq_len: found 129; wanted at most 128, the max_position_embeddings",
    ),
    "sizes for weights that have their own": option(
        {"model.hidden_size": 64}, "config.model.hidden_size: found 64; wanted none: RUN/hf has its"
    ),
    "a new tokenizer for old weights": option(
        {"data.tokenizer_vocab_size": 320},
        "config.data.tokenizer_vocab_size: found 320; wanted none: the ids of a new tokenizer mean",
    ),
    "heads that do not divide the width": option(
        {**RANDOM, "model.num_attention_heads": 5},
        "config.model.num_attention_heads: found 5; wanted a divisor of hidden_size (32)",
    ),
    "no preset": option(
        {"init_from": "random", "model.preset": "llama9"},
        "config.model.preset: found 'llama9'; wanted one of ",
    ),
    "a mesh of two axes": option(
        {"mesh": "2,4"}, "config.mesh: found '2,4'; wanted data,fsdp,tensor: three"
    ),
    "a mesh of other devices": option(
        {"mesh": "3,1,1"}, "mesh: found '3,1,1' on 8 devices; wanted data * fsdp * tensor = 8"
    ),
    "a mesh that does not divide the heads": option(
        {"mesh": "1,1,8"},
        "mesh: found tensor=8, which does not divide the model (attention heads 4,",
        "wanted tensor in 1, 2, 4",
    ),
    "no example left": option(
        {"data.seq_len": 5},
        "data.sources: no example is left of 36 rows at data.seq_len=5; wanted at least one.",
        "Dropped: 36 no target left after truncation",
    ),
}


def a_row_that_is_too_long(folder, run):
    path = folder / "long.jsonl"
    path.write_text(json.dumps(ROWS[0]) + '\n{"prompt": "hi", "completion": "' + "yes " * 80 + '"}')
    return Case(
        {"init_from": run / "hf", "data.sources": path, "data.too_long": "error"},
        [f"{path}:2:", "tokens; wanted at most data.seq_len=80. Raise it, or set data.too_long="],
    )


def no_row_is_good(folder, run):
    path = folder / "bad.jsonl"
    path.write_text('{"prompt": "hi"}\n' * 3 + "{\n")
    return Case(
        {"init_from": run / "hf", "data.sources": path, "data.on_bad_row": "skip"},
        [f"data.sources: no good row in {path} (4 read)", "3 text is missing", "1 broken"],
    )


def a_cache_below_a_file(folder, run):
    path = folder / "rows.jsonl" / "cache"
    return Case(
        {"init_from": run / "hf", "data.cache": path},
        [str(path), "found a file where a folder is wanted"],
    )


def no_tensorboard(folder, run):
    said = "tensorboard: found no tensorboardX in this environment; wanted it installed: pip"
    options = {"init_from": run / "hf", "tensorboard": True}
    return Case(options, [said], missing="tensorboardX")


def no_wandb(folder, run):
    said = "wandb: found no wandb in this environment; wanted it installed: pip"
    return Case({"init_from": run / "hf", "wandb": "project"}, [said], missing="wandb")


# Workdirs.


def a_workdir_that_is_a_file(folder, run):
    path = folder / "new"
    path.write_text("notes")
    return Case({"init_from": run / "hf"}, [f"--workdir: {path} is a file; wanted a folder"])


def a_workdir_below_a_file(folder, run):
    (folder / "file").write_text("notes")
    return Case(
        {"init_from": run / "hf"},
        [f"--workdir: {folder}/file is a file; wanted a folder"],
        "file/new",
    )


def again(folder, run, *wanted, **options):
    """Goes on with a copy of the run."""
    again = copied(run.parent, folder, "run")
    said = [text.replace("RUN", str(again)) for text in wanted]
    return Case({**RANDOM, "steps": 2, **options}, said, "run")


def another_config(folder, run):
    return again(
        folder, run,
        "RUN: holds a run of another config; wanted the same one",
        "config.optimizer.learning_rate: 0.01 before, 0.02 now",
        "config.seed: 42 before, 7 now",
        **{"seed": 7, "optimizer.learning_rate": 0.02},
    )  # fmt: skip


def other_data(folder, run):
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[:-1]))
    return again(
        folder, run, "RUN: its checkpoints were trained on other data: found 35 examples of"
    )


def a_model_without_its_run(folder, run):
    case = again(folder, run, "RUN/hf: found a model, but RUN/checkpoints has none of the run")
    shutil.rmtree(folder / "run" / "checkpoints")
    return case


def a_damaged_checkpoint(folder, run):
    case = again(folder, run, "RUN/checkpoints/2/params: cannot be restored", "move this folder")
    for path in (folder / "run" / "checkpoints" / "2" / "params").rglob("d/*"):
        os.truncate(path, path.stat().st_size // 2)
    return case


def a_checkpoint_without_bundle(folder, run):
    case = again(folder, run, "RUN/checkpoints/2/bundle", "cannot be restored")
    shutil.rmtree(folder / "run" / "checkpoints" / "2" / "bundle")
    return case


def a_checkpoint_without_optimizer(folder, run):
    case = again(folder, run, "RUN/checkpoints/2/opt_state: cannot be restored")
    shutil.rmtree(folder / "run" / "checkpoints" / "2" / "opt_state")
    return case


def a_checkpoint_of_another_version(folder, run):
    case = again(folder, run, "RUN/checkpoints/2/bundle: format: found 'easylm-9'; wanted")
    edit(folder / "run" / "checkpoints" / "2" / "bundle" / "metadata", format="easylm-9")
    return case


def a_damaged_config_of_the_run(folder, run):
    case = again(folder, run, "RUN/config.json: found no JSON")
    os.truncate(folder / "run" / "config.json", 100)
    return case


def a_run_without_its_config(folder, run):
    case = again(folder, run, "RUN/config.json: no such file, though RUN/checkpoints holds")
    (folder / "run" / "config.json").unlink()
    return case


def an_export_that_is_a_file(folder, run):
    case = again(folder, run, "RUN/hf", "is a file; wanted a folder")
    shutil.rmtree(folder / "run" / "hf")
    (folder / "run" / "hf").write_text("notes")
    return case


def exports_of_steps(folder, run):
    case = again(folder, run, "RUN/hf: holds the model after step 1, 2; wanted export.every set")
    shutil.rmtree(folder / "run" / "hf")
    for step in ("1", "2"):
        shutil.copytree(run / "hf", folder / "run" / "hf" / step)
    return case


SETUPS = [
    a_row_that_is_too_long, no_row_is_good, a_cache_below_a_file, no_tensorboard, no_wandb,
    a_workdir_that_is_a_file, a_workdir_below_a_file, another_config, other_data,
    a_model_without_its_run, a_damaged_checkpoint, a_checkpoint_without_bundle,
    a_checkpoint_of_another_version, a_damaged_config_of_the_run, a_run_without_its_config,
    an_export_that_is_a_file, exports_of_steps,
    a_checkpoint_without_optimizer,
]  # fmt: skip
CASES = {case.__name__: case for case in MODELS + SETUPS} | OPTIONS
