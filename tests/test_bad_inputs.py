"""What `python -m easylm.sft` says to bad input, and that it leaves nothing behind."""

import pathlib
import sys

import pytest

from easylm import sft
from easylm.command import COLUMNS, format_error
from easylm.errors import InputError
from tests import bad_data, bad_models, bad_setups
from tests.runs import RANDOM, arguments, make_folder, start


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of two steps."""
    folder = make_folder(tmp_path_factory.mktemp("bad_inputs"))
    sft.main(arguments(folder, folder / "run", {**RANDOM, "steps": 2}))
    return folder / "run"


@pytest.fixture
def folder(tmp_path):
    """Where a case lies: with good rows, and a config."""
    return make_folder(tmp_path)


def refuse(folder, options, workdir="new") -> str:
    """What a run says that must refuse its input and leave nothing, with single spaces."""
    return refuse_call(folder, arguments(folder, folder / workdir, options), workdir)


def refuse_call(folder, argv, workdir="new") -> str:
    before = content(folder)
    with pytest.raises(InputError) as error:
        sft.main(argv)
    check_nothing_left(folder, workdir, before)
    message = format_error(error.value)
    print(message)
    return check_message(message)


def content(folder: pathlib.Path) -> dict[str, bytes | None]:
    """Every file below a folder with its bytes, and every folder with None."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def check_nothing_left(folder: pathlib.Path, workdir: str, before: dict) -> None:
    """What was there is as it was; new are whole data and a whole tokenizer, for the next start."""
    after = content(folder)
    assert {path: after.get(path) for path in before} == before
    whole = [path.removesuffix("COMPLETE") for path in after if path.endswith("/COMPLETE")]
    for path in after.keys() - before.keys():
        assert path.startswith(("prepared", f"{workdir}/tokenizer")) or path == workdir, path
        if after[path] is not None or path.endswith(".incomplete"):
            assert path.startswith(tuple(whole)), path


def check_message(message: str) -> str:
    """The one message, with single spaces."""
    assert message.split()[0] == "error:"
    assert message.count("error:") == 1
    assert "Traceback" not in message
    for line in message.splitlines():
        # Longer lines only where a path or a value cannot be broken.
        assert len(line) <= COLUMNS or len(line.split()) <= 2, line
    return " ".join(message.split())


@pytest.mark.parametrize("field", ["data.sources", "data.eval_sources"])
@pytest.mark.parametrize("case", bad_data.ROW)
def test_a_bad_row(run, folder, case, field):
    row, wanted = bad_data.ROW[case]
    path = folder / "bad.jsonl"
    path.write_bytes(bad_data.file_of(row))
    said = refuse(folder, {"init_from": run / "hf", field: path})
    assert f"1 of 3 rows of {field} are bad:" in said
    assert f"{path}:2: {wanted}" in said
    assert "Repair them, or set data.on_bad_row=skip to leave them out." in said


@pytest.mark.parametrize("field", ["data.sources", "data.eval_sources"])
@pytest.mark.parametrize("case", bad_data.FILES, ids=lambda case: case.__name__)
def test_a_bad_source(run, folder, case, field):
    source, wanted = case(folder)
    said = refuse(folder, {"init_from": run / "hf", field: source})
    for text in wanted:
        assert text in said


@pytest.mark.parametrize("name", bad_setups.CASES)
def test_a_bad_setup(run, folder, name, monkeypatch):
    case = bad_setups.CASES[name](folder, run)
    if case.missing:
        monkeypatch.setitem(sys.modules, case.missing, None)
    said = refuse(folder, case.options, case.workdir)
    for text in case.wanted:
        assert text in said


CALLS = {
    "no config": (["--workdir=W"], "--config: not given; wanted a path or a name. See python -m"),
    "no such config": (
        ["--config=sft/quikstart", "--workdir=W"],
        "--config: found no file 'sft/quikstart' in",
    ),
    "no workdir": (["--config=sft/quickstart"], "--workdir: not given; wanted a folder"),
    "a word too many": (
        ["--config=CONFIG", "--workdir=W", "data.seq_len=5"],
        "data.seq_len: no such option; wanted --config, --workdir, --coordinator, "
        "--processes, --process, --help or --config.FIELD=VALUE. "
        "Did you mean --config.data.seq_len?",
    ),
    "a config with a typing error": (
        ["--config=BAD", "--workdir=W"],
        'bad.py:7: AttributeError: Key "stepps" does not exist and cannot be added since the '
        'config is locked. Did you mean "steps" instead of "stepps"?',
    ),
    "a config without data": (
        ["--config=CONFIG", "--workdir=W", "--config.init_from=random"],
        "config.data.sources: found ''; wanted files to train on",
    ),
}


@pytest.mark.parametrize("case", CALLS)
def test_a_bad_call(folder, case):
    argv, wanted = CALLS[case]
    good, bad = folder / "config.py", folder / "bad.py"
    lines = good.read_text().replace("return to_config_dict", "config = to_config_dict")
    bad.write_text(lines + "    config.stepps = 5\n    return config\n")
    places = {"=W": f"={folder / 'new'}", "=CONFIG": f"={good}", "=BAD": f"={bad}"}
    for name, place in places.items():
        argv = [argument.replace(name, place) for argument in argv]
    assert wanted in refuse_call(folder, argv)


def unknown_role(folder, run):
    row, wanted = bad_data.ROW["unknown role"]
    path = folder / "bad.jsonl"
    path.write_bytes(bad_data.file_of(row))
    return bad_models.Case({**RANDOM, "data.sources": path}, [f"{path}:2: {wanted}"])


@pytest.mark.parametrize(
    "case",
    [
        unknown_role,
        bad_setups.OPTIONS["an unknown field"],
        bad_models.cut_weights,
        bad_models.weights_that_are_not_finite,
        bad_setups.a_damaged_checkpoint,
    ],
    ids=["row", "option", "weights", "values", "checkpoint"],
)
def test_the_real_command_leaves_with_two(run, folder, case):
    options, wanted, workdir, _ = case(folder, run)
    before = content(folder)
    process = start(arguments(folder, folder / workdir, options))
    printed, errors = process.communicate()
    assert process.returncode == 2, errors
    assert printed == ""
    assert "Traceback" not in errors
    # What the run did before stands above.
    message = check_message(errors[errors.index("error:") :])
    for text in wanted:
        assert text in message
    check_nothing_left(folder, workdir, before)
