"""The trace of a few steps, for people who want to see where the time goes."""

import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable

import jax

from easylm import hosts, storage
from easylm.errors import InputError
from easylm.trainers.options import ProfileConfig


class Profile:
    """Traces the steps that the config names, each host its own devices.

    A trace begins and ends between two steps, with idle devices. It comes to lie in
    WORKDIR/profile; where there are several hosts, each has a folder host-I below. A run that goes
    on within these steps traces those that are left; one that goes on behind them, none.

    Args:
      config: which steps.
      workdir: of the run.
      last_step: the step the run goes on from, 0 for a new one.
      total_steps: of the run.
      tell: says a line to people.
    Raises:
      InputError: this process cannot trace.
    """

    def __init__(
        self,
        config: ProfileConfig,
        workdir: str,
        *,
        last_step: int,
        total_steps: int,
        tell: Callable[[str], None],
    ):
        self._folder, self._tell = f"{workdir}/profile", tell
        if hosts.count() > 1:
            self._folder += f"/host-{hosts.index()}"
        self._steps = range(0)
        self._local = ""  # where the trace under way is to be written
        if not config.steps or config.last <= last_step:
            return
        _check_profiler()
        first, last = max(config.first, last_step + 1), min(config.last, total_steps)
        self._steps = range(first, last + 1)
        if config.last > total_steps:
            traced = f"only {first} to {last} are traced" if self._steps else "none is traced"
            tell(f"profile.steps={config.steps}: the run has {total_steps} steps; {traced}")

    def due(self, step: int) -> bool:
        """Whether a trace begins or ends after `step`."""
        return bool(self._steps) and step in (self._steps[0] - 1, self._steps[-1])

    def after(self, step: int) -> None:
        """Begins or ends the trace where that is due; the devices are idle."""
        if not self._steps:
            return
        if step == self._steps[0] - 1:
            self._begin()
        elif step == self._steps[-1]:
            self._end(f"steps {self._steps[0]} to {step}")

    def close(self) -> None:
        """Ends a trace that is under way because the run ends early."""
        if self._local:
            self._end(f"steps {self._steps[0]} to where the run ended")

    def _begin(self) -> None:
        local = os.path.expanduser(self._folder)
        try:
            if storage.is_bucket(self._folder):  # jax writes to disks only
                local = tempfile.mkdtemp(prefix="easylm-profile-")
            else:
                with storage.explained(local):
                    os.makedirs(local, exist_ok=True)
        except (InputError, OSError) as error:
            self._failed(error)
            return
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # it would slow down every call that Python makes
        jax.profiler.start_trace(local, create_perfetto_trace=True, profiler_options=options)
        self._local = local

    def _end(self, what: str) -> None:
        if not self._local:
            return
        local, self._local = self._local, ""
        try:
            jax.profiler.stop_trace()
            if storage.is_bucket(self._folder):
                _upload(local, self._folder)
        except (InputError, OSError, jax.errors.JaxRuntimeError) as error:
            self._failed(error)
        else:
            self._tell(f"{what} are traced in {self._folder}; {_how_to_open(self._folder)}")
        finally:
            if storage.is_bucket(self._folder):
                shutil.rmtree(local)

    def _failed(self, error: Exception) -> None:
        """A run is worth more than its trace."""
        self._tell(f"no trace: {self._folder} cannot be written ({error}); the run goes on")


def _upload(local: str, folder: str) -> None:
    """Copies the files below `local` into a bucket."""
    for parent, _, names in os.walk(local):
        for name in names:
            path = os.path.join(parent, name)
            target = f"{folder}/{os.path.relpath(path, local)}"
            with (
                storage.explained(target),
                open(path, "rb") as source,
                storage.open_to_write(target) as file,
            ):
                shutil.copyfileobj(source, file, storage.UPLOAD_BYTES)


def _how_to_open(folder: str) -> str:
    """What a person types to see the trace."""
    copied = ""
    if storage.is_bucket(folder):
        copied, folder = f"`gcloud storage cp -r {folder} .`, then ", "profile"
    return (
        f"to see it: {copied}`pip install xprof` and `xprof --logdir={folder}`, or give its "
        "perfetto_trace.json.gz to https://ui.perfetto.dev"
    )


def _check_profiler() -> None:
    """Refuses the profiler of a libtpu that found no TPU: it ends the process."""
    asked = not jax.config.jax_platforms or "tpu" in jax.config.jax_platforms.split(",")
    if asked and jax.default_backend() != "tpu" and importlib.util.find_spec("libtpu"):
        raise InputError(
            "profile.steps: libtpu is installed, which cannot trace where there is no TPU; wanted "
            f"JAX_PLATFORMS={jax.default_backend()} in the environment, so that it is left alone"
        )
