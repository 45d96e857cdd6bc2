"""The house rules hold, and each of them can fail."""

import pathlib
import subprocess
import sys

import pytest

from tests import layering

ROOT = pathlib.Path(__file__).resolve().parent.parent
MODULES = layering.load_modules(ROOT)
COMMANDS = [module.name for module in MODULES if module.layer == "commands"]

# `--help`, config errors and bad data are answered from these before jax loads.
JAX_FREE = (
    "easylm.errors",
    "easylm.command",
    "easylm.config",
    "easylm.chat",
    "easylm.tokenizer",
    "easylm.data",
    "easylm.trainers.config",
    "easylm.models.llama.config",
    "easylm.models.llama.presets",
    "easylm.eval_bridge",
)


@pytest.mark.parametrize("rule", layering.RULES, ids=lambda rule: rule.__name__)
def test_the_tree_obeys(rule):
    violations = rule(MODULES)
    assert not violations, "\n".join(violations)


VIOLATIONS = {
    "a trainer imports a converter": (
        "imports_point_one_way",
        {"trainers/sft.py": "from easylm.converters import llama"},
        "trainers imports easylm.converters.llama (converters)",
    ),
    "the same by a relative import": (
        "imports_point_one_way",
        {"trainers/sft.py": "from ..converters.llama import import_weights"},
        "trainers imports easylm.converters.llama (converters)",
    ),
    "the core imports a model inside a function": (
        "imports_point_one_way",
        {"easylm/core.py": "def f():\n    import easylm.models.llama"},
        "core.py:2: core imports easylm.models.llama (models)",
    ),
    "a model imports a trainer": (
        "imports_point_one_way",
        {"models/llama/model.py": "from easylm.trainers.step import step"},
        "models imports easylm.trainers",
    ),
    "the core imports a command": (
        "imports_point_one_way",
        {"easylm/core.py": "from easylm import talk"},
        "core imports easylm.talk (commands)",
    ),
    "a command imports another": (
        "imports_point_one_way",
        {"easylm/other.py": "import easylm.talk\nif __name__ == '__main__':\n    pass"},
        "commands imports easylm.talk (commands)",
    ),
    "a command imports a run's config": (
        "imports_point_one_way",
        {"easylm/talk.py": "from easylm import configs\nif __name__ == '__main__':\n    pass"},
        "commands imports easylm.configs (configs)",
    ),
    "a core module needs the tests": (
        "imports_exist",
        {"easylm/core.py": "from easylm.tests import helpers"},
        "easylm.tests.helpers is not installed with the package",
    ),
    "a bare folder name": (
        "no_bare_folder_names",
        {"trainers/sft.py": "from models.llama import model"},
        "import easylm.models.llama.model, not models.llama.model",
    ),
    "a module named like a folder": (
        "no_core_module_hides_a_folder",
        {"easylm/models.py": ""},
        "hides the folder models/",
    ),
    "a package named like a folder": (
        "no_core_module_hides_a_folder",
        {"easylm/trainers/__init__.py": ""},
        "hides the folder trainers/",
    ),
    "a file of 501 lines": (
        "files_and_functions_are_short",
        {"easylm/core.py": "x = 1\n" * 501},
        "501 lines, at most 500",
    ),
    "a function of 81 lines": (
        "files_and_functions_are_short",
        {"easylm/core.py": "def f():\n" + "    x = 1\n" * 80},
        "f has 81 lines, at most 80",
    ),
    "a config field that nothing reads": (
        "config_fields_are_read",
        {
            "trainers/config.py": "import dataclasses\n@dataclasses.dataclass\n"
            "class RunConfig:\n    seed: int = 0\n    steps: int = 1\n"
            "    def __post_init__(self):\n        assert self.seed >= 0",
            "trainers/loop.py": "def run(config):\n    config.seed = 1\n    return config.steps",
        },
        "config.py:4: no code reads RunConfig.seed",
    ),
}


@pytest.mark.parametrize(("rule", "files", "expected"), VIOLATIONS.values(), ids=VIOLATIONS.keys())
def test_each_rule_can_fail(tmp_path, rule, files, expected):
    sound = {
        "easylm/__init__.py": "",
        "easylm/core.py": "import numpy",
        "easylm/talk.py": "from easylm.trainers import sft\nif __name__ == '__main__':\n    pass",
        "models/__init__.py": "",
        "models/llama/__init__.py": "",
        "models/llama/model.py": "from easylm import core",
        "trainers/__init__.py": "",
        "trainers/sft.py": "from easylm.models.llama import model\nfrom . import step",
        "trainers/step.py": "from easylm.core import numpy",
        "converters/__init__.py": "",
        "converters/llama.py": "from easylm.models.llama.model import core",
        "configs/__init__.py": "",
    }
    write_tree(tmp_path, sound)
    for check in layering.RULES:
        assert check(layering.load_modules(tmp_path)) == []

    write_tree(tmp_path, files)
    violations = getattr(layering, rule)(layering.load_modules(tmp_path))
    assert len(violations) == 1
    assert expected in violations[0]


def write_tree(root, files):
    for name, source in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(source)


def python(code, *args):
    return subprocess.run(
        [sys.executable, "-c", code, *args], cwd=ROOT, capture_output=True, text=True
    )


def test_importing_easylm_loads_neither_jax_nor_torch():
    result = python("import easylm, sys; print(sorted({'jax', 'torch'} & set(sys.modules)))")
    assert result.stdout.strip() == "[]", result.stderr


def test_every_module_imports_without_torch():
    names = [module.name for module in MODULES]
    assert len(names) > 10
    # torch is no requirement: whoever reads a .bin file or scores on a GPU imports it then.
    code = "import importlib, sys; sys.modules['torch'] = None; "
    result = python(code + "[*map(importlib.import_module, sys.argv[1:])]", *names)
    assert result.returncode == 0, result.stderr


def test_what_answers_before_jax_imports_none():
    names = [m.name for m in MODULES if m.name.startswith(JAX_FREE)]
    assert "easylm.errors" in names
    code = "import importlib, sys; sys.modules['jax'] = None; "
    result = python(code + "[*map(importlib.import_module, sys.argv[1:])]", *names)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_help_needs_no_heavy_library(command):
    code = (
        "import runpy, sys\n"
        "for name in ('jax', 'flax', 'torch', 'transformers', 'datasets', 'tensorflow_datasets'):\n"
        "    sys.modules[name] = None\n"
        "runpy.run_module(sys.argv.pop(1), run_name='__main__', alter_sys=True)"
    )
    result = python(code, command, "--help")
    assert result.returncode == 0, result.stderr
    assert "usage" in result.stdout.lower()


@pytest.mark.parametrize("folder", layering.FOLDERS)
def test_ruff_bans_the_bare_name_everywhere(folder):
    source = f"import {folder}\nfrom {folder}.some import thing\nimport easylm.{folder}\n"
    command = [sys.executable, "-m", "ruff", "check", "--select=TID251", "--output-format=concise"]
    options = ["--stdin-filename=tests/bare.py", "-"]
    result = subprocess.run(
        [*command, *options], cwd=ROOT, input=source, capture_output=True, text=True
    )
    assert result.stdout.count(f"Import `easylm.{folder}`") == 2, result.stdout + result.stderr
