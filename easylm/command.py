"""The one process boundary: what a command's exceptions mean to the shell."""

import sys
import textwrap
from collections.abc import Callable, Sequence
from typing import NoReturn

from easylm.errors import InputError, PreemptedError

COLUMNS = 80
FAULT_CODE = 1
INPUT_ERROR_CODE = 2
PREEMPTED_CODE = 75  # EX_TEMPFAIL of sysexits.h: try again later
INTERRUPTED_CODE = 130  # 128 + SIGINT, what a shell reports for Ctrl-C


def run_command(main: Callable[[Sequence[str]], int | None]) -> NoReturn:
    """Calls `main` with the command line's arguments and leaves with its exit code.

    None counts as 0. An `InputError` prints one message on stderr and exits 2, a `PreemptedError`
    its message and exits 75, a `FloatingPointError` (a loss that is not finite) its message and
    exits 1. Ctrl-C exits 130 without a word. Any other exception is a fault of ours: Python prints
    its traceback, exit 1.
    """
    try:
        code = main(sys.argv[1:])
    except InputError as error:
        print(format_error(error), file=sys.stderr)
        code = INPUT_ERROR_CODE
    except PreemptedError as error:
        print(wrap_line(str(error)), file=sys.stderr)
        code = PREEMPTED_CODE
    except FloatingPointError as error:
        print(format_error(error), file=sys.stderr)
        code = FAULT_CODE
    except KeyboardInterrupt:
        code = INTERRUPTED_CODE
    sys.exit(code or 0)


def say(text: str) -> None:
    """A line for the person at the terminal, on stderr, at once."""
    print(text, file=sys.stderr, flush=True)


def format_error(error: Exception) -> str:
    """The message behind "error: ", wrapped at 80 columns; its own line breaks are kept.

    Only spaces are broken at, so a path or an option can be copied whole from the terminal.
    """
    return "\n".join(wrap_line(line) for line in f"error: {error}".splitlines())


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
