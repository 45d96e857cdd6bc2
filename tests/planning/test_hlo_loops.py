"""How often loops run, read from compiled programs."""

import re

import jax
import jax.numpy as jnp
import pytest

from easylm.planning.hlo_loops import trip_count
from easylm.planning.hlo_text import parse_module
from tests.planning.hlo_programs import array, make_mesh, text

BOTH = pytest.mark.parametrize("topology", ["cpu", "v3:2x2"])


def counts(program: str) -> list[int]:
    module = parse_module(program)
    return sorted(
        trip_count(module, computation, instruction)
        for computation in module.computations.values()
        for instruction in computation.instructions.values()
        if instruction.opcode == "while"
    )


def compiled(topology: str, function) -> str:
    """The program of a function of [8, 128]; tensors keep the compilers from unrolling it."""
    mesh = make_mesh(topology, 8)
    return text(function, array(mesh, (8, 128)))


def double(x):
    return jnp.sin(x @ (x.T @ x)) * 2


@BOTH
def test_scan_in_scan(topology):
    def inner(x):
        return jax.lax.scan(lambda x, _: (double(x), None), x, length=11)[0]

    program = compiled(
        topology, lambda x: jax.lax.scan(lambda x, _: (inner(x), None), x, length=7)[0]
    )
    assert counts(program) == [7, 11]


@BOTH
def test_first_value_and_step_of_the_counter(topology):
    """9, 13, 17: three times; 0, 4, 8, 12, 16 would be five."""

    def run(x):
        return jax.lax.while_loop(
            lambda carry: carry[0] < 20, lambda carry: (carry[0] + 4, double(carry[1])), (9, x)
        )[1]

    program = compiled(topology, run)
    assert counts(program) == [3]


@BOTH
def test_a_loop_that_never_runs(topology):
    def run(x, start):
        return jax.lax.fori_loop(9, 9, lambda _, x: double(x), x) + start

    assert counts(compiled(topology, lambda x: run(x, 1))) in ([], [0])


@BOTH
def test_a_loop_that_the_data_ends_is_refused_by_name(topology):
    program = compiled(
        topology, lambda x: jax.lax.while_loop(lambda x: x.sum() < 1e6, lambda x: x * x, x)
    )
    (name,) = re.findall(r"%(while\S*) =", program)
    with pytest.raises(ValueError, match=rf"loop {re.escape(name)} of main\S*: cannot tell how"):
        counts(program)


def test_a_counter_that_is_doubled_is_refused():
    def run(x):
        return jax.lax.while_loop(
            lambda carry: carry[0] < 20, lambda carry: (carry[0] * 2, double(carry[1])), (1, x)
        )[1]

    with pytest.raises(ValueError, match="not by adding a constant"):
        counts(compiled("v3:2x2", run))


def test_a_bound_that_is_an_argument_is_refused():
    mesh = make_mesh("v3:2x2", 8)
    program = text(
        lambda x, n: jax.lax.fori_loop(0, n, lambda _, x: double(x), x),
        array(mesh, (8, 128)),
        array(mesh, (), dtype="int32"),
    )
    with pytest.raises(ValueError, match="cannot tell how often it runs"):
        counts(program)
