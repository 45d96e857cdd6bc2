"""The one process boundary: what a command's exceptions mean to the shell."""

import contextlib
import os
import select
import sys
import textwrap
from collections.abc import Callable, Sequence
from typing import NoReturn

from easylm.errors import InputError, PreemptedError, UnavailableError

COLUMNS = 80
FAULT_CODE = 1
INPUT_ERROR_CODE = 2
PREEMPTED_CODE = 75  # EX_TEMPFAIL of sysexits.h: try again later
HOST_LOST_CODE = 76  # another host of the run is gone
INTERRUPTED_CODE = 130  # 128 + SIGINT, what a shell reports for Ctrl-C
BROKEN_PIPE_CODE = 141  # 128 + SIGPIPE


def run_command(main: Callable[[Sequence[str]], int | None]) -> NoReturn:
    """Calls `main` with the command line's arguments and leaves with its exit code.

    None counts as 0. An `InputError` prints one message on stderr and exits 2, a `PreemptedError`
    its message and exits 75, a `FloatingPointError` (a loss that is not finite) or an
    `UnavailableError` its message and exits 1. Without a word, Ctrl-C exits 130, and a reader of
    stdout that has left (`| head`) 141. Any other exception is a fault of ours: Python prints its
    traceback, exit 1.
    """
    try:
        code = printed(main)
    except (InputError, PreemptedError, UnavailableError, FloatingPointError) as error:
        code, message = explained_exit(error)
        say(wrap(message))
    except KeyboardInterrupt:
        with contextlib.suppress(BrokenPipeError):
            sys.stdout.flush()
        # At once: Python would wait for threads, and those of a save can take minutes. What they
        # have written is no checkpoint.
        os._exit(INTERRUPTED_CODE)
    except BrokenPipeError:
        if not _reader_has_left():
            raise
        # Python flushes stdout once more when it ends, and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = BROKEN_PIPE_CODE
    sys.exit(code or 0)


def explained_exit(error: Exception) -> tuple[int, str | None]:
    """(exit code, message) of an error that explains itself; no message where it is our fault."""
    if isinstance(error, InputError):
        return INPUT_ERROR_CODE, f"error: {error}"
    if isinstance(error, PreemptedError):
        return PREEMPTED_CODE, str(error)
    if isinstance(error, (FloatingPointError, UnavailableError)):
        return FAULT_CODE, f"error: {error}"
    return FAULT_CODE, None


def printed(main: Callable[[Sequence[str]], int | None]) -> int | str | None:
    """The exit code of `main`, once all that it printed has left this process."""
    try:
        code = main(sys.argv[1:])
    except SystemExit as left:  # of --help
        code = left.code
    sys.stdout.flush()
    return code


def _reader_has_left() -> bool:
    """Whether stdout is a pipe that nobody reads any more."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)  # errors alone
    return bool(poll.poll(0))


def say(text: str) -> None:
    """A line for the person at the terminal, on stderr, at once."""
    print(text, file=sys.stderr, flush=True)


def format_error(error: Exception) -> str:
    """What people see of an error that explains itself."""
    return wrap(f"error: {error}")


def wrap(text: str) -> str:
    """A message wrapped at 80 columns; its own line breaks are kept.

    Only spaces are broken at, so a path or an option can be copied whole from the terminal.
    """
    return "\n".join(map(wrap_line, text.splitlines()))


def wrap_line(line: str) -> str:
    """One line as several of at most 80 columns, the later ones indented under the first."""
    indent = line[: len(line) - len(line.lstrip())] + "  "
    return textwrap.fill(
        line,
        COLUMNS,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
        replace_whitespace=False,
        tabsize=4,
    )
