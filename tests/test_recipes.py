"""The published SFT recipes: valid, traced on meshes of their pods, true to their docstrings."""

import dataclasses

import pytest

from easylm.config import CONFIGS, difference, from_config_dict, load
from easylm.trainers.config import SftConfig
from tests.recipes import docstring, planned, stated, trace

# Recipe -> the sizes of its weights, its peak learning rate and its row length.
RECIPES = {
    "tulu1_7b": ("llama_7b", 2e-5, 2048),
    "tulu1_13b": ("llama_13b", 2e-5, 2048),
    "tulu1_30b": ("llama_30b", 1e-5, 1024),
    "tulu1_65b": ("llama_65b", 1e-5, 1024),
    "tulu2_7b": ("llama2_7b", 2e-5, 8192),
    "tulu2_13b": ("llama2_13b", 2e-5, 8192),
    "tulu2_70b": ("llama2_70b", 1e-5, 8192),
    "code_tulu2_7b": ("codellama_7b", 2e-5, 8192),
    "code_tulu2_13b": ("codellama_13b", 2e-5, 8192),
    "code_tulu2_34b": ("codellama_34b", 2e-5, 8192),
}
# Parameters in millions, as the weights' own files count them.
MILLIONS = {
    "llama_7b": 6738,
    "llama_13b": 13016,
    "llama_30b": 32529,
    "llama_65b": 65286,
    "llama2_7b": 6738,
    "llama2_13b": 13016,
    "llama2_70b": 68977,
    "codellama_7b": 6739,
    "codellama_13b": 13016,
    "codellama_34b": 33744,
}


def recipe(name):
    return from_config_dict(SftConfig, load(f"sft/{name}").config)


@pytest.fixture(scope="module")
def traces():
    asked = {
        f"sft/{name}": {
            "preset": preset,
            "devices": stated(f"sft/{name}", r"Pod: v3-(\d+)"),
            "examples": stated(f"sft/{name}", r"mixture(?: from the hub)?, ([\d,]+) examples"),
        }
        for name, (preset, _, _) in RECIPES.items()
    }
    return trace(asked)


def test_every_config_is_known_here():
    names = {path.stem for path in (CONFIGS / "sft").glob("*.py")}
    assert names == {*RECIPES, "quickstart", "__init__"}


@pytest.mark.parametrize("name", RECIPES)
def test_the_whole_step_traces_on_the_pod(traces, name):
    preset, rate, seq_len = RECIPES[name]
    traced = traces[f"sft/{name}"]
    assert round(traced["parameters"] / 1e6) == MILLIONS[preset]
    assert traced["state_is_kept"]
    assert traced["metrics"]["loss"] == traced["metrics"]["grad_norm"] == []
    mesh = traced["mesh"]
    groups = mesh["data"] * mesh["fsdp"]
    assert traced["batch"] == [groups * recipe(name).micro_batches, seq_len]
    start, near_peak, end = traced["rates"]
    assert start == end == 0 and 0.9 * rate < near_peak < rate


@pytest.mark.parametrize("name", RECIPES)
def test_the_docstring_states_the_steps(traces, name):
    steps = stated(f"sft/{name}", r"([\d,]+) steps \(2 epochs of 128 examples")
    assert steps == traces[f"sft/{name}"]["steps"]


@pytest.mark.parametrize("name", RECIPES)
def test_what_the_papers_trained_with(name):
    config = recipe(name)
    _, rate, seq_len = RECIPES[name]
    first = name.startswith("tulu1")
    assert (config.epochs, config.batch_examples, config.data.seq_len) == (2, 128, seq_len)
    assert config.loss_weighting == "microbatch" and config.loss_group == (2 if first else 32)
    assert config.data.eos_newline == "strip" and config.data.packing
    options = config.optimizer
    assert (options.name, options.schedule, options.warmup_ratio) == ("adamw", "linear", 0.03)
    assert (options.learning_rate, options.final_ratio, options.weight_decay) == (rate, 0, 0)
    assert (options.b1, options.b2, options.eps) == (0.9, 0.999 if first else 0.95, 1e-8)
    assert options.clip_norm == (None if first else 1.0)
    assert (config.param_dtype, config.compute_dtype) == ("float32", "bfloat16")


@pytest.mark.parametrize("name", RECIPES)
def test_the_weights_are_those_of_the_size(name):
    config = recipe(name)
    family, size = RECIPES[name][0].split("_")
    hub = {
        "llama": f"huggyllama/llama-{size}",
        "llama2": f"meta-llama/Llama-2-{size}-hf",
        "codellama": f"codellama/CodeLlama-{size}-hf",
    }
    assert config.init_from == hub[family]
    assert size.upper() in docstring(f"sft/{name}").splitlines()[0]


@pytest.mark.parametrize(
    ("larger", "smaller", "expected"),
    [
        ("tulu2_13b", "tulu2_7b", ["init_from"]),
        ("tulu2_70b", "tulu2_7b", ["init_from", "optimizer.learning_rate", "remat"]),
        (
            "tulu1_65b",
            "tulu1_7b",
            ["data.seq_len", "init_from", "mesh", "optimizer.learning_rate", "pod", "remat"],
        ),
        ("code_tulu2_7b", "tulu2_7b", ["init_from", "model.max_position_embeddings"]),
    ],
)
def test_recipes_of_a_family_differ_in_what_they_say(larger, smaller, expected):
    lines = difference(dataclasses.asdict(recipe(smaller)), dataclasses.asdict(recipe(larger)))
    assert [line.split(":")[0].removeprefix("config.") for line in lines] == expected


@pytest.mark.parametrize("name", RECIPES)
def test_the_docstring_is_a_lab_note(name):
    text = docstring(f"sft/{name}")
    assert f"--config=sft/{name} --workdir=gs://BUCKET/{name}" in text
    source = recipe(name).data.sources
    for part in (
        "Pod: ",
        f"Data: {source}",
        "Expect: ",
        "Differs from the paper's run",
        "Verified",
    ):
        assert part in text
    assert recipe(name).pod == f"v3-{stated(f'sft/{name}', r'Pod: v3-([0-9]+)')}"
    for part in planned(f"sft/{name}"):
        assert part in " ".join(text.split())
    family = "tulu1_7b" if name.startswith("tulu1") else "tulu2_7b"
    for override in ("--config.loss_weighting=token", "--config.data.eos_newline=keep"):
        assert override in docstring(f"sft/{family}")
    assert name == family or f"see {family}.py" in text
