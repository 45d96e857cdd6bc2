"""The trace of a few steps: which are in it, where it lies, and when there is none."""

import os
import pathlib
import subprocess
import sys
import tempfile

import jax
import jax.numpy as jnp
import pytest

from easylm import storage
from easylm.errors import PreemptedError
from easylm.trainers.loop import train
from easylm.trainers.options import ProfileConfig
from easylm.trainers.profile import Profile
from tests.bucket import running_bucket


def run(workdir, steps, *, last_step=0, total_steps=6, taken_away_in=None):
    """Takes steps of a matrix product in the training loop; returns what was said."""
    said = []
    profile = Profile(
        ProfileConfig(steps=steps),
        str(workdir),
        last_step=last_step,
        total_steps=total_steps,
        tell=said.append,
    )
    product = jax.jit(lambda a: a @ a / 8)
    taken = []

    def step_fn(state, batch):
        taken.append(batch)
        state = product(state)
        return state, {"loss": state[0, 0], "grad_norm": state[0, 1]}

    profile.after(last_step)
    try:
        train(
            jnp.ones((8, 8)),
            step_fn,
            iter(range(last_step + 1, total_steps + 1)),
            last_step=last_step,
            total_steps=total_steps,
            report=lambda step, metrics, seconds: None,
            save_at=lambda step: False,
            save=lambda step, state: None,
            evaluate_at=lambda step: False,
            evaluate=lambda params: {},
            pause_at=profile.due,
            pause=profile.after,
            stopped=lambda: taken_away_in in taken,
        )
    finally:
        profile.close()
    return said


def traced_steps(folder):
    """The numbers of the steps in the only trace below `folder`."""
    (file,) = pathlib.Path(folder).glob("plugins/profile/*/*.xplane.pb")
    planes = jax.profiler.ProfileData.from_file(str(file)).planes
    events = [event for plane in planes for line in plane.lines for event in line.events]
    return sorted(dict(event.stats)["step_num"] for event in events if event.name == "train")


@pytest.mark.parametrize(
    "steps, last_step, traced",
    [
        ("3:5", 0, [3, 4, 5]),
        ("1:1", 0, [1]),
        ("2:6", 3, [4, 5, 6]),
        ("2:4", 3, [4]),
    ],
)
def test_the_trace_holds_the_steps_asked_for_by_number(tmp_path, steps, last_step, traced):
    said = run(tmp_path, steps, last_step=last_step)
    assert traced_steps(tmp_path / "profile") == traced
    assert len(list((tmp_path / "profile").glob("plugins/profile/*/perfetto_trace.json.gz"))) == 1
    assert said == [
        f"steps {traced[0]} to {traced[-1]} are traced in {tmp_path}/profile; to see it: `pip "
        f"install xprof` and `xprof --logdir={tmp_path}/profile`, or give its "
        "perfetto_trace.json.gz to https://ui.perfetto.dev"
    ]


@pytest.mark.parametrize(
    "steps, last_step, expected",
    [
        ("", 0, []),
        ("2:4", 4, []),  # before the run went on
        ("7:9", 0, ["profile.steps=7:9: the run has 6 steps; none is traced"]),
    ],
)
def test_there_may_be_nothing_to_trace(tmp_path, steps, last_step, expected):
    assert run(tmp_path, steps, last_step=last_step) == expected
    assert list(tmp_path.iterdir()) == []


def test_a_libtpu_without_a_tpu_is_kept_from_tracing(tmp_path):
    """It ends the process with SIGSEGV; seen with libtpu 0.0.51."""
    pytest.importorskip("libtpu")
    trace = (
        "from easylm.trainers.options import ProfileConfig\n"
        "from easylm.trainers.profile import Profile\n"
        "steps = ProfileConfig(steps='1:2')\n"
        f"Profile(steps, {str(tmp_path)!r}, last_step=0, total_steps=3, tell=print)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    result = subprocess.run(
        [sys.executable, "-c", trace], env=environment, capture_output=True, text=True
    )
    assert "wanted JAX_PLATFORMS=cpu in the environment" in result.stderr


def test_steps_beyond_the_end_are_said(tmp_path):
    said = run(tmp_path, "5:9")
    assert said[0] == "profile.steps=5:9: the run has 6 steps; only 5 to 6 are traced"
    assert traced_steps(tmp_path / "profile") == [5, 6]


def test_a_run_that_is_stopped_leaves_what_it_has_traced(tmp_path):
    with pytest.raises(PreemptedError):
        run(tmp_path, "2:5", taken_away_in=3)
    assert traced_steps(tmp_path / "profile") == [2, 3]


def test_a_trace_that_cannot_be_written_does_not_stop_the_run(tmp_path):
    (tmp_path / "profile").write_text("a file")
    (said,) = run(tmp_path, "2:3")
    assert said.startswith(f"no trace: {tmp_path}/profile cannot be written (")
    assert said.endswith("; the run goes on")


def test_a_trace_in_a_bucket_leaves_nothing_on_the_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with running_bucket() as bucket:
        (said,) = run(f"{bucket}/run", "2:3")
        assert f"`gcloud storage cp -r {bucket}/run/profile .`, then `pip" in said
        (trace,) = storage.list_folders(f"{bucket}/run/profile/plugins/profile")
        kept = f"{bucket}/run/profile/plugins/profile/{trace}"
        names = [name for name in storage.list_files(kept) if name.endswith(".xplane.pb")]
        local = tmp_path / "copy" / "plugins" / "profile" / trace
        assert list(tmp_path.iterdir()) == []
        local.mkdir(parents=True)
        storage.copy_to_disk(f"{kept}/{names[0]}", str(local / names[0]))
    assert traced_steps(tmp_path / "copy") == [2, 3]
