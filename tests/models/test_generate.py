"""Generation against transformers, against exact probabilities, and against itself in batches."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from easylm.errors import InputError
from easylm.models.llama.decoding import Completion, Decoding
from easylm.models.llama.generate import Generator, split_layers
from easylm.models.llama.model import Execution, logits
from easylm.models.llama.sampling import next_tokens, nucleus
from easylm.models.llama.sharding import param_shardings
from easylm.sharding import make_mesh
from tests.models.test_llama import VARIANTS
from tests.tiny import hf_llama, native

# Of both buckets, the last with four positions left of the model's 64.
LENGTHS = (1, 5, 32, 33, 60)
STOPS = tuple(range(30))


def prompts_of(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 67, length).tolist() for length in lengths]


def generator(model, mesh="1,1,1", *, dtype=jnp.float32, batch_size=8):
    config, params = native(model)
    devices = jax.devices() if mesh != "1,1,1" else jax.devices()[:1]
    mesh = make_mesh(mesh, devices)
    placed = jax.device_put(params, param_shardings(config, mesh))
    placed = jax.tree.map(lambda leaf: leaf.astype(dtype), placed)
    params = split_layers(placed)
    return Generator(config, params, mesh, compute_dtype=dtype, batch_size=batch_size)


def by_transformers(model, prompt, decoding):
    """One prompt, alone, as transformers continues it greedily."""
    room = model.config.max_position_embeddings - len(prompt)
    out = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=min(decoding.max_new_tokens, room),
        do_sample=False,
        eos_token_id=list(decoding.stop_ids) or None,
        pad_token_id=0,
    )
    tokens = out[0, len(prompt) :].tolist()
    if tokens[-1] in decoding.stop_ids:
        return Completion(tokens[:-1], "stop")
    return Completion(tokens, "length")


def assert_equals_transformers(model, lengths):
    ours, prompts = generator(model), prompts_of(lengths)
    free = [by_transformers(model, prompt, Decoding(20)) for prompt in prompts]
    # As many stops as below, for the same program, but none that occurs.
    assert ours.generate(prompts, Decoding(20, stop_ids=(900, 901))) == free
    # Two tokens that end some of them: a seventh, and the very first of another.
    decoding = Decoding(20, stop_ids=(free[1].tokens[6], free[2].tokens[0]))
    wanted = [by_transformers(model, prompt, decoding) for prompt in prompts]
    assert wanted[2] == ([], "stop")
    assert ours.generate(prompts, decoding) == wanted


@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_equals_transformers_token_for_token(variant):
    assert_equals_transformers(hf_llama(**VARIANTS[variant]), (1, 9, 17, 30))


@pytest.mark.parametrize("variant", ["grouped queries", "rope dynamic"])
def test_greedy_equals_transformers_up_to_the_last_position(variant):
    assert_equals_transformers(hf_llama(**VARIANTS[variant]), LENGTHS)


@pytest.fixture(scope="module")
def model():
    return hf_llama()


@pytest.fixture(scope="module")
def tiny(model):
    return generator(model)


# Weights over fsdp, over tensor, and K/V heads copied for a tensor axis longer than they are.
@pytest.mark.parametrize("mesh", ["8,1,1", "1,8,1", "4,1,2", "2,1,4", "1,2,4"])
def test_meshes_equal_one_device(model, tiny, mesh):
    decoding = Decoding(max_new_tokens=20, stop_ids=STOPS)
    prompts = prompts_of(LENGTHS)
    assert generator(model, mesh).generate(prompts, decoding) == tiny.generate(prompts, decoding)


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_a_completion_does_not_depend_on_the_rest_of_the_batch(model, tiny, temperature):
    decoding = Decoding(max_new_tokens=20, stop_ids=STOPS, temperature=temperature, top_p=0.9)
    prompts = prompts_of(LENGTHS)
    together = tiny.generate(prompts, decoding)
    for batch_size in (1, 2):
        assert generator(model, batch_size=batch_size).generate(prompts, decoding) == together
    others = prompts_of([9, 50, 40, 2, 21], seed=1)
    for index, prompt in enumerate(prompts):
        mixed = [*others[:index], prompt, *others[index + 1 :]]
        assert tiny.generate(mixed, decoding)[index] == together[index]


def test_indices_come_with_their_completions_over_many_batches(tiny):
    prompts = prompts_of(np.random.default_rng(2).integers(1, 60, 150))
    decoding = Decoding(max_new_tokens=1)
    out = list(tiny.stream(prompts, decoding))
    assert sorted(index for index, _ in out) == list(range(150))
    # In windows: none of the last prompts before one of the first.
    assert {index for index, _ in out[:128]} == set(range(128))
    for index, completion in out[::13]:
        assert tiny.generate([prompts[index]], decoding) == [completion]


def test_a_prompt_compiles_nothing_that_another_of_its_bucket_did(model, caplog):
    ours = generator(model)
    compiled = []
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        for lengths, options in [
            ([3, 9], {"max_new_tokens": 20}),
            ([30, 1], {"max_new_tokens": 32, "temperature": 0.5, "seed": 3}),
            ([17, 32], {"max_new_tokens": 5, "temperature": 2.0, "top_p": 0.5}),
            ([33, 9], {"max_new_tokens": 20}),
            ([3, 50], {"max_new_tokens": 20}),
        ]:
            caplog.clear()
            ours.generate(prompts_of(lengths), Decoding(**options))
            compiled.append(sum("Compiling jit(_continue)" in text for text in caplog.messages))
    assert compiled == [1, 0, 0, 2, 0]


def test_bfloat16_takes_tokens_that_are_likeliest_in_bfloat16(model):
    prompts = prompts_of(LENGTHS)
    out = generator(model, dtype=jnp.bfloat16).generate(prompts, Decoding(max_new_tokens=20))
    config, params = native(model)
    tokens = np.zeros((len(prompts), 64), np.int32)
    for row, prompt, completion in zip(tokens, prompts, out, strict=True):
        row[: len(prompt) + len(completion.tokens)] = prompt + completion.tokens
    positions = np.broadcast_to(np.arange(64, dtype=np.int32), tokens.shape)
    execution = Execution(compute_dtype=jnp.bfloat16)
    scores = logits(params, config, tokens, positions, np.ones_like(tokens), execution)
    for row, prompt, completion in zip(np.asarray(scores), prompts, out, strict=True):
        row = row[len(prompt) - 1 : len(prompt) - 1 + len(completion.tokens)]
        chosen = row[np.arange(len(row)), completion.tokens]
        # bfloat16 has eight bits, and these logits reach beyond 2.
        assert np.all(chosen > row.max(-1) - 0.1)
        assert np.abs(row).max() > 2


def frequencies(tokens, vocab):
    return np.bincount(tokens, minlength=vocab) / len(tokens)


def assert_drawn_from(tokens, probabilities):
    """Every frequency within four standard deviations; tokens of probability 0 never."""
    found = frequencies(tokens, len(probabilities))
    deviation = np.sqrt(probabilities * (1 - probabilities) / len(tokens))
    assert np.all(np.abs(found - probabilities) <= 4 * deviation)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("top_p", [0.6, 1.0])
def test_tokens_are_drawn_by_their_exact_probabilities(temperature, top_p):
    scores = np.array([2.0, 1.0, 0.5, 0.0, -1.0, -6.0])
    count = 20_000
    keys = jax.random.split(jax.random.key(1), count)
    rows = jnp.tile(jnp.float32(scores), (count, 1))
    tokens = next_tokens(rows, keys, jnp.float32(temperature), jnp.float32(top_p))
    wanted = np.exp(scores / temperature)
    wanted /= wanted.sum()
    # `scores` descend, so the nucleus is a prefix.
    kept = np.cumsum(wanted) - wanted < top_p
    wanted = np.where(kept, wanted, 0) / wanted[kept].sum()
    assert_drawn_from(np.asarray(tokens), wanted)


def test_a_generator_draws_by_the_probabilities_of_transformers(model):
    # One prompt 3,000 times: draws differ by the prompt's index alone.
    prompt = prompts_of([12])[0]
    with torch.no_grad():
        scores = model(torch.tensor([prompt])).logits[0, -1].double()
    decoding = Decoding(max_new_tokens=2, temperature=0.8, seed=5)
    ours = generator(model, batch_size=512)
    out = ours.generate([prompt] * 3000, decoding)
    assert_drawn_from([c.tokens[0] for c in out], torch.softmax(scores / 0.8, -1).numpy())
    # The second token has draws of its own: after a common first one it varies.
    first = max({c.tokens[0] for c in out}, key=[c.tokens[0] for c in out].count)
    with torch.no_grad():
        scores = model(torch.tensor([[*prompt, first]])).logits[0, -1].double()
    second = [c.tokens[1] for c in out if c.tokens[0] == first]
    assert_drawn_from(second, torch.softmax(scores / 0.8, -1).numpy())
    assert ours.generate([prompt] * 40, decoding) == out[:40]
    other = ours.generate([prompt] * 40, Decoding(max_new_tokens=2, temperature=0.8, seed=6))
    assert other != out[:40]


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [
        (0.01, [2]),
        (0.49, [2]),
        (0.51, [2, 0]),
        (0.79, [2, 0]),
        (0.81, [2, 0, 3]),
        (0.96, [2, 0, 3, 1]),
    ],
)
def test_the_nucleus_is_the_smallest_set_of_its_mass(top_p, kept):
    scores = jnp.log(jnp.float32([[0.3, 0.05, 0.5, 0.15]])) + 7
    out = np.asarray(nucleus(scores, jnp.float32(top_p)))[0]
    assert np.flatnonzero(np.isfinite(out)).tolist() == sorted(kept)
    np.testing.assert_array_equal(out[kept], np.asarray(scores)[0, kept])


def test_equals_of_the_last_token_of_a_nucleus_belong_to_it():
    out = nucleus(jnp.log(jnp.float32([[0.25, 0.25, 0.4, 0.1]])), jnp.float32(0.5))
    assert np.isfinite(np.asarray(out))[0].tolist() == [True, True, True, False]


def test_a_very_low_temperature_takes_the_likeliest():
    scores = jnp.float32([[499.0, -500.0, 500.0]] * 50)
    keys = jax.random.split(jax.random.key(0), 50)
    tokens = next_tokens(scores, keys, jnp.float32(1e-37), jnp.float32(0.9))
    assert np.asarray(tokens).tolist() == [2] * 50


@pytest.mark.parametrize("length", [0, 64, 100])
def test_prompts_that_leave_no_position_are_refused(tiny, length):
    with pytest.raises(InputError, match=rf"prompts\[1\]: found {length} tokens; wanted 1 to 63"):
        tiny.generate(prompts_of([4, length]), Decoding(max_new_tokens=3))


def test_no_prompts_have_no_completions(tiny):
    assert tiny.generate([], Decoding(max_new_tokens=3)) == []
