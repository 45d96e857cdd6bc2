"""Whether a workdir holds a run, and whether it is this one."""

import dataclasses
import os

from easylm import storage
from easylm.config import difference, read_json, to_config_dict
from easylm.errors import InputError

COMPLETE = "commit_success.txt"  # as Orbax marks a checkpoint in a bucket
# What may change between two starts of one run: where and in what pieces it computes, where its
# data lies (its content is compared by itself) and what it shows and leaves behind.
FREE_FIELDS = (
    "config.attention",
    "config.checkpoint.",
    "config.compilation_cache",
    "config.cpu_devices",
    "config.data.cache",
    "config.data.eval_sources",
    "config.data.expected_",
    "config.data.processes",
    "config.data.show",
    "config.data.sources",
    "config.eval_every",
    "config.export.",
    "config.log_every",
    "config.loss_chunk",
    "config.mesh",
    "config.micro_batches",
    "config.pod",
    "config.profile.",
    "config.remat",
    "config.tensorboard",
    "config.wandb",
)


def holds_same_run(config, workdir: str) -> bool:
    """Whether there is a run to go on with.

    Args:
      config: of the run, any config dataclass.
      workdir: without a slash at its end.
    Raises:
      InputError: the workdir is a file, holds a run of another config, or the model of a run that
        is gone; with the fields that differ. Or a bucket refuses it.
    """
    storage.check_writable(workdir)
    if not has_checkpoints(workdir):
        if storage.exists(f"{workdir}/hf"):
            raise InputError(
                f"{workdir}/hf: found a model, but {workdir}/checkpoints has none of the run that "
                "made it; wanted a new folder for this run, or that model moved away"
            )
        return False
    if not storage.exists(f"{workdir}/config.json"):
        raise InputError(
            f"{workdir}/config.json: no such file, though {workdir}/checkpoints holds a run; "
            "wanted the one it was started with, or a new folder for this run"
        )
    # As it was written, by whatever version: fields that came since had their defaults.
    old = _filled(to_config_dict(type(config)).to_dict(), read_json(f"{workdir}/config.json"))
    changed = difference(old, dataclasses.asdict(config))
    changed = [line for line in changed if not line.startswith(FREE_FIELDS)]
    if changed:
        raise InputError(
            f"{workdir}: holds a run of another config; wanted the same one, to go on with it, "
            "or a new folder:\n" + "\n".join(f"  {line}" for line in changed)
        )
    return True


def _filled(defaults: dict, values: dict) -> dict:
    """`values` with those of `defaults` where they have none."""
    filled = {**defaults, **values}
    for name, default in defaults.items():
        if isinstance(default, dict) and isinstance(filled[name], dict):
            filled[name] = _filled(default, filled[name])
    return filled


def has_checkpoints(workdir: str) -> bool:
    """Whether a run has left complete checkpoints.

    Raises:
      InputError: the workdir is a file.
    """
    place = workdir  # or what is there of it
    while not storage.is_bucket(place) and place and not storage.exists(place):
        place = os.path.dirname(place)
    if place and storage.exists(place) and not storage.is_folder(place):
        raise InputError(f"--workdir: {place} is a file; wanted a folder, or a new name for one")
    folder = f"{workdir}/checkpoints"
    names = storage.list_folders(folder) if storage.is_folder(folder) else []
    # On a disk it has its name when it is complete.
    return any(
        name.isdigit()
        and (not storage.is_bucket(folder) or storage.exists(f"{folder}/{name}/{COMPLETE}"))
        for name in names
    )
