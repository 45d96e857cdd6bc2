"""Packaging: the top-level folders install under one importable name.

`models/` installs as `easylm.models`, `trainers/` as `easylm.trainers`, and so on. In a source
checkout `easylm/__init__.py` finds the same folders beside itself, so both spell the same imports.
"""

from setuptools import find_packages, setup

FOLDERS = ("models", "trainers", "converters", "eval_bridge", "configs")

core = find_packages(include=["easylm", "easylm.*"])
mapped = find_packages(include=[pattern for f in FOLDERS for pattern in (f, f"{f}.*")])

setup(
    packages=core + [f"easylm.{package}" for package in mapped],
    package_dir={"easylm": "easylm", **{f"easylm.{f}": f for f in FOLDERS}},
    package_data={
        "easylm": ["py.typed"],
        "easylm.configs": ["quickstart/*"],
        "easylm.eval_bridge": ["*.json"],
    },
)
