"""The process boundary of a command that may run on several hosts at once."""

import sys
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn

from easylm import hosts
from easylm.command import FAULT_CODE, explained_exit, printed, run_command, say, wrap
from easylm.errors import PreemptedError
from easylm.hosts.flags import may_have_others
from easylm.hosts.link import parent
from easylm.hosts.supervise import supervise

# What may be the consequence of another host's loss waits so long for news of that, in seconds. An
# error that explains itself hardly is one.
_GRACE, _GRACE_EXPLAINED, _GRACE_OF_ALL = 3.0, 0.5, 30.0


def run_on_hosts(main: Callable[[Sequence[str]], int | None]) -> NoReturn:
    """As `easylm.command.run_command`, of a command that may be one of several hosts'.

    Then the command is a parent that starts itself once more, and only watches that child.
    """
    if parent.is_there:
        _run_child(main)
    if not may_have_others(sys.argv[1:]):
        run_command(main)
    verdict = supervise([sys.executable, *sys.orig_argv[1:]])
    if verdict.message:
        say(wrap(verdict.message))
    sys.exit(verdict.code)


def _run_child(main: Callable[[Sequence[str]], int | None]) -> NoReturn:
    """As `run_command`, but what goes wrong is told to the parent, which prints it on all hosts."""
    ending = ""
    try:
        code = printed(main) or 0
    except Exception as error:
        code, message = explained_exit(error)
        if message is None:
            parent.fail(traceback.format_exc().rstrip(), FAULT_CODE, grace=_GRACE)
        if not isinstance(error, PreemptedError):
            # All have a loss that is not finite at once; the first may still have to store it.
            waits = isinstance(error, FloatingPointError) and not hosts.is_first()
            parent.fail(message, code, grace=_GRACE_OF_ALL if waits else _GRACE_EXPLAINED)
        ending = message
    parent.tell(ended=code, message=ending)
    sys.exit(code)
