"""The pass of the reference: what it says is kept on the way, and nobody is asked twice."""

import os
import signal

import jax
import numpy as np
import pytest
import torch

from easylm.config import from_config_dict, to_config_dict
from easylm.data.encode import Examples
from easylm.data.pairs import Pairs
from easylm.errors import PreemptedError
from easylm.models.llama.sharding import param_shardings
from easylm.reference import ReferenceParts, ReferenceTable
from easylm.sharding import make_mesh
from easylm.trainers import reference
from easylm.trainers.config import DpoConfig
from easylm.trainers.reference import reference_pass
from tests.tiny import hf_llama, native

COUNT = 20
SEQ_LEN = 32


@pytest.fixture(scope="module")
def pairs():
    """Random ids: a prompt of 2 to 5, answers of 2 to 7."""
    rng = np.random.default_rng(0)
    encoded = []
    for _ in range(COUNT):
        prompt = rng.integers(3, 67, rng.integers(2, 6))
        for _ in range(2):
            answer = rng.integers(3, 67, rng.integers(2, 8))
            mask = np.r_[np.zeros(len(prompt)), np.ones(len(answer))]
            encoded.append((np.r_[prompt, answer], mask))
    ids = rng.integers(0, 2**63, COUNT).astype(np.uint64)
    return Pairs(Examples.concatenate(encoded), ids, np.full(COUNT, np.nan, np.float32))


def ask(pairs, folder, *, mesh="1,1,1", params=None, batch_rows=2, **options) -> ReferenceTable:
    """One pass of the tiny model over `pairs`, with parts in `folder`."""
    options = {"init_from": "x", "data.sources": "x", "batch_rows": 1, "steps": 1, **options}
    options |= {"data.seq_len": SEQ_LEN, "compute_dtype": "float32"}
    config = to_config_dict(DpoConfig)
    config.update_from_flattened_dict(options)
    devices = jax.devices()[: int(np.prod([int(axis) for axis in mesh.split(",")]))]
    mesh = make_mesh(mesh, devices)
    model, weights = native(hf_llama())
    params = jax.device_put(params or weights, param_shardings(model, mesh))
    parts = ReferenceParts(str(folder))
    return reference_pass(
        from_config_dict(DpoConfig, config),
        model,
        mesh,
        params,
        pairs,
        parts.load(),
        parts,
        batch_rows=batch_rows,
    )


@pytest.fixture(scope="module")
def whole(pairs, tmp_path_factory):
    """What an uninterrupted pass says."""
    return ask(pairs, tmp_path_factory.mktemp("reference") / "parts")


@pytest.fixture
def a_part_a_batch(monkeypatch):
    monkeypatch.setattr(reference, "SECONDS_BETWEEN_PARTS", 0)


def check_same(found: ReferenceTable, wanted: ReferenceTable) -> None:
    for name in ("ids", "chosen", "rejected"):
        np.testing.assert_array_equal(getattr(found, name), getattr(wanted, name), err_msg=name)


def logprob_by_torch(model, tokens, mask) -> float:
    with torch.no_grad():
        logprobs = model(torch.tensor(tokens[None]).long()).logits[0, :-1].double().log_softmax(-1)
    of_targets = logprobs.gather(1, torch.tensor(tokens[1:, None]).long())[:, 0]
    return of_targets[torch.tensor(mask[1:] > 0)].sum().item()


@pytest.mark.parametrize(
    "options",
    [{}, {"data.packing": False}, {"mesh": "2,2,2", "batch_rows": 4}],
    ids=["packed", "padded", "sharded"],
)
def test_every_pair_gets_what_torch_says_of_it_alone(pairs, tmp_path, options):
    model = hf_llama()
    wanted = np.array(
        [logprob_by_torch(model, *pairs.sequences.example(index)) for index in range(2 * COUNT)]
    )
    found = ask(pairs, tmp_path / "parts", **options).lookup(pairs.ids)
    np.testing.assert_allclose(found[0], wanted[0::2], rtol=1e-5)
    np.testing.assert_allclose(found[1], wanted[1::2], rtol=1e-5)


def test_what_is_known_is_kept_and_batches_of_it_are_left_out(pairs, whole, tmp_path, capsys):
    marked = ReferenceTable(pairs.ids[:13], *np.full((2, 13), -1.0, np.float32))
    parts = ReferenceParts(str(tmp_path))
    parts.add("before", marked)
    found = ask(pairs, tmp_path)
    check_same(found, marked.merge(whole))
    check_same(parts.load(), found)
    assert len(os.listdir(tmp_path)) == 2  # one more, in less than a minute
    capsys.readouterr()
    check_same(ask(pairs, tmp_path, seed=3), found)
    assert "reference" not in capsys.readouterr().err  # there is nothing to do, so no bar


def signal_after(monkeypatch, count: int) -> None:
    """Somebody wants the process to stop when `count` parts are kept."""
    add, names = ReferenceParts.add, []

    def add_then_signal(parts, name, table):
        add(parts, name, table)
        names.append(name)
        if len(names) == count:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(ReferenceParts, "add", add_then_signal)


def test_a_pass_that_is_stopped_goes_on_to_the_same_bits(
    pairs, whole, tmp_path, monkeypatch, a_part_a_batch
):
    with monkeypatch.context() as patch:
        signal_after(patch, 2)
        with pytest.raises(PreemptedError, match=r"after (\d+) of 20 pairs; they are kept") as stop:
            ask(pairs, tmp_path)
    kept = ReferenceParts(str(tmp_path)).load()
    assert f"after {len(kept)} of" in str(stop.value)
    assert 0 < len(kept) < COUNT and len(os.listdir(tmp_path)) == 2
    check_same(ask(pairs, tmp_path), whole)
    check_same(ReferenceParts(str(tmp_path)).load(), whole)


def test_a_stop_at_the_end_of_the_pass_is_not_forgotten(pairs, whole, tmp_path, monkeypatch):
    signal_after(monkeypatch, 1)
    with pytest.raises(PreemptedError, match="after 20 of 20 pairs"):
        ask(pairs, tmp_path)
    check_same(ReferenceParts(str(tmp_path)).load(), whole)


def test_a_pass_in_another_order_overwrites_nothing(pairs, tmp_path, monkeypatch, a_part_a_batch):
    with monkeypatch.context() as patch:
        signal_after(patch, 2)
        with pytest.raises(PreemptedError):
            ask(pairs, tmp_path)
    kept = ReferenceParts(str(tmp_path)).load()
    shifted = ReferenceTable(kept.ids, kept.chosen - 1, kept.rejected)
    for name in os.listdir(tmp_path):
        table = ReferenceTable.load(str(tmp_path / name))
        ReferenceTable(table.ids, *shifted.lookup(table.ids)).save(str(tmp_path / name))
    found = ask(pairs, tmp_path, seed=3)
    check_same(ReferenceParts(str(tmp_path)).load(), found)
    np.testing.assert_array_equal(found.lookup(kept.ids)[0], shifted.chosen)


def test_numbers_that_are_not_finite_are_not_kept(pairs, tmp_path):
    _, params = native(hf_llama())
    params["norm"]["scale"] = params["norm"]["scale"] * np.inf
    with pytest.raises(FloatingPointError, match="a log-probability that is not finite"):
        ask(pairs, tmp_path, params=params)
    assert os.listdir(tmp_path) == []
