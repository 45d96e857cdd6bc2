"""Configs: defaults in one place, every wrong value refused with its path, one JSON round trip."""

import dataclasses
import subprocess
import sys
from typing import Literal

import pytest

from easylm import config
from easylm.command_line import Flag, choose_class, parse_command_line, parse_config
from easylm.config import difference, from_config_dict, from_dict, option, to_config_dict
from easylm.errors import InputError
from tests.bucket import running_bucket


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inner:
    """A section."""

    rate: float = option(0.5, "A rate.")
    limit: float | None = option(None, "A limit.")
    kind: Literal["big", "small"] = option("big", "A kind.")

    def __post_init__(self):
        if self.rate < 0:
            raise InputError(f"rate: found {self.rate}; wanted 0 or more")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outer:
    """A whole config."""

    name: str = option("", "A name, which must be given.")
    steps: int | None = option(None, "Steps.")
    fast: bool = option(False, "Whether.")
    inner: Inner
    other: Inner = dataclasses.field(default_factory=lambda: Inner(rate=0.25))

    def __post_init__(self):
        if not self.name:
            raise InputError("name: not given")


FILE = '''
"""What this run is for."""
from easylm.config import to_config_dict
from tests.test_config import Outer

def get_config():
    config = to_config_dict(Outer)
    config.name = "from file"
    config.steps = 7
    {line}
    return config
'''


@pytest.fixture
def config_file(tmp_path):
    def write(line=""):
        path = tmp_path / "run.py"
        path.write_text(FILE.format(line=line))
        return str(path)

    return write


def parse(path, *overrides):
    argv = [f"--config={path}", "--workdir=out", *overrides]
    return parse_command_line(argv, Outer, "python -m program", "Does it.").config


def refusal(path, *overrides):
    with pytest.raises(InputError) as error:
        parse(path, *overrides)
    return str(error.value)


def test_a_class_gives_its_defaults_and_a_config_its_values():
    defaults = to_config_dict(Outer)
    assert defaults.to_dict() == {
        "name": "",
        "steps": None,
        "fast": False,
        "inner": {"rate": 0.5, "limit": None, "kind": "big"},
        "other": {"rate": 0.25, "limit": None, "kind": "big"},
    }
    made = Outer(name="x", steps=3, inner=Inner(limit=2.0))
    assert from_config_dict(Outer, to_config_dict(made)) == made


def test_a_config_dict_takes_only_its_own_fields_and_types():
    values = to_config_dict(Outer)
    values.steps = 3
    values.inner.limit = 2  # an int where a float is wanted
    with pytest.raises(AttributeError):
        values.step = 3
    with pytest.raises(TypeError):
        values.steps = "3"
    values.name = "x"
    made = from_config_dict(Outer, values)
    assert made.steps == 3
    assert (made.inner.limit, type(made.inner.limit)) == (2.0, float)


def test_the_command_line_wins_over_the_file(config_file):
    path = config_file()
    assert parse(path).steps == 7
    found = parse(path, "--config.steps=9", "--config.inner.rate=1e-3", "--config.fast=true")
    assert (found.steps, found.inner.rate, found.fast) == (9, 1e-3, True)
    assert parse(path, "--config.steps=9", "--config.steps=11").steps == 11
    assert parse(path, "--config.steps=none").steps is None
    assert parse(path, "--config.inner.limit=3").inner.limit == 3.0
    assert parse(path, "--config.name=gs://a,gs://b@0.5").name == "gs://a,gs://b@0.5"
    assert parse(path, "--config.name=none").name == "none"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Another:
    """Without `steps`."""

    name: str = option("", "A name.")
    inner: Inner


def test_a_command_of_several_kinds_takes_the_one_of_the_file(config_file):
    argv = ["--config.steps=9", f"--config={config_file()}"]
    assert choose_class(argv, [Another, Outer]) is Outer
    assert choose_class(argv, [Outer, Another]) is Outer
    assert choose_class(argv, [Another]) is Another
    assert choose_class(["--help"], [Another, Outer]) is Another


def test_overrides_before_the_config_count_too(config_file):
    argv = ["--config.steps=9", "--workdir", "out", "--config", config_file()]
    assert parse_command_line(argv, Outer, "p", "d") == (parse(config_file(), argv[0]), "out")


@pytest.mark.parametrize(
    "override, expected",
    [
        ("--config.inner.rat=1", "--config.inner.rat: no such option"),
        ("--config.inner.rat=1", "Did you mean --config.inner.rate or --config.other.rate?"),
        ("--rate=1", "Did you mean --config.inner.rate"),
        ("--config.inner=1", "--config.inner: found a section; wanted --config.inner.FIELD=VALUE"),
        ("--config.steps.x=1", "--config.steps.x: no such option"),
        ("--config.steps", "--config.steps: found no value; wanted --config.steps=VALUE"),
        ("--config.steps=1.5", "--config.steps: found '1.5'; wanted an integer, or none"),
        ("--config.inner.rate=fast", "--config.inner.rate: found 'fast'; wanted a finite number"),
        ("--config.inner.rate=none", "--config.inner.rate: found 'none'; wanted a finite number"),
        ("--config.inner.rate=nan", "config.inner.rate: found nan; wanted a finite number"),
        ("--config.fast=maybe", "--config.fast: found 'maybe'; wanted true or false"),
        ("--config.inner.kind=tall", "config.inner.kind: found 'tall'; wanted one of big, small"),
        ("--config.inner.rate=-1", "config.inner.rate: found -1.0; wanted 0 or more"),
        ("--config.name=", "config.name: not given"),
        ("stray", "stray: no such option"),
        ("--workdir=", "--workdir: not given"),
        ("--workdir", "Missing value for flag --workdir"),
    ],
)
def test_a_wrong_option_is_refused_by_name(config_file, override, expected):
    assert expected in refusal(config_file(), override)


@pytest.mark.parametrize(
    "line, expected",
    [
        (
            "config.inner.rat = 1",
            'run.py:10: AttributeError: Key "rat" does not exist and cannot be added since '
            'the config is locked. Did you mean "rate"',
        ),
        ("config.steps = 'many'", "run.py:10: TypeError: "),
        ("config.inner.rate = -1", "config.inner.rate: found -1.0; wanted 0 or more"),
        ("undefined", "run.py:10: NameError: "),
        ("import no_such_module", "run.py:10: ModuleNotFoundError: "),
        ("return 5", "run.py: get_config() returned 5; wanted a ConfigDict"),
        ("return to_config_dict(Outer(", "run.py:10: '(' was never closed"),
        ("Outer(inner=None)", "run.py:10: name: not given"),
    ],
)
def test_a_wrong_config_file_is_refused_by_line(config_file, line, expected):
    assert expected in refusal(config_file(line))


def test_a_config_file_for_another_command_is_refused(tmp_path):
    path = tmp_path / "other.py"
    path.write_text(
        "from ml_collections import ConfigDict\n"
        "def get_config():\n    return ConfigDict({'nam': 'x', 'steps': 1})\n"
    )
    assert "config.nam: no such field. Did you mean name?" in refusal(path)
    path.write_text("x = 1\n")
    assert "other.py: found no function get_config()" in refusal(path)


def test_no_config_or_none_of_that_name():
    with pytest.raises(InputError, match="--config: not given; wanted a path or a name"):
        parse_command_line(["--workdir=x"], Outer, "p", "d")
    message = refusal("sft/quikstart")
    assert "sft/quikstart" in message
    assert "one of the names" in message
    assert "sft/quickstart" in message


def test_help_shows_every_field_in_80_columns(config_file, capsys):
    with pytest.raises(SystemExit) as leave:
        parse_command_line(["--help"], Outer, "python -m program", "Does it.")
    shown = capsys.readouterr().out
    assert leave.value.code == 0
    assert max(map(len, shown.splitlines())) <= 80
    for part in (
        "usage: python -m program --config=",
        "Does it.",
        "--config.steps=none  (int or none)",
        "--config.inner.rate=0.5  (float)\n      A rate.",
        "--config.other.rate=0.25  (float)",
        "--config.inner.kind=big  (big|small)",
        "--config.fast=false  (bool)",
    ):
        assert part in shown


def test_help_beside_a_config_shows_what_it_says_and_sets(config_file, capsys):
    with pytest.raises(SystemExit):
        parse_command_line(["-h", f"--config={config_file()}"], Outer, "p", "Does it.")
    shown = capsys.readouterr().out
    assert "What this run is for." in shown
    assert "--config.steps=7  (int or none)" in shown


def test_help_of_the_training_options_is_quick_and_loads_no_jax():
    code = (
        "import sys\n"
        "from easylm.command_line import parse_command_line\n"
        "from easylm.trainers.config import SftConfig\n"
        "try:\n"
        "    parse_command_line(['--help'], SftConfig, 'p', 'd')\n"
        "finally:\n"
        "    heavy = {'jax', 'torch', 'transformers', 'datasets'} & set(sys.modules)\n"
        "    assert not heavy, heavy\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "--config.optimizer.learning_rate=" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80


OWN = {
    "place": Flag(str, "here", "NAME", "A place."),
    "minutes": Flag(float, 1.5, "N", "Minutes."),
    "loud": Flag(bool, False, "", "Whether it is loud."),
}


def parse_own(*argv):
    return parse_config(argv, Outer, "python -m program", "Does it.", usage="[--loud]", own=OWN)


def test_a_command_has_options_of_its_own(config_file):
    path = f"--config={config_file()}"
    made, own = parse_own(path)
    assert own == {"place": "here", "minutes": 1.5, "loud": False} and made.steps == 7
    # Anywhere among the others; the last value counts.
    made, own = parse_own("--loud", path, "--minutes=3", "--config.steps=9", "--minutes=0.25")
    assert own == {"place": "here", "minutes": 0.25, "loud": True} and made.steps == 9
    for argument, said in {
        "--minutes=soon": "--minutes: found 'soon'; wanted a number",
        "--loud=perhaps": "Non-boolean argument to boolean flag",
        "--minuets=3": "--minuets: no such option; wanted --config, --place, --minutes, --loud, "
        "--help or --config.FIELD=VALUE. Did you mean --minutes?",
        "--workdir=x": "--workdir: no such option",
    }.items():
        with pytest.raises(InputError) as error:
            parse_own(path, argument)
        assert said in str(error.value)


def test_help_shows_a_commands_own_options(capsys):
    with pytest.raises(SystemExit):
        parse_own("--help")
    shown = capsys.readouterr().out
    assert "usage: python -m program --config=PATH|NAME [--loud] [--config.FIELD=VALUE" in shown
    assert "\n  --place=NAME\n      A place.\n" in shown
    assert "\n  --loud\n      Whether it is loud.\n" in shown
    assert "--workdir" not in shown


def test_json_gives_the_same_config_back(tmp_path):
    made = Outer(name="x", steps=3, inner=Inner(rate=0.1 + 0.2, limit=1e-12))
    path = str(tmp_path / "new" / "config.json")
    config.write_json(made, path)
    assert config.from_dict(Outer, config.read_json(path)) == made
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["config.json"]


def test_json_in_a_bucket():
    made = Outer(name="x", inner=Inner())
    with running_bucket() as bucket:
        config.write_json(made, f"{bucket}/run/config.json")
        assert config.from_dict(Outer, config.read_json(f"{bucket}/run/config.json")) == made


def test_wrong_json_is_refused_with_the_file(tmp_path):
    path = tmp_path / "config.json"
    for wrong, expected in [
        ("{", "config.json: found no JSON"),
        ("[]", "config.json: found a list; wanted a JSON object"),
        ("[" * 100_000, "config.json: found no JSON (maximum recursion depth"),
        ('{"steps": ' + "9" * 5000 + "}", "config.json: found no JSON (Exceeds the limit"),
        ('{"name": "\udcff"}', "config.json: found no JSON ('utf-8' codec"),
    ]:
        path.write_bytes(wrong.encode(errors="surrogateescape"))
        with pytest.raises(InputError, match="config") as error:
            config.read_json(str(path))
        assert expected in str(error.value)
    with pytest.raises(InputError, match="no_such"):
        config.read_json(str(tmp_path / "no_such.json"))


def test_wrong_values_are_refused_by_their_path():
    values = dataclasses.asdict(Outer(name="x", inner=Inner()))
    for wrong, expected in [
        (values | {"steps": True}, "config.steps: found True; wanted"),
        (values | {"inner": 3}, "config.inner: found 3; wanted the fields of a section"),
        ({"name": "x"}, "missing"),
        (values | {"inner": values["inner"] | {"rate": 10**400}}, "config.inner.rate: found 1000"),
    ]:
        with pytest.raises(InputError) as error:
            config.from_dict(Outer, wrong)
        assert expected in str(error.value)


def test_difference_lists_the_paths():
    old = dataclasses.asdict(Outer(name="x", steps=3, inner=Inner()))
    new = dataclasses.asdict(Outer(name="x", steps=4, inner=Inner(rate=0.1)))
    assert difference(old, old) == []
    assert difference(old, new) == [
        "config.inner.rate: 0.5 before, 0.1 now",
        "config.steps: 3 before, 4 now",
    ]
    assert difference(old | {"gone": None}, old) == ["config.gone: None before, absent now"]


@pytest.mark.parametrize("mesh", ["1,-1,1", "2,2,2", "-1,16,16"])
def test_a_mesh(mesh):
    assert config.parse_mesh(mesh) == tuple(int(size) for size in mesh.split(","))


@pytest.mark.parametrize("mesh", ["", "8", "1,2", "1,2,3,4", "a,b,c", "0,1,1", "-1,-1,1", "-2,1,1"])
def test_no_mesh(mesh):
    with pytest.raises(InputError, match=r"mesh: found .* wanted data,fsdp,tensor"):
        config.parse_mesh(mesh)


def test_an_unknown_field_in_values_is_refused():
    values = dataclasses.asdict(Outer(name="x", inner=Inner()))
    with pytest.raises(InputError, match=r"config.inner.rat: no such field. Did you mean rate\?"):
        from_dict(Outer, values | {"inner": {**values["inner"], "rat": 1}})


def test_an_int_serves_where_a_float_is_wanted():
    values = dataclasses.asdict(Outer(name="x", inner=Inner())) | {"inner": {"rate": 1, "limit": 2}}
    values["inner"]["kind"] = "small"
    made = from_dict(Outer, values).inner
    assert (made.rate, type(made.rate), made.limit, type(made.limit)) == (1.0, float, 2.0, float)
