"""A compiled step: what it says is kept, and what is not understood is nothing that it says."""

import re

import jax
import pytest

from easylm.planning import overflow
from easylm.planning.compiled import compile_step
from easylm.planning.topology import parse_topology
from tests.planning.overflowing import Step

pytest.importorskip("libtpu", reason="the TPU compiler is not installed")


def test_an_overflow_in_words_that_are_not_understood_is_a_fault(monkeypatch, tmp_path):
    step = Step()
    topology = parse_topology(step.topology)
    with monkeypatch.context() as another_compiler:
        another_compiler.setattr(overflow, "_TOTALS", re.compile("of other words"))
        with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
            compile_step(step.program(), topology, str(tmp_path))
    assert not list(tmp_path.iterdir())
    found, was_known = compile_step(step.program(), topology, str(tmp_path))
    assert found.overflow is not None and not found.refusal and not was_known
    assert compile_step(step.program(), topology, str(tmp_path)) == (found, True)
