"""What a run says of itself while it goes on: its memory, a step that hangs, a trace."""

import re
import time

import jax
import pytest

from easylm import sft
from easylm.trainers import fit
from easylm.trainers.place import batches_on
from tests.hosts import ends, start_hosts
from tests.runs import RANDOM, arguments, make_folder, metrics


@pytest.mark.slow  # a step is not reported before 5 seconds
def test_a_run_tells_its_memory_a_hanging_step_and_where_its_trace_is(
    tmp_path, monkeypatch, capsys
):
    def slow_batches(mesh, stream, steps):
        for step, batch in zip(steps, batches_on(mesh, stream, steps), strict=True):
            if step == 8:  # counted from 0
                time.sleep(7)
            yield batch

    monkeypatch.setattr(fit, "batches_on", slow_batches)
    workdir = tmp_path / "run"
    options = {**RANDOM, "steps": 9, "profile.steps": "2:3"}
    sft.main(arguments(make_folder(tmp_path), workdir, options))
    said = " ".join(capsys.readouterr().err.split())
    # The numbers of step 8 are still to be fetched when batch 9 is waited for.
    report = r"step 8 takes [5-9]\S* s so far; the median is \S+ s: it waits for data: this host is"
    assert re.search(report, said)
    assert re.search(r"step 8 is done; it took \d+", said)
    assert metrics(workdir)[7]["step_seconds"] > 7
    assert "memory after step 1: " in said
    assert "B in the whole process, " in said
    assert "; the compiler expects " in said
    assert "memory at the peak: " in said
    assert all("memory_peak_bytes" not in line for line in metrics(workdir))
    assert f"steps 2 to 3 are traced in {workdir}/profile; to see it: `pip install" in said
    assert len(list((workdir / "profile" / "plugins" / "profile").iterdir())) == 1
    # Other steps may be asked for when a run goes on; those behind it are not traced.
    sft.main(arguments(tmp_path, workdir, {**options, "profile.steps": "4:5"}))
    assert len(list((workdir / "profile" / "plugins" / "profile").iterdir())) == 1


@pytest.mark.slow  # two processes
def test_each_host_traces_itself(tmp_path):
    workdir = tmp_path / "run"
    options = {**RANDOM, "steps": 3, "profile.steps": "2:3", "data.cache": tmp_path / "prepared"}
    hosts = start_hosts(arguments(make_folder(tmp_path), workdir, options), 2, devices=2)
    (first, said), (second, other) = ends(hosts)
    assert (first, second) == (0, 0), said + other
    assert f"steps 2 to 3 are traced in {workdir}/profile/host-0; to see it" in " ".join(
        said.split()
    )
    for host in ("host-0", "host-1"):
        (trace,) = (workdir / "profile" / host).glob("plugins/profile/*/*.xplane.pb")
        planes = jax.profiler.ProfileData.from_file(str(trace)).planes
        events = [event for plane in planes for line in plane.lines for event in line.events]
        steps = [dict(event.stats)["step_num"] for event in events if event.name == "train"]
        assert sorted(steps) == [2, 3]
