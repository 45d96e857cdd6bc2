"""What a command may end with, apart from success and faults of its own."""


class InputError(ValueError):
    """The user's input, config or files are wrong.

    The message names what is wrong, where (file, line, field), what was found and what was wanted.
    A command prints it and exits with code 2 (`easylm.command.run_command`); there is no traceback.
    """


class PreemptedError(Exception):
    """The run was told to stop; what was done is saved, and the same command goes on.

    A command prints the message and exits with code 75.
    """


class UnavailableError(Exception):
    """A bucket did not answer, however often it was asked; it may later.

    A command prints the message and exits with code 1: the same command goes on from what is saved.
    """
