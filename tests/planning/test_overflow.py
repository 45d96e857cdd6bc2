"""What fills the memory of a program that is too large, as the compiler sees it."""

import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from easylm.devices import DEVICES, GIB
from easylm.optimizer import adamw
from easylm.planning.overflow import is_overflow, read_overflow
from easylm.planning.target import target_devices
from easylm.planning.topology import parse_topology
from tests.planning.overflowing import Step

pytest.importorskip("libtpu", reason="the TPU compiler is not installed")

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent


def lower(function, *shapes):
    """`function` of float32 arrays of these shapes, for one device of TPU v3."""
    device = target_devices(parse_topology("v3:1x1"))[0]
    mesh = jax.sharding.Mesh(np.array([device]), ("x",))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place) for shape in shapes]
    return jax.jit(function).lower(*arrays)


def error_of(lowered):
    """What compiling raises."""
    with pytest.raises(jax.errors.JaxRuntimeError) as error:
        lowered.compile()
    return error.value


def test_a_stack_that_a_loop_fills_is_named_with_its_size():
    def products(x):
        stack = jax.lax.map(lambda factor: factor * x @ x, jnp.arange(16.0))
        return jax.lax.optimization_barrier(stack).sum()

    overflow = read_overflow(lower(products, (16384, 16384)))
    largest = overflow.largest[0]
    assert (largest.shape, largest.size) == ("f32[16,16384,16384]", 16 * GIB)
    assert "while/body" in largest.operation
    # The caller is no file of the package, so that the operation stands for the line.
    assert largest.source == largest.operation
    assert overflow.arguments == GIB
    assert overflow.temporaries >= largest.size * largest.count
    assert overflow.needed == pytest.approx(GIB + overflow.temporaries, rel=0.05)
    assert overflow.usable == pytest.approx(DEVICES["TPU v3"].usable, abs=0.005 * GIB)


def test_a_line_of_a_library_stands_behind_the_line_that_calls_it():
    optimizer = adamw(
        lambda step: 1e-3, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.0, clip_norm=None
    )

    def update(gradient, mean, square):
        params = {"kernel": gradient}
        moments = iter([mean, square])
        state = jax.tree.map(lambda x: next(moments) if x.ndim else x, optimizer.init(params))
        updates, _ = optimizer.update(params, state, params)
        return jnp.sort(updates["kernel"], axis=0)[0]

    overflow = read_overflow(lower(update, *[(2**15, 2**15)] * 3))
    assert "easylm/optimizer.py" in overflow.largest[0].source


def test_arguments_alone_may_be_too_much():
    lowered = lower(lambda x, y: x.sum() + y.sum(), (4, 2**15, 2**15), (2**15, 2**15))
    assert is_overflow(error_of(lowered))
    overflow = read_overflow(lowered)
    assert overflow.arguments == 20 * GIB
    assert overflow.needed >= 20 * GIB
    assert overflow.temporaries < GIB


def test_a_program_that_its_code_makes_too_large():
    # Argument and result take all that is usable; the compiler says so in other words.
    rows = DEVICES["TPU v3"].usable // 2 // 4096 - 8
    lowered = lower(lambda x: x * 2, (rows, 1024))
    error = error_of(lowered)
    assert "hbm. Exceeded" in str(error) and is_overflow(error)
    overflow = read_overflow(lowered)
    assert overflow.needed == overflow.usable == int(15.48 * GIB)
    assert overflow.arguments == rows * 4096


def test_other_errors_are_no_overflow():
    assert not is_overflow(jax.errors.JaxRuntimeError("INTERNAL: Mosaic failed to compile"))
    assert not is_overflow(ValueError("(20G) exceeds available HBM (15.48G)"))
    with pytest.raises(AssertionError, match="the program fits"):
        read_overflow(lower(lambda x: x + 1, (8, 8)))


@pytest.fixture(scope="module")
def overflow():
    return Step().overflow()


def test_temporaries_of_a_step_have_lines_of_this_package(overflow):
    assert len(overflow.largest) >= 8
    sizes = [one.size * one.count for one in overflow.largest]
    assert sizes == sorted(sizes, reverse=True)
    assert sum(sizes) <= overflow.temporaries
    # 128 rows of 512 tokens in 4 layers, 4,096 wide: the float32 that norms keep comes first.
    assert overflow.largest[0].shape == "f32[4,128,512,4096]"
    assert overflow.largest[0].size == 4 * GIB
    for one in overflow.largest[:8]:
        path, line, function = re.fullmatch(r"(\S+):(\d+) in (\S+)", one.source).groups()
        source = (ROOT / path).read_text().splitlines()
        assert function.split(".")[-1] in "\n".join(source)
        assert source[int(line) - 1].strip(), one
    lines = [one.source for one in overflow.largest]
    assert any("in Linear.__call__" in line for line in lines), lines


def test_an_overflow_is_kept_as_json(overflow):
    assert json.loads(json.dumps(overflow))[2][0] == list(overflow.largest[0])
