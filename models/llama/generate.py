"""Continuing token sequences: a prompt at once, then a token a step, from cached keys and values.

The prompts of a batch are padded on the right to a power of two, so that a few compiled programs
serve prompts of any length. New tokens go into the slots of the cache after the padding, the whole
batch into the same slot: positions and a mask, not places, say what a row sees.
"""

import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from easylm.attention.cached import cached_attention
from easylm.models.llama.config import LlamaConfig
from easylm.models.llama.decoding import Completion, Decoding, check_prompt
from easylm.models.llama.model import Attend, Block, Execution, Llama
from easylm.models.llama.rope import rope_angles
from easylm.models.llama.sampling import next_tokens
from easylm.models.llama.sharding import execution_on
from easylm.sharding import batch_sharding, replicated, row_groups

# Of prompts and of new tokens: below this, padding costs less than another program.
_SHORTEST_BUCKET = 32
# Prompts are sorted by length among so many batches, and finished in their order beyond them.
_SORTED_BATCHES = 16
_NONE = -1  # no token: a row that has ended

# Keys and values of one layer, each [batch, kv_heads, slots, head_dim].
Cache = tuple[jax.Array, jax.Array]


def split_layers(params: dict) -> dict:
    """Parameters with a tree for each layer, in place of stacked layers.

    A step reads every weight once; read out of a stack, they would be copied first. The stacked
    arrays are taken out of `params["layers"]` one by one, so that no two copies of the whole are
    in memory; after this `params` is of no use.
    """

    def split(stacked: dict, count: int) -> list[dict]:
        layers = [{} for _ in range(count)]
        while stacked:
            name, value = stacked.popitem()
            if isinstance(value, dict):
                parts = split(value, count)
            else:
                parts = jax.jit(lambda array: [array[i] for i in range(count)])(value)
            for layer, part in zip(layers, parts, strict=True):
                layer[name] = part
        return layers

    count = len(params["layers"]["input_layernorm"]["scale"])
    return {**params, "layers": dict(enumerate(split(params["layers"], count)))}


class Generator:
    """Continues prompts with one model.

    One program is compiled for each number of rows, bucket of prompt lengths and bucket of new
    tokens, all powers of two. The bucket of a prompt depends on its own length alone. So a
    completion does not depend on the other prompts, apart from the last bits of float arithmetic,
    which differ between numbers of rows.

    Args:
      config: sizes and constants.
      params: of `split_layers`, on `mesh`.
      mesh: the devices; rows are split over data and fsdp, weights and cache over tensor.
      compute_dtype: of activations and of the cache; sampling is float32.
      batch_size: rows computed at once, at most.
    """

    def __init__(
        self,
        config: LlamaConfig,
        params: dict,
        mesh: Mesh,
        *,
        compute_dtype: DTypeLike = jnp.float32,
        batch_size: int = 16,
    ):
        self._config, self._params, self._mesh = config, params, mesh
        self._batch_size = batch_size
        execution = execution_on(config, mesh, compute_dtype=compute_dtype)
        definition = _definition(config, execution)
        self._run = jax.jit(functools.partial(_continue, definition), static_argnames="new_tokens")

    def generate(self, prompts: Sequence[Sequence[int]], decoding: Decoding) -> list[Completion]:
        """The completions of all prompts, in their order; see `stream`."""
        completions = dict(self.stream(prompts, decoding))
        return [completions[index] for index in range(len(prompts))]

    def stream(
        self, prompts: Sequence[Sequence[int]], decoding: Decoding
    ) -> Iterator[tuple[int, Completion]]:
        """Yields (index of the prompt, its completion) as batches finish.

        Args:
          prompts: token ids of each, with whatever begins a sequence (bos) included.
          decoding: how.
        Raises:
          InputError: a prompt is empty, or leaves no position for a new token.
        """
        for index, prompt in enumerate(prompts):
            check_prompt(self._config, len(prompt), f"prompts[{index}]")
        window = _SORTED_BATCHES * self._batch_size
        for start in range(0, len(prompts), window):
            buckets: dict[int, list[int]] = {}
            for index in range(start, min(start + window, len(prompts))):
                buckets.setdefault(self._bucket(len(prompts[index])), []).append(index)
            for length, members in sorted(buckets.items(), reverse=True):
                for first in range(0, len(members), self._batch_size):
                    batch = members[first : first + self._batch_size]
                    yield from zip(
                        batch, self._batch(prompts, batch, length, decoding), strict=True
                    )

    def _bucket(self, length: int) -> int:
        longest = self._config.max_position_embeddings
        return min(_power_of_two(max(length, _SHORTEST_BUCKET)), longest)

    def _batch(
        self, prompts: Sequence[Sequence[int]], indices: list[int], length: int, decoding: Decoding
    ) -> list[Completion]:
        """Completions of the prompts at `indices`, none longer than `length`."""
        groups = row_groups(self._mesh)
        rows = _power_of_two(-(-len(indices) // groups)) * groups
        tokens = np.zeros((rows, length), np.int32)
        lengths, limits, ids = (
            np.ones(rows, np.int32),
            np.zeros(rows, np.int32),
            np.zeros(rows, int),
        )
        for row, index in enumerate(indices):
            lengths[row] = len(prompts[index])
            tokens[row, : lengths[row]] = prompts[index]
            ids[row] = index
            room = self._config.max_position_embeddings - lengths[row]
            limits[row] = min(decoding.max_new_tokens, room)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(decoding.seed), ids)
        by_row = jax.device_put((tokens, lengths, limits, keys), batch_sharding(self._mesh))
        scalars = np.float32(decoding.temperature), np.float32(decoding.top_p)
        stop_ids = np.array(decoding.stop_ids, np.int32)
        whole = jax.device_put((stop_ids, *scalars), replicated(self._mesh))
        new_tokens = self._bucket(decoding.max_new_tokens)
        out = np.asarray(self._run(self._params, *by_row, *whole, new_tokens=new_tokens))
        return [_completion(row, decoding.stop_ids) for row in out[: len(indices)].tolist()]


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()


def _completion(row: list[int], stop_ids: Sequence[int]) -> Completion:
    tokens = row[: row.index(_NONE)] if _NONE in row else row
    if tokens and tokens[-1] in stop_ids:
        return Completion(tokens[:-1], "stop")
    return Completion(tokens, "length")


def _definition(config: LlamaConfig, execution: Execution) -> nnx.GraphDef:
    """The static half of a Llama whose layers are those of `split_layers`."""

    def make():
        rngs = nnx.Rngs(params=0)
        model = Llama(config, execution, rngs=rngs)
        layers = range(config.num_hidden_layers)
        model.layers = nnx.List(
            Block(config, execution, dtype=jnp.float32, rngs=rngs) for _ in layers
        )
        return model

    return nnx.graphdef(nnx.eval_shape(make))


def _continue(
    definition, params, tokens, lengths, limits, keys, stop_ids, temperature, top_p, *, new_tokens
) -> jax.Array:
    """Continues a batch of prompts.

    Args:
      definition, params: the model.
      tokens: [batch, seq] int32, prompts padded on the right.
      lengths: [batch] int32, of the prompts.
      limits: [batch] int32, new tokens wanted, at most `new_tokens`.
      keys: [batch] random keys.
      stop_ids: [stops] int32.
      temperature, top_p: scalars, see `next_tokens`.
      new_tokens: room for new tokens.
    Returns:
      [batch, new_tokens] int32: the new tokens, the stop token included, then _NONE.
    """
    model = nnx.merge(definition, params)
    batch, seq = tokens.shape
    slots = jnp.arange(seq + new_tokens, dtype=jnp.int32)[None, :]

    def add(out, done, logits, count):
        """Chooses the token number `count` of every row."""
        logits = model.execution.shard(logits, ("batch", None))
        step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, count)
        token = jnp.where(done, _NONE, next_tokens(logits, step_keys, temperature, top_p))
        ended = jnp.any(token[:, None] == stop_ids[None, :], axis=-1) | (count + 1 >= limits)
        return jax.lax.dynamic_update_slice(out, token[:, None], (0, count)), done | ended

    def step(state):
        count, out, done, caches = state
        last = jax.lax.dynamic_slice_in_dim(out, count - 1, 1, axis=1)
        slot = seq + count - 1
        filled = (slots < lengths[:, None]) | ((slots >= seq) & (slots <= slot))
        positions = jnp.minimum(lengths + count, limits + lengths)[:, None] - 1
        attends = [_attend_cache(cache, slot, filled) for cache in caches]
        hidden, caches = _hidden_states(model, jnp.maximum(last, 0), positions, attends)
        out, done = add(out, done, model.logits(hidden)[:, 0], count)
        return count + 1, out, done, caches

    logits, caches = _prefill(model, tokens, lengths, new_tokens)
    out, done = add(jnp.full((batch, new_tokens), _NONE, jnp.int32), limits == 0, logits, 0)
    start = jnp.int32(1), out, done, caches
    return jax.lax.while_loop(lambda state: ~jnp.all(state[2]), step, start)[1]


def _prefill(model: Llama, tokens, lengths, new_tokens: int) -> tuple[jax.Array, list[Cache]]:
    """Logits [batch, vocab] after each prompt, and caches with `new_tokens` slots to spare."""
    places = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :]
    is_prompt = places < lengths[:, None]
    positions, segment_ids = jnp.where(is_prompt, places, 0), is_prompt.astype(jnp.int32)

    def attend(q, k, v):
        out = model.execution.attention(q, k, v, positions=positions, segment_ids=segment_ids)
        spare = ((0, 0), (0, 0), (0, new_tokens), (0, 0))
        return out, tuple(jnp.pad(x.swapaxes(1, 2), spare) for x in (k, v))

    hidden, caches = _hidden_states(model, tokens, positions, [attend] * len(model.layers))
    last = jnp.take_along_axis(hidden, lengths[:, None, None] - 1, axis=1)
    return model.logits(last)[:, 0], caches


def _attend_cache(cache: Cache, slot: jax.Array, filled: jax.Array) -> Attend:
    """Attention of one token a row, put into `slot`, over the `filled` slots [batch, slots]."""

    def attend(q, k, v):
        kept = tuple(
            jax.lax.dynamic_update_slice_in_dim(old, new.swapaxes(1, 2), slot, axis=2)
            for old, new in zip(cache, (k, v), strict=True)
        )
        out = cached_attention(q[:, 0], *kept, filled)[:, None]
        return out, kept

    return attend


def _hidden_states(
    model: Llama, tokens, positions, attends: Sequence[Attend]
) -> tuple[jax.Array, list[Cache]]:
    """Final, normed states [batch, seq, embed], and what each layer's `attend` kept."""
    cos, sin = rope_angles(model.config, positions)
    x, caches = model.embed(tokens), []
    for block, attend in zip(model.layers, attends, strict=True):
        x, cache = block(x, cos, sin, attend)
        caches.append(cache)
    return model.norm(x), caches
