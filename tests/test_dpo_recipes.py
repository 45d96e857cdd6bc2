"""The published DPO recipes: valid, traced on meshes of their pods, true to their docstrings."""

import dataclasses

import pytest

from easylm.config import CONFIGS, difference, from_config_dict, load
from easylm.trainers.config import DpoConfig
from tests.recipes import docstring, planned, stated, trace

# Recipe -> the sizes of its weights, their parameters in millions, the pod.
RECIPES = {
    "tulu2_7b": ("llama2_7b", 6738, 32),
    "tulu2_13b": ("llama2_13b", 13016, 32),
    "tulu2_70b": ("llama2_70b", 68977, 256),
}


def recipe(name):
    return from_config_dict(DpoConfig, load(f"dpo/{name}").config)


@pytest.fixture(scope="module")
def traces():
    asked = {
        f"dpo/{name}": {
            "preset": preset,
            "devices": stated(f"dpo/{name}", r"Pod: v3-(\d+)"),
            "examples": stated(f"dpo/{name}", r"train_prefs(?: from the hub)?, ([\d,]+) pairs"),
        }
        for name, (preset, _, _) in RECIPES.items()
    }
    return trace(asked)


def test_every_config_is_known_here():
    names = {path.stem for path in (CONFIGS / "dpo").glob("*.py")}
    assert names == {*RECIPES, "quickstart", "__init__"}


@pytest.mark.parametrize("name", RECIPES)
def test_the_whole_step_traces_on_the_pod(traces, name):
    _, millions, devices = RECIPES[name]
    traced = traces[f"dpo/{name}"]
    assert round(traced["parameters"] / 1e6) == millions
    assert traced["state_is_kept"]
    assert traced["metrics"]["loss"] == traced["metrics"]["rewards/margins"] == []
    mesh = traced["mesh"]
    assert mesh["data"] * mesh["fsdp"] * mesh["tensor"] == devices
    # 32 pairs of some 1,000 tokens fill 4 rows of 8,192: no row group is idle.
    assert traced["batch"] == [mesh["data"] * mesh["fsdp"], 8192] == [4, 8192]
    # The warm-up takes a tenth of the steps, rounded up.
    start, rising, end = traced["rates"]
    assert start == end == 0 and rising == pytest.approx(5e-7 * 300 / 574)


@pytest.mark.parametrize("name", RECIPES)
def test_the_docstring_states_the_steps(traces, name):
    steps = stated(f"dpo/{name}", r"([\d,]+) steps \(3 epochs of 32 pairs")
    assert steps == traces[f"dpo/{name}"]["steps"]


@pytest.mark.parametrize("name", RECIPES)
def test_what_the_paper_trained_with(name):
    config = recipe(name)
    assert (config.epochs, config.batch_examples, config.data.seq_len) == (3, 32, 8192)
    assert (config.dpo.loss, config.dpo.beta, config.dpo.label_smoothing) == ("sigmoid", 0.1, 0)
    assert config.dpo.reference == "policy" and config.dpo.scored_turns == "last"
    assert config.dpo.sft_weight == config.dpo.margin_weight == 0
    options = config.optimizer
    assert (options.name, options.schedule, options.warmup_ratio) == ("adamw", "linear", 0.1)
    assert (options.learning_rate, options.final_ratio, options.weight_decay) == (5e-7, 0, 0)
    assert (options.b1, options.b2, options.eps, options.clip_norm) == (0.9, 0.95, 1e-8, 1.0)
    assert (config.param_dtype, config.compute_dtype) == ("float32", "bfloat16")


@pytest.mark.parametrize(
    ("larger", "expected"),
    [
        ("tulu2_13b", ["init_from", "remat"]),
        ("tulu2_70b", ["init_from", "mesh", "pod", "remat"]),
    ],
)
def test_recipes_differ_in_what_they_say(larger, expected):
    smaller = dataclasses.asdict(recipe("tulu2_7b"))
    lines = difference(smaller, dataclasses.asdict(recipe(larger)))
    assert [line.split(":")[0].removeprefix("config.") for line in lines] == expected


@pytest.mark.parametrize("name", RECIPES)
def test_the_docstring_is_a_lab_note(name):
    text = docstring(f"dpo/{name}")
    size = name.removeprefix("tulu2_")
    assert f"--config=dpo/{name} --workdir=gs://BUCKET/tulu2_dpo_{size}" in text
    assert recipe(name).init_from == f"allenai/tulu-2-{size}"
    assert size.upper() in text.splitlines()[0]
    sources = recipe(name).data
    assert sources.eval_sources == "HuggingFaceH4/ultrafeedback_binarized:test_prefs"
    for part in (
        f"Data: {sources.sources}",
        "Expect: ",
        "Differs from the paper's run",
        "Verified",
    ):
        assert part in text
    assert recipe(name).pod == f"v3-{RECIPES[name][2]}"
    for part in planned(f"dpo/{name}"):
        assert part in " ".join(text.split())
    assert name == "tulu2_7b" or "what tulu2_7b.py lists" in text
