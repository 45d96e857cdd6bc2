"""Advice for steps that do not fit, held against what the compiler says once it is followed."""

import dataclasses
import re

import pytest

from easylm.models.llama.sharding import check_mesh
from easylm.planning.advice import advice
from easylm.planning.overflow import Overflow, Temporary
from easylm.planning.target import target_devices
from easylm.planning.topology import parse_topology
from easylm.sharding import make_mesh, row_groups
from tests.planning.overflowing import Step

pytest.importorskip("libtpu", reason="the TPU compiler is not installed")

ADVICE = re.compile(r"(--\S+(?: --\S+)*): up to ([\d.]+) GiB less, ([\d.]+) in all: .+")
GIB = 2**30
V3_8 = parse_topology("v3-8")


def by_override(lines):
    """{overrides: GiB that are left}, in their order."""
    return {found[1]: float(found[3]) for found in map(ADVICE.fullmatch, lines)}


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
    assert found[-1] == "--topology=v3-32 --config.mesh=1,-1,4"
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


def test_a_state_that_does_not_fit_is_not_blamed_on_rows():
    step = Step(mesh="8,1,1", rows=8, num_hidden_layers=16, remat="block")
    overflow = step.overflow()
    found = by_override(step.advice(overflow))
    # All of the state is held eight times.
    assert next(iter(found)) == "--config.mesh=1,8,1"
    assert "--config.optimizer.mu_dtype=bfloat16" in found
    assert not any("micro_batches" in change and "mesh" not in change for change in found)
    rounded = dataclasses.replace(step, mu_dtype="bfloat16")
    less = rounded.overflow()
    expected = found["--config.optimizer.mu_dtype=bfloat16"] * GIB
    assert less.needed == pytest.approx(expected, rel=0.05)
    assert not any("mu_dtype" in change for change in rounded.advice(less))


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
        "--topology=v3-32 --config.mesh=1,-1,4": pytest.approx(left, abs=0.1)
    }


@pytest.mark.parametrize("shape", ["1,8,1", "1,2,4", "1,1,8", "2,4,1", "4,1,2"])
def test_every_advice_is_allowed(kept, shape):
    step, overflow = kept
    lines = dataclasses.replace(step, mesh=shape).advice(overflow)
    assert lines
    for change in by_override(lines):
        options = dict(part.removeprefix("--config.").split("=") for part in change.split())
        devices = target_devices(parse_topology(options.pop("--topology", step.topology)))
        mesh = make_mesh(options.pop("mesh", shape), devices)
        check_mesh(step.model, mesh)
        parts = int(options.pop("micro_batches", 1))
        assert step.rows % (parts * row_groups(mesh)) == 0
        assert set(options) <= {"remat", "optimizer.mu_dtype"}
        assert options.get("remat") != "block_sharded" or mesh.shape["tensor"] > 1


def test_a_batch_of_rows_is_cut_into_parts_that_divide_it(kept):
    step, overflow = kept
    fixed = dataclasses.replace(step.config, batch_examples=None, batch_rows=250)
    lines = advice(
        fixed, step.model, {"data": 1, "fsdp": 4, "tensor": 2}, overflow, rows=250, topology=V3_8
    )
    # 63 parts would be enough for 4 groups, but do not divide 250 rows.
    assert "--config.micro_batches=125" in by_override(lines)
