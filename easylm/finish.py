"""What a run leaves for others: the model as a Hugging Face folder, and how to talk to it."""

import dataclasses
import json

from easylm import hosts, storage
from easylm.command import say
from easylm.converters.export import export_hf
from easylm.errors import InputError
from easylm.model_card import model_card
from easylm.models.llama.config import LlamaConfig
from easylm.trainers.config import RunConfig


class Exporter:
    """Writes the model of a run to WORKDIR/hf, or to WORKDIR/hf/STEP with export.every.

    Args:
      config: of the run.
      workdir: of the run.
      model: sizes of the model.
      tokenizer_files: name -> content, chat template included.
      total_steps: of the run.
    Raises:
      InputError: what is in the place of the model is none, or must not be written over.
    """

    def __init__(
        self,
        config: RunConfig,
        workdir: str,
        model: LlamaConfig,
        tokenizer_files: dict[str, bytes],
        *,
        total_steps: int,
    ):
        self._config, self._workdir, self._model = config, workdir, model
        self._files, self._total_steps = tokenizer_files, total_steps
        self._written = ""  # the newest that this process has made
        hosts.on_first("looking at the export", self._check_place)

    def _check_place(self) -> None:
        folder = f"{self._workdir}/hf"
        if not storage.exists(folder):
            return
        if not storage.is_folder(folder):
            raise InputError(
                f"{folder}: is a file; wanted a folder for the model, or none: move it away"
            )
        steps = [name for name in storage.list_folders(folder) if name.isdigit()]
        if steps and self._config.export.every is None:
            raise InputError(
                f"{folder}: holds the model after step {', '.join(steps)}; wanted export.every set "
                "as when it was written, or that folder moved away"
            )
        if self._config.export.every is not None:
            self._clear_unfinished(folder, steps)

    def _clear_unfinished(self, folder: str, steps: list[str]) -> None:
        """Removes the rest of a model that a start without export.every did not finish."""
        files = storage.list_files(folder)
        if storage.COMPLETE in files or not any(name.endswith(".safetensors") for name in files):
            return
        if steps:  # another's, then: a run writes one or the other
            raise InputError(
                f"{folder}: found an unfinished model beside those after step {', '.join(steps)}; "
                f"wanted none: move its files away ({', '.join(files)})"
            )
        say(f"{folder} was not finished; it is removed, for export.every writes to {folder}/STEP")
        storage.remove_folder(folder)

    def __call__(self, step: int, params: dict) -> str:
        """Exports the parameters after `step`, unless that is done; returns the folder.

        Raises:
          InputError: the folder cannot be written.
        """
        config, target = self._config, f"{self._workdir}/hf"
        if config.export.every is not None:
            target = f"{target}/{step}"
        if target == self._written:
            return target
        if hosts.on_first("looking at the export", lambda: self._is_there(target)):
            return target
        export_hf(
            params,
            self._model,
            target,
            dtype=config.export.dtype,
            tokenizer_files=self._files,
            model_card=self._card(step),
        )
        self._written = target
        say(f"exported to {target}")
        return target

    def _is_there(self, target: str) -> bool:
        """Whether the folder is there, whole; removes one that is not."""
        if storage.exists(f"{target}/{storage.COMPLETE}"):
            found = json.loads(storage.read_bytes(f"{target}/config.json"))["torch_dtype"]
            wanted = self._config.export.dtype
            hint = f", in {found}; easylm.convert writes it in {wanted}" if found != wanted else ""
            say(f"{target} is there already{hint}")
            return True
        if storage.exists(target):
            say(f"{target} was not finished; it is written again")
            storage.remove_folder(target)
        return False

    def _card(self, step: int) -> str:
        of_run = "" if step == self._total_steps else f" of {self._total_steps:,}"
        facts = {"trained for": f"{step:,} steps{of_run}", "dtype": self._config.export.dtype}
        recipe = dataclasses.asdict(self._config)
        return model_card("A LLaMA fine-tuned with easylm", facts, recipe)


def say_how_to_chat(folder: str) -> None:
    say(f'talk to it: python -m easylm.generate --model={folder} --prompt="Hello!"')
