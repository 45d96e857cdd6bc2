"""Bytes moved in memory, against XLA's own count and against what is known by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas

from easylm.planning.hlo_costs import program_costs
from easylm.planning.hlo_text import parse_module
from tests.planning.hlo_programs import Spec, array, make_mesh, per_device, text

TABLE = jax.ShapeDtypeStruct((2000, 1000), jnp.float32)
ROW = 1000 * 4


def traffic(function, *arguments, **options) -> int:
    return program_costs(text(function, *arguments, **options)).traffic


def block(x, kernels):
    up, down = kernels
    x = x + (jax.nn.silu(x @ up) * jnp.tanh(x @ up)) @ down
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-5)


def test_close_to_the_count_of_the_compiler_without_loops():
    """A step of four blocks; XLA counts what each instruction touches, but each loop once."""

    def loss(kernels, x):
        for layer in range(4):
            x = block(x, [kernel[layer] for kernel in kernels])
        return -jax.nn.log_softmax(x)[:, 0].mean()

    def step(kernels, x):
        value, gradients = jax.value_and_grad(loss)(kernels, x)
        return value, jax.tree.map(lambda p, g: p - 0.1 * g, kernels, gradients)

    kernels = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((4, 256, 512), (4, 512, 256))]
    x = jax.ShapeDtypeStruct((128, 256), jnp.float32)
    compiled = jax.jit(step).lower(kernels, x).compile()
    counted = program_costs(compiled.as_text()).traffic
    assert counted == pytest.approx(compiled.cost_analysis()["bytes accessed"], rel=0.1)


@pytest.mark.parametrize("topology", ["cpu", "v3:2x2"])
def test_each_turn_of_a_scan_reads_its_own_layer(topology):
    """Twice the layers move twice as much; four times as much, if each read the whole stack."""
    mesh = make_mesh(topology, 8)

    def run(kernels, x):
        return jax.lax.scan(lambda x, layer: (block(x, layer), None), x, kernels)[0]

    def moved(layers):
        shapes = ((layers, 256, 512), (layers, 512, 256))
        kernels = [array(mesh, shape) for shape in shapes]
        return traffic(run, kernels, array(mesh, (128, 256)))

    each_layer = (moved(32) - moved(16)) / 16
    assert each_layer == pytest.approx(moved(16) / 16, rel=0.1)
    assert each_layer >= 2 * 256 * 512 * 4


@pytest.mark.parametrize(("topology", "in_a_turn"), [("cpu", 7), ("v3:2x2", 4)])
def test_an_update_of_a_scan_writes_its_own_layer(topology, in_a_turn):
    """What a scan stacks up is written once: `layers` parts of it, not `layers` times all.

    In a turn x is read, doubled and written; and read, its sine written. The CPU's compiler
    copies x in each turn and fills the stack with zeros before the loop; the TPU's leaves the
    stack as it finds it. Both copy x before the loop.
    """
    mesh = make_mesh(topology, 8)
    layers, size = 16, 128 * 256 * 4
    moved = traffic(
        lambda x: jax.lax.scan(lambda x, _: (x * 2, jnp.sin(x)), x, length=layers)[1],
        array(mesh, (128, 256)),
    )
    assert moved == pytest.approx((in_a_turn * layers + 2) * size, rel=1e-3)


@pytest.mark.parametrize(("dtype", "rows_moved"), [("float32", 15), ("bfloat16", 21)])
def test_a_slice_updated_in_place(dtype, rows_moved):
    """Three rows are read, doubled and written over three of a donated table of 2,000.

    These are read again for their sum; in bfloat16 after a copy of the three in float32.
    """
    table, rows = (jax.ShapeDtypeStruct((n, 1000), dtype) for n in (2000, 3))

    def run(table, rows, at):
        table = jax.lax.dynamic_update_slice(table, rows * 2, (at, 0))
        return table, jax.lax.dynamic_slice(table, (at, 0), (3, 1000)).sum()

    row = 1000 * table.dtype.itemsize
    moved = traffic(run, table, rows, jax.ShapeDtypeStruct((), jnp.int32), donate_argnums=0)
    assert moved == pytest.approx(rows_moved * row, rel=0.01)


def test_a_copy_of_what_was_updated_in_place():
    """A row is read and written; then the whole table of 2,000 is, for the second result."""

    def run(table, row):
        table = jax.lax.dynamic_update_slice(table, row, (5, 0))
        return table, table

    row = jax.ShapeDtypeStruct((1, 1000), jnp.float32)
    moved = traffic(run, TABLE, row, donate_argnums=0)
    assert moved == pytest.approx((2 + 2 * 2000) * ROW, rel=1e-6)


def test_rows_of_a_table():
    """Seven rows are read and written; the compiler's own count is the whole table."""
    indices = jax.ShapeDtypeStruct((7,), jnp.int32)

    def run(table, at):
        rows = table[at]
        return jnp.sin(rows) * jnp.cos(rows)

    moved = traffic(run, TABLE, indices)
    assert moved == pytest.approx(14 * ROW, rel=0.01)


def test_rows_added_to_a_donated_table():
    """Seven rows are read, and written in place."""
    indices = jax.ShapeDtypeStruct((7,), jnp.int32)
    rows = jax.ShapeDtypeStruct((7, 1000), jnp.float32)
    moved = traffic(lambda t, at, r: t.at[at].add(r), TABLE, indices, rows, donate_argnums=0)
    assert moved == pytest.approx(14 * ROW, rel=0.01)


def test_what_stays_on_the_chip_moves_nothing():
    """A v5e keeps the products between its kernels in VMEM, and fetches the kernels in parts."""
    mesh = make_mesh("v5e:2x2", 4)

    def run(x, kernels):
        for kernel in kernels:
            x = jax.nn.relu(x @ kernel)
        return x

    kernel = array(mesh, (1024, 1024), dtype="bfloat16")
    program = text(run, array(mesh, (512, 1024), dtype="bfloat16"), [kernel] * 6)
    assert " slice-start(" in program
    size, x = 1024 * 1024 * 2, 512 * 1024 * 2
    assert program_costs(program).traffic == 6 * size + 2 * x
    # If nothing stayed there: five kernels are copied to the chip, and each of three fusions
    # reads two of them, and x before and after.
    moved = program_costs(program.replace("S(1)", "")).traffic
    assert moved == 5 * 2 * size + 3 * (2 * size + 2 * x)


def test_a_kernel_reads_what_it_is_given_once():
    """A Pallas kernel with metadata, which the text of a program breaks into several lines."""
    mesh = make_mesh("v5e:2x2", 4)

    def add(x, y, out):
        out[...] = x[...] + y[...]

    block = pallas.BlockSpec((256, 512), lambda i: (i, 0))
    kernel = pallas.pallas_call(
        add,
        grid=(4,),
        in_specs=[block, pallas.BlockSpec((256, 512), lambda i: (0, 0))],
        out_specs=block,
        out_shape=jax.ShapeDtypeStruct((1024, 512), jnp.float32),
        metadata={"rows": "256"},
    )
    program = per_device(mesh, kernel, Spec(), Spec(), (1024, 512), (256, 512))
    assert '\n"rows":"256"\n' in program
    assert program_costs(program).traffic == (1024 + 256 + 1024) * 512 * 4
    module = parse_module(program)
    called = module.computations[module.entry].instructions.values()
    (call,) = [instruction for instruction in called if instruction.opcode == "custom-call"]
    assert "backend_config" in call.attributes  # which comes last


def test_an_operand_that_is_given_twice_is_read_once():
    x = jax.ShapeDtypeStruct((256, 256), jnp.float32)
    assert traffic(lambda x: jnp.concatenate([x, x]), x) == 3 * 256 * 256 * 4
