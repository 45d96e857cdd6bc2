"""`python -m easylm.plan` as it is used: its answers, its exit codes, its refusals."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest

from easylm import plan, sft
from easylm.devices import DEVICES
from easylm.errors import InputError
from tests.runs import PAIRS_OPTIONS, RANDOM, arguments, make_folder, make_pairs_folder, start

ROOT = pathlib.Path(plan.__file__).parent.parent
# A model of 400 million parameters, and rows that fill a v3-8 if all that layers make is kept.
LARGE = {
    "init_from": "random",
    "model.hidden_size": 2048,
    "model.intermediate_size": 8192,
    "model.num_hidden_layers": 4,
    "model.num_attention_heads": 16,
    "model.num_key_value_heads": 16,
    "model.max_position_embeddings": 4096,
    "data.tokenizer_vocab_size": 32000,
    "data.expected_examples": 1000,
    "data.expected_mean_tokens": 800.0,
    "data.seq_len": 4096,
    "batch_rows": 64,
    "compute_dtype": "bfloat16",
    "mesh": "1,4,2",
    "remat": "none",
}
A_STEP = {**RANDOM, "steps": 1, "checkpoint.every": 1}
# Of runs that are compiled for a TPU.
TINY = {**RANDOM, "compute_dtype": "bfloat16"}


def argv(folder, topology, options=RANDOM, *more):
    """The command's arguments for a run on the rows of `folder`."""
    found = [one for one in arguments(folder, "", options) if not one.startswith("--workdir")]
    return [*found, *([f"--topology={topology}"] if topology else []), *more]


def run(arguments, home, program=("-m", "easylm.plan"), **environment):
    """(exit code, stdout, stderr) of the command, in a process with a home of its own."""
    process = start(arguments, program=program, HOME=str(home), **environment)
    stdout, stderr = process.communicate(timeout=120)
    return process.returncode, stdout, stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("sft"))


@pytest.fixture(scope="module")
def pairs_folder(tmp_path_factory):
    return make_pairs_folder(tmp_path_factory.mktemp("dpo"))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Where the commands keep what they have compiled."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture
def plan_here(home, monkeypatch, capsys):
    """`plan_here(arguments)` plans for a CPU in this process: (exit code, stdout, stderr)."""
    # The command sets them, and they are unset afterwards.
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", "true")
    monkeypatch.setenv("HOME", str(home))

    def plan_here(arguments):
        capsys.readouterr()
        return plan.main(arguments), *capsys.readouterr()

    return plan_here


needs_libtpu = pytest.mark.skipif(
    subprocess.run([sys.executable, "-c", "import libtpu"], capture_output=True).returncode != 0,
    reason="the TPU compiler is not installed",
)


def width_of(text):
    return max(map(len, text.splitlines()))


@needs_libtpu
def test_an_sft_run_that_fits_a_slice(folder, home):
    code, text, said = run(argv(folder, "v3:2x2", TINY), home)
    assert code == 0, said
    assert "v3:2x2: 8 x TPU v3, 15.48 GiB usable on each" in text
    assert "39,072 parameters in float32, random" in text
    assert "36 examples of 43 tokens on average, counted" in text
    assert re.search(r"total +[\d.]+ MiB  \[\.+\] +0\.0% fits", text)
    assert "all-gather" in text and "MFU          at most" in text
    assert width_of(text) <= 80
    assert re.search(r"^compiled in [\d.]+ s$", said, re.MULTILINE)
    # The second call reads what the first one compiled, and says the same.
    code, values, said = run(argv(folder, "v3:2x2", TINY, "--json"), home)
    assert code == 0 and re.search(
        r"^compiled in [\d.]+ s, in an earlier call$", said, re.MULTILINE
    )
    values = json.loads(values)
    assert values["compiled_before"] is True and values["fits"] is True
    assert values["memory"]["usable"] == DEVICES["TPU v3"].usable
    memory = values["memory"]
    for name in ("parameters", "temporaries", "total"):
        assert re.search(rf"^  {name} +{memory[name] / 2**20:.2f} MiB", text, re.MULTILINE), name
    for name, flops in values["flops"].items():
        shown = re.escape(f"{flops:.2e}")
        assert re.search(rf"^  {name} +{shown} ", text, re.MULTILINE), name
    for one in values["collectives"]:
        assert re.search(rf"^  {one['kind']} .* in +{one['count']:,.0f} calls$", text, re.MULTILINE)
    estimate = values["estimate"]
    assert f"at most {estimate['mfu_bound']:.1%}, an estimate" in text
    assert f"bound by {estimate['bound']}" in text


@needs_libtpu
def test_a_dpo_run_that_fits_a_slice(pairs_folder, home):
    options = {**TINY, **PAIRS_OPTIONS, "mesh": "1,2,2", "micro_batches": 3}
    code, values, said = run(argv(pairs_folder, "v4:2x2x1", options, "--json"), home)
    assert code == 0, said
    values = json.loads(values)
    assert values["device_kind"] == "TPU v4" and values["devices"] == 4
    assert values["mesh"] == {"data": 1, "fsdp": 2, "tensor": 2}
    assert values["step"]["rows"] == 3 and values["step"]["empty_rows"] == 3
    assert values["data"]["examples"] == 30
    kinds = [one["kind"] for one in values["collectives"]]
    assert "all-gather" in kinds and "all-reduce" in kinds
    assert 0 < values["estimate"]["mfu_bound"] < 1
    assert values["estimate"]["step_seconds"] <= values["estimate"]["serial_seconds"]


@needs_libtpu
def test_a_run_that_does_not_fit_is_told_what_fills_it_and_what_to_change(folder, home):
    code, text, said = run(argv(folder, "v3:2x2", LARGE), home)
    assert code == 3, said
    assert "399,525,888 parameters" in text and "expected by the config" in text
    assert re.search(r"total +2\d\.\d\d GiB  \[#+\] 18\d\.\d% DOES NOT FIT", text)
    lines = re.findall(r"^ +(\S+\.py):(\d+) in (\S+)$", text, re.MULTILINE)
    assert 4 <= len(lines) <= 8
    for path, number, function in lines:
        source = (ROOT / path).read_text().splitlines()
        assert source[int(number) - 1].strip() and function.split(".")[-1] in "\n".join(source)
    assert any(path == "models/llama/model.py" for path, _, _ in lines)
    assert "--config.remat=block_sharded: up to" in text
    assert "--config.micro_batches=16: up to" in text
    assert width_of(text) <= 80


@pytest.fixture(scope="module")
def of_eight(folder, home):
    """The values of the plan of a tiny run for eight virtual devices of the CPU."""
    code, values, said = run(argv(folder, "cpu:8", A_STEP, "--json"), home)
    assert code == 0 and "in an earlier call" not in said
    return json.loads(values)


def test_a_cpu_is_planned_for_as_training_compiles_it(folder, of_eight, capsys):
    memory, step = of_eight["memory"], of_eight["step"]
    pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert memory["usable"] == pages // 8  # virtual devices share the machine's memory
    assert set(of_eight["estimate"].values()) == {None}
    sft.main(arguments(folder, folder / "run", A_STEP))
    said = capsys.readouterr().err
    found = re.search(r"memory    ([\d.]+) KiB state and batch \+ ([\d.]+) KiB temporaries", said)
    kept = memory["parameters"] + memory["optimizer"] + memory["batch"]
    assert float(found[1]) == pytest.approx(kept / 2**10, rel=0.01)
    assert float(found[2]) == pytest.approx(memory["temporaries"] / 2**10, rel=0.01)
    steps = re.search(r"steps     ([\d,]+) of ([\d,]+) rows of 80 tokens", said)
    assert int(steps[1]) == of_eight["data"]["steps"] and int(steps[2]) == step["rows"]
    assert f"{of_eight['parameters']:,} parameters" in said
    assert f"; {step['empty_rows']} empty rows a step" in said


def test_what_is_compiled_again_and_what_is_not(folder, of_eight, home, plan_here):
    cache = home / ".cache" / "easylm" / "plans"

    def compiles(change):
        before = set(cache.iterdir())
        code, text, said = plan_here(argv(folder, "cpu:8", {**A_STEP, **change}))
        assert code == 0 and "time: no estimate" in text
        assert ("in an earlier call" in said) == (set(cache.iterdir()) == before)
        return "in an earlier call" not in said

    assert not compiles({"seed": 7})  # other data of the same shapes
    assert compiles({"loss_chunk": 16})


def test_a_search_prints_what_fits_and_how_to_ask_for_it(folder, plan_here):
    code, text, said = plan_here(argv(folder, "cpu:4", RANDOM, "--search", "--budget_minutes=0.01"))
    assert code == 0 and re.search(r"^1.* GiB: fits$", said, re.MULTILINE)
    assert text.startswith("What fits, fastest first. Times and MFU are estimates")
    assert "were not tried: the time is used up (--budget_minutes)" in text
    assert width_of(text) <= 80
    overrides = re.findall(r"^  (--config\.\S+)$", text, re.MULTILINE)
    assert any(one.startswith("--config.mesh=") for one in overrides)
    # They are options of the command; what they ask for was compiled.
    code, _, said = plan_here([*argv(folder, "cpu:4"), *overrides])
    assert code == 0 and "in an earlier call" in said
    code, values, _ = plan_here(
        argv(folder, "cpu:4", RANDOM, "--search", "--budget_minutes=0.01", "--json")
    )
    values = json.loads(values)
    assert values["fitting"] and values["untried"] > 0


@pytest.mark.parametrize("question", ["--search", "--smallest"])
@needs_libtpu
def test_a_question_that_the_budget_leaves_open_is_an_error_and_no_no(folder, home, question):
    more = [question, "--json", "--budget_minutes=1e-9"]
    code, values, said = run(argv(folder, "v3-8", TINY, *more), home)
    assert code == 2
    said, values = " ".join(said.split()), json.loads(values)
    assert "error: --budget_minutes: found 1e-09, which is used up, and whether" in said
    if question == "--search":
        assert values["fitting"] == [] and values["too_large"] == 0 < values["untried"]
        assert f"none of 0 compiled ways to run it fits, {values['untried']} were not tried" in said
    else:
        assert values == {"fits": None, "tried": []} and "no slice was tried" in said


@needs_libtpu
def test_no_slice_at_all_is_a_no(folder, home):
    # 16 bytes a parameter, of 1e12: no slice of v2 has room for it.
    options = {**LARGE, "model.num_hidden_layers": 15000, "mesh": "1,-1,8"}
    code, values, said = run(argv(folder, "v2", options, "--smallest", "--json"), home)
    assert code == 3, said
    values = json.loads(values)
    assert values["fits"] is False and values["tried"][-1] == "v2-512"
    assert "it fits none of v2-8, v2-32, v2-128, v2-256, v2-512" in " ".join(said.split())


def test_ctrl_c_in_a_search_keeps_what_was_found(folder, tmp_path):
    process = start(
        argv(folder, "cpu:4", RANDOM, "--search"),
        program=("-m", "easylm.plan"),
        HOME=str(tmp_path),
    )
    said = process.stderr.readline()
    while said and not said.endswith("GiB: fits\n"):
        said = process.stderr.readline()
    process.send_signal(signal.SIGINT)
    text, said = process.communicate(timeout=120)
    assert process.returncode == 130, said
    assert "interrupted: the search ends after the compile that is running" in said
    assert text.startswith("What fits, fastest first.") and "Traceback" not in said


@needs_libtpu
def test_the_smallest_slice_is_found(folder, home):
    code, report, said = run(argv(folder, "v4", TINY, "--smallest"), home)
    assert code == 0, said
    assert "v4-8: 4 x TPU v4" in report and report.count("  --topology=v4-8\n") == 1
    assert re.search(r"^v4-8:\n  1,.*: fits$", said, re.MULTILINE)


REFUSED = {
    "misspelt option": ("v3-8", ["--budgetminutes=1"], "Did you mean --budget_minutes?"),
    "bad value": ("v3-8", ["--config.remat=all"], "config.remat: found 'all'; wanted one of"),
    "bad config": ("v3-8", ["--config.batch_rows=none"], "wanted exactly one of the two"),
    "unknown topology": ("v3-7", [], "wanted one of v2-8, v2-32"),
    "no topology": ("", [], "--topology: not given, and the config names no pod"),
    "both questions": ("v3-8", ["--search", "--smallest"], "--search and --smallest: found both"),
    "no time": ("v3-8", ["--budget_minutes=0"], "--budget_minutes: found 0; wanted a number above"),
    "no number": ("v3-8", ["--budget_minutes=nan"], "--budget_minutes: found nan; wanted a number"),
    "text for time": ("v3-8", ["--budget_minutes=abc"], "--budget_minutes: found 'abc'; wanted a"),
    "generation": ("v3", [], "found 'v3', a generation of TPU; wanted a slice of it"),
    "no generation": ("cpu:8", ["--smallest"], "wanted a generation of TPU, one of v2, v3"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_wrong_is_one_message_without_jax(folder, tmp_path, name):
    (tmp_path / "jax.py").write_text("raise SystemExit('jax was imported')")
    topology, more, message = REFUSED[name]
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    code, text, said = run(argv(folder, topology, RANDOM, *more), tmp_path, PYTHONPATH=path)
    assert (code, text) == (2, ""), said
    assert message in " ".join(said.split())
    assert said.startswith("error: ") and said.count("error: ") == 1


def test_help_is_quick_and_needs_no_jax(tmp_path):
    (tmp_path / "jax.py").write_text("raise SystemExit('jax was imported')")
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    started = time.monotonic()
    code, text, said = run(["--help"], tmp_path, PYTHONPATH=path)
    assert time.monotonic() - started < 2
    assert (code, said) == (0, "")
    for part in ("--topology=NAME", "--search", "--smallest", "--budget_minutes=N", "--json"):
        assert f"\n  {part}\n" in text
    assert "--config.pod=" in text and width_of(text) <= 80


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ("1,3,1", "mesh: found '1,3,1' on 8 devices; wanted data * fsdp * tensor = 8"),
        ("1,1,8", "mesh: found tensor=8, which does not divide the model"),
    ],
)
def test_a_mesh_that_does_not_divide(folder, plan_here, mesh, message):
    with pytest.raises(InputError) as error:
        plan_here(argv(folder, "cpu:8", {**RANDOM, "mesh": mesh}))
    assert message in str(error.value)


def test_without_libtpu_the_way_to_get_it_is_said(folder, tmp_path):
    program = (
        "import sys; sys.modules['libtpu'] = None\n"  # what cannot be imported
        "from easylm import plan\nfrom easylm.command import run_command\nrun_command(plan.main)"
    )
    code, text, said = run(argv(folder, "v3-8", TINY), tmp_path, program=("-c", program))
    assert (code, text) == (2, "")
    assert "the TPU compiler is not installed; run pip install" in " ".join(said.split())
    assert "pip install libtpu" in " ".join(said.split()) and "Traceback" not in said
