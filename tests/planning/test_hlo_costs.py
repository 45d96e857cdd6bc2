"""Collectives counted in compiled programs, against what is known of them by hand."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding

from easylm.planning.hlo_costs import Collective, program_costs
from tests.planning.hlo_programs import Spec, array, make_mesh, per_device, text

# Eight devices each. The v5e has collectives in two halves, start and done.
ALL = pytest.mark.parametrize("topology", ["cpu", "v3:2x2", "v5e:2x4"])


def only(program: str) -> Collective:
    """The collectives of a program that has them of one kind only."""
    (collective,) = program_costs(program).collectives
    return collective


def test_loops_in_loops_and_all_reduce_of_a_tensor_parallel_product():
    """Three layers on five batches: each layer sums its second product over the axis y."""
    assert only(tensor_parallel("cpu")) == only(tensor_parallel("v3:2x2"))
    size = 16 * 128 * 4
    assert only(tensor_parallel("cpu")) == ("all-reduce", 15, 15 * size, 15 * 2 * size * 3 // 4)


def tensor_parallel(topology: str) -> str:
    mesh = make_mesh(topology, 2, 4)

    def layer(x, kernels):
        up, down = kernels
        y = jnp.dot(jax.nn.relu(jnp.dot(x, up, precision="highest")), down, precision="highest")
        return jax.lax.with_sharding_constraint(y, NamedSharding(mesh, Spec())), None

    def run(kernels, batches):
        return jax.lax.map(lambda x: jax.lax.scan(layer, x, kernels)[0], batches)

    up = array(mesh, (3, 128, 256), None, None, "y")
    down = array(mesh, (3, 256, 128), None, "y")
    return text(run, (up, down), array(mesh, (5, 16, 128)))


@ALL
def test_all_gather_of_kernels_split_over_one_axis(topology):
    mesh = make_mesh(topology, 2, 4)

    def layer(x, kernel):
        kernel = jax.lax.with_sharding_constraint(kernel, NamedSharding(mesh, Spec()))
        return jnp.dot(x, kernel, precision="highest"), None

    program = text(
        lambda kernels, x: jax.lax.scan(layer, x, kernels)[0],
        array(mesh, (4, 128, 64 * 2), None, "x"),
        array(mesh, (64, 128), "x"),
    )
    size = 128 * 128 * 4
    assert only(program) == ("all-gather", 4, 4 * size, 4 * size // 2)


@ALL
@pytest.mark.parametrize(
    ("kind", "function", "spec", "out", "payload", "wire"),
    [
        (
            "reduce-scatter",
            lambda x: jax.lax.psum_scatter(x, "y", tiled=True),
            Spec(),
            Spec("y"),
            1024 * 128 * 4,
            1024 * 128 * 4 * 3 // 4,
        ),
        (
            "all-to-all",
            lambda x: jax.lax.all_to_all(x, "y", 0, 1, tiled=True),
            Spec("y"),
            Spec(None, "y"),
            256 * 128 * 4,
            256 * 128 * 4 * 3 // 4,
        ),
        (
            "collective-permute",
            lambda x: jax.lax.ppermute(x, "y", [(0, 1), (1, 2), (2, 3), (3, 0)]),
            Spec("y"),
            Spec("y"),
            256 * 128 * 4,
            256 * 128 * 4,
        ),
        (
            "all-reduce",
            lambda x: jax.lax.psum(x, ("x", "y")),
            Spec("y"),
            Spec(),
            256 * 128 * 4,
            2 * 256 * 128 * 4 * 7 // 8,
        ),
    ],
)
def test_each_kind(topology, kind, function, spec, out, payload, wire):
    program = per_device(make_mesh(topology, 2, 4), function, spec, out, (1024, 128))
    assert only(program) == (kind, 1, payload, wire)


def test_reduce_scatter_that_is_an_all_reduce_and_a_slice():
    """So the TPU's compiler writes a product of which each device keeps some rows."""
    mesh = make_mesh("v3:2x2", 2, 4)

    def run(x, kernel):
        y = jnp.dot(x, kernel, precision="highest")
        return jax.lax.with_sharding_constraint(y, NamedSharding(mesh, Spec("y")))

    program = text(run, array(mesh, (512, 512), None, "y"), array(mesh, (512, 512), "y"))
    size = 512 * 512 * 4
    assert " all-reduce(" in program
    assert only(program) == ("reduce-scatter", 1, size, size * 3 // 4)


def test_calls_are_followed():
    """Computations that the compiler would write in place of their calls if it were let."""
    mesh = make_mesh("cpu", 8)
    summed = jax.jit(lambda x: jnp.sin(jax.lax.psum(x, "x")))
    mapped = jax.shard_map(
        lambda x: summed(summed(x)), mesh=mesh, in_specs=Spec("x"), out_specs=Spec("x")
    )
    lowered = jax.jit(mapped).lower(array(mesh, (64, 128)))
    called = lowered.compile({"xla_disable_hlo_passes": "call-inliner"}).as_text()
    assert " call(" in called
    assert program_costs(called) == program_costs(lowered.compile().as_text())
    # The same as the GPU's compiler writes what it runs beside the rest.
    beside = re.sub(r" call\((.*?), to_apply=", r" async-start(\1, calls=", called)
    assert program_costs(beside) == program_costs(called)


def test_tuples_are_summed():
    """Two arrays reduced by one instruction."""
    mesh = make_mesh("cpu", 8)
    program = per_device(
        mesh,
        lambda x, y: jax.lax.psum((x, y), "x"),
        Spec("x"),
        (Spec(), Spec()),
        (64, 128),
        (16, 128),
    )
    size = (8 + 2) * 128 * 4
    assert sum(c.payload for c in program_costs(program).collectives) == size


@pytest.mark.parametrize(
    "groups",
    [
        "{{0,1,2,3},{4,5,6,7}}",
        "[2,4]<=[8]",
        "[2,4]<=[4,2]T(1,0)",
        "mesh['a'=2,'b'=4] {'b'}",
        "mesh['a'=2,'b'=2,'c'=2] {'b','c'}",
        "mesh['a'=8] {'a':(2)4}",
    ],
)
def test_every_spelling_of_groups(groups):
    """Four devices a group, however it is written."""
    mesh = make_mesh("cpu", 2, 4)
    program = per_device(mesh, lambda x: jax.lax.psum(x, "y"), Spec("y"), Spec(), (1024, 128))
    spelled, replaced = re.subn(
        r"replica_groups=.*?, (?=use_global)", f"replica_groups={groups}, ", program
    )
    assert replaced == 1
    assert only(spelled) == only(program)


def test_groups_of_all_devices_and_unknown_ones():
    mesh = make_mesh("cpu", 8)
    program = per_device(mesh, lambda x: jax.lax.psum(x, "x"), Spec("x"), Spec(), (1024, 128))
    pattern = r"replica_groups=.*?, (?=use_global)"
    assert only(re.sub(pattern, "replica_groups={}, ", program)) == only(program)
    with pytest.raises(ValueError, match=r"not a known way to write groups of devices: <8>"):
        program_costs(re.sub(pattern, "replica_groups=<8>, ", program))


def test_the_branch_that_sends_most_and_the_one_that_moves_least():
    mesh = make_mesh("cpu", 8)

    def branches(x):
        return jax.lax.cond(
            x[0, 0] > 0, lambda: jnp.sin(jax.lax.psum(x * 2, "x")) @ x.T @ x, lambda: x
        )

    program = per_device(mesh, branches, Spec("x"), Spec("x"), (64, 128))
    size = 8 * 128 * 4
    assert only(program) == ("all-reduce", 1, size, 2 * size * 7 // 8)
    # Of the other branch: at most its copy, read and written, and the predicate.
    assert program_costs(program).traffic < 4 * size


def test_a_collective_that_runs_along_with_products_counts_once():
    """The TPU's compiler splits it over three fusions or more; each tells of the whole."""
    mesh = make_mesh("v5e:2x2", 4)

    def layer(x, kernels):
        whole = NamedSharding(mesh, Spec())
        up, down = (jax.lax.with_sharding_constraint(kernel, whole) for kernel in kernels)
        return x + jax.nn.relu(x @ up) @ down, None

    kernel = array(mesh, (6, 1024, 1024), None, "x", dtype="bfloat16")
    program = text(
        lambda kernels, x: jax.lax.scan(layer, x, kernels)[0],
        (kernel, kernel),
        array(mesh, (8192, 1024), "x", dtype="bfloat16"),
    )
    assert len(re.findall(r" all-gather\(", program)) > 2  # else it is not split, and shows nothing
    size = 1024 * 1024 * 2
    assert only(program) == ("all-gather", 12, 12 * size, 12 * size * 3 // 4)
    # Activations stay on the chip: what moves is the kernels' parts, read, and x, in and out.
    part, x = size // 4, 2048 * 1024 * 2
    assert program_costs(program).traffic == pytest.approx(12 * part + 2 * x, rel=1e-3)
    # If nothing stayed there: each part is sliced out and gathered; x goes through one product,
    # then with the result through the other; and x is copied to the chip and back.
    turn = 2 * (2 * part) + 2 * (part + size) + (2 * x + size) + (3 * x + size)
    moved = program_costs(program.replace("S(1)", "")).traffic
    assert moved == pytest.approx(6 * turn + 4 * x, rel=1e-3)


def test_kinds_that_are_not_counted_are_refused():
    mesh = make_mesh("cpu", 8)
    program = per_device(mesh, lambda x: jax.lax.psum(x, "x"), Spec("x"), Spec(), (1024, 128))
    with pytest.raises(ValueError, match=r"psum\S* of main\S*: cannot count a collective-br"):
        program_costs(program.replace(" all-reduce(", " collective-broadcast("))


@ALL
def test_elements_of_tuples_named_where_they_are_used(topology):
    """As jax 0.11 has programs written: %while.72#3 for a get-tuple-element of its own line."""
    program = tensor_parallel(topology)
    element = r"  %(\S+) = [^\n]* get-tuple-element\([^\n]*%([\w.-]+)\), index=(\d+)[^\n]*\n"
    places = {name: f"{of}#{index}" for name, of, index in re.findall(element, program)}
    assert places

    def place(match):
        name = places.get(match[1], match[1])
        while (of := name.partition("#")[0]) in places:
            name = name.replace(of, places[of], 1)
        return f"%{name}"

    short = re.sub(r"%([\w.-]+)", place, re.sub(element, "", program))
    assert "#" in short
    assert program_costs(short) == program_costs(program)


def test_what_runs_on_other_cores_of_a_chip_is_read_too():
    """SparseCores of v5p and v6e: their computations end with the name of a thread."""
    program = per_device(
        make_mesh("cpu", 8), lambda x: jax.lax.psum(x, "x"), Spec("x"), Spec(), (64,)
    )
    elsewhere = program.replace("\n}\n", '\n}, execution_thread="sparsecore"\n', 1)
    assert elsewhere != program
    assert program_costs(elsewhere) == program_costs(program)
