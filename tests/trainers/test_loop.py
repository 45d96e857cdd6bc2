"""The loop with steps of arithmetic: order of batches, reports, evaluations and saves; its ends."""

from typing import NamedTuple

import jax.numpy as jnp
import pytest

from easylm.errors import PreemptedError
from easylm.trainers.loop import not_finite, train


class State(NamedTuple):
    params: int


def run(
    losses,
    *,
    last_step=0,
    save_every=2,
    evaluate_every=100,
    taken_away_in=None,
    paused=(),
    events=None,
):
    events = [] if events is None else events
    total = len(losses)

    def step_fn(state, batch):
        events.append(("step", batch))
        metrics = {"loss": jnp.asarray(losses[batch - 1]), "grad_norm": jnp.ones(())}
        return State(state.params + batch), metrics

    def report(step, metrics, seconds):
        assert seconds >= 0
        evaluated = [metrics["eval/loss"]] if "eval/loss" in metrics else []
        events.append(("report", step, metrics["loss"], *evaluated))

    state = train(
        State(sum(range(last_step + 1))),
        step_fn,
        iter(range(last_step + 1, total + 1)),
        last_step=last_step,
        total_steps=total,
        report=report,
        save_at=lambda step: step % save_every == 0,
        save=lambda step, state: events.append(("save", step, state.params)),
        evaluate_at=lambda step: step % evaluate_every == 0,
        evaluate=lambda params: {"eval/loss": 100.0 + params},
        pause_at=lambda step: step in paused,
        pause=lambda step: events.append(("pause", step)),
        stopped=lambda: ("step", taken_away_in) in events,
    )
    return state.params, events


def test_each_step_is_reported_once_and_in_order_while_the_next_one_runs():
    state, events = run([5.0, 4.0, 3.0], save_every=10)
    assert state == 6
    assert events == [
        ("step", 1),
        ("step", 2),
        ("report", 1, 5.0),
        ("step", 3),
        ("report", 2, 4.0),
        ("report", 3, 3.0),
        ("save", 3, 6),
    ]


def test_a_pause_comes_with_idle_devices_after_the_save_of_its_step():
    _, events = run([5.0, 4.0, 3.0], save_every=2, paused=(1, 2))
    assert events == [
        ("step", 1),
        ("report", 1, 5.0),
        ("pause", 1),
        ("step", 2),
        ("report", 2, 4.0),
        ("save", 2, 3),
        ("pause", 2),
        ("step", 3),
        ("report", 3, 3.0),
        ("save", 3, 6),
    ]


def test_saves_come_every_so_often_and_at_the_end_after_their_report():
    _, events = run([3.0, 2.0, 1.0], save_every=2)
    kinds = [event[:2] for event in events if event[0] != "step"]
    assert kinds == [("report", 1), ("report", 2), ("save", 2), ("report", 3), ("save", 3)]


def test_a_run_goes_on_after_its_last_step():
    _, whole = run([3.0, 2.0, 1.0, 0.0])
    _, rest = run([3.0, 2.0, 1.0, 0.0], last_step=2)
    assert rest == whole[whole.index(("step", 3)) :]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_reported_and_stops_the_run_before_a_save(bad):
    events = []
    with pytest.raises(FloatingPointError, match=r"step 2: loss is (nan|inf)"):
        run([3.0, bad, 1.0, 0.0], events=events)
    assert events[-1][:2] == ("report", 2)
    assert not any(event[0] == "save" for event in events)


def test_an_evaluation_is_reported_with_its_step_and_comes_before_the_save():
    _, events = run([5.0, 4.0, 3.0, 2.0], save_every=4, evaluate_every=2)
    assert [event for event in events if event[0] != "step"] == [
        ("report", 1, 5.0),
        ("report", 2, 4.0, 100.0 + 1 + 2),
        ("report", 3, 3.0),
        ("report", 4, 2.0, 100.0 + 1 + 2 + 3 + 4),
        ("save", 4, 10),
    ]


def test_a_machine_that_is_taken_away_saves_the_step_under_way_and_stops():
    events = []
    with pytest.raises(PreemptedError, match=r"stopped after step 2 of 4.*same command goes on"):
        run([5.0, 4.0, 3.0, 2.0], save_every=4, evaluate_every=2, taken_away_in=2, events=events)
    assert events[-2:] == [("report", 2, 4.0), ("save", 2, 3)]  # no time for an evaluation


def test_a_machine_taken_away_in_the_last_step_ends_the_run_as_usual():
    state, events = run([5.0, 4.0], taken_away_in=2)
    assert state == 3
    assert events[-1] == ("save", 2, 3)


def test_a_gradient_alone_can_stop_a_run():
    assert not_finite({"loss": 1.0, "grad_norm": float("nan")}) == ["grad_norm"]
    assert not_finite({"loss": float("inf"), "grad_norm": 2.0}) == ["loss"]
    assert not_finite({"loss": 1.0, "grad_norm": 2.0}) == []
