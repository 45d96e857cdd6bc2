"""The one error class of easylm."""


class InputError(ValueError):
    """The user's input, config or files are wrong.

    The message names what is wrong, where (file, line, field), what was found and what was wanted.
    A command prints it and exits with code 2 (`easylm.command.run_command`); there is no traceback.
    """
