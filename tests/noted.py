"""A command that notes down what it does, for runs on several hosts, into which no test looks.

    NOTES=FOLDER [STEP_SECONDS=SECONDS] python -m tests.noted sft|dpo ARGUMENTS

Process I of the hosts appends JSON lists to FOLDER/I: ["written", path] for each file that Python
opens to write, ["changed", path] for what it makes, renames or removes otherwise, ["read", path,
first byte, bytes] of files that easylm.storage reads, ["parsed", sources] and ["encoded"] of data,
["saved", step, fingerprint] and ["restored", fingerprint] of states. STEP_SECONDS makes every step
wait for its batch.
"""

import json
import os
import pathlib
import sys
import time
from collections.abc import Callable

from easylm import dpo, sft, storage
from easylm.data import prepare
from easylm.hosts.command import run_on_hosts
from easylm.hosts.link import parent

_CHANGES = ("os.mkdir", "os.remove", "os.rename", "os.rmdir", "shutil.rmtree")


def fingerprint(*trees) -> str:
    """Stands for the bits of all arrays in the trees, wherever they lie."""
    # Of a host the process that trains loads jax, its parent does not.
    import jax

    from easylm.fingerprint import params_fingerprint

    leaves = jax.tree_util.tree_leaves_with_path(trees)
    return params_fingerprint({jax.tree_util.keystr(path): leaf for path, leaf in leaves})


def read_notes(folder: pathlib.Path, kind: str) -> list[list[list]]:
    """The notes of one kind, of each host."""
    hosts = sorted(folder.iterdir(), key=lambda file: int(file.name))
    notes = [[json.loads(line) for line in file.read_text().splitlines()] for file in hosts]
    return [[note[1:] for note in of_host if note[0] == kind] for of_host in notes]


def start_notes() -> None:
    """From here on what this process does is noted."""
    (index,) = [text.partition("=")[2] for text in sys.argv if text.startswith("--process=")]
    file = os.open(f"{os.environ['NOTES']}/{index}", os.O_CREAT | os.O_WRONLY | os.O_APPEND)

    def note(*what: object) -> None:
        os.write(file, (json.dumps(what) + "\n").encode())

    def hear(event: str, values: tuple) -> None:
        if event == "open" and isinstance(values[0], (str, os.PathLike)):
            if (values[2] or 0) & (os.O_WRONLY | os.O_RDWR):
                note("written", os.fspath(values[0]))
        elif event in _CHANGES:
            note("changed", os.fspath(values[0]))

    sys.addaudithook(hear)
    _note_data(note)
    _note_states(note)


def _note_data(note: Callable[..., None]) -> None:
    read_into, read_rows = storage.read_into, prepare.read_rows
    encode_in_parts = prepare.encode_in_parts

    def noted_read(path, start, out):
        note("read", path, start, len(out))
        return read_into(path, start, out)

    def noted_rows(sources, *arguments):
        note("parsed", sources)
        return read_rows(sources, *arguments)

    def noted_encode(*arguments, **options):
        note("encoded")
        return encode_in_parts(*arguments, **options)

    storage.read_into, prepare.read_rows = noted_read, noted_rows
    prepare.encode_in_parts = noted_encode


def _note_states(note: Callable[..., None]) -> None:
    from easylm.saving import Checkpointer
    from easylm.trainers import fit

    save, read_state = Checkpointer.save, fit.read_state

    def noted_save(self, step, params, opt_state, bundle):
        note("saved", step, fingerprint(params, opt_state))
        return save(self, step, params, opt_state, bundle)

    def noted_restore(*arguments):
        state = read_state(*arguments)
        note("restored", fingerprint(*state))
        return state

    Checkpointer.save, fit.read_state = noted_save, noted_restore


def slow_down(seconds: float) -> None:
    """Makes every batch take so long."""
    from easylm.trainers import fit

    batches_on = fit.batches_on

    def slow(*arguments):
        for batch in batches_on(*arguments):
            time.sleep(seconds)
            yield batch

    fit.batches_on = slow


if __name__ == "__main__":
    command = {"sft": sft.main, "dpo": dpo.main}[sys.argv.pop(1)]
    if parent.is_there:
        start_notes()
        slow_down(float(os.environ.get("STEP_SECONDS", "0")))
    run_on_hosts(command)
