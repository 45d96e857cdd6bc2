"""What a compiled step sends between devices and moves in memory, from its program's text.

Collectives are counted as rings move them (Thakur et al. 2005, "Optimization of Collective
Communication Operations in MPICH"), per device.
"""

import re
from typing import NamedTuple

from easylm.planning.hlo_loops import trip_count
from easylm.planning.hlo_text import Computation, Instruction, Module, parse_module
from easylm.planning.hlo_traffic import traffic

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_UNCOUNTED = ("collective-broadcast", "ragged-all-to-all")


class Collective(NamedTuple):
    """All collectives of one kind.

    Attributes:
      kind: as XLA spells it.
      count: how many run in a step.
      payload: bytes of the larger of operand and result, a device, summed over a step.
      wire: bytes that leave a device in a step.
    """

    kind: str
    count: int
    payload: int
    wire: int


class ProgramCosts(NamedTuple):
    """What a program does once it runs.

    Attributes:
      collectives: those it has, one entry a kind.
      traffic: bytes of main memory that a device reads and writes, at least; see hlo_traffic.py.
    """

    collectives: tuple[Collective, ...]
    traffic: int


def program_costs(text: str) -> ProgramCosts:
    """Counts what a compiled program does on one device, loops as often as they run.

    Of a conditional, what is counted once is the collectives of the branch that sends most, and
    the traffic of the branch that moves least: traffic is a count from below.

    Args:
      text: `jax.stages.Compiled.as_text()`.
    Raises:
      ValueError: the text is no program, or it has a loop or a collective that cannot be counted.
    """
    module = parse_module(text)
    costs = _costs(module, module.computations[module.entry], {})
    return costs._replace(collectives=tuple(sorted(costs.collectives, key=_place)))


def _place(collective: Collective) -> int:
    return KINDS.index(collective.kind)


def _costs(module: Module, computation: Computation, known: dict) -> ProgramCosts:
    """Costs of a computation with all that it calls."""
    if computation.name in known:
        return known[computation.name]
    parts, started = [], set()
    for instruction in computation.instructions.values():
        parts += _called(module, computation, instruction, known)
        if instruction.opcode in ("while", "conditional", "call", "async-start"):
            continue
        collectives, continued = _collectives(module, computation, instruction, started)
        moved = traffic(module, computation, instruction, continued)
        parts.append(ProgramCosts(tuple(collectives), moved))
    known[computation.name] = _total(parts)
    return known[computation.name]


def _called(module: Module, computation: Computation, instruction: Instruction, known: dict):
    """Costs of the computations that an instruction runs, as often as it does."""

    def costs(name: str) -> ProgramCosts:
        return _costs(module, module.computations[name], known)

    if instruction.opcode == "while":
        trips = trip_count(module, computation, instruction)
        body, condition = (costs(instruction.attribute(key)) for key in ("body", "condition"))
        return [_times(body, trips), _times(condition, trips + 1)]
    if instruction.opcode == "conditional":
        branches = [costs(name) for name in instruction.branches()]
        most = max(branches, key=lambda branch: sum(c.wire for c in branch.collectives))
        return [ProgramCosts(most.collectives, min(branch.traffic for branch in branches))]
    if instruction.opcode == "call":
        return [costs(instruction.attribute("to_apply"))]
    if instruction.opcode == "async-start":
        return [costs(instruction.attribute("calls"))]
    return []


def _times(costs: ProgramCosts, times: int) -> ProgramCosts:
    collectives = (
        Collective(c.kind, c.count * times, c.payload * times, c.wire * times)
        for c in costs.collectives
    )
    return ProgramCosts(tuple(collectives), costs.traffic * times)


def _total(parts: list[ProgramCosts]) -> ProgramCosts:
    kinds = {}
    for part in parts:
        for kind, count, payload, wire in part.collectives:
            old = kinds.get(kind, Collective(kind, 0, 0, 0))
            kinds[kind] = Collective(
                kind, old.count + count, old.payload + payload, old.wire + wire
            )
    return ProgramCosts(tuple(kinds.values()), sum(part.traffic for part in parts))


def _collectives(
    module: Module, computation: Computation, instruction: Instruction, started: set[str]
) -> tuple[list[Collective], set[str]]:
    """Collectives that an instruction is, or has in its fusion.

    The TPU's compiler splits a collective over fusions, to run with what else they hold; each
    repeats it with the same channel. The first to come is the one that counts.

    Args:
      module, computation, instruction: `instruction` is of `computation`.
      started: channels that fusions of this computation had before; those of this one are added.
    Returns:
      (the collectives, names of those in the fusion that were started before)
    """
    if instruction.opcode != "fusion":
        kind = instruction.opcode.removesuffix("-start")
        if kind in _UNCOUNTED:
            raise ValueError(f"{instruction.name} of {computation.name}: cannot count a {kind}")
        counted = kind in KINDS
        return [_collective(module, computation, instruction, kind)] if counted else [], set()
    found, continued = [], set()
    fused = module.computations[instruction.attribute("calls")]
    for inner in fused.instructions.values():
        if inner.opcode == "fusion":
            found += _collectives(module, fused, inner, started)[0]
        elif inner.opcode in KINDS:
            channel = inner.attribute("channel_id")
            if channel in started:
                continued.add(inner.name)
            else:
                found.append(_collective(module, fused, inner, _fused_kind(fused, inner)))
                started.add(channel)
    return found, continued


def _fused_kind(fused: Computation, inner: Instruction) -> str:
    """The kind of a collective in a fusion.

    A reduce-scatter for the TPU is an all-reduce of which each device takes a slice.
    """
    users = fused.users[inner.name]
    scattered = bool(users) and all(user.opcode == "dynamic-slice" for user in users)
    return "reduce-scatter" if inner.opcode == "all-reduce" and scattered else inner.opcode


def _collective(
    module: Module, computation: Computation, instruction: Instruction, kind: str
) -> Collective:
    operands = (computation.instructions[name] for name in instruction.operands)
    size = sum(array.bytes for operand in operands for array in operand.arrays)
    if kind == "collective-permute":
        return Collective(kind, 1, size, size)
    group = _group_size(instruction.attributes, module.devices)
    if kind == "all-gather":
        return Collective(kind, 1, size * group, size * (group - 1))
    rounds = 2 if kind == "all-reduce" else 1
    return Collective(kind, 1, size, rounds * size * (group - 1) // group)


def _group_size(attributes: str, devices: int) -> int:
    """Devices of a group of a collective, from any of the ways that XLA writes groups.

    {{0,1},{2,3}} lists them, {} is all devices, [groups,size]<=[...] are rows of a reshaped
    and transposed range, mesh['x'=2,'y'=4] {'y'} are axes of a mesh, whole or (as 'y':(2)2) in
    part.
    """
    groups = re.search(r"\breplica_groups=(.*)", attributes).group(1)
    if iota := re.match(r"\[\d+,(\d+)\]<=", groups):
        return int(iota.group(1))
    if mesh := re.match(r"mesh\[(.*?)\](?:, device_ids=\S+)? \{(.*?)\}", groups):
        sizes = dict(re.findall(r"'([^']*)'=(\d+)", mesh.group(1)))
        size = 1
        for axis, part in re.findall(r"'([^']*)'(?::\(\d+\)(\d+))?", mesh.group(2)):
            size *= int(part or sizes[axis])
        return size
    if listed := re.match(r"\{\{([\d,]+)\}", groups):
        return len(listed.group(1).split(","))
    if groups.startswith("{}"):
        return devices
    raise ValueError(f"not a known way to write groups of devices: {groups[:100]}")
