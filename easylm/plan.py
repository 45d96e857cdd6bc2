"""Compiles a run's step for machines that are not there: does it fit, how fast?

python -m easylm.plan --config=CONFIG [--topology=v3-32] [--search | --smallest]

Exits 0 where it fits, 3 where it does not, 2 where that stays unknown. Speeds
are estimates.
"""

from collections.abc import Sequence

from easylm.command import run_command
from easylm.command_line import Flag, choose_class, parse_config
from easylm.errors import InputError
from easylm.planning.target import prepare_environment
from easylm.planning.topology import parse_generation, parse_topology
from easylm.trainers.config import DpoConfig, SftConfig

DOES_NOT_FIT_CODE = 3
_FLAGS = {
    "topology": Flag(
        str,
        "",
        "NAME",
        "A slice such as v3-256, or v3:8x16 in chips; cpu:8; gpu. With --smallest also a "
        "generation such as v3. By default the config's pod.",
    ),
    "search": Flag(
        bool, False, "", "Try meshes, micro-batches and remat policies; print what fits."
    ),
    "smallest": Flag(bool, False, "", "Find the smallest slice of a generation that it fits."),
    "budget_minutes": Flag(
        float,
        30.0,
        "N",
        "Minutes after which --search and --smallest start no compile. By default 30.",
    ),
    "json": Flag(bool, False, "", "Print values for machines on stdout."),
}


def main(argv: Sequence[str]) -> int:
    """Plans a run."""
    config_class = choose_class(argv, [SftConfig, DpoConfig])
    usage = "[--topology=NAME] [--search | --smallest]"
    config, named = parse_config(
        argv, config_class, "python -m easylm.plan", __doc__, usage=usage, own=_FLAGS
    )
    name, minutes, as_json = named["topology"] or config.pod, named["budget_minutes"], named["json"]
    if not name:
        raise InputError("--topology: not given, and the config names no pod; wanted one of both")
    if named["search"] and named["smallest"]:
        raise InputError("--search and --smallest: found both; wanted one, or none")
    if not minutes > 0:  # nor what is no number
        raise InputError(f"--budget_minutes: found {minutes:g}; wanted a number above 0")
    if named["smallest"]:
        slices = parse_generation(name)
        prepare_environment(slices[0])
    else:
        topology = parse_topology(name)
        prepare_environment(topology)
    # jax loads now, for those devices.
    from easylm.planning import answers

    if named["smallest"]:
        fits = answers.find_smallest(config, slices, minutes, as_json=as_json)
    elif named["search"]:
        fits = answers.search_ways(config, topology, minutes, as_json=as_json)
    else:
        fits = answers.plan_as_is(config, topology, as_json=as_json)
    return 0 if fits else DOES_NOT_FIT_CODE


if __name__ == "__main__":
    run_command(main)
