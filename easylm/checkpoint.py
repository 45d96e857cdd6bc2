"""Native checkpoints: Orbax step folders that hold all it takes to use or continue a model.

A step folder has the items `params` and `bundle` and, from training, `opt_state`. It is written
under a temporary name or mark and becomes visible whole, on disks and in buckets alike. Those of a
run are written by easylm/saving.py.
"""

import base64
import contextlib
import logging
import os
import re
from collections.abc import Iterator

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint._src.serialization import tensorstore_utils

from easylm import storage
from easylm.errors import InputError, UnavailableError
from easylm.patience import patient_loops

FORMAT = "easylm-1"
_BUNDLE_FIELDS = ("model_config", "run_config", "tokenizer")
# How the name ends of a folder on a disk until it is complete, as Orbax has it.
UNFINISHED = ".orbax-checkpoint-tmp"
# How tensorstore's errors of a bucket begin that stay the same when asked again.
_REFUSALS = ("PERMISSION_DENIED", "UNAUTHENTICATED", "NOT_FOUND", "INVALID_ARGUMENT")


def make_bundle(
    model_config: dict, tokenizer_files: dict[str, bytes], run_config: dict | None = None
) -> dict:
    """What makes a checkpoint self-contained, as JSON.

    Args:
      model_config: config.json of the model, as `LlamaConfig.to_hf` gives it.
      tokenizer_files: name -> content, chat template included.
      run_config: of the run that trained it, if any.
    """
    files = {name: base64.b64encode(data).decode() for name, data in tokenizer_files.items()}
    return {
        "format": FORMAT,
        "model_config": model_config,
        "run_config": run_config,
        "tokenizer": files,
    }


def tokenizer_files_of(bundle: dict) -> dict[str, bytes]:
    """The tokenizer's files in a bundle, name -> content."""
    return {name: base64.b64decode(text) for name, text in bundle["tokenizer"].items()}


def find_checkpoint(path: str) -> str | None:
    """The step folder that `path` means: itself, or the newest of a checkpoints folder or workdir.

    None where there is no complete checkpoint.

    Raises:
      InputError: `path` itself is what is left of a save that did not finish.
    """
    path = path.rstrip("/")
    if storage.exists(f"{path}/bundle") and storage.exists(f"{path}/params"):
        if not ocp.utils.is_checkpoint_finalized(absolute(path)):
            raise InputError(
                f"{path}: the save that made this checkpoint did not finish; wanted a complete "
                "one: name another step, or their folder for the newest complete one"
            )
        return path
    step = latest_step(path)
    if step is not None:
        return f"{path}/checkpoints/{step}"
    # Other folders have numbers for names too, such as the exports of a run.
    step = _latest_step(path)
    items = (f"{path}/{step}/bundle", f"{path}/{step}/params")
    return f"{path}/{step}" if step is not None and any(map(storage.exists, items)) else None


def latest_step(workdir: str) -> int | None:
    """The newest complete checkpoint of a run; reads nothing but names."""
    return _latest_step(f"{workdir}/checkpoints")


def _latest_step(folder: str) -> int | None:
    return max(steps(folder), default=None)


def steps(folder: str) -> list[int]:
    """Of the complete checkpoints in a folder."""
    if not storage.is_folder(folder):
        return []
    return ocp.utils.checkpoint_steps(absolute(folder))


def read_bundle(step_folder: str) -> dict:
    """The bundle of a step folder.

    Raises:
      InputError: it is damaged, or written by another version.
    """
    with _damage_named(step_folder, "bundle"):
        bundle = ocp.JsonCheckpointHandler().restore(absolute(f"{step_folder}/bundle"))
    found = bundle.get("format") if isinstance(bundle, dict) else None
    if found != FORMAT:
        raise InputError(
            f"{step_folder}/bundle: format: found {found!r}; wanted {FORMAT!r}. Use the version of "
            "easylm that wrote it, or another folder"
        )
    missing = [field for field in _BUNDLE_FIELDS if field not in bundle]
    if missing:
        raise InputError(
            f"{step_folder}/bundle: found no {', '.join(missing)}; "
            f"wanted {', '.join(_BUNDLE_FIELDS)}"
        )
    return bundle


def abstract_params_in(step_folder: str) -> dict:
    """The parameters of a step folder as jax.ShapeDtypeStruct, nothing read but their shapes."""
    return _abstract(step_folder, "params")


def abstract_state_in(step_folder: str) -> tuple:
    """The same of the parameters and the optimizer's state, whose tuples are lists."""
    return _abstract(step_folder, "params"), _abstract(step_folder, "opt_state")


def _abstract(step_folder: str, item: str):
    with _damage_named(step_folder, item):
        stored = arrays().metadata(absolute(f"{step_folder}/{item}")).tree
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), stored)


def read_params(step_folder: str, params: dict) -> dict:
    """The parameters of a step folder, on the devices.

    Args:
      params: jax.ShapeDtypeStruct with the shardings and dtypes wanted, for all parameters or
        some.
    Raises:
      InputError: the checkpoint is damaged, or of another model.
    """
    return _read(step_folder, "params", params)


def read_state(step_folder: str, params: dict, opt_state) -> tuple:
    """The parameters and the optimizer's state of a step folder, on the devices.

    Args:
      params, opt_state: trees of jax.ShapeDtypeStruct with the shardings wanted.
    Raises:
      InputError: the checkpoint is damaged, or of another model or optimizer.
    """
    return _read(step_folder, "params", params), _read(step_folder, "opt_state", opt_state)


def write_params(target: str, params: dict, bundle: dict) -> None:
    """Writes a checkpoint without optimizer state; `target` becomes the step folder.

    Raises:
      InputError: the target exists or cannot be written.
      UnavailableError: its bucket did not take it, but may later.
    """
    if storage.exists(target):
        raise InputError(f"{target}: exists; wanted a new folder")
    checkpointer = ocp.Checkpointer(items(params=arrays()))
    args = ocp.args.Composite(params=ocp.args.PyTreeSave(params), bundle=ocp.args.JsonSave(bundle))
    try:
        with failure_named(target), failures_unlogged(), contextlib.closing(checkpointer):
            checkpointer.save(absolute(target), args=args)
    except BaseException:
        rest = target if storage.is_bucket(target) else f"{target}{UNFINISHED}"
        if storage.exists(rest):
            storage.remove_folder(rest)
        raise


def _read(step_folder: str, item: str, abstract):
    with _damage_named(step_folder, item):
        _check_arrays(arrays().metadata(absolute(f"{step_folder}/{item}")).tree, abstract)
        restore = ocp.args.PyTreeRestore(
            abstract,
            restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
            partial_restore=True,
        )
        return arrays().restore(absolute(f"{step_folder}/{item}"), args=restore)


def _check_arrays(stored, abstract) -> None:
    # A partial restore hands back what it does not find as it was asked for, without a word.
    stored = {_name(path): leaf.shape for path, leaf in _leaves(stored)}
    wanted = {_name(path): leaf.shape for path, leaf in _leaves(abstract)}
    for name, shape in wanted.items():
        if stored.get(name) != shape:
            raise ValueError(f"{name}: found {stored.get(name, 'nothing')}; wanted shape {shape}")


def _leaves(tree) -> list:
    return jax.tree_util.tree_leaves_with_path(tree)


def _name(path) -> str:
    # Orbax keeps tuples as lists and named tuples as dicts: only the last parts of keys agree.
    return "/".join(jax.tree_util.keystr((key,)).strip("[].'") for key in path)


# Where a folder cannot be made, threads that wait for it would do so for minutes.
ASYNC_OPTIONS = ocp.AsyncOptions(create_directories_asynchronously=False)


def items(**handlers: ocp.CheckpointHandler) -> ocp.CompositeCheckpointHandler:
    """What writes a step folder: these items, and `bundle`."""
    return ocp.CompositeCheckpointHandler(
        bundle=ocp.JsonCheckpointHandler(),
        composite_options=ocp.CompositeOptions(async_options=ASYNC_OPTIONS),
        **handlers,
    )


def arrays() -> ocp.PyTreeCheckpointHandler:
    """What reads and writes the items `params` and `opt_state`."""
    # Compression takes most of the time of a save and a second copy of the arrays in memory, and
    # weights hardly shrink: their mantissas are noise.
    _limit_retries()
    return ocp.PyTreeCheckpointHandler(use_compression=False)


def _limit_retries() -> None:
    # tensorstore asks a bucket 32 times, for a quarter of an hour, or longer if it does not
    # answer. It has an option for that, but Orbax has none to pass it on.
    for context in (
        tensorstore_utils._BASE_TS_CONTEXT,
        tensorstore_utils._DEFAULT_OCDBT_TS_CONTEXT,
    ):
        context["gcs_request_retries"] = {"max_retries": storage.TENSORSTORE_RETRIES}


def absolute(path: str) -> epath.Path:
    """The path as Orbax wants it."""
    return epath.Path(path) if storage.is_bucket(path) else epath.Path(path).absolute()


@contextlib.contextmanager
def _damage_named(step_folder: str, item: str) -> Iterator[None]:
    try:
        with patient_loops():
            yield
    except Exception as error:
        if not _is_of_storage(error):
            raise
        reason = _first_line(error.__cause__ or error)
        if "retry attempts failed" in reason:
            raise UnavailableError(f"{step_folder}/{item}: cannot be read: {reason}") from error
        raise InputError(
            f"{step_folder}/{item}: cannot be restored: {reason}. Wanted a "
            "complete checkpoint of this model; move this folder away to use an older one."
        ) from error


@contextlib.contextmanager
def failure_named(target: str) -> Iterator[None]:
    """Turns what goes wrong where `target` is written into an error that says so.

    Raises:
      InputError: it cannot be written.
      UnavailableError: its bucket did not take it, but may later.
    """
    try:
        with storage.explained(target):
            yield
    except InputError:
        raise
    except Exception as error:
        if not _is_of_storage(error):
            raise
        number = re.search(r"\[os_error_code='([0-9]+)'\]", str(error))
        reason = os.strerror(int(number[1])) if number else _first_line(error)
        may_pass = storage.is_bucket(target) and not str(error).startswith(_REFUSALS)
        kind = UnavailableError if may_pass else InputError
        raise kind(f"{target}: cannot be written: {reason}") from error


@contextlib.contextmanager
def failures_unlogged() -> Iterator[None]:
    """Within it Orbax and its threads do not print what they raise as well."""

    def is_wanted(record: logging.LogRecord) -> bool:
        return not (record.exc_info and "orbax" in record.pathname)

    logger = logging.getLogger("absl")
    logger.addFilter(is_wanted)
    try:
        with patient_loops():
            yield
    finally:
        logger.removeFilter(is_wanted)


def _is_of_storage(error: Exception) -> bool:
    # Orbax hands on what tensorstore says of its files as a bare Exception, too.
    return type(error) is Exception or isinstance(error, (ValueError, KeyError, OSError))


def _first_line(error: BaseException) -> str:
    line = (str(error) or repr(error)).splitlines()[0]
    return line.partition(" [tensorstore_spec=")[0].rstrip(".")  # how it was opened
