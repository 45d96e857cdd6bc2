"""What README.md and docs/ show is what the code takes."""

import pathlib
import re

import pytest

from easylm import config
from easylm.trainers.config import DpoConfig, SftConfig

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_every_page_is_reached_from_the_readme():
    readme = (ROOT / "README.md").read_text()
    for page in PAGES[1:]:
        assert f"(docs/{page.name})" in readme


def test_the_config_of_the_readme_is_one(tmp_path):
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (tmp_path / "my_run.py").write_text(block)
    read = config.from_config_dict(SftConfig, config.load(str(tmp_path / "my_run.py")).config)
    assert read.init_from == "meta-llama/Llama-2-7b-hf"
    assert read.batch_examples == 128


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_options_and_commands_that_are_shown_exist(page):
    text = page.read_text()
    known = {path for run in (SftConfig, DpoConfig) for path, _, _ in config.options(run)}
    for field in re.findall(r"--config\.([a-z_][\w.]*)", text):
        assert field in known, field
    for module in re.findall(r"python -m (easylm[\w.]*)", text):
        assert (ROOT / (module.replace(".", "/") + ".py")).is_file(), module


def test_continuous_integration_runs_the_test_command_of_the_readme():
    (command,) = re.findall(r"^    (bash scripts/\S+)$", (ROOT / "README.md").read_text(), re.M)
    assert command in (ROOT / ".ci" / "run").read_text()
