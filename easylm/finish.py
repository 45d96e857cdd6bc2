"""What a run leaves for others: the model as a Hugging Face folder, and how to talk to it."""

import json

from easylm import storage
from easylm.command import say
from easylm.converters.export import export_hf
from easylm.errors import InputError
from easylm.models.llama.config import LlamaConfig
from easylm.trainers.config import SftConfig


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
        config: SftConfig,
        workdir: str,
        model: LlamaConfig,
        tokenizer_files: dict[str, bytes],
        *,
        total_steps: int,
    ):
        self._config, self._workdir, self._model = config, workdir, model
        self._files, self._total_steps = tokenizer_files, total_steps
        self._check_place()

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

    def __call__(self, step: int, params: dict) -> str:
        """Exports the parameters after `step`, unless that is done; returns the folder.

        Raises:
          InputError: the folder cannot be written.
        """
        config, target = self._config, f"{self._workdir}/hf"
        if config.export.every is not None:
            target = f"{target}/{step}"
        if storage.exists(f"{target}/{storage.COMPLETE}"):
            dtype = json.loads(storage.read_bytes(f"{target}/config.json"))["torch_dtype"]
            say(f"{target} is there already, in {dtype}; easylm.convert writes it in another dtype")
            return target
        if storage.exists(target):
            say(f"{target} was not finished; it is written again")
            storage.remove_folder(target)
        export_hf(
            params,
            self._model,
            target,
            dtype=config.export.dtype,
            tokenizer_files=self._files,
            model_card=model_card(config, step, self._total_steps),
        )
        say(f"exported to {target}")
        return target


def model_card(config: SftConfig, step: int, total_steps: int) -> str:
    """README.md of an exported folder."""
    options, data = config.optimizer, config.data
    of_run = "" if step == total_steps else f" of {total_steps:,}"
    warmup = (
        f"{options.warmup_ratio:.0%} of the steps"
        if options.warmup_steps is None
        else f"{options.warmup_steps:,} steps"
    )
    card = (
        "# A LLaMA fine-tuned with easylm\n\n"
        f"- started from: {config.init_from}\n"
        f"- data: {data.sources}\n"
        f"- {step:,} steps{of_run}, rows of {data.seq_len:,} tokens, "
        f"{'packed' if data.packing else 'one example each'}\n"
        f"- {options.name}, {options.schedule} schedule, peak learning rate "
        f"{options.learning_rate:g}, warm-up {warmup}; loss weighted by {config.loss_weighting}\n"
        f"- chat template ({data.chat_template}): in the tokenizer\n"
    )
    if data.eos_newline == "strip":
        card += (
            "\nTrained without the newline tokens after the end of a turn, as Tülu 2 was "
            "(eos_newline=strip). The chat template of this folder writes them, so from the second "
            "turn on inference sees tokens there that training did not. Chats of one turn are the "
            "same; a template without the newline after eos_token gives the ids of training.\n"
        )
    return card


def say_how_to_chat(folder: str) -> None:
    say(f'talk to it: python -m easylm.generate --model={folder} --prompt="Hello!"')
