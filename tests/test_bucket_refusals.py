"""What every path argument says of a bucket that is missing, refuses, or holds nothing there."""

import pytest

from easylm import convert, generate, sft, storage
from easylm.errors import InputError
from tests import bucket
from tests.converters import models
from tests.fault_proxy import running_proxy
from tests.runs import RANDOM, arguments, make_folder


@pytest.fixture(scope="module")
def proxy():
    with bucket.running_bucket(), running_proxy() as proxy:
        yield proxy


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = make_folder(tmp_path_factory.mktemp("refusals"))
    models.write_all(folder)
    return folder


def run_sft(folder, path, name):
    workdir = path if name == "workdir" else folder / "run"
    own = name in ("init_from", "data.tokenizer")
    options = {key: value for key, value in RANDOM.items() if not own or "tokenizer" not in key}
    if name == "init_from":
        options = {}
    options |= {} if name == "workdir" else {name: path}
    sft.main(arguments(folder, workdir, options))


def run_convert(folder, path, name):
    paths = {"source": folder / "hf", "target": folder / "converted", name: path}
    convert.main([*(f"--{key}={value}" for key, value in paths.items()), "--to=native"])


def run_generate(folder, path, name):
    storage.write_bytes(str(folder / "questions.jsonl"), b'{"prompt": "Who?"}\n')
    paths = {
        "model": folder / "hf",
        "input": folder / "questions.jsonl",
        "output": folder / "answers.jsonl",
        name: path,
    }
    generate.main([*(f"--{key}={value}" for key, value in paths.items()), "--raw"])


READ = {
    "data.sources": run_sft,
    "data.eval_sources": run_sft,
    "data.tokenizer": run_sft,
    "init_from": run_sft,
    "model": run_generate,
    "input": run_generate,
    "source": run_convert,
}
WRITTEN = {
    "workdir": run_sft,
    "data.cache": run_sft,
    "output": run_generate,
    "target": run_convert,
}
REFUSALS = {
    "missing": ("gs://no-such-bucket/x", None, "check the spelling"),
    "no object": ("gs://tests/nothing/there", None, "check the spelling"),
    "forbidden": ("gs://tests/x", 403, "role Storage Object Admin"),
    "unknown": ("gs://tests/x", 401, "gcloud auth application-default login"),
}
CASES = [(name, refusal) for name in {**READ, **WRITTEN} for refusal in REFUSALS]
CASES = [case for case in CASES if case[0] in READ or case[1] != "no object"]


@pytest.mark.parametrize(("name", "refusal"), CASES)
def test_it_is_said_at_once_with_the_path_and_the_usual_cause(folder, proxy, name, refusal):
    path, proxy.always, cause = REFUSALS[refusal]
    if name == "output":
        path += ".jsonl"
    proxy.requests.clear()
    with pytest.raises(InputError) as error:
        {**READ, **WRITTEN}[name](folder, path, name)
    message = str(error.value)
    assert path.rpartition("/")[0] in message and cause in message
    assert "\n" not in message
    assert len(proxy.requests) < 20
    assert not (folder / "run" / "checkpoints").exists()


@pytest.mark.parametrize("name", WRITTEN)
def test_a_bucket_that_may_only_be_read_is_refused_before_the_work(folder, proxy, capfd, name):
    proxy.requests.clear()
    proxy.always, proxy.only = 403, "POST"
    try:
        with pytest.raises(InputError, match="role Storage Object Admin"):
            WRITTEN[name](folder, "gs://tests/x", name)
    finally:
        proxy.only = ""
    assert sum(method == "POST" for method, _ in proxy.requests) == 1
    said = capfd.readouterr().err  # of the weights, or of preparing data
    assert f"{folder / 'hf'}: " not in said and "encode:" not in said
