"""The command line of the commands that take a config: options, overrides and `--help`."""

import dataclasses
import os
import textwrap
from collections.abc import Mapping, Sequence
from typing import Generic, NamedTuple, NoReturn, TypeVar

from absl import flags
from ml_collections import config_dict, config_flags

from easylm.command import COLUMNS
from easylm.config import ConfigFile, Kind, from_config_dict, load, options, suggest, to_config_dict
from easylm.errors import InputError

_Config = TypeVar("_Config")


class Flag(NamedTuple):
    """An option of one command, beside --config and the fields of the config.

    Attributes:
      kind: bool, float or str.
      default: where it is not given.
      shown: what stands for its value in the help; nothing for a bool.
      text: what it does.
    """

    kind: type
    default: bool | float | str
    shown: str
    text: str


class CommandLine(NamedTuple, Generic[_Config]):
    """What a command line says: the checked config, and the folder for the results."""

    config: _Config
    workdir: str


WORKDIR = {"workdir": Flag(str, "", "DIR", "Folder for all results, local or gs://.")}


def parse_command_line(
    argv: Sequence[str],
    config_class: type[_Config],
    program: str,
    description: str,
    *,
    workdir_required: bool = True,
) -> CommandLine[_Config]:
    """Reads `--config=PATH|NAME --workdir=DIR [--config.FIELD=VALUE ...]`; the last value wins.

    Args:
      argv, config_class, program, description: as of `parse_config`.
      workdir_required: whether --workdir must be given; else it may be empty.
    Raises:
      InputError: as `parse_config`.
    """
    workdir = "--workdir=DIR" if workdir_required else "[--workdir=DIR]"
    config, named = parse_config(
        argv, config_class, program, description, usage=workdir, own=WORKDIR
    )
    if workdir_required:
        require_workdir(named["workdir"])
    return CommandLine(config, os.path.expanduser(named["workdir"]))


def require_workdir(given: str) -> str:
    """The folder that --workdir names, without a slash at its end.

    Raises:
      InputError: it names none.
    """
    if not given:
        raise InputError("--workdir: not given; wanted a folder (local or gs://) for the results")
    return os.path.expanduser(given).rstrip("/")


def parse_config(
    argv: Sequence[str],
    config_class: type[_Config],
    program: str,
    description: str,
    *,
    usage: str,
    own: Mapping[str, Flag],
) -> tuple[_Config, dict]:
    """Reads `--config=PATH|NAME`, overrides of its fields, and the command's own options.

    `--help` prints every option on stdout and exits 0; beside --config it shows what that file
    says about itself, and its values in place of the defaults.

    Args:
      argv: the arguments, without the program's name.
      config_class: the dataclass that the config fills.
      program: what is typed to start the command.
      description: what it does, for --help.
      usage: the command's own options as its usage shows them.
      own: the same by name.
    Returns:
      (the checked config, the values of the command's own options).
    Raises:
      InputError: an unknown option, or anything that `load` and `from_config_dict` refuse.
    """
    named, overrides = _split(argv, own)
    kinds = {path: kind for path, kind, _ in options(config_class)}
    file = load(named.config) if named.config else None
    config = file.config if file else to_config_dict(config_class)
    for argument in overrides:
        _override(config, argument, kinds, own)
    if named.help:
        usage = f"usage: {program} --config=PATH|NAME {usage} [--config.FIELD=VALUE ...]"
        _print_help(usage, description, config_class, config, file, own)
    if file is None:
        raise InputError(f"--config: not given; wanted a path or a name. See {program} --help")
    return from_config_dict(config_class, config), _values(named, own)


def own_options(argv: Sequence[str], own: Mapping[str, Flag]) -> dict:
    """The values of a command's own options by name, whatever else is wrong with its arguments.

    Raises:
      InputError: one of them has no value, or one of another kind.
    """
    named, _ = _split(argv, own)
    return _values(named, own)


def choose_class(argv: Sequence[str], config_classes: Sequence[type]) -> type:
    """Which of several classes the file that `--config` names fills; the first where none does.

    Args:
      argv: the arguments, without the program's name.
      config_classes: the dataclasses that the command takes.
    Raises:
      InputError: as `load`.
    """
    named, _ = _split(argv, {})
    fields = set(load(named.config).config) if named.config else set()
    for config_class in config_classes:
        if fields <= {field.name for field in dataclasses.fields(config_class)}:
            return config_class
    return config_classes[0]


def _split(argv: Sequence[str], own: Mapping[str, Flag]) -> tuple[flags.FlagValues, list[str]]:
    """The options proper, and the other arguments in their order."""
    # Whether a text is a number is checked later, to say so in the words of other errors.
    define = {str: flags.DEFINE_string, bool: flags.DEFINE_bool, float: flags.DEFINE_string}
    named = flags.FlagValues()
    named.set_gnu_getopt(True)
    flags.DEFINE_string("config", "", "", flag_values=named)
    flags.DEFINE_bool("help", False, "", short_name="h", flag_values=named)
    for name, flag in own.items():
        default = str(flag.default) if flag.kind is float else flag.default
        define[flag.kind](name, default, "", flag_values=named)
    try:
        _, *others = named(["", *argv], known_only=True)
    except flags.Error as error:
        raise InputError(str(error)) from None
    return named, others


def _values(named: flags.FlagValues, own: Mapping[str, Flag]) -> dict:
    """The values of a command's own options."""
    values = {name: named[name].value for name in own}
    for name, flag in own.items():
        if flag.kind is float:
            try:
                values[name] = float(values[name])
            except ValueError:
                raise InputError(f"--{name}: found {values[name]!r}; wanted a number") from None
    return values


def _override(
    config: config_dict.ConfigDict, argument: str, kinds: dict[str, Kind], own: Mapping[str, Flag]
) -> None:
    """Applies one `--config.FIELD=VALUE` to `config`."""
    name, equals, value = argument.partition("=")
    path = name.removeprefix("--config.")
    if path not in kinds or not name.startswith("--config."):
        fields = [f"--config.{known}" for known in kinds]
        if any(field.startswith(f"{name}.") for field in fields):
            raise InputError(f"{name}: found a section; wanted {name}.FIELD=VALUE")
        proper = ", ".join(f"--{one}" for one in ("config", *own, "help"))
        known = [*(f"--{one}" for one in own), *fields]
        raise InputError(
            f"{name}: no such option; wanted {proper} or "
            f"--config.FIELD=VALUE.{suggest(name.lstrip('-'), known)}"
        )
    if not equals:
        raise InputError(f"{name}: found no value; wanted {name}=VALUE")
    kind = kinds[path]
    if kind.optional and value.lower() == "none":
        section, _, field = path.rpartition(".")
        # absl has no way to write None, and a placeholder takes it only as an item.
        (config[section] if section else config)[field] = None
        return
    parsed = flags.FlagValues()
    try:
        config_flags.DEFINE_config_dict(
            "config", config, flag_values=parsed, sys_argv=["", argument]
        )
        parsed(["", argument])
    except flags.IllegalFlagValueError:
        raise InputError(f"{name}: found {value!r}; wanted {kind.wanted}") from None


def _print_help(
    usage: str,
    description: str,
    config_class: type,
    config: config_dict.ConfigDict,
    file: ConfigFile | None,
    own: Mapping[str, Flag],
) -> NoReturn:
    parts = [_fill(usage, "", "         "), description.strip()]
    if file:
        parts += [f"{file.path}:", file.docstring.strip()]
    parts += [
        "options:",
        _entry(
            "--config=PATH|NAME",
            "A Python config file, or the name of one in configs/ without .py.",
        ),
        *(
            _entry(f"--{name}={flag.shown}" if flag.shown else f"--{name}", flag.text)
            for name, flag in own.items()
        ),
        "fields, with their values{}:".format(" in this config" if file else " by default"),
    ]
    for path, kind, text in options(config_class):
        value = config
        for name in path.split("."):
            value = value[name]
        shown = str(value).lower() if value is None or kind.type is bool else str(value)
        parts.append(_entry(f"--config.{path}={shown}  ({kind.short})", text))
    print("\n".join(parts))
    raise SystemExit(0)


def _entry(head: str, text: str) -> str:
    return f"{_fill(head, '  ', '      ')}\n{_fill(text, '      ', '      ')}"


def _fill(text: str, first: str, rest: str) -> str:
    return textwrap.fill(
        text,
        COLUMNS,
        initial_indent=first,
        subsequent_indent=rest,
        break_long_words=False,
        break_on_hyphens=False,
    )
