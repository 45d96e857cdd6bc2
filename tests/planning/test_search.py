"""The search finds what a full enumeration finds, with few compiles and within its budget."""

import io
import json
import os
import signal
import sys
import threading
import time
from typing import NamedTuple

import pytest

from easylm.devices import TPU_V3
from easylm.models.llama.presets import LLAMA2_7B, LLAMA2_70B
from easylm.planning.candidates import REMAT, candidates, guess
from easylm.planning.found import outcome, search_records, search_table
from easylm.planning.search import Budget, search, smallest_slice
from easylm.planning.topology import parse_topology, slices
from tests.planning.test_candidates import sft

GIB = 2**30
CONFIG = sft()
FEW, MANY = {8192: 17}, {8192: 140}


class Planned(NamedTuple):
    """What a compiler would say."""

    total_bytes: int
    usable: int | None
    step_seconds: float | None
    serial_seconds: float | None
    mfu_bound: float | None
    refusal: str = ""

    @property
    def fits(self):
        has_room = self.usable is None or self.total_bytes <= self.usable
        return has_room and not self.refusal


class Compiler:
    """Plans by a made-up law of memory that grows with rows at once and with what is kept."""

    def __init__(self, usable=15.48, minutes=0.0, known=True):
        self.asked, self.now, self._known = [], 0.0, known
        self._usable, self._minutes = int(usable * GIB), minutes

    def clock(self):
        return self.now

    def __call__(self, one):
        self.asked.append(one)
        self.now += 60 * self._minutes
        return self.planned(one)

    def planned(self, one):
        data, fsdp, tensor = one.mesh
        at_once = one.rows / (data * fsdp * one.micro_batches)
        kept = (1 / tensor, 1, 3, 12)[REMAT.index(one.remat)]
        total = (1100 / (fsdp * tensor) + 8 * at_once * (kept + 4 / tensor)) * GIB
        seconds = guess(one, CONFIG, LLAMA2_70B, TPU_V3).key[0]
        timed = (0.8 * seconds, seconds, 5.0 / seconds) if self._known else (None, None, None)
        return Planned(int(total), self._usable, *timed)


def run(compiler, num_devices=256, rows=FEW, minutes=1000, device=TPU_V3):
    return search(
        CONFIG,
        LLAMA2_70B,
        num_devices=num_devices,
        device=device,
        batch_rows=rows,
        plan_of=compiler,
        budget=Budget(minutes, compiler.clock),
    )


@pytest.mark.parametrize("rows", [FEW, MANY])
@pytest.mark.parametrize("num_devices", [128, 256, 512])
def test_it_finds_the_fastest_that_fits_of_every_mesh(rows, num_devices):
    compiler = Compiler()
    result = run(compiler, num_devices, rows)
    everything = candidates(CONFIG, LLAMA2_70B, num_devices, rows)

    def key(one):
        return guess(one, CONFIG, LLAMA2_70B, TPU_V3).key

    best = {}
    for one in sorted(filter(lambda one: compiler.planned(one).fits, everything), key=key):
        best.setdefault(one.mesh, key(one))
    limit = 1.5 * min(best.values())[0]
    looks = {mesh: min(key(one)[0] for one in everything if one.mesh == mesh) for mesh in best}
    best = {mesh: time for mesh, time in best.items() if looks[mesh] <= limit}
    found = {}
    for one in (fit.candidate for fit in result.fitting):
        found[one.mesh] = min(key(one), found.get(one.mesh, key(one)))
    assert found == best
    assert len(found) > 1
    assert key(result.fitting[0].candidate)[0] == min(best.values())[0]
    for i, one in enumerate(compiler.asked):  # nothing is compiled that cannot be the answer
        for other in (earlier for earlier in compiler.asked[:i] if earlier.mesh == one.mesh):
            assert key(one) < key(other) or not compiler.planned(other).fits
    assert len(compiler.asked) == len(set(compiler.asked)) < len(everything) / 2
    assert result.settled == len(everything)
    assert result.untried == 0


def test_a_mesh_that_looks_hopeless_is_not_compiled():
    compiler = Compiler(usable=1000)
    result = run(compiler)
    looks = {one.mesh: guess(one, CONFIG, LLAMA2_70B, TPU_V3).key[0] for one in compiler.asked}
    assert (1, 4, 64) in looks
    assert (1, 128, 2) not in looks  # 111 of 128 rows would be empty
    assert result.settled == len(candidates(CONFIG, LLAMA2_70B, 256, FEW))


def test_the_smallest_program_of_a_mesh_comes_first_and_can_be_the_last():
    compiler = Compiler(usable=9)
    result = run(compiler, rows=MANY)
    first = {}
    for one in compiler.asked:
        first.setdefault(one.mesh, one)
    assert {one.remat for one in first.values() if one.mesh[2] > 1} == {"block_sharded"}
    for mesh, one in first.items():
        assert one.micro_batches == -(-140 // mesh[1])
        if not compiler.planned(one).fits:
            assert [asked.mesh for asked in compiler.asked].count(mesh) == 1
    assert result.too_large
    assert result.pruned > result.too_large


def test_what_fits_is_sorted_by_the_time_of_the_program_and_not_by_the_guess():
    compiler = Compiler()

    def reversed_times(one):
        planned = compiler(one)
        return planned._replace(serial_seconds=1 / planned.serial_seconds)

    result = run(reversed_times_with_clock(reversed_times), rows=MANY)
    times = [fit.planned.serial_seconds for fit in result.fitting]
    assert times == sorted(times)
    assert times[0] < times[-1]


def reversed_times_with_clock(plan_of):
    plan_of.clock = lambda: 0.0
    return plan_of


def test_state_that_cannot_fit_is_not_compiled():
    compiler = Compiler()
    result = run(compiler, num_devices=32)
    assert compiler.asked == []
    assert result.pruned == len(candidates(CONFIG, LLAMA2_70B, 32, FEW))
    assert search_table(result, CONFIG).startswith("Nothing of what was compiled fits.\n")
    # Of an unknown device nothing is known to be too large.
    assert run(compiler, num_devices=32, device=None).too_large == len(compiler.asked) > 0


def test_the_budget_ends_the_compiles_and_the_rest_is_counted():
    compiler = Compiler(minutes=1)
    result = run(compiler, minutes=4.5)
    assert len(compiler.asked) == 5
    total = len(candidates(CONFIG, LLAMA2_70B, 256, FEW))
    assert result.untried == total - result.settled > 0
    text = search_table(result, CONFIG)
    assert f"{result.untried} were not tried: the time is used up" in text
    assert "The first of them, of an incomplete search:" in text
    assert "The first of them:" in search_table(run(Compiler()), CONFIG)


def test_ctrl_c_keeps_what_was_found_and_ends_after_the_compile_that_is_running(capsys):
    compiler, ended = Compiler(), []

    def plan_of(one):
        planned = compiler(one)
        if len(compiler.asked) == 6:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.3)
            ended.append("interrupted:" in capsys.readouterr().err)
            # A compile lets no signal through to the thread that waits for it.
            ended.append(threading.current_thread() is not threading.main_thread())
        return planned

    plan_of.clock = compiler.clock
    before = signal.getsignal(signal.SIGINT)
    result = run(plan_of)
    assert signal.getsignal(signal.SIGINT) == before
    assert ended == [True, True]  # said while the sixth was compiled
    whole = run(Compiler())
    assert len(compiler.asked) == 6
    assert result.is_interrupted and not whole.is_interrupted
    assert 0 < len(result.fitting) < len(whole.fitting)
    assert result.untried == whole.settled - result.settled > 0
    assert f"{result.untried} were not tried: interrupted" in search_table(result, CONFIG)


def test_meshes_that_look_fast_are_compiled_first():
    compiler = Compiler()
    run(compiler)
    best = min(
        candidates(CONFIG, LLAMA2_70B, 256, FEW),
        key=lambda one: guess(one, CONFIG, LLAMA2_70B, TPU_V3).key,
    )
    assert compiler.asked[0].mesh == best.mesh


def test_shorter_rows_are_candidates_of_their_own():
    compiler = Compiler()
    result = run(compiler, rows={8192: 4, 4096: 8})
    assert {fit.candidate.seq_len for fit in result.fitting} == {8192, 4096}
    assert "4,096" in search_table(result, CONFIG)


def test_the_table_has_80_columns_and_the_overrides_of_the_best():
    result = run(Compiler(), rows=MANY)
    text = search_table(result, CONFIG)
    assert "not tried" not in text
    assert max(map(len, text.splitlines())) <= 80
    best, planned = result.fitting[0]
    line = next(line for line in text.splitlines() if line.startswith(best.mesh_text))
    assert line.split() == [
        best.mesh_text,
        str(best.micro_batches),
        best.remat,
        "8,192",
        f"{planned.total_bytes / GIB:.2f}",
        f"{planned.total_bytes / planned.usable:.0%}",
        f"{planned.step_seconds:.3g}",
        "to",
        f"{planned.serial_seconds:.3g}",
        f"{planned.mfu_bound:.0%}",
        str(best.empty_rows),
    ]
    assert text.endswith("\n".join(f"  {option}" for option in best.overrides(CONFIG)))
    assert "estimates" in text
    assert "(estimates) (est.)" in text


def test_what_is_unknown_is_a_dash_and_the_guess_decides():
    result = run(Compiler(known=False))
    order = [guess(fit.candidate, CONFIG, LLAMA2_70B, TPU_V3).key for fit in result.fitting]
    assert order == sorted(order)
    assert "       -      -" in search_table(result, CONFIG)


def test_records_are_values_of_json():
    result = run(Compiler())
    records = json.loads(json.dumps(search_records(result)))
    assert len(records["fitting"]) == len(result.fitting)
    first = records["fitting"][0]
    assert first["mesh"] == result.fitting[0].candidate.mesh_text
    assert first["estimated_step_seconds"] == result.fitting[0].planned.step_seconds
    assert first["estimated_serial_seconds"] == result.fitting[0].planned.serial_seconds
    assert records["slower"] == result.slower > 0


class Terminal(io.StringIO):
    """What a person looks at."""

    def isatty(self):
        return True


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()], ids=["log", "terminal"])
def test_progress_has_a_line_for_each_compile(monkeypatch, stream):
    monkeypatch.setattr(sys, "stderr", stream)
    compiler = Compiler()
    result = run(compiler, rows=MANY)
    text = stream.getvalue()
    lines = [line for line in text.replace("\r", "\n").splitlines() if "GiB" in line]
    assert len(lines) == len(compiler.asked)
    assert sum(line.endswith("does not fit") for line in lines) == result.too_large > 0
    assert max(map(len, lines)) <= 80
    total = len(candidates(CONFIG, LLAMA2_70B, 256, MANY))
    assert (f"{total}/{total} |" in text) == ("\r" in text) == stream.isatty()
    if not stream.isatty():
        assert text == "".join(f"{line}\n" for line in lines)


@pytest.mark.parametrize("total", [1, 1234.5])
def test_lines_of_progress_have_80_columns(capsys, total):
    long = next(
        one
        for one in candidates(CONFIG, LLAMA2_70B, 2048, MANY)
        if len(one.mesh_text) > 7 and one.remat == "block_sharded"
    )
    planned = Planned(int(total * GIB), int(95.73 * GIB), None, None, None)
    line = outcome(long._replace(micro_batches=140), planned)
    verdict = "fits" if total == 1 else "does not fit"
    assert line.endswith(f"{total:.2f} of 95.73 GiB: {verdict}")
    assert "micro_batches=140" in line and len(line) <= 78  # --smallest indents it


def smallest(generation, plan_of, minutes=1000, model=LLAMA2_70B, clock=lambda: 0.0):
    return smallest_slice(
        CONFIG,
        model,
        slices=slices(generation),
        device=TPU_V3,
        batch_rows=FEW,
        plan_of=plan_of,
        budget=Budget(minutes, clock),
    )


def test_the_smallest_slice_is_the_first_that_fits(capsys):
    compiler = Compiler()
    result = smallest("v3", lambda topology, one: compiler(one))
    assert result.topology == parse_topology("v3-128")
    assert result.tried == ["v3-8", "v3-32", "v3-64", "v3-128"]
    assert result.found.planned.fits
    assert not result.is_over
    said = capsys.readouterr().err
    # 70B at 16 bytes a parameter.
    assert "v3-8: parameters, optimizer and gradients alone take 128.48 of 15.48 GiB" in said
    assert said.count("\nv3-128:\n  ") == 1
    _, lines = said.split("v3-128:\n")
    assert lines.count("\n  1") + 1 == len(lines.splitlines()) == len(compiler.asked)
    assert max(map(len, said.splitlines())) <= 80
    assert compiler.asked[0].mesh[2] == 64


def test_narrower_meshes_are_tried_where_the_widest_does_not_fit():
    asked = []

    def only_sixteen(topology, one):
        asked.append((topology.name, one.mesh[2]))
        return Planned(GIB if one.mesh[2] == 16 else 99 * GIB, 15 * GIB, None, None, None)

    result = smallest("v3", only_sixteen)
    assert asked == [("v3-128", 64), ("v3-128", 32), ("v3-128", 16)]
    assert result.found.candidate.mesh == (1, 8, 16)


def test_no_slice_at_all_and_no_time_are_told_apart():
    never = smallest("v3", lambda topology, one: Planned(99 * GIB, 15 * GIB, None, None, None))
    assert (never.topology, never.found, never.is_over) == (None, None, False)
    assert never.tried == [topology.name for topology in slices("v3")]
    compiler = Compiler(usable=1, minutes=1)
    late = smallest("v3", lambda topology, one: compiler(one), minutes=4, clock=compiler.clock)
    assert (late.topology, late.found, late.is_over) == (None, None, True)
    assert late.tried == ["v3-8", "v3-32", "v3-64", "v3-128"]


def test_a_small_model_fits_the_smallest_slice():
    fits = Planned(GIB, 15 * GIB, None, None, None)
    result = smallest("v3", lambda topology, one: fits, model=LLAMA2_7B)
    assert result.topology.name == "v3-8"


def test_what_the_compiler_cannot_compile_is_counted_and_the_rest_goes_on():
    compiler = Compiler()
    whole = run(Compiler())
    refused = whole.fitting[0].candidate

    def plan_of(one):
        planned = compiler(one)
        return planned._replace(refusal="no feasible span") if one == refused else planned

    plan_of.clock = compiler.clock
    result = run(plan_of)
    assert result.refused == 1
    assert refused not in [found.candidate for found in result.fitting]
    assert result.settled == len(candidates(CONFIG, LLAMA2_70B, 256, FEW))
    assert "    1 the compiler could not compile" in search_table(result, CONFIG)
