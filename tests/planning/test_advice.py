"""Advice for steps that do not fit, held against what the compiler says once it is followed."""

import dataclasses
import re

import pytest

from easylm.devices import GIB
from easylm.models.llama.sharding import check_mesh
from easylm.planning.advice import advice
from easylm.planning.candidates import Candidate, least_bytes
from easylm.planning.overflow import Overflow, Temporary
from easylm.planning.target import target_devices
from easylm.planning.topology import parse_topology
from easylm.sharding import make_mesh, row_groups
from tests.planning.overflowing import Step

pytest.importorskip("libtpu", reason="the TPU compiler is not installed")

ADVICE = re.compile(r"(--\S+(?: --\S+)*): up to ([\d.]+) GiB less, ([\d.]+) at best: .+")
V3_8 = parse_topology("v3-8")


def by_override(lines):
    """{overrides: GiB that are left}, in their order."""
    return {found[1]: float(found[3]) for found in map(ADVICE.fullmatch, lines)}


def options(change):
    """{name: value} of overrides."""
    return dict(part.removeprefix("--config.").split("=") for part in change.split())


def overflow_of(arguments, temporaries, *, too_much):
    """An overflow whose temporaries all grow with the rows; sizes in GiB."""
    needed = int((arguments + temporaries) * GIB)
    usable, grows = needed - int(too_much * GIB), int(temporaries * GIB)
    return Overflow(needed, usable, (), arguments=needed - grows, temporaries=grows)


@pytest.fixture(scope="module")
def kept():
    """A step that keeps everything for the backward pass, and its overflow."""
    step = Step()
    return step, step.overflow()


def test_the_worst_is_named_first_and_a_larger_slice_last(kept):
    step, overflow = kept
    lines = step.advice(overflow)
    found = list(by_override(lines))
    # 256 rows in 2 groups.
    assert found[:2] == ["--config.micro_batches=128", "--config.remat=block_sharded"]
    assert found[-1] == "--topology=v3-32 --config.mesh=1,-1,4 --config.micro_batches=32"
    left = list(by_override(lines).values())[:-1]
    assert left == sorted(left)
    (remat,) = [line for line in lines if "remat" in line]
    assert re.search(r"what 4 layers keep for the backward pass takes (2\d|3\d)\.\d GiB", remat)


def test_advice_is_worth_what_it_says():
    # Too large before and after, so that the compiler names both sizes.
    step = Step(rows=2048)
    overflow = step.overflow()
    found = by_override(step.advice(overflow))
    after = dataclasses.replace(step, remat="block_sharded").overflow()
    expected = found["--config.remat=block_sharded"] * GIB
    assert after.needed == pytest.approx(expected, rel=0.2)
    assert after.needed < overflow.needed / 3


def test_logits_that_fill_the_memory_call_for_smaller_chunks():
    step = Step(
        mesh="1,8,1", rows=1024, seq_len=2048, num_hidden_layers=1, remat="block", loss_chunk=2048
    )
    overflow = step.overflow()
    (line,) = [line for line in step.advice(overflow) if "loss_chunk" in line]
    # 128 rows of 2,048 tokens and 32,000 logits of 4 bytes.
    assert "the logits of 2048 tokens a row take 31.2 GiB" in line
    smaller = dataclasses.replace(step, loss_chunk=512).overflow()
    # Less than they take, since another moment becomes the peak.
    assert 12 * GIB < overflow.needed - smaller.needed < 31.25 * GIB
    assert not any("loss_chunk" in change for change in step.advice(smaller))


def test_a_state_that_does_not_fit_is_said_and_not_blamed_on_rows():
    step = Step(mesh="8,1,1", rows=8, num_hidden_layers=16, remat="block")
    first, *lines = step.advice(step.overflow())
    # 3.5e9 parameters of 16 bytes, all of them held eight times; rounded, they would take 14.
    assert re.match(r"parameters, .* alone take 52\.2 GiB of the 15\.5 that a device has", first)
    assert list(by_override(lines)) == [
        "--config.mesh=1,8,1",
        "--topology=v3-32 --config.mesh=1,-1,1 --config.micro_batches=1",
    ]


@pytest.mark.parametrize("share, helps", [(0.9, True), (0.8, False)])
def test_rounded_moments_are_no_help_where_the_state_does_not_fit_with_them(share, helps):
    step = Step()
    held = least_bytes(step.config, step.model, (1, 2, 4))
    # 14 bytes a parameter in place of 16.
    too_large = Overflow(3 * held, int(share * held), (), arguments=held, temporaries=2 * held)
    first, *lines = step.advice(too_large)
    assert first.startswith("parameters, ")
    found = list(by_override(lines))
    assert ("--config.optimizer.mu_dtype=bfloat16" in found) == helps
    assert len(found) == 1 + helps and found[-1].startswith("--topology")


def test_a_slice_that_holds_the_state_is_named_where_none_is_known_to_hold_all():
    step = Step(mesh="1,8,1", rows=8)
    held = least_bytes(step.config, step.model, (1, 8, 1)) / GIB
    too_large = overflow_of(held, 100, too_much=100 + held / 2)
    _, larger = step.advice(too_large)
    assert larger.startswith("--topology=v3-32 --config.mesh=1,-1,1 --config.micro_batches=1:")


def test_what_changes_the_result_comes_after_what_does_not():
    lines = Step(rows=4096).advice(overflow_of(2.1, 0.1, too_much=0.15))
    *unchanged, rounded, larger = by_override(lines)
    assert rounded == "--config.optimizer.mu_dtype=bfloat16" and "--topology" in larger
    assert "--config.micro_batches=2048" in unchanged
    left = list(by_override(lines).values())
    assert left[-2] < min(left[:-2]), "the test needs a change that saves less and comes first"


def test_rounded_moments_are_worth_what_is_said():
    step = Step(mesh="8,1,1", rows=1024, num_hidden_layers=2, remat="block")
    found = by_override(step.advice(step.overflow()))
    rounded = dataclasses.replace(step, mu_dtype="bfloat16")
    less = rounded.overflow()
    expected = found["--config.optimizer.mu_dtype=bfloat16"] * GIB
    assert less.needed == pytest.approx(expected, rel=0.02)
    assert not any("mu_dtype" in change for change in rounded.advice(less))


@pytest.mark.parametrize(
    "too_much, mesh", [(1, "1,4,2"), (2.5, "1,2,4"), (3.4, "1,1,8"), (3.9, "1,1,8")]
)
def test_the_narrowest_tensor_axis_that_is_enough_is_named(too_much, mesh):
    # A half, 3/4, 7/8 of 4 GiB are saved.
    found = by_override(Step(mesh="1,8,1", rows=8).advice(overflow_of(9, 4, too_much=too_much)))
    wider = next(change for change in found if "mesh" in change)
    parts = 8 // int(mesh.split(",")[1])
    assert wider == f"--config.mesh={mesh} --config.micro_batches={parts}"


def test_no_wider_tensor_axis_where_fewer_rows_at_once_are_enough():
    step = Step(mesh="1,8,1", rows=64)
    assert not any("mesh=1,4,2" in line for line in step.advice(overflow_of(9, 8, too_much=7)))
    assert any("mesh=1,4,2" in line for line in step.advice(overflow_of(9, 8, too_much=7.2)))
    # 7 of the 8 GiB by fewer rows at once, less than 1% of 140 by splitting the last.
    assert not any("mesh=1,1,8" in line for line in step.advice(overflow_of(132, 8, too_much=7.9)))


def test_the_first_advice_leads_to_a_step_that_fits_with_exact_moments():
    step = Step(
        mesh="1,8,1", rows=24, seq_len=8192, num_hidden_layers=32, remat="block", micro_batches=3
    )
    first = next(iter(by_override(dataclasses.replace(step, rows=17).advice(step.overflow()))))
    assert first == "--config.mesh=1,1,8 --config.micro_batches=17"
    wider = dataclasses.replace(step, mesh="1,1,8", micro_batches=17, rows=17)
    overflow = wider.overflow()
    first, left = next(iter(by_override(wider.advice(overflow)).items()))
    assert first == "--config.remat=block_sharded"
    # Compiled, it takes 14.19 GiB of 15.48 by libtpu 0.0.51, and is taken for 15.6 by 0.0.42.
    assert 14.0 < left < 15.7


@pytest.mark.parametrize(
    "batch_rows, growing, parts, empty",
    [
        (None, 4, 5, 3),
        # Parts divide the batch: all 5 rows of a group at once, or 17 times one.
        (17, 1, 1, 3),
        (17, 4, 17, 51),
    ],
)
def test_no_row_group_of_a_larger_slice_is_idle_for_nothing(batch_rows, growing, parts, empty):
    step = Step(mesh="1,1,8", rows=17, micro_batches=17, remat="block")
    examples = step.config.batch_examples if batch_rows is None else None
    config = dataclasses.replace(step.config, batch_rows=batch_rows, batch_examples=examples)
    # Of 9 GiB, a group of four holds 2.25; a row at once takes `growing`, and 8 are usable.
    overflow = overflow_of(9, growing, too_much=growing + 1)
    mesh = {"data": 1, "fsdp": 1, "tensor": 8}
    lines = advice(config, step.model, mesh, overflow, rows=17, topology=V3_8)
    found = options(list(by_override(lines))[-1])
    assert (found["--topology"], found["mesh"]) == ("v3-32", "1,-1,8")
    assert int(found["micro_batches"]) == parts
    assert Candidate((1, 4, 8), parts, "block", 512, 17).empty_rows == empty


def test_copies_of_weights_are_not_what_layers_keep(kept):
    step, overflow = kept
    kernel = "state.params['layers']['mlp']['up_proj']['kernel']"
    copies = Temporary(10 * GIB, "bf16[4,2048,2752]", 1, kernel, kernel)
    full = Overflow(
        needed=overflow.arguments + 10 * GIB,
        usable=5 * GIB,
        largest=(copies,),
        arguments=overflow.arguments,
        temporaries=10 * GIB,
    )
    rounded, larger = step.advice(full)
    assert "mu_dtype" in rounded
    # Split over four times as many devices, as the state is.
    left = (overflow.arguments / GIB + 10) / 4
    assert by_override([larger]) == {
        "--topology=v3-32 --config.mesh=1,-1,4 --config.micro_batches=32": pytest.approx(
            left, abs=0.1
        )
    }


@pytest.mark.parametrize("shape", ["1,8,1", "1,2,4", "1,1,8", "2,4,1", "4,1,2"])
def test_every_advice_is_allowed(kept, shape):
    step, overflow = kept
    lines = dataclasses.replace(step, mesh=shape).advice(overflow)
    assert lines
    for change in by_override(lines):
        changed = options(change)
        devices = target_devices(parse_topology(changed.pop("--topology", step.topology)))
        mesh = make_mesh(changed.pop("mesh", shape), devices)
        check_mesh(step.model, mesh)
        parts = int(changed.pop("micro_batches", 1))
        assert step.rows % (parts * row_groups(mesh)) == 0
        assert set(changed) <= {"remat", "optimizer.mu_dtype"}
        assert changed.get("remat") != "block_sharded" or mesh.shape["tensor"] > 1


def test_a_batch_of_rows_is_cut_into_parts_that_divide_it(kept):
    step, overflow = kept
    fixed = dataclasses.replace(step.config, batch_examples=None, batch_rows=250)
    lines = advice(
        fixed, step.model, {"data": 1, "fsdp": 4, "tensor": 2}, overflow, rows=250, topology=V3_8
    )
    # 63 parts would be enough for 4 groups, but do not divide 250 rows.
    assert "--config.micro_batches=125" in by_override(lines)
