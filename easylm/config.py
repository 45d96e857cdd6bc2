"""Configs: frozen dataclasses hold the defaults, config files and the command line change them.

A config file is Python: `get_config()` takes `to_config_dict(SftConfig)`, changes what differs and
returns it. Behind `easylm.command_line` no ConfigDict exists any more, only checked dataclasses.
"""

import dataclasses
import difflib
import importlib.resources
import json
import math
import os
import pathlib
import re
import runpy
import sys
import traceback
import types
import typing
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, TypeVar

from ml_collections import config_dict

from easylm.errors import InputError

CONFIGS = pathlib.Path(str(importlib.resources.files("easylm.configs")))

_Config = TypeVar("_Config")


def option(default: Any, help: str) -> Any:
    """A field of a config dataclass: its default, and what `--help` says about it."""
    return dataclasses.field(default=default, metadata={"help": help})


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a field may hold: an int, float, str, bool or Literal of strings; or None as well."""

    type: type
    optional: bool
    choices: tuple[str, ...]

    @classmethod
    def of(cls, annotation) -> "Kind":
        kinds = [annotation]
        if isinstance(annotation, types.UnionType):
            kinds = [kind for kind in typing.get_args(annotation) if kind is not types.NoneType]
        choices = typing.get_args(kinds[0])
        return cls(str if choices else kinds[0], kinds != [annotation], choices)

    @property
    def wanted(self) -> str:
        names = {int: "an integer", float: "a finite number", str: "text", bool: "true or false"}
        wanted = "one of " + ", ".join(self.choices) if self.choices else names[self.type]
        return f"{wanted}, or none" if self.optional else wanted

    @property
    def short(self) -> str:
        name = "|".join(self.choices) or self.type.__name__
        return f"{name} or none" if self.optional else name

    def check(self, value, path: str):
        """`value` as this kind; an int where a float is wanted becomes one."""
        if value is None and self.optional:
            return None
        if self.type is float and type(value) is int and abs(value) <= sys.float_info.max:
            value = float(value)
        right = type(value) is self.type and (not self.choices or value in self.choices)
        if not right or (self.type is float and not math.isfinite(value)):
            raise InputError(f"{path}: found {value!r}; wanted {self.wanted}")
        return value


def _annotations(config_class: type) -> dict[str, Any]:
    hints = typing.get_type_hints(config_class)
    return {field.name: hints[field.name] for field in dataclasses.fields(config_class)}


def options(config_class: type, prefix: str = "") -> Iterator[tuple[str, Kind, str]]:
    """(dotted path, kind, help) of every field, those of the sections included."""
    annotations = _annotations(config_class)
    for field in dataclasses.fields(config_class):
        annotation = annotations[field.name]
        if dataclasses.is_dataclass(annotation):
            yield from options(annotation, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", Kind.of(annotation), field.metadata["help"]


def suggest(path: str, known: Iterable[str]) -> str:
    """A sentence naming the known paths whose last part resembles that of `path`, or nothing."""
    paths_by_end = {}
    for other in known:
        paths_by_end.setdefault(other.split(".")[-1], []).append(other)
    ends = difflib.get_close_matches(path.split(".")[-1], paths_by_end, n=2, cutoff=0.7)
    close = [other for end in ends for other in paths_by_end[end]]
    return f" Did you mean {' or '.join(close)}?" if close else ""


def to_config_dict(config: Any) -> config_dict.ConfigDict:
    """The defaults of a config class, or the values of a config, as a locked ConfigDict.

    A field that holds None becomes a typed placeholder, so it can be set to its type later.
    A class is not constructed: its required fields may still be empty.
    """
    annotations = _annotations(config if isinstance(config, type) else type(config))
    values = {}
    for field in dataclasses.fields(config):
        name, annotation = field.name, annotations[field.name]
        if not isinstance(config, type):
            value = getattr(config, name)
        elif field.default_factory is not dataclasses.MISSING:
            value = field.default_factory()
        else:
            value = field.default
        if dataclasses.is_dataclass(annotation):
            values[name] = to_config_dict(annotation if value is dataclasses.MISSING else value)
        elif value is None:
            values[name] = config_dict.placeholder(Kind.of(annotation).type)
        else:
            values[name] = value
    return config_dict.ConfigDict(values).lock()


def from_config_dict(config_class: type[_Config], config: config_dict.ConfigDict) -> _Config:
    """The checked dataclass of a ConfigDict; raises as `from_dict`."""
    return from_dict(config_class, config.to_dict())


def from_dict(config_class: type[_Config], values: dict, path: str = "config") -> _Config:
    """Builds `config_class` from nested plain values, as JSON holds them.

    Args:
      config_class: a config dataclass; its sections are dataclasses too.
      values: one entry for each field.
      path: in front of every field name in messages.
    Raises:
      InputError: an unknown or missing field, a value of the wrong type, or one that the
        dataclass refuses.
    """
    annotations = _annotations(config_class)
    for name in values.keys() - annotations.keys():
        raise InputError(f"{path}.{name}: no such field.{suggest(name, annotations)}")
    for name in annotations.keys() - values.keys():
        raise InputError(f"{path}.{name}: missing; start from to_config_dict(...)")
    fields = {}
    for name, annotation in annotations.items():
        here, value = f"{path}.{name}", values[name]
        if not dataclasses.is_dataclass(annotation):
            fields[name] = Kind.of(annotation).check(value, here)
        elif isinstance(value, dict):
            fields[name] = from_dict(annotation, value, here)
        else:
            raise InputError(f"{here}: found {value!r}; wanted the fields of a section")
    try:
        return config_class(**fields)
    except InputError as error:
        raise InputError(f"{path}.{error}") from None


def write_json(config: Any, path: str) -> None:
    """Writes a config as JSON to a local or gs:// file, whole or not at all.

    Raises:
      InputError: the file cannot be written.
    """
    from easylm import storage

    data = (json.dumps(dataclasses.asdict(config), indent=2) + "\n").encode()
    if storage.is_bucket(path):
        storage.write_bytes(path, data)  # an object appears whole
        return
    with storage.explained(path):
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    storage.write_bytes(f"{path}.tmp", data)
    os.replace(f"{path}.tmp", path)


def read_json(path: str) -> dict:
    """The plain values of the config that `write_json` wrote, perhaps of another version.

    Raises:
      InputError: no such file, or no JSON object; the message names the file.
    """
    from easylm import storage

    text = storage.read_bytes(path)
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:  # too deep, or an integer of too many digits
        raise InputError(f"{path}: found no JSON ({error})") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: found a {type(values).__name__}; wanted a JSON object")
    return values


def difference(
    old: dict, new: dict, path: str = "config", *, words: tuple[str, str] = ("before", "now")
) -> list[str]:
    """What differs between two configs, given as by `dataclasses.asdict`, sorted by path.

    One line for each field, such as "config.steps: 10 before, 20 now"; `words` name the two.
    """
    lines = []
    for name in sorted(old.keys() | new.keys()):
        here = f"{path}.{name}"
        before, now = old.get(name, "absent"), new.get(name, "absent")
        if isinstance(before, dict) and isinstance(now, dict):
            lines += difference(before, now, here, words=words)
        elif before != now:
            lines.append(f"{here}: {before} {words[0]}, {now} {words[1]}")
    return lines


def parse_mesh(shape: str) -> tuple[int, int, int]:
    """Reads "data,fsdp,tensor": three positive integers, at most one of them -1 (the rest)."""
    try:
        sizes = tuple(int(size) for size in shape.split(","))
    except ValueError:
        sizes = ()
    if len(sizes) != 3 or any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
        raise InputError(
            f"mesh: found {shape!r}; wanted data,fsdp,tensor: three positive integers, of which "
            "one may be -1 (all devices that are left), such as 1,-1,1"
        )
    return sizes


class ConfigFile(NamedTuple):
    """A config file that was run: where it is, what it says about itself, its values."""

    path: pathlib.Path
    docstring: str
    config: config_dict.ConfigDict


def load(path_or_name: str) -> ConfigFile:
    """Runs the config file at a path, or the one in configs/ of that name without `.py`.

    Raises:
      InputError: there is no such file, or it fails; the message names the line.
    """
    path = _find(path_or_name)
    try:
        return _run(path)
    except SyntaxError as error:
        raise InputError(f"{path}:{error.lineno}: {error.msg}") from None
    except InputError as error:
        raise InputError(f"{_line(path, error)}: {error}") from None
    except (AttributeError, ImportError, LookupError, NameError, TypeError, ValueError) as error:
        raise InputError(f"{_line(path, error)}: {type(error).__name__}: {_said(error)}") from None


def _run(path: pathlib.Path) -> ConfigFile:
    module = runpy.run_path(str(path))
    if "get_config" not in module:
        raise InputError("found no function get_config(); wanted one that returns a ConfigDict")
    config = module["get_config"]()
    if not isinstance(config, config_dict.ConfigDict):
        raise InputError(f"get_config() returned {config!r}; wanted a ConfigDict")
    return ConfigFile(path, module["__doc__"] or "", config)


def _said(error: Exception) -> str:
    """What an exception says; ml_collections wraps one, and shows all fields before its advice."""
    while error.args and isinstance(error.args[0], Exception):
        error = error.args[0]
    said = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    said = re.sub(r" Other fields present: .*?(?=\nDid you mean|\Z)", "", said, flags=re.DOTALL)
    return " ".join(said.split())


def _line(path: pathlib.Path, error: Exception) -> str:
    """path:line of the innermost frame of `error` that is in the file, or only the path."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == str(path)]
    return f"{path}:{lines[-1]}" if lines else str(path)


def _find(path_or_name: str) -> pathlib.Path:
    path = pathlib.Path(path_or_name)
    if path.suffix == ".py" and path.is_file():
        return path
    named = CONFIGS / f"{path_or_name}.py"
    if path.suffix != ".py" and named.is_file():
        return named
    names = [
        file.relative_to(CONFIGS).with_suffix("").as_posix()
        for file in sorted(CONFIGS.rglob("*.py"))
        if file.name != "__init__.py"
    ]
    raise InputError(
        f"--config: found no file {path_or_name!r} in {pathlib.Path.cwd()}; wanted the path of a "
        f"config file, or one of the names {', '.join(names)}"
    )
