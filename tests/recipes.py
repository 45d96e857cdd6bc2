"""What a recipe says of itself, and what its step is on its pod."""

import json
import pathlib
import re
import subprocess
import sys

from easylm.config import load

ROOT = pathlib.Path(__file__).resolve().parent.parent


def docstring(name):
    """Of a config, named as for --config."""
    return load(name).docstring


def stated(name, pattern):
    """The one number that a docstring states in this place."""
    found = re.findall(pattern, docstring(name))
    assert len(found) == 1, f"{name}: {pattern}: {found}"
    return int(found[0].replace(",", ""))


def planned(name):
    """What the docstring has to say of the recipe's plan on its own pod."""
    results = json.loads((ROOT / "benchmarks" / "results" / "plans.json").read_text())
    (plan,) = (one["plan"] for one in results if (one["recipe"], one["overrides"]) == (name, {}))
    hours = plan["estimate"]["hours"]
    return (
        f"It takes {plan['memory']['total'] / 2**30:.1f} of the 15.5 GiB of a device",
        f"at least {hours:.{0 if hours >= 10 else 1}f} hours, an estimate",
    )


def trace(asked):
    """Config -> what tests/trace_recipes.py says of it.

    Args:
      asked: config -> preset (of its weights), devices (of its pod) and examples (of its data).
    """
    command = [sys.executable, "-m", "tests.trace_recipes", json.dumps(asked)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout)
