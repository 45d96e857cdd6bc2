"""A plan as text of at most 80 columns, and as plain values."""

import math
import textwrap
from collections.abc import Sequence

from easylm.command import COLUMNS, wrap_line
from easylm.planning.compiled import compiler
from easylm.planning.estimate import Plan
from easylm.planning.overflow import Overflow
from easylm.planning.roofline import Roofline
from easylm.trainers.config import DpoConfig

_BAR = 25
# Of the temporaries, so many are shown, if each takes at least this share of what is needed.
_SHOWN, _LEAST = 8, 0.01


def report(plan: Plan, advice: Sequence[str]) -> str:
    """What a person wants to know, in at most 80 columns, but for paths longer than that.

    Args:
      plan: of a run.
      advice: what to change where it does not fit.
    """
    overflow = plan.compiled.overflow
    if overflow is None:
        parts = [_run(plan), _memory(plan), _flops(plan), _collectives(plan), _time(plan)]
    else:
        parts = [_run(plan), _memory(plan), _temporaries(overflow)]
    if not plan.fits:
        parts.append(_advice(advice))
    return "\n\n".join(parts)


def _run(plan: Plan) -> str:
    config, stream = plan.config, plan.inputs.stream
    lengths = stream.segment_lengths.sum(axis=1)
    axes = ", ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
    usable = "" if plan.usable is None else f", {_size(plan.usable)} usable on each"
    filling = plan.rows - stream.batch_rows
    empty = f", and {_count(filling, 'empty row')}" if filling else ""
    lines = {
        "devices": f"{plan.topology.name}: {plan.num_devices} x {plan.device_kind}{usable}",
        "model": f"{plan.parameters:,} parameters in {config.param_dtype}, {config.init_from}",
        "data": f"{_count(len(lengths), plan.inputs.noun)} of {lengths.mean():,.0f} tokens on "
        f"average, {plan.inputs.origin}",
        "a step": f"{plan.tokens:,.0f} tokens in {_count(stream.batch_rows, 'row')} of "
        f"{stream.seq_len:,}{empty}",
        "run": _count(len(stream), "step"),
        "mesh": f"{axes}; {_count(config.micro_batches, 'micro-batch', 'es')}; "
        f"remat={config.remat}",
        "attention": plan.attention,
    }
    return "\n".join(
        textwrap.fill(
            text,
            COLUMNS,
            initial_indent=f"  {name:<11}",
            subsequent_indent=" " * 13,
            break_long_words=False,
            break_on_hyphens=False,
        )
        for name, text in lines.items()
    )


def _memory(plan: Plan) -> str:
    total = plan.total_bytes
    text = [f"  {name:<13}{_size(size, total)}" for name, size in _parts(plan).items()]
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    line = f"  {'total':<13}{_size(total, total)}"
    if plan.usable is not None:
        share = total / plan.usable
        filled = "#" * min(_BAR, round(share * _BAR))
        percent = f"{share:>6.1%}" if share < 10 else f"{share:.0%}"
        line += f"  [{filled:.<{_BAR}}] {percent} {verdict}"
    head = f"memory of a device, by the compiler ({compiler(plan.topology)})"
    return "\n".join([head, *text, line])


def _parts(plan: Plan) -> dict[str, int]:
    """Bytes of a device by what they are for.

    They add up to the total, which the compiler rounds to 0.01 GiB where it found no room.
    """
    found, state = plan.compiled, plan.state
    arguments, temporaries = _arguments(plan), _temporary_bytes(plan)
    return {
        "parameters": state.params,
        "optimizer": state.opt_state,
        "batch": state.batch,
        # Tiles of the device's memory are not always full.
        "layout": arguments - state.params - state.opt_state - state.batch,
        "temporaries": temporaries,
        "program": max(0, found.total - arguments - temporaries),
    }


def _arguments(plan: Plan) -> int:
    overflow = plan.compiled.overflow
    return plan.compiled.arguments if overflow is None else overflow.arguments


def _temporary_bytes(plan: Plan) -> int:
    overflow = plan.compiled.overflow
    return plan.compiled.temporaries if overflow is None else overflow.temporaries


def _temporaries(overflow: Overflow) -> str:
    large = [one for one in overflow.largest if one.size * one.count > _LEAST * overflow.needed]
    if not large:
        return "no temporary takes 1% of it: what is large are the lines above it"
    lines = ["the largest temporaries at the peak, and the lines that make them"]
    for one in large[:_SHOWN]:
        times = f"{one.count} x " if one.count > 1 else ""
        lines.append(f"  {_size(one.size * one.count, overflow.needed)}  {times}{one.shape}")
        lines.append(f"{'':17}{_end(one.source, COLUMNS - 17)}")
    return "\n".join(lines)


def _end(text: str, width: int) -> str:
    """The end of a text that is longer; operations of jax are, and begin alike."""
    return text if len(text) <= width else f"...{text[3 - width :]}"


def _advice(advice: Sequence[str]) -> str:
    known = advice or [
        "what fills it is known for TPUs alone; try more micro_batches, remat=block, a mesh that "
        "splits more, a smaller loss_chunk"
    ]
    return "\n".join(["what to change", *(wrap_line(f"  {line}") for line in known)])


def _flops(plan: Plan) -> str:
    model, hardware = plan.flops
    return (
        "FLOPs of a step, counted\n"
        f"  model        {model:>9.2e}  6 a parameter and token, and attention: for MFU\n"
        f"  hardware     {hardware:>9.2e}  what is multiplied, also for padding and empty rows"
    )


def _collectives(plan: Plan) -> str:
    lines = ["between devices, sent by each in a step, by the compiled program"]
    found = plan.compiled.collectives
    most = max((one.wire for one in found), default=0)
    for one in found:
        lines.append(f"  {one.kind:<19}{_size(one.wire, most)} in {one.count:>8,.0f} calls")
    return "\n".join(lines if found else [*lines, "  nothing"])


def _time(plan: Plan) -> str:
    line = plan.roofline
    if line.bound is None:
        return "time: no estimate, since the speed of these devices is not known"

    def time(seconds: float) -> str:
        return _duration(seconds, line.step_seconds)

    # A pass of another model, before the run, of which nothing is counted here.
    reference = ["  reference    its pass over all data comes on top"] * _has_reference(plan)
    return "\n".join(
        [
            "time of a step, an estimate: devices, memory and links all at their peak",
            f"  compute      {time(line.compute_seconds)}",
            f"  memory       {time(line.memory_seconds)}",
            f"  interconnect {time(line.interconnect_seconds)}",
            f"  at least     {time(line.step_seconds)}, an estimate: all at once, bound by "
            f"{line.bound}",
            f"  or           {time(line.serial_seconds)}, an estimate: nothing sent while a "
            "device computes",
            f"  MFU          at most {line.mfu_bound:.1%}, an estimate; "
            f"{line.tokens_per_second:,.0f} tokens/s at most",
            f"  the run      at least {_span(line.hours)}, {_span(line.device_hours, 'device-')}: "
            "an estimate",
            *reference,
        ]
    )


def _has_reference(plan: Plan) -> bool:
    """Whether the data pass through another model before the run; nothing of it is counted."""
    return isinstance(plan.config, DpoConfig) and plan.config.dpo.needs_reference


def _count(number: int, noun: str, plural: str = "s") -> str:
    return f"{number:,} {noun}{'' if number == 1 else plural}"


def _size(size: int, column: int | None = None) -> str:
    """Bytes in the unit that suits the largest of a column, and as wide; or that suits them."""
    units = {"GiB": 2**30, "MiB": 2**20, "KiB": 2**10}
    largest = size if column is None else column
    unit = next((name for name, scale in units.items() if largest >= scale / 10), "KiB")
    return f"{size / units[unit]:{'' if column is None else '>9'},.2f} {unit}"


def _duration(seconds: float, column: float) -> str:
    """In the unit that suits the column, and with as many decimals as give it three digits."""
    units = {"s": 1.0, "ms": 1e-3, "us": 1e-6}
    unit = next((name for name, scale in units.items() if column >= scale / 10), "us")
    decimals = max(0, 2 - math.floor(math.log10(column / units[unit])))
    return f"{seconds / units[unit]:>9,.{decimals}f} {unit}"


def _span(hours: float, of: str = "") -> str:
    """Time in a unit that leaves few zeros; `of` stands before the unit."""
    if hours >= 0.1:
        return f"{_amount(hours)} {of}hours"
    minutes = 60 * hours
    return f"{_amount(minutes)} {of}minutes" if minutes >= 1 else f"{minutes * 60:.2g} {of}seconds"


def _amount(number: float) -> str:
    if number >= 100:
        return f"{number:,.0f}"
    return f"{number:.1f}" if number >= 1 else f"{number:.2g}"


def as_values(plan: Plan, advice: Sequence[str]) -> dict:
    """The plan in values of JSON; sizes in bytes of a device, times in seconds.

    What only a compiled program tells is None where the compiler found no room.
    """
    found, stream = plan.compiled, plan.inputs.stream
    is_compiled = found.overflow is None
    line = plan.roofline if is_compiled else Roofline(*[None] * len(Roofline._fields))
    return {
        "topology": plan.topology.name,
        "devices": plan.num_devices,
        "device_kind": plan.device_kind,
        "compiler": compiler(plan.topology),
        "init_from": plan.config.init_from,
        "reference_comes_on_top": _has_reference(plan),
        "parameters": plan.parameters,
        "mesh": plan.mesh,
        "micro_batches": plan.config.micro_batches,
        "remat": plan.config.remat,
        "attention": plan.attention,
        "data": {
            "origin": plan.inputs.origin,
            "examples": stream.num_examples,
            "mean_tokens": float(stream.segment_lengths.sum() / stream.num_examples),
            "steps": len(stream),
        },
        "step": {
            "tokens": plan.tokens,
            "rows": stream.batch_rows,
            "empty_rows": plan.rows - stream.batch_rows,
            "seq_len": stream.seq_len,
        },
        "fits": plan.fits,
        "memory": {
            "parameters": plan.state.params,
            "optimizer": plan.state.opt_state,
            "batch": plan.state.batch,
            "arguments": _arguments(plan),
            "temporaries": _temporary_bytes(plan),
            "program": _parts(plan)["program"],
            "total": plan.total_bytes,
            "usable": plan.usable,
        },
        "overflow": None
        if is_compiled
        else {
            "needed": found.overflow.needed,
            "usable": found.overflow.usable,
            "largest": [one._asdict() for one in found.overflow.largest],
            "advice": advice,
        },
        "flops": plan.flops._asdict(),
        "collectives": [one._asdict() for one in found.collectives] if is_compiled else None,
        "memory_traffic": found.traffic if is_compiled else None,
        "estimate": line._asdict(),
        "compile_seconds": found.seconds,
        "compiled_before": plan.was_known,
    }
