"""Hugging Face tensors from a source straight into stacked, sharded parameters.

The rows of every tensor are cut into as many pieces as there are devices to hold them, in the order
of the mesh, and every process reads the pieces of its own devices: of stacked layers a whole tensor
a round, of the rest a range of rows. So the processes read disjoint shares of the bytes, and one
jitted update, which donates its destination, lets the devices exchange the pieces.
"""

import dataclasses
import itertools
import math
import sys
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from tqdm import tqdm

from easylm.converters.llama import EMBEDDING, HEAD, Rule, check_tensors, rules
from easylm.converters.tensors import TensorSource, contiguous, has_nonfinite, refuse
from easylm.errors import InputError
from easylm.models.llama.config import LlamaConfig

# A request to a bucket costs some 50 ms however short it is.
MIN_READ_BYTES = 8 << 20
_NOT_FINITE = "holds values that are not finite, or too large for the dtype asked for"
_NOT_TIED = f"differs from {EMBEDDING}, but config.json says tie_word_embeddings"


def load_params(
    source: TensorSource,
    config: LlamaConfig,
    shardings: dict,
    dtype: DTypeLike,
    progress: bool = True,
) -> dict:
    """Reads a model onto the mesh.

    Every process of the mesh calls this. A host holds, beside its share of the parameters, two of
    the largest tensors it reads.

    Args:
      source: the tensors, under Hugging Face's names.
      config: sizes of the model. A vocabulary larger than the source's gives the embedding and the
        head new rows, each the mean of the old ones, and a line on stderr says so.
      shardings: a NamedSharding for each parameter (`param_shardings`), all of one mesh.
      dtype: of the result.
      progress: whether process 0 shows a bar.
    Raises:
      InputError: tensors are missing, unknown, of a wrong shape or dtype, or hold values that are
        not finite; each list is complete. Or the vocabulary is smaller than the source's.
    """
    own_config = source_config(source, config)
    ignored = check_tensors(own_config, source.tensors, source.folder)
    if ignored:
        _say(f"ignored {len(ignored)} tensors {ignored[0]}, ...: RoPE follows from the config")
    say_growth(source.folder, own_config.vocab_size, config.vocab_size)
    reader = _Reader(source, tied=config.tie_word_embeddings, dtype=jnp.dtype(dtype))
    mesh = jax.tree.leaves(shardings)[0].mesh
    params: dict = {}
    with tqdm(
        total=sum(source.tensors[name].nbytes for name in reader.names(rules(own_config))),
        desc="load",
        unit="B",
        unit_scale=True,
        disable=not progress or jax.process_index() != 0,
    ) as bar:
        for rule, target in zip(rules(own_config), rules(config), strict=True):
            *parents, key = rule.path
            node, sharding = params, shardings
            for parent in parents:
                node, sharding = node.setdefault(parent, {}), sharding[parent]
            place = NamedSharding(mesh, sharding[key].spec)
            node[key] = _load(reader, rule, target, place, jnp.dtype(dtype), bar.update)
    reader.raise_problems()
    return params


def _say(text: str) -> None:
    if jax.process_index() == 0:
        print(text, file=sys.stderr)


def say_growth(where: str, old: int, new: int) -> None:
    """Says so on stderr where a model of `old` words gets `new`.

    Raises:
      InputError: it would lose some.
    """
    if new < old:
        raise InputError(
            f"{where}: {EMBEDDING}: found {old} rows; wanted at most vocab_size = {new}: a "
            "vocabulary can grow, not shrink"
        )
    if new > old:
        _say(
            f"vocabulary: {old} rows in {where}, {new} wanted; the new rows of embedding and head "
            "are the mean of the old ones"
        )


def grow_rows(tensor: jax.Array | np.ndarray, count: int, dtype: DTypeLike) -> jax.Array:
    """`tensor` [rows, ...] in `dtype` and `count` rows more, each the mean, taken in float32."""
    mean = tensor.astype(jnp.float32).mean(axis=0, keepdims=True).astype(dtype)
    new = jnp.broadcast_to(mean, (count, *mean.shape[1:]))
    return jnp.concatenate([tensor.astype(dtype), new])


def source_config(source: TensorSource, config: LlamaConfig) -> LlamaConfig:
    """`config` with the vocabulary that the source says it has."""
    if source.config is None:
        return config
    vocab_size = LlamaConfig.from_hf(source.config, source.config_path).vocab_size
    return dataclasses.replace(config, vocab_size=vocab_size)


class _Reader:
    """Reads ranges of rows and remembers which tensors held bad values, to name all at once."""

    def __init__(self, source: TensorSource, tied: bool, dtype: np.dtype):
        self.source = source
        self._dtype = dtype
        self._tied_head = tied and HEAD in source.tensors
        self._bad: set[tuple[str, str]] = set()

    def names(self, wanted: tuple[Rule, ...]) -> list[str]:
        """The tensors that will be read."""
        found = [name for rule in wanted for name in rule.hf_names()]
        return [*found, HEAD] if self._tied_head else found

    def wire_dtype(self, rule: Rule) -> np.dtype:
        """One dtype for the tensors of a rule, all of which hold only floats."""
        dtypes = {self.source.tensors[name].dtype for name in rule.hf_names()}
        wide = dtypes.pop()
        for dtype in dtypes:
            wide = jnp.promote_types(wide, dtype)
        return np.dtype(np.float32) if wide == np.float64 else wide

    def read(self, name: str, start: int, end: int) -> np.ndarray:
        """Rows `[start, end)`."""
        rows = self.source.read(name, start, end)
        if has_nonfinite(rows, self._dtype):
            self._bad.add((name, _NOT_FINITE))
        if name == EMBEDDING and self._tied_head:
            head = self.source.read(HEAD, start, end)
            if not np.array_equal(rows, head):
                self._bad.add((HEAD, _NOT_TIED))
        return rows

    def raise_problems(self) -> None:
        """Raises, in every process, the InputError that lists what any of them found."""
        names = self.source.tensors
        possible = [(name, problem) for name in names for problem in (_NOT_FINITE, _NOT_TIED)]
        seen = np.array([entry in self._bad for entry in possible])
        if jax.process_count() > 1:
            seen = multihost_utils.process_allgather(seen).any(axis=0)
        refuse(
            [
                f"{self.source.tensors[name].where}: tensor {name} {problem}"
                for (name, problem), bad in zip(possible, seen, strict=True)
                if bad
            ],
            self.source.folder,
        )


def _load(
    reader: _Reader,
    rule: Rule,
    target: Rule,
    sharding: NamedSharding,
    dtype: np.dtype,
    report: Callable[[int], object],
) -> jax.Array:
    """One parameter, reporting bytes; `target` is `rule` with the vocabulary wanted."""
    layers = rule.num_layers
    shape = target.native_shape if layers is None else (layers, *target.native_shape)
    result = jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)()
    readers = 1 if layers is None else _slots(sharding.mesh)
    update = make_update(rule, target, readers, sharding)
    share = math.ceil((layers or 1) / readers)
    for turn in range(share):
        # Towards the end the last readers have none left.
        turns = list(range(turn, layers or 1, share))
        pieces = _read_pieces(reader, rule, turns, readers, sharding.mesh)
        # The read above overlapped the update before it; a third would only fill the memory.
        result.block_until_ready()
        result = update(result, pieces, np.array(turns, np.int32))
        report(sum(reader.source.tensors[rule.hf_name(layer)].nbytes for layer in turns))
    # Two updates at once may meet in another order in another process and wait for each other.
    return result.block_until_ready()


def _slots(mesh: Mesh) -> int:
    """How many layers are read at once: one by each process."""
    processes = {device.process_index for device in mesh.devices.flat}
    return math.gcd(len(processes), mesh.size)


def make_update(rule: Rule, target: Rule, slots: int, sharding: NamedSharding) -> Callable:
    """(parameter, pieces, layers of the first slots) -> the parameter with these layers in it."""
    rows, new_rows = rule.hf_shape[0], target.hf_shape[0] - rule.hf_shape[0]
    columns_apart = _columns_apart(rule, sharding)

    def update(stack: jax.Array, pieces: jax.Array, layers: jax.Array) -> jax.Array:
        if rule.transposed:
            pieces = jax.lax.with_sharding_constraint(pieces, columns_apart).swapaxes(1, 2)
        tensors = pieces.reshape(slots, -1, *pieces.shape[2:])[:, :rows]
        if rule.num_layers is None:
            tensor = grow_rows(tensors[0], new_rows, stack.dtype) if new_rows else tensors[0]
            return target.to_native(tensor).astype(stack.dtype)
        native = jax.vmap(rule.to_native)(tensors).astype(stack.dtype)
        # On a CPU one scatter takes three times as long.
        for slot in range(len(layers)):
            stack = jax.lax.dynamic_update_index_in_dim(stack, native[slot], layers[slot], 0)
        return stack

    return jax.jit(update, donate_argnums=0, out_shardings=sharding)


def _columns_apart(rule: Rule, sharding: NamedSharding) -> NamedSharding:
    """Of transposed pieces: their columns already lie where the parameter has them.

    Without this step between, XLA may gather the tensors of all slots on every device.
    """
    spec = sharding.spec if rule.num_layers is None else sharding.spec[1:]
    first = (*spec, None)[0]
    axes = first if isinstance(first, tuple) else (first,)
    rest = tuple(name for name in sharding.mesh.axis_names if name not in axes)
    return NamedSharding(sharding.mesh, PartitionSpec(rest, first))


def _read_pieces(
    reader: _Reader, rule: Rule, layers: list[int], slots: int, mesh: Mesh
) -> jax.Array:
    """Tensors cut into rows over all devices: [devices, rows of a piece, ...].

    `layers` are those of the first of `slots`; the rest is zeros. Where the rule says transposed,
    the pieces are already, [devices, columns, rows of a piece].
    """
    devices = list(mesh.devices.flat)
    pieces = len(devices) // slots
    dtype = reader.wire_dtype(rule)
    total, rest = rule.hf_shape[0], rule.hf_shape[1:]
    rows = _piece_rows(total, math.prod(rest) * dtype.itemsize, pieces, devices)
    local = [i for i, device in enumerate(devices) if device.process_index == jax.process_index()]
    arrays = []
    for slot, run in _neighbours(local, pieces):
        first, last = run[0] % pieces * rows, (run[-1] % pieces + 1) * rows
        start, end = min(first, total), min(last, total)
        if slot >= len(layers) or start == end:
            data = np.empty((0, *rest), dtype)
        else:
            data = reader.read(rule.hf_name(layers[slot]), start, end).astype(dtype, copy=False)
        for number, device in enumerate(devices[i] for i in run):
            piece = data[number * rows : (number + 1) * rows]
            if len(piece) < rows:
                fill = np.zeros((rows - len(piece), *rest), dtype)
                piece = np.concatenate([piece, fill])
            if rule.transposed:
                piece = contiguous(piece.T)
            arrays.append(jax.device_put(piece[None], device))
    return jax.make_array_from_single_device_arrays(
        (len(devices), *arrays[0].shape[1:]),
        NamedSharding(mesh, PartitionSpec(mesh.axis_names)),
        arrays,
    )


def _piece_rows(total: int, row_bytes: int, pieces: int, devices: list[jax.Device]) -> int:
    """Rows of a piece, such that one process's pieces together are worth a request."""
    processes = len({device.process_index for device in devices})
    even = math.ceil(total / pieces)
    if processes == 1:
        return even
    enough = math.ceil(MIN_READ_BYTES / (row_bytes * min(pieces, len(devices) // processes)))
    return min(total, max(even, enough))


def _neighbours(positions: list[int], pieces: int) -> Iterator[tuple[int, list[int]]]:
    """Runs of consecutive positions with one slot each, as (slot, positions)."""
    groups = itertools.groupby(
        enumerate(positions), lambda item: (item[1] // pieces, item[1] - item[0])
    )
    for (slot, _), run in groups:
        yield slot, [position for _, position in run]
