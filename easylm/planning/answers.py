"""The questions that plan answers: does it fit, in which other ways does it run, on how little?"""

import dataclasses
import json
from collections.abc import Sequence

from easylm.command import say
from easylm.devices import DEVICES
from easylm.errors import InputError
from easylm.planning.advice import advice
from easylm.planning.candidates import Candidate
from easylm.planning.estimate import Plan, make_plan
from easylm.planning.found import search_records, search_table
from easylm.planning.inputs import Inputs, read_inputs
from easylm.planning.report import as_values, report
from easylm.planning.search import Budget, search, smallest_slice
from easylm.planning.target import target_devices
from easylm.planning.topology import Topology
from easylm.trainers.config import RunConfig


def plan_as_is(config: RunConfig, topology: Topology, *, as_json: bool) -> bool:
    """Compiles the config as it is and prints what came of it; returns whether it fits.

    Raises:
      InputError: the compiler cannot compile it.
    """
    devices = target_devices(topology)
    plan = make_plan(config, read_inputs(config), topology, devices)
    if plan.refusal:
        raise InputError(
            f"mesh={config.mesh} on {topology.name}: the compiler has no way to compile this step "
            f"({plan.refusal}); wanted another mesh, micro_batches or remat. --search finds those "
            "that it compiles"
        )
    _show(plan, as_json=as_json)
    return plan.fits


def search_ways(config: RunConfig, topology: Topology, minutes: float, *, as_json: bool) -> bool:
    """Compiles other ways to run the config and prints those that fit; returns whether any does.

    Raises:
      InputError: the time was used up before any was found, or all were known not to fit.
      KeyboardInterrupt: Ctrl-C, once what was found until then is printed.
    """
    devices = target_devices(topology)
    inputs = _by_seq_len(config)

    def plan_of(one: Candidate) -> Plan:
        return make_plan(one.apply(config), inputs[one.seq_len], topology, devices)

    found = search(
        config,
        inputs[config.data.seq_len].model,
        num_devices=len(devices),
        device=DEVICES.get(devices[0].device_kind),
        batch_rows={seq_len: of.stream.batch_rows for seq_len, of in inputs.items()},
        plan_of=plan_of,
        budget=Budget(minutes),
    )
    print(json.dumps(search_records(found)) if as_json else search_table(found, config), flush=True)
    if found.is_interrupted:
        raise KeyboardInterrupt
    if found.untried and not found.fitting:
        tried = f"none of {found.too_large + found.refused} compiled ways to run it fits"
        raise _out_of_time(minutes, f"{tried}, {found.untried} were not tried")
    return bool(found.fitting)


def find_smallest(
    config: RunConfig, slices: Sequence[Topology], minutes: float, *, as_json: bool
) -> bool:
    """Prints the plan of the smallest slice that fits; returns whether there is one.

    Raises:
      InputError: the time was used up before it was found, or known that there is none.
    """
    inputs = _by_seq_len(config)

    def plan_of(topology: Topology, one: Candidate) -> Plan:
        devices = target_devices(topology)
        return make_plan(one.apply(config), inputs[one.seq_len], topology, devices)

    found = smallest_slice(
        config,
        inputs[config.data.seq_len].model,
        slices=slices,
        device=DEVICES.get(slices[0].device_kind),
        batch_rows={seq_len: of.stream.batch_rows for seq_len, of in inputs.items()},
        plan_of=plan_of,
        budget=Budget(minutes),
    )
    if found.found is None:
        if as_json:
            fits = None if found.is_over else False
            print(json.dumps({"fits": fits, "tried": found.tried}), flush=True)
        tried = f"it fits none of {', '.join(found.tried)}" if found.tried else "no slice was tried"
        if found.is_over:
            raise _out_of_time(minutes, tried)
        say(tried)
        return False
    candidate, plan = found.found
    _show(plan, as_json=as_json)
    if not as_json:
        options = [f"--topology={found.topology.name}", *candidate.overrides(config)]
        print("\n".join(["", "the smallest slice that it fits:", *(f"  {one}" for one in options)]))
    return True


def _out_of_time(minutes: float, tried: str) -> InputError:
    """The error of a question that is left open."""
    return InputError(
        f"--budget_minutes: found {minutes:g}, which is used up, and whether the run fits is not "
        f"known: {tried}; wanted more"
    )


def _by_seq_len(config: RunConfig) -> dict[int, Inputs]:
    """The run's inputs for its rows, and for shorter ones that no example is too long for."""
    inputs = read_inputs(config)
    by_seq_len = {config.data.seq_len: inputs}
    longest = inputs.stream.segment_lengths.sum(axis=1).max()
    seq_len = config.data.seq_len // 2
    while config.batch_examples is not None and longest <= seq_len:
        data = dataclasses.replace(config.data, seq_len=seq_len)
        by_seq_len[seq_len] = read_inputs(dataclasses.replace(config, data=data))
        seq_len //= 2
    return by_seq_len


def _show(plan: Plan, *, as_json: bool) -> None:
    changes = _changes(plan)
    print(json.dumps(as_values(plan, changes), indent=2) if as_json else report(plan, changes))
    known = ", in an earlier call" if plan.was_known else ""
    say(f"compiled in {plan.compiled.seconds:.1f} s{known}")


def _changes(plan: Plan) -> list[str]:
    """What to change where the compiler found no room."""
    overflow = plan.compiled.overflow
    if overflow is None:
        return []
    return advice(
        plan.config,
        plan.inputs.model,
        plan.mesh,
        overflow,
        rows=plan.inputs.stream.batch_rows,
        topology=plan.topology,
    )
