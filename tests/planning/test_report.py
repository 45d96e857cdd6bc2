"""A plan as text and as values: true to what is known, readable at 80 columns."""

import dataclasses
import json
import re

import pytest

from easylm.config import from_config_dict, load
from easylm.devices import DEVICES, GIB
from easylm.planning.compiled import Compiled
from easylm.planning.estimate import Plan
from easylm.planning.flops import Flops, count_parameters
from easylm.planning.hlo_costs import Collective
from easylm.planning.inputs import read_inputs
from easylm.planning.overflow import Overflow, Temporary
from easylm.planning.program import StateBytes
from easylm.planning.report import as_values, report
from easylm.planning.roofline import roofline
from easylm.planning.topology import parse_topology
from easylm.trainers.config import DpoConfig, SftConfig

FITTING = Compiled(
    arguments=2 * GIB,
    temporaries=7 * GIB,
    code=GIB // 50,
    collectives=(
        Collective("all-gather", count=1_234_567.0, payload=13 * GIB, wire=1234 * GIB),
        Collective("collective-permute", count=6.0, payload=GIB, wire=GIB // 8),
    ),
    traffic=1400 * GIB,
    seconds=12.0,
)
LONG = "jit(step)/transpose(jvp())/while/body/closed_call/checkpoint/rematted_computation/add_any"


def temporary(size, count=1, source="models/llama/model.py:274 in Llama.hidden_states"):
    return Temporary(int(size), "bf16[80,16,8,1,512,128]", count, source, LONG)


def overflowing(*largest, needed=131 * GIB, arguments=3 * GIB):
    usable = DEVICES["TPU v3"].usable
    temporaries = needed - arguments + GIB // 1000  # the compiler rounds what is needed
    return Compiled(overflow=Overflow(needed, usable, largest, arguments, temporaries))


def make_plan(compiled=FITTING, name="v3-2048", steps=10, **changes) -> Plan:
    """A plan of the 7B recipe with a thousand examples, on a slice of which all is known."""
    config = from_config_dict(SftConfig, load("sft/tulu2_7b").config)
    data = dataclasses.replace(config.data, expected_examples=1000)
    config = dataclasses.replace(config, data=data, epochs=None, steps=steps, **changes)
    origin = config.init_from
    known = dataclasses.replace(config, init_from="meta-llama/Llama-2-70b-hf")
    inputs = read_inputs(known)
    topology = parse_topology(name)
    count = topology.device_count
    device = DEVICES.get(topology.device_kind)
    flops = Flops(model=5.56e17, hardware=7.37e17)
    return Plan(
        config=dataclasses.replace(config, init_from=origin),
        topology=topology,
        device_kind=topology.device_kind,
        inputs=inputs,
        mesh={"data": 1, "fsdp": count // 8, "tensor": 8},
        rows=2 * count // 8,
        attention="blockwise",
        parameters=count_parameters(inputs.model),
        state=StateBytes(int(0.6 * GIB), int(1.3 * GIB), GIB // 1000),
        compiled=compiled,
        was_known=False,
        usable=3 * GIB if device is None else device.usable,
        flops=flops,
        roofline=roofline(
            device,
            num_devices=count,
            flops=flops,
            traffic=compiled.traffic,
            wire=sum(one.wire for one in compiled.collectives),
            tokens=139_062.0,
            steps=123_456,
        ),
    )


def size_in(line):
    """The first size of a line, in bytes."""
    number, unit = re.search(r"([\d,.]+) ([KMG]iB)", line).groups()
    return float(number.replace(",", "")) * {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}[unit]


def block(text, head):
    """The lines under the one that begins so, by their first word."""
    (found,) = [part for part in text.split("\n\n") if part.startswith(head)]
    return {line.split()[0]: line for line in found.splitlines()[1:]}


ADVICE = [f"--config.mesh=1,32,64 --config.micro_batches=17: up to 99.9 GiB less: {'words ' * 30}"]
TOO_LARGE = [
    overflowing(temporary(5 * GIB, 4), temporary(GIB, 12, LONG)),
    overflowing(temporary(5 * GIB, 4), needed=260_000 * GIB),
]


@pytest.mark.parametrize("compiled", [FITTING, *TOO_LARGE], ids=["fits", "too large", "far"])
@pytest.mark.parametrize("name", ["v3-2048", "v5litepod-256", "cpu:64"])
def test_no_line_is_wider_than_80_columns(compiled, name):
    plan = make_plan(compiled, name, micro_batches=128, remat="block_sharded")
    lines = report(plan, ADVICE if compiled.overflow else []).splitlines()
    assert max(map(len, lines)) <= 80, max(lines, key=len)


def test_a_path_stays_whole():
    path = "/data/models/" + "very-long-folder-name/" * 3 + "hf"
    text = report(make_plan(init_from=path), [])
    (line,) = [line for line in text.splitlines() if path in line]
    assert line == " " * 13 + path
    assert "  model      68,976,648,192 parameters in float32,\n" in text


def test_the_parts_of_memory_add_up_and_the_bar_shows_the_share():
    for compiled in (FITTING, TOO_LARGE[0]):
        lines = block(report(make_plan(compiled), []), "memory of a device")
        total = size_in(lines.pop("total"))
        assert sum(map(size_in, lines.values())) == pytest.approx(total, abs=0.03 * GIB)
        assert total == pytest.approx(compiled.total, abs=0.005 * GIB)
        assert not any("-0.00" in line for line in lines.values())
    share = FITTING.total / DEVICES["TPU v3"].usable
    total = block(report(make_plan(), []), "memory of a device")["total"]
    assert total.endswith(f"{share:.1%} fits")
    bar = re.search(r"\[(#+)(\.+)\]", total)
    assert len(bar[1]) / len(bar[1] + bar[2]) == pytest.approx(share, abs=0.02)
    over = block(report(make_plan(TOO_LARGE[0]), []), "memory of a device")["total"]
    assert over.endswith("DOES NOT FIT") and "." not in re.search(r"\[(.*)\]", over)[1]


def test_every_time_and_mfu_is_called_an_estimate():
    text = report(make_plan(), [])
    timed = block(text, "time of a step, an estimate")
    assert text.count("MFU") == 2  # one says which FLOPs it counts
    components = [timed.pop(name) for name in ("compute", "memory", "interconnect")]
    assert all(re.search(r" [\d.]+ (s|ms)$", line) for line in components)
    assert len(timed) == 4 and all("estimate" in line for line in timed.values())
    others = text.replace("\n".join(components), "")
    for line in others.splitlines():
        if re.search(r"[\d.] (s|ms|us|hours)\b|MFU +at most", line):
            assert "estimate" in line, line


def test_the_times_are_those_of_the_roofline():
    plan = make_plan()
    found, lines = plan.roofline, block(report(plan, []), "time of a step")
    for name, seconds in {
        "compute": found.compute_seconds,
        "memory": found.memory_seconds,
        "interconnect": found.interconnect_seconds,
        "at": found.step_seconds,
        "or": found.serial_seconds,
    }.items():
        number, unit = re.search(r"([\d,.]+) (s|ms)\b", lines[name]).groups()
        shown = float(number.replace(",", "")) * {"s": 1, "ms": 1e-3}[unit]
        assert shown == pytest.approx(seconds, rel=0.01), name
    assert f"bound by {found.bound}" in lines["at"]
    assert f"{found.mfu_bound:.1%}" in lines["MFU"]


def test_sizes_and_times_of_a_tiny_step_are_not_zeros():
    tiny = Compiled(arguments=5 * 2**20, temporaries=2**20, code=2**15, traffic=2**21, seconds=1.0)
    plan = make_plan(tiny, "v3-8")
    plan = dataclasses.replace(plan, state=StateBytes(2**20, 2**22, 2**10))
    line = roofline(
        DEVICES["TPU v3"], num_devices=8, flops=Flops(10**8, 10**9), traffic=2**21, wire=2**10,
        tokens=100.0, steps=10,
    )  # fmt: skip
    text = report(dataclasses.replace(plan, roofline=line), [])
    assert max(map(len, text.splitlines())) <= 80
    memory = block(text, "memory of a device")
    assert size_in(memory["optimizer"]) == 2**22 and size_in(memory["temporaries"]) == 2**20
    times = block(text, "time of a step")
    assert "4.66 us" in times["memory"] and "4.66 us" in times["at"]
    assert f"at least {line.hours * 3600:.2g} seconds" in times["the"]
    assert f", {line.device_hours * 3600:.2g} device-seconds: an estimate" in times["the"]


@pytest.mark.parametrize(
    ("hours", "shown"),
    [
        (5.14, "5.1 hours, 41.1 device-hours"),
        (0.1, "0.1 hours, 0.8 device-hours"),
        (0.02, "1.2 minutes, 0.16 device-hours"),
        (0.012, "43 seconds, 5.8 device-minutes"),
    ],
)
def test_the_time_of_the_run_has_the_unit_that_suits_it(hours, shown):
    plan = make_plan(name="v3-8")
    line = plan.roofline._replace(hours=hours, device_hours=8 * hours)
    text = report(dataclasses.replace(plan, roofline=line), [])
    assert f"  the run      at least {shown}: an estimate\n" in f"{text}\n"


def test_a_pass_of_a_reference_is_said_to_come_on_top():
    plan = make_plan()
    config = from_config_dict(DpoConfig, load("dpo/tulu2_7b").config)
    without = dataclasses.replace(config.dpo, loss="simpo")
    for changed, comes in [(config, True), (dataclasses.replace(config, dpo=without), False)]:
        values = as_values(dataclasses.replace(plan, config=changed), [])
        text = report(dataclasses.replace(plan, config=changed), [])
        assert values["reference_comes_on_top"] is comes
        assert ("  reference    its pass over all data comes on top" in text) is comes
    assert as_values(plan, [])["reference_comes_on_top"] is False


def test_the_temporaries_that_matter_are_listed():
    largest = [temporary((20 - i) * GIB // 8, 2) for i in range(12)] + [temporary(GIB // 100)]
    text = report(make_plan(overflowing(*largest, needed=40 * GIB)), ADVICE)
    _, _, found = text.partition("the largest temporaries at the peak")
    listed, _, changes = found.partition("\n\nwhat to change\n")
    sizes = [size_in(line) for line in listed.splitlines() if "GiB" in line]
    # Both of a kind together, to a hundredth.
    assert sizes == pytest.approx([(20 - i) * GIB / 4 for i in range(8)], abs=0.006 * GIB)
    assert listed.count("2 x bf16[80,16,8,1,512,128]") == 8
    assert listed.count("models/llama/model.py:274 in Llama.hidden_states") == 8
    assert "FLOPs" not in text and "time of a step" not in text
    assert changes.splitlines()[0].startswith("  --config.mesh=1,32,64 --config.micro_batches=17:")
    assert all(line.startswith("    words") for line in changes.splitlines()[1:])
    two = report(make_plan(overflowing(temporary(4 * GIB), temporary(GIB // 100))), ADVICE)
    assert two.count("bf16[80,16,8,1,512,128]") == 1


def test_of_an_operation_the_end_is_shown():
    text = report(make_plan(overflowing(temporary(50 * GIB, source=LONG))), ADVICE)
    (line,) = [line for line in text.splitlines() if "rematted_computation" in line]
    assert line.strip().startswith("...") and line.endswith("rematted_computation/add_any")


def test_a_state_that_is_too_large_by_itself_is_said():
    compiled = overflowing(temporary(GIB // 100), needed=40 * GIB, arguments=39 * GIB)
    text = report(make_plan(compiled), ADVICE)
    assert "what is large are the lines above it" in text and "the largest temporaries" not in text


def test_without_a_list_of_temporaries_what_to_try_is_said():
    plan = make_plan(name="cpu:64")
    assert not plan.fits and plan.compiled.overflow is None
    text = report(plan, [])
    assert "DOES NOT FIT" in text and "known for TPUs alone; try more micro_batches" in text
    assert "time: no estimate" in text


def test_one_is_no_plural():
    plan = make_plan(steps=1)
    plan = dataclasses.replace(plan, rows=plan.inputs.stream.batch_rows + 1)
    text = report(plan, [])
    assert "1 empty row\n" in text and "run        1 step\n" in text
    assert "1 micro-batch;" in text


def test_values_are_those_of_the_plan():
    plan = make_plan()
    values = json.loads(json.dumps(as_values(plan, [])))
    assert values["fits"] is True and values["overflow"] is None
    memory = values["memory"]
    assert memory["arguments"] + memory["temporaries"] + memory["program"] == memory["total"]
    assert memory["total"] == FITTING.total and memory["usable"] == plan.usable
    assert values["estimate"]["step_seconds"] == plan.roofline.step_seconds
    assert values["estimate"]["serial_seconds"] == plan.roofline.serial_seconds
    assert [one["kind"] for one in values["collectives"]] == ["all-gather", "collective-permute"]


def test_values_of_what_was_not_compiled_are_none():
    compiled = TOO_LARGE[0]
    values = json.loads(json.dumps(as_values(make_plan(compiled), ADVICE)))
    assert values["fits"] is False
    assert values["collectives"] is values["memory_traffic"] is None
    assert set(values["estimate"].values()) == {None}
    memory = values["memory"]
    assert memory["arguments"] == compiled.overflow.arguments
    assert memory["temporaries"] == compiled.overflow.temporaries
    assert memory["total"] == compiled.overflow.needed
    assert values["overflow"]["advice"] == ADVICE
    assert values["overflow"]["largest"][0]["source"].startswith("models/llama/model.py:274")
