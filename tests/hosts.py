"""Runs of several hosts: processes of this machine that find each other at a port."""

import subprocess

from tests.bucket import free_port
from tests.runs import start


def start_hosts(
    arguments: list[str], count: int, *, devices: int = 4, module: str = "easylm.sft", **environment
) -> list[subprocess.Popen]:
    """The same command in `count` processes, with so many virtual devices each."""
    coordinator = f"localhost:{free_port()}"
    flags = f"--xla_force_host_platform_device_count={devices}"
    return [
        start(
            [
                *arguments,
                f"--coordinator={coordinator}",
                f"--processes={count}",
                f"--process={index}",
            ],
            program=("-m", module),
            XLA_FLAGS=flags,
            **environment,
        )
        for index in range(count)
    ]


def ends(hosts: list[subprocess.Popen]) -> list[tuple[int, str]]:
    """(exit code, stderr) of each, when all have ended."""
    printed = [host.communicate()[1] for host in hosts]
    return [(host.returncode, text) for host, text in zip(hosts, printed, strict=True)]
