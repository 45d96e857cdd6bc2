"""The loop with steps of arithmetic: order of batches, reports and saves; non-finite losses."""

import jax.numpy as jnp
import pytest

from easylm.trainers.loop import train


def run(losses, *, last_step=0, save_every=2, events=None):
    events = [] if events is None else events

    def step_fn(state, batch):
        events.append(("step", batch))
        return state + batch, {"loss": jnp.asarray(losses[batch - 1]), "grad_norm": jnp.ones(())}

    def report(step, metrics, seconds):
        assert seconds >= 0
        events.append(("report", step, metrics["loss"]))

    total = len(losses)
    state = train(
        sum(range(last_step + 1)),
        step_fn,
        iter(range(last_step + 1, total + 1)),
        last_step=last_step,
        total_steps=total,
        save_every=save_every,
        report=report,
        save=lambda step, state: events.append(("save", step, state)),
    )
    return state, events


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
