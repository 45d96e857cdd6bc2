"""A run on two hosts is told to stop; it goes on from the same bits on as many hosts, or on others.

That is four devices each at first; then in one process with eight, and on four hosts with two.
"""

import pathlib
import shutil
import signal

import numpy as np
import pytest

from easylm import dpo, sft
from easylm.trainers import fit
from tests.hosts import ends, start_hosts
from tests.noted import fingerprint, read_notes
from tests.runs import (
    PAIRS_OPTIONS,
    RANDOM,
    arguments,
    make_folder,
    make_pairs_folder,
    metrics,
)
from tests.test_interrupt import signal_at

pytestmark = pytest.mark.slow

# Hosts ask one another every second whether to stop: steps of a run that shall be are slow.
OPTIONS = {
    **RANDOM,
    "steps": 24,
    "batch_rows": 14,
    "optimizer.learning_rate": 1e-3,
    "checkpoint.every": 100,
}
STEP_SECONDS = 0.25


class Folder:
    """Where the runs of one command are."""

    def __init__(self, path: pathlib.Path, command: str, options: dict):
        self.path, self.command, self.options = path, command, {**OPTIONS, **options}

    def start(self, name: str, hosts: int, step_seconds: float = 0, **options) -> list:
        """The command on so many hosts, in the workdir of that name."""
        notes = self.path / f"notes_{name}"
        notes.mkdir()
        options = {**self.options, "data.cache": "", **options}
        return start_hosts(
            [self.command, *arguments(self.path, self.path / name, options)],
            hosts,
            devices=8 // hosts,
            module="tests.noted",
            NOTES=str(notes),
            STEP_SECONDS=str(step_seconds),
        )

    def stop(self, name: str, host: int, after: int) -> int:
        """A run on two hosts, one of which is told to stop; the step it stopped after."""
        processes = self.start(name, 2, STEP_SECONDS)
        signal_at(processes[host], self.path / name, after, signal.SIGTERM)
        found = ends(processes)
        assert [code for code, _ in found] == [75, 75], found
        assert "Traceback" not in found[0][1] + found[1][1]
        step = metrics(self.path / name)[-1]["step"]
        said = " ".join(found[0][1].split())
        assert f"stopped after step {step} of 24; the checkpoint is saved" in said
        assert after <= step < 24
        return step

    def checkpoints(self, name: str) -> list[int]:
        """The steps of a run's checkpoints."""
        return sorted(int(path.name) for path in (self.path / name / "checkpoints").iterdir())

    def saved(self, name: str) -> list[list]:
        """[step, fingerprint] of each save, which all hosts saw alike."""
        first, *others = read_notes(self.path / f"notes_{name}", "saved")
        assert all(of_host == first for of_host in others)
        return first

    def go_on(self, stopped: str, name: str, hosts: int, **options) -> set[str]:
        """Goes on with a copy of a run; the fingerprints of what the hosts restored."""
        shutil.copytree(self.path / stopped, self.path / name)
        if hosts == 1:
            return self._go_on_here(name, options)
        found = ends(self.start(name, hosts, **options))
        assert [code for code, _ in found] == [0] * hosts, found
        restored = read_notes(self.path / f"notes_{name}", "restored")
        assert list(map(len, restored)) == [1] * hosts
        return {value for ((value,),) in restored}

    def _go_on_here(self, name: str, options: dict) -> set[str]:
        found, read_state = set(), fit.read_state

        def noted(*arguments):
            state = read_state(*arguments)
            found.add(fingerprint(*state))
            return state

        main = {"sft": sft.main, "dpo": dpo.main}[self.command]
        cache = {"data.cache": self.path / name / "prepared"}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fit, "read_state", noted)
            main(arguments(self.path, self.path / name, {**self.options, **cache, **options}))
        return found

    def check_lines(self, name: str, wanted: str, step: int) -> None:
        """The run that went on after `step` beside one with the same past, to where that went."""
        found, wanted = metrics(self.path / name), metrics(self.path / wanted)
        assert [line["step"] for line in found] == list(range(1, 25))
        found = found[: len(wanted)]
        for field in ("epoch", "tokens", "target_tokens", "learning_rate"):
            assert [line[field] for line in found] == [line[field] for line in wanted]
        losses, expected = ([line["loss"] for line in lines] for lines in (found, wanted))
        assert losses[:step] == expected[:step]
        assert losses[step] == pytest.approx(expected[step], rel=2e-6)
        np.testing.assert_allclose(losses, expected, rtol=0, atol=1e-3)


@pytest.fixture(scope="module")
def of_sft(tmp_path_factory):
    return Folder(make_folder(tmp_path_factory.mktemp("sft")), "sft", {})


@pytest.fixture(scope="module")
def whole(of_sft):
    """The run on two hosts that nothing stops."""
    found = ends(of_sft.start("whole", 2))
    assert [code for code, _ in found] == [0, 0], found


@pytest.fixture(scope="module")
def stopped(of_sft):
    """The step after which a run has stopped, in "stopped"."""
    return of_sft.stop("stopped", host=1, after=3)


def test_told_to_stop_all_hosts_save_the_same_step(of_sft, stopped):
    assert [step for step, _ in of_sft.saved("stopped")] == [stopped]
    assert of_sft.checkpoints("stopped") == [stopped]
    assert not (of_sft.path / "stopped" / "hf").exists()


def test_on_as_many_hosts_it_ends_as_if_it_had_never_stopped(of_sft, stopped, whole):
    ((_, saved),) = of_sft.saved("stopped")
    assert of_sft.go_on("stopped", "same", hosts=2) == {saved}
    assert of_sft.saved("same") == of_sft.saved("whole")
    weights = [of_sft.path / run / "hf" / "model.safetensors" for run in ("same", "whole")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    losses = [[line["loss"] for line in metrics(of_sft.path / run)] for run in ("same", "whole")]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("hosts, mesh", [(1, "1,8,1"), (4, "1,2,4")])
def test_elsewhere_it_goes_on_from_the_same_bits(of_sft, stopped, whole, hosts, mesh):
    ((_, saved),) = of_sft.saved("stopped")
    assert of_sft.go_on("stopped", f"on{hosts}", hosts, mesh=mesh) == {saved}
    of_sft.check_lines(f"on{hosts}", "whole", stopped)


def test_a_preference_run_goes_on_from_any_of_its_checkpoints_and_keeps_its_reference(tmp_path):
    options = {**PAIRS_OPTIONS, "checkpoint.every": 4}
    runs = Folder(make_pairs_folder(tmp_path), "dpo", options)
    last = runs.stop("stopped", host=0, after=5)
    step, *later = runs.checkpoints("stopped")
    assert later == [last]
    shutil.rmtree(tmp_path / "stopped" / "checkpoints" / str(last))
    assert runs.go_on("stopped", "alone", hosts=1) == {dict(runs.saved("stopped"))[step]}
    runs.check_lines("alone", "stopped", step)
    for field in ("logps/chosen", "logps/rejected"):
        found, wanted = (metrics(tmp_path / name)[step][field] for name in ("alone", "stopped"))
        assert found == pytest.approx(wanted, rel=2e-6)
    tables = [(tmp_path / name / "reference.npz").read_bytes() for name in ("alone", "stopped")]
    assert tables[0] == tables[1]
