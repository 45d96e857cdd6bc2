"""When the state of a run is kept, and when its model is given to others."""

from collections.abc import Callable

from easylm.command import say, wrap_line
from easylm.saving import Checkpointer, Saved
from easylm.trainers.config import RunConfig
from easylm.trainers.step import TrainState


class Saver:
    """Saves checkpoints, and exports the model after some of them.

    Args:
      config: of the run: its checkpoint.* and export.every.
      workdir: of the run.
      export: (step, parameters) writes the model; does nothing if it is there already.
      bundle: what makes a checkpoint self-contained; see easylm/checkpoint.py.

    Attributes:
      tell: says something to people, from another thread; where there is a progress bar, above it.
    """

    def __init__(
        self,
        config: RunConfig,
        workdir: str,
        export: Callable[[int, dict], None],
        bundle: dict,
    ):
        self._options, self._export_every = config.checkpoint, config.export.every
        self._export, self._bundle = export, bundle
        self._checkpointer = Checkpointer(workdir, keep=self._options.keep, saved=self._saved)
        self._has_saved = False
        self.tell: Callable[[str], None] = lambda text: say(wrap_line(text))

    def due(self, step: int) -> bool:
        """Whether to save after `step`: an export has its checkpoint too.

        Raises:
          InputError, UnavailableError: the last save has failed, so that going on is of little use.
        """
        self._checkpointer.check()
        return step % self._options.every == 0 or self._exports(step)

    def save(self, step: int, state: TrainState) -> None:
        """Starts a checkpoint, and writes the export that is due."""
        bundle = {**self._bundle, "step": step}
        self._checkpointer.save(step, state.params, state.opt_state, bundle)
        self.export(step, state.params)

    def export(self, step: int, params: dict) -> None:
        """Writes the export that is due after `step`, unless it is there."""
        if self._exports(step):
            self._export(step, params)

    def close(self) -> None:
        """Waits for the save under way.

        Raises:
          InputError, UnavailableError: it has failed.
        """
        self._checkpointer.close()

    def _saved(self, saved: Saved) -> None:
        """Says what the first save took."""
        if self._has_saved:
            return
        self._has_saved = True
        self.tell(
            f"saved step {saved.step}: {saved.bytes / 1e9:,.3g} GB in {saved.seconds:,.1f} s; "
            f"training waited for {saved.waited:,.1f} s of them"
        )
        grace = self._options.grace_seconds
        if saved.seconds > grace:
            self.tell(
                f"warning: that is longer than the {grace:g} s that a run may have between being "
                "told to stop and its end (checkpoint.grace_seconds): then it may go on from the "
                "last of its regular checkpoints, up to "
                f"{self._options.every:,} steps (checkpoint.every) back"
            )

    def _exports(self, step: int) -> bool:
        every = self._export_every
        return every is not None and step > 0 and step % every == 0
