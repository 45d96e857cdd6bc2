"""Runs of several hosts: processes of this machine that find each other at a port."""

import subprocess
from collections.abc import Mapping

from tests.bucket import free_port
from tests.runs import start


def start_hosts(
    arguments: list[str],
    count: int,
    *,
    devices: int = 4,
    module: str = "easylm.sft",
    own: Mapping[int, list[str]] = {},
    before: Mapping[int, list[str]] = {},
    **environment: str,
) -> list[subprocess.Popen]:
    """The same command in `count` processes, with so many virtual devices each.

    `own` are further arguments of some hosts, `before` what starts their command, by index.
    """
    coordinator = f"localhost:{free_port()}"
    flags = f"--xla_force_host_platform_device_count={devices}"
    return [
        start(
            [
                *arguments,
                f"--coordinator={coordinator}",
                f"--processes={count}",
                f"--process={index}",
                *own.get(index, []),
            ],
            program=("-m", module),
            before=before.get(index, []),
            XLA_FLAGS=flags,
            **environment,
        )
        for index in range(count)
    ]


def ends(hosts: list[subprocess.Popen]) -> list[tuple[int, str]]:
    """(exit code, stderr) of each, when all have ended."""
    printed = [host.communicate()[1] for host in hosts]
    return [(host.returncode, text) for host, text in zip(hosts, printed, strict=True)]
