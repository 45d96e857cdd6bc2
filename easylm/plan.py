"""Compiles the step of a run for machines that are not there: does it fit, how fast can it be?

python -m easylm.plan --config=CONFIG --topology=v3-256 [--search | --smallest]
"""

import json
import sys
from collections.abc import Sequence

from easylm.command import run_command, say
from easylm.command_line import Flag, choose_class, parse_config
from easylm.errors import InputError
from easylm.planning.target import prepare_environment, target_devices
from easylm.planning.topology import Topology, parse_topology
from easylm.trainers.config import DpoConfig, RunConfig, SftConfig

DOES_NOT_FIT_CODE = 3
_FLAGS = {
    "topology": Flag(
        str,
        "",
        "NAME",
        "A slice such as v3-256, or v3:8x16 in chips; cpu:8; gpu; with --smallest a generation "
        "such as v3. By default the config's pod.",
    ),
    "search": Flag(bool, False, "", "Try meshes, micro-batches and remat policies; fastest first."),
    "smallest": Flag(bool, False, "", "Find the smallest slice of the generation that fits."),
    "budget_minutes": Flag(float, 30.0, "N", "Start no compile of a search after so long."),
    "json": Flag(bool, False, "", "Print values for machines on stdout."),
}


def main(argv: Sequence[str]) -> int:
    """Plans a run; returns 0 where it fits and 3 where it does not."""
    kind = choose_class(argv, [SftConfig, DpoConfig])
    config, named = parse_config(
        argv,
        kind,
        "python -m easylm.plan",
        __doc__,
        usage="[--topology=NAME] [--search | --smallest]",
        own=_FLAGS,
    )
    name = named["topology"] or config.pod
    if not name:
        raise InputError("--topology: not given, and the config names no pod; wanted one of them")
    return plan_one(config, parse_topology(name), as_json=named["json"])


def plan_one(config: RunConfig, topology: Topology, *, as_json: bool) -> int:
    """Compiles the config as it is, and prints what came out."""
    prepare_environment(topology)
    devices = target_devices(topology)
    # jax is loaded now, for those devices.
    advice = lambda *a: []
    from easylm.planning.compiled import CACHE
    from easylm.planning.estimate import make_plan
    from easylm.planning.inputs import read_inputs
    from easylm.planning.report import as_values, report

    inputs = read_inputs(config)
    plan = make_plan(config, inputs, topology, devices, CACHE)
    overflow = plan.compiled.overflow
    what_to_do = [] if overflow is None else advice(config, inputs.model, plan.mesh, overflow)
    print(json.dumps(as_values(plan, what_to_do), indent=2) if as_json else report(plan, what_to_do))
    say(compiled_in(plan))
    return 0 if plan.fits else DOES_NOT_FIT_CODE


def compiled_in(plan) -> str:
    """How long the compiler took, in a line."""
    known = "; read from the cache now" if plan.was_known else ""
    return f"compiled in {plan.compiled.seconds:.1f} s{known}"


if __name__ == "__main__":
    run_command(main)
