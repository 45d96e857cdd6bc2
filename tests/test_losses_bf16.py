"""What bfloat16 costs the log-probability of a whole answer, which preference losses compare."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from easylm.losses import token_logprobs
from easylm.models.llama.model import Execution, graph_definition
from tests.tiny import hf_llama, native


def test_given_the_states_nothing_is_lost_over_512_tokens():
    vocab_size, seq_len = 32_000, 512
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(1, seq_len, 64)), jnp.bfloat16)
    head = jnp.asarray(0.6 * rng.normal(size=(64, vocab_size)), jnp.bfloat16)
    logits = np.asarray(hidden, np.float64)[0] @ np.asarray(head, np.float64)
    targets = np.argmax(logits + rng.gumbel(size=logits.shape), axis=-1)  # drawn from the softmax
    exact = logits[np.arange(seq_len), targets] - np.log(np.exp(logits).sum(axis=-1))

    targets = targets[None].astype(np.int32)
    for chunk in (64, 100):
        ours = token_logprobs(hidden, head, targets, vocab_size, chunk)
        error = float(ours.sum()) - exact.sum()
        print(f"chunks of {chunk}: {error:+.1e} nat of {exact.sum():.0f}")
        assert abs(error) < 1e-3
        # Most of this comes of adding up in float32, and little of the softmax.
        assert abs(np.asarray(ours, np.float64).sum() - exact.sum()) < 1e-4


def our_logprobs(config, params, tokens, dtype):
    """Of each row given its first token, [batch] float64, computed in `dtype`."""
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    graph = graph_definition(config, Execution(compute_dtype=dtype))

    @jax.jit
    def logprobs(params):
        model = nnx.merge(graph, params)
        hidden = model.hidden_states(tokens, positions, np.ones_like(tokens))[:, :-1]
        return token_logprobs(hidden, model.head(), tokens[:, 1:], config.vocab_size, 50)

    return np.asarray(logprobs(params), np.float64).sum(axis=1)


def their_logprobs(model, tokens):
    """The same of transformers, whose log-softmax of bfloat16 logits is float32, as in its loss."""
    import torch

    ids = torch.tensor(tokens, dtype=torch.long)
    with torch.no_grad():
        logprobs = model(ids).logits[:, :-1].float().log_softmax(-1)
    return logprobs.gather(-1, ids[:, 1:, None])[..., 0].double().sum(1).numpy()


def test_error_of_a_model_is_no_larger_than_that_of_transformers(tmp_path):
    import torch
    import transformers

    sizes = {"vocab_size": 1000, "hidden_size": 64, "num_hidden_layers": 4}
    errors = []
    for seed in range(3):
        model = hf_llama(seed, max_position_embeddings=128, **sizes)
        config, params = native(model)
        shape = (16, 128)
        tokens = np.random.default_rng(seed).integers(3, 1000, shape, dtype=np.int32)
        ours = our_logprobs(config, params, tokens, jnp.float32)
        theirs = their_logprobs(model, tokens)
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)

        # Loaded, not cast: a cast would round the rotary frequencies too, which loading does not.
        model.save_pretrained(tmp_path / str(seed))
        rounded = transformers.LlamaForCausalLM.from_pretrained(
            tmp_path / str(seed), dtype=torch.bfloat16
        ).eval()
        ours -= our_logprobs(config, params, tokens, jnp.bfloat16)
        theirs -= their_logprobs(rounded, tokens)
        errors.append((ours, theirs))
    ours, theirs = np.sqrt(np.mean(np.square(errors), axis=(0, 2)))
    print(f"root mean square over 127 tokens: {ours:.3f} nat; transformers: {theirs:.3f} nat")
    assert 0 < ours <= theirs
