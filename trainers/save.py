"""When the state of a run is kept, and when its model is given to others."""

from collections.abc import Callable

from easylm.checkpoint import Checkpointer
from easylm.trainers.config import RunConfig
from easylm.trainers.step import TrainState


class Saver:
    """Saves checkpoints, and exports the model after some of them.

    Args:
      config: of the run: checkpoint.every and export.every.
      checkpointer: of its workdir.
      export: (step, parameters) writes the model; does nothing if it is there already.
      bundle: what makes a checkpoint self-contained; see easylm/checkpoint.py.
    """

    def __init__(
        self,
        config: RunConfig,
        checkpointer: Checkpointer,
        export: Callable[[int, dict], None],
        bundle: dict,
    ):
        self._every, self._export_every = config.checkpoint.every, config.export.every
        self._checkpointer, self._export, self._bundle = checkpointer, export, bundle

    def due(self, step: int) -> bool:
        """Whether to save after `step`: an export has its checkpoint too."""
        return step % self._every == 0 or self._exports(step)

    def save(self, step: int, state: TrainState) -> None:
        """Starts a checkpoint, and writes the export that is due."""
        bundle = {**self._bundle, "step": step}
        self._checkpointer.save(step, state.params, state.opt_state, bundle)
        self.export(step, state.params)

    def export(self, step: int, params: dict) -> None:
        """Writes the export that is due after `step`, unless it is there."""
        if self._exports(step):
            self._export(step, params)

    def _exports(self, step: int) -> bool:
        every = self._export_every
        return every is not None and step > 0 and step % every == 0
