"""benchmarks/plans.py: that what it asks can be asked, and what it makes of the answers."""

import json
import math
import subprocess
import sys

import pytest

from benchmarks import plans, plans_page
from easylm.command_line import parse_config
from easylm.models.llama.presets import PUBLISHED
from easylm.models.llama.sharding import tensor_sizes
from easylm.planning.topology import parse_topology
from easylm.trainers.config import DpoConfig, SftConfig

ROWS = [*plans.recipes_as_they_are(), *plans.OTHERS]


def answer(recipe="sft/tulu2_7b", topology="v3-256", overrides=None, *, total=10, **changes):
    """A result as the benchmark keeps it; `total` GiB of 16 are taken."""
    estimate = {"step_seconds": 1.234, "serial_seconds": 2.5, "mfu_bound": 0.6, "hours": 48.0}
    plan = {
        "devices": int(topology.partition("-")[2]),
        "mesh": {"data": 1, "fsdp": 32, "tensor": 8},
        "micro_batches": 1,
        "remat": "block_sharded",
        "data": {"examples": 61_135, "mean_tokens": 1000.0},
        "fits": total <= 16,
        "memory": {"total": total * 2**30, "usable": 16 * 2**30},
        "estimate": estimate | {"bound": "interconnect"} | changes,
        "compile_seconds": 30.0,
    }
    return {
        "recipe": recipe,
        "topology": topology,
        "overrides": overrides or {},
        "machine": "x86_64, 2 cores",
        "load_average": 1.0,
        "versions": {"python": "3.11", "jax": "0.10.2"},
        "first": {"seconds": 35.0, "peak": 2e9},
        "again": {"seconds": 4.0, "peak": 1e9},
        "plan": plan,
    }


def test_every_recipe_is_planned_on_its_pod_and_no_plan_is_made_twice():
    names = [row.name for row in ROWS]
    assert len(names) == len(set(names))
    assert {row.recipe for row in ROWS} == {row.recipe for row in plans.recipes_as_they_are()}
    assert names[0] == "sft/tulu1_7b@v3-128"
    assert not [name for name in names if "quickstart" in name or name.endswith("@")]
    assert set(plans_page.PUBLISHED) <= set(names)


@pytest.mark.parametrize("row", plans.OTHERS, ids=lambda row: row.name)
def test_the_mesh_of_each_plan_goes_with_its_slice_and_its_model(row):
    arguments = [f"--config.{field}={value}" for field, value in row.overrides.items()]
    config_class = SftConfig if row.recipe.startswith("sft/") else DpoConfig
    config, _ = parse_config(
        [f"--config={row.recipe}", *arguments], config_class, "plan", "", usage="", own={}
    )
    data, fsdp, tensor = map(int, config.mesh.split(","))
    assert math.prod((data, fsdp, tensor)) == parse_topology(row.topology).device_count
    model = PUBLISHED[config.init_from]
    assert tensor in tensor_sizes(model)
    assert model.hidden_size % (fsdp * tensor) == 0


def test_results_of_plans_that_are_not_asked_for_are_left_out():
    rows = [plans.Row("a", "v3-8", {"mesh": "1,1,8"}), plans.Row("b", "v3-8", {})]
    same = answer("a", "v3-8", {"mesh": "1,1,8"})
    with_others = answer("b", "v3-8", {"mesh": "1,2,4"})
    assert plans.known([same, with_others, answer("c", "v3-8")], rows) == {"a@v3-8": same}


def test_faults_are_no_room_too_little_room_and_bounds_below_what_was_reached():
    assert plans_page.faults(answer()) == []
    assert plans_page.faults(answer(total=15.2)) == []
    assert "does not fit" in plans_page.faults(answer(total=17))[0]
    assert "more than 95%" in plans_page.faults(answer(total=15.3))[0]
    (fault,) = plans_page.faults(answer(mfu_bound=0.47, overrides={"batch_rows": 128}))
    assert "bound to 47.0%, but 47.3% was reached" in fault
    assert plans_page.faults(answer(mfu_bound=0.05)) == []  # its small batch fills no such slice


def test_a_line_says_what_to_set_and_what_comes_of_it():
    assert plans_page.line(answer()) == (
        "| sft/tulu2_7b | v3-256 | 1,32,8 1 block_sharded | 10.0 62% | 1.23 to 2.5 | 60% | 48 | "
        "interconnect |"
    )
    longest = answer("sft/code_tulu2_34b", step_seconds=0.1234, serial_seconds=0.2345)
    assert len(plans_page.line(longest)) <= 110
    shorter = plans_page.line(answer(overrides={"mesh": "1,32,8", "data.seq_len": 1024}))
    assert shorter.startswith("| sft/tulu2_7b, data.seq_len=1024 | v3-256 |")
    assert "does not fit" in plans_page.line(answer(total=17))


def test_the_page_says_of_times_that_they_are_estimates_and_compares_them():
    full = {"batch_examples": "none", "batch_rows": 128}
    results = [answer(), answer("dpo/tulu2_70b", "v3-512"), answer("dpo/tulu2_70b", hours=96.0)]
    results.append(answer(overrides=full))
    page = plans_page.page(results)
    text = " ".join(page.split())
    assert text.index("are estimates") < text.index("| recipe |")
    assert "3 times over 61,135 pairs with 500 tokens a side" in text
    assert "4 on a v3-256, 2 on a v3-512" in text
    assert "about 7 days on a v3-512" in text
    assert "a v3-256 at most 60.0%, and 47.3% was reached (Levanter 1.0, 6.7B)" in text
    assert "| sft/tulu2_7b, batch_rows=128 |" in text
    assert "in 30 to 30 s, by a process that took 2.0 GB or less; asked again, the longest" in text


def test_a_page_keeps_what_stands_around_the_markers():
    text = f"before\n{plans_page.BEGIN}\nold\n{plans_page.END}\nafter\n"
    placed = plans_page.placed(text, "new")
    assert placed == f"before\n{plans_page.BEGIN}\n\nnew\n\n{plans_page.END}\nafter\n"
    assert plans_page.placed(placed, "new") == placed
    with pytest.raises(ValueError, match="found no line"):
        plans_page.placed("before\n", "new")


def test_recipes_are_in_the_order_of_their_models():
    recipes = [row.recipe for row in plans.recipes_as_they_are()]
    assert recipes == sorted(recipes, key=plans_page.in_order)
    assert recipes.index("sft/tulu2_13b") < recipes.index("sft/tulu2_70b")


def test_a_command_is_measured_apart_from_this_process(tmp_path):
    code = "import sys; x = bytearray(800_000_000); print('out'); sys.exit(3)"
    # By a process as small as the benchmark is: what it starts begins as a copy of it.
    measure = "import json, sys; from benchmarks import plans; print(json.dumps(plans.run("
    measure += "[sys.executable, '-c', sys.argv[1]], sys.argv[2])))"
    command = [sys.executable, "-c", measure, code, str(tmp_path)]
    ran = json.loads(
        subprocess.run(command, capture_output=True, check=True, cwd=plans.ROOT).stdout
    )
    assert (ran["exit_code"], ran["stdout"], ran["stderr"]) == (3, "out\n", "")
    assert 800e6 < ran["peak"] < 1000e6
    assert 0 < ran["seconds"] < 30
