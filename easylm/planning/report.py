"""A plan as text of at most 80 columns, and as plain values."""

from easylm.planning.estimate import Plan
from easylm.planning.overflow import Temporary

_GIB = 2**30
_BAR = 36


def report(plan: Plan, advice: list[str]) -> str:
    """What a person wants to know, most important last.

    Args:
      plan: of a run.
      advice: what to change where it does not fit.
    """
    parts = [_run(plan), _memory(plan)]
    if plan.compiled.overflow is not None:
        parts += [_temporaries(plan.compiled.overflow.largest), _advice(advice)]
    else:
        parts += [_flops(plan), _collectives(plan), _time(plan)]
    return "\n\n".join(parts)


def _run(plan: Plan) -> str:
    config, stream = plan.config, plan.inputs.stream
    lengths = stream.segment_lengths.sum(axis=1)
    empty = plan.rows - stream.batch_rows
    axes = ", ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
    parts = "1 part" if config.micro_batches == 1 else f"{config.micro_batches} micro-batches"
    usable = "" if plan.usable is None else f", {plan.usable / _GIB:.2f} GiB usable on each"
    kind = plan.topology.device_kind or "GPU"
    lines = {
        "devices": f"{plan.topology.name}: {plan.num_devices} x {kind}{usable}",
        "model": f"{plan.parameters:,} parameters in {config.param_dtype}, {config.init_from}",
        "data": f"{len(lengths):,} {plan.inputs.noun}s of {lengths.mean():,.0f} tokens on average, "
        f"{plan.inputs.origin}",
        "a step": f"{plan.tokens:,.0f} tokens in {stream.batch_rows} rows of {stream.seq_len:,}"
        + (f", and {empty} empty rows" if empty else ""),
        "run": f"{len(stream):,} steps",
        "mesh": f"{axes}; {parts}; remat={config.remat}",
        "attention": plan.attention,
    }
    return "\n".join(f"  {name:<11}{text}" for name, text in lines.items())


def _memory(plan: Plan) -> str:
    found, state = plan.compiled, plan.state
    known = state.params + state.opt_state + state.batch
    lines = {
        "parameters": state.params,
        "optimizer": state.opt_state,
        "batch": state.batch,
    }
    if found.overflow is None:
        lines |= {
            # Tiles of the device's memory are not always full.
            "layout": max(0, found.arguments - known),
            "temporaries": found.temporaries,
            "program": found.code,
        }
    text = [f"  {name:<13}{size / _GIB:>8.2f} GiB" for name, size in lines.items()]
    total = f"  {'total':<13}{plan.total_bytes / _GIB:>8.2f} GiB"
    if plan.usable is not None:
        share = plan.total_bytes / plan.usable
        filled = "#" * min(_BAR, round(share * _BAR))
        verdict = "fits" if plan.fits else "DOES NOT FIT"
        total += f"  [{filled:.<{_BAR}}] {share:>6.1%} {verdict}"
    return "\n".join(["memory of a device, by the compiler", *text, total])


def _temporaries(largest: tuple[Temporary, ...]) -> str:
    lines = ["the largest temporaries at the peak, and the lines that make them"]
    for one in largest:
        times = f"{one.count} x " if one.count > 1 else ""
        lines.append(f"  {one.size / _GIB:>6.2f} GiB  {times}{one.shape}")
        lines.append(f"              {one.source}")
    return "\n".join(lines)


def _advice(advice: list[str]) -> str:
    return "\n".join(["what to change", *(f"  {line}" for line in advice)])


def _flops(plan: Plan) -> str:
    model, hardware = plan.flops
    return (
        "FLOPs of a step, counted\n"
        f"  model        {model:>9.3g}  what the tokens ask for; MFU counts these\n"
        f"  hardware     {hardware:>9.3g}  with recomputation, padding and empty rows"
    )


def _collectives(plan: Plan) -> str:
    lines = ["between devices, sent by each in a step, by the compiled program"]
    for one in plan.compiled.collectives:
        lines.append(f"  {one.kind:<19}{one.wire / _GIB:>9.3f} GiB in {one.count:>8,.0f} calls")
    return "\n".join(lines if plan.compiled.collectives else [*lines, "  nothing"])


def _time(plan: Plan) -> str:
    line = plan.roofline
    if line.bound is None:
        return "time: no estimate, since the speed of these devices is not known"
    text = [
        "time of a step, an estimate: every device at its peak, all three at once",
        f"  compute      {_seconds(line.compute_seconds)}",
        f"  memory       {_seconds(line.memory_seconds)}",
        f"  interconnect {_seconds(line.interconnect_seconds)}",
        f"  so at least  {_seconds(line.step_seconds)}, bound by {line.bound}",
        f"  MFU          at most {line.mfu_bound:.1%}, an estimate; "
        f"{line.tokens_per_second:,.0f} tokens/s at most",
        f"  the run      at least {line.hours:,.1f} hours, {line.device_hours:,.0f} device-hours: "
        "an estimate",
    ]
    return "\n".join(text)


def _seconds(seconds: float) -> str:
    return f"{seconds:>9.3g} s"


def as_values(plan: Plan, advice: list[str]) -> dict:
    """The plan in values of JSON; sizes in bytes of a device, times in seconds."""
    found, stream = plan.compiled, plan.inputs.stream
    return {
        "topology": plan.topology.name,
        "devices": plan.num_devices,
        "device_kind": plan.topology.device_kind,
        "init_from": plan.config.init_from,
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
            "arguments": found.arguments,
            "temporaries": found.temporaries,
            "program": found.code,
            "total": plan.total_bytes,
            "usable": plan.usable,
        },
        "overflow": None
        if found.overflow is None
        else {
            "needed": found.overflow.needed,
            "usable": found.overflow.usable,
            "largest": [one._asdict() for one in found.overflow.largest],
            "advice": advice,
        },
        "flops": plan.flops._asdict(),
        "collectives": [one._asdict() for one in found.collectives],
        "memory_traffic": found.traffic,
        "estimate": plan.roofline._asdict(),
        "compile_seconds": found.seconds,
        "compiled_before": plan.was_known,
    }
