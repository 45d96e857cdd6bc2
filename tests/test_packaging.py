"""What a wheel of this tree holds, and that it works far from the checkout."""

import importlib.metadata
import itertools
import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile

import pytest

from tests import layering

ROOT = pathlib.Path(__file__).resolve().parent.parent


def run(*command, cwd=None, ok=True):
    result = subprocess.run(
        [str(part) for part in command], cwd=cwd, capture_output=True, text=True
    )
    if ok:
        assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    return result


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of what goes into a distribution; building leaves its traces there."""
    tree = tmp_path_factory.mktemp("tree")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for name in ("easylm", *layering.FOLDERS):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    return tree


@pytest.fixture(scope="module")
def distributions(tree, tmp_path_factory):
    """`(wheel, sdist)`, built by the backend itself with the setuptools of this environment."""
    target = tmp_path_factory.mktemp("dist")
    code = "import setuptools.build_meta as b, sys; print(getattr(b, sys.argv[1])(sys.argv[2]))"
    for kind in ("build_wheel", "build_sdist"):
        run(sys.executable, "-c", code, kind, target, cwd=tree)
    return next(target.glob("*.whl")), next(target.glob("*.tar.gz"))


@pytest.fixture(scope="module")
def installed(distributions, tmp_path_factory):
    """The python of an environment that holds the wheel and borrows the libraries of this one."""
    home = tmp_path_factory.mktemp("installed")
    run(sys.executable, "-m", "venv", "--without-pip", home)
    site = next(home.glob("lib/python*/site-packages"))
    with zipfile.ZipFile(distributions[0]) as wheel:
        wheel.extractall(site)
    # A .pth line that is a path only adds it: the editable install of the checkout, which is a
    # .pth file of its own over there, is not carried along.
    (site / "borrowed.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return home / "bin" / "python"


def test_the_wheel_installs_easylm_alone(distributions, tree):
    with zipfile.ZipFile(distributions[0]) as wheel:
        files = set(wheel.namelist())
    top = {name.split("/")[0] for name in files if ".dist-info/" not in name}
    assert top == {"easylm"}
    expected = {
        module.name.replace(".", "/") + ("/__init__.py" if is_package(module) else ".py")
        for module in layering.load_modules(tree)
    }
    assert expected == {name for name in files if name.endswith(".py")}
    assert "easylm/py.typed" in files
    for folder, pattern in (("configs/quickstart", "*"), ("eval_bridge", "*.json")):
        for data in (tree / folder).glob(pattern):
            assert f"easylm/{folder}/{data.name}" in files


def is_package(module):
    return module.path.name == "__init__.py"


def test_the_sdist_builds_the_same_wheel(distributions, tmp_path):
    wheel, sdist = distributions
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (unpacked,) = tmp_path.iterdir()
    code = "import setuptools.build_meta as b; print(b.build_wheel('rebuilt'))"
    run(sys.executable, "-c", code, cwd=unpacked)
    (rebuilt,) = (unpacked / "rebuilt").glob("*.whl")
    with zipfile.ZipFile(wheel) as first, zipfile.ZipFile(rebuilt) as second:
        assert sorted(first.namelist()) == sorted(second.namelist())


def test_every_module_imports_from_the_wheel(installed, tree, tmp_path):
    # Folders of the user's own with our folders' names must not get in the way.
    for folder in layering.FOLDERS:
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "__init__.py").write_text("raise ImportError('the wrong package')")
    names = [module.name for module in layering.load_modules(tree)]
    code = "import importlib, sys; [*map(importlib.import_module, sys.argv[1:])]; import easylm; "
    result = run(installed, "-c", code + "print(easylm.__path__)", *names, cwd=tmp_path)
    assert str(ROOT) not in result.stdout
    failed = run(installed, "-c", "import easylm.setup", cwd=tmp_path, ok=False)
    assert "No module named 'easylm.setup'" in failed.stderr


def test_commands_answer_from_another_folder(installed, tree, tmp_path):
    commands = [m.name for m in layering.load_modules(tree) if m.layer == "commands"]
    for command in commands:
        assert "usage" in run(installed, "-m", command, "--help", cwd=tmp_path).stdout.lower()


def test_what_is_imported_is_required():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = itertools.chain(
        project["dependencies"], *project["optional-dependencies"].values()
    )
    required = {re.match(r"[\w-]+", text)[0].lower().replace("_", "-") for text in requirements}
    distributions = importlib.metadata.packages_distributions()
    known = {*sys.stdlib_module_names, "easylm"}
    for module in layering.load_modules(ROOT):
        for name, line in layering.imported_names(module):
            package = name.split(".")[0]
            providers = {d.lower().replace("_", "-") for d in distributions.get(package, [])}
            assert package in known or providers & required, f"{module.path}:{line}: {name}"


@pytest.mark.slow
@pytest.mark.parametrize(("python", "jax"), [("3.11", "jax==0.10."), ("3.12", "jax==0.11.")])
def test_all_extras_resolve_together(python, jax):
    uv = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--system-certs"]
    result = run(*uv, "--python-version", python, "--all-extras", ROOT / "pyproject.toml", ok=False)
    if result.returncode and "error sending request" in result.stderr:
        pytest.skip("the package index does not answer")
    assert result.returncode == 0, result.stderr
    assert any(line.startswith(jax) for line in result.stdout.splitlines()), result.stdout
