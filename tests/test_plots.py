"""The pictures of a run show its numbers: what is drawn is looked at, not its pixels."""

import json
import subprocess
import sys

import numpy as np
import pytest
from matplotlib.image import imread

from easylm import storage
from easylm.errors import InputError
from easylm.plots import (
    lengths_figure,
    log_histogram,
    loss_figure,
    plot_lengths,
    plot_loss,
    plot_preferences,
    preferences_figure,
    read_metrics,
    smooth,
)
from tests.bucket import running_bucket


def record(step, **values):
    return {"step": step, "epoch": step / 40, "loss": 3.0 / step, "learning_rate": 1e-3, **values}


def write_run(workdir, records, end=""):
    workdir.mkdir(exist_ok=True)
    lines = "".join(json.dumps(line) + "\n" for line in records)
    (workdir / "metrics.jsonl").write_text(lines + end)
    return str(workdir)


def figure_of(workdir, records):
    return loss_figure(read_metrics(write_run(workdir, records) + "/metrics.jsonl"), "a run")


def curves(axes):
    """Label -> (x, y) of every line."""
    return {line.get_label(): np.asarray(line.get_data()) for line in axes.lines}


def test_metrics_with_gaps_strings_and_a_cut_line(tmp_path):
    records = [
        record(10, mfu=None),
        record(20, **{"loss": "nan", "grad_norm": "-inf", "eval/loss": 2.0}),
    ]
    columns = read_metrics(write_run(tmp_path, records, end='{"step": 30, "lo') + "/metrics.jsonl")
    np.testing.assert_array_equal(columns["step"], [10, 20])
    np.testing.assert_array_equal(columns["loss"], [0.3, np.nan])
    np.testing.assert_array_equal(columns["eval/loss"], [np.nan, 2.0])
    np.testing.assert_array_equal(columns["grad_norm"], [np.nan, -np.inf])
    assert "mfu" not in columns


@pytest.mark.parametrize("line", ["hello", "[1]", "{}", '{"step": "x"}', '{"step": 1, "loss": []}'])
def test_a_line_that_is_no_metric_is_named(tmp_path, line):
    workdir = write_run(tmp_path, [record(1)], end=f"{line}\n")
    with pytest.raises(InputError, match=r"metrics\.jsonl:2: found .*; wanted a step's metrics"):
        plot_loss(workdir)


def test_a_run_without_steps_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"metrics\.jsonl: no such file"):
        plot_loss(str(tmp_path))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1')
    with pytest.raises(InputError, match=r"metrics\.jsonl: found no step"):
        plot_loss(str(tmp_path))


def test_the_figure_shows_every_number(tmp_path):
    records = [record(step) for step in range(1, 121)]
    records[59]["eval/loss"], records[119]["eval/loss"] = 0.25, 0.125
    figure = figure_of(tmp_path, records)
    loss_axes, rate_axes, _ = figure.axes
    drawn = curves(loss_axes)
    steps = np.arange(1, 121)
    np.testing.assert_allclose(drawn["loss of a step"], [steps, 3.0 / steps])
    smoothed = smooth(3.0 / steps)
    np.testing.assert_allclose(drawn[f"smoothed, {smoothed[-1]:.4g} at the end"][1], smoothed)
    held_out = drawn["held-out data, 0.125 at the end"]
    np.testing.assert_allclose(held_out, [[60, 120], [0.25, 0.125]])
    (rates,) = curves(rate_axes).values()
    np.testing.assert_allclose(rates, [steps, np.full(120, 1e-3)])
    assert rate_axes.get_xlabel() == "step"
    assert loss_axes.get_title(loc="left") == "a run"


def test_epochs_stand_above_the_steps_they_end_at(tmp_path):
    loss_axes, _, top = figure_of(tmp_path, [record(step) for step in range(1, 121)]).axes
    labels = [label.get_text() for label in top.get_xticklabels()]
    marks = dict(zip(labels, top.get_xticks(), strict=True))
    assert marks["1"] == pytest.approx(40) and marks["2"] == pytest.approx(80)
    assert next(iter(marks)) == "epoch 0.5"
    assert top.get_xlim() == loss_axes.get_xlim()


def test_a_loss_that_is_not_finite_is_marked_and_not_drawn(tmp_path):
    records = [record(step) for step in range(1, 10)] + [record(10, loss="nan")]
    drawn = curves(figure_of(tmp_path, records).axes[0])
    np.testing.assert_array_equal(drawn["loss of a step"][0], np.arange(1, 10))
    assert set(drawn["not finite at step 10"][0]) == {10}


def test_a_line_of_an_evaluation_alone_is_not_a_loss_that_is_not_finite(tmp_path):
    records = [record(1), {"step": 2, "eval/loss": 1.5}, record(3)]
    drawn = curves(figure_of(tmp_path, records).axes[0])
    assert not [label for label in drawn if label.startswith("not finite")]
    np.testing.assert_array_equal(drawn["loss of a step"][0], [1, 3])


def test_a_run_of_one_step_is_a_point(tmp_path):
    figure = figure_of(tmp_path, [record(1)])
    assert figure.axes[0].lines[0].get_marker() == "o"
    plot_loss(str(tmp_path))
    plot_loss(write_run(tmp_path, [{"step": 1}]))


def test_a_run_that_dies_at_its_second_step_is_a_point(tmp_path):
    loss_axes, rate_axes, _ = figure_of(tmp_path, [record(1), record(2, loss="nan")]).axes
    assert loss_axes.lines[0].get_marker() == "o"
    assert rate_axes.lines[0].get_marker() == ""


def preferences(step, **values):
    rewards = {"chosen": -0.5 * step, "rejected": -2.0 * step, "margins": 1.5 * step}
    rewards["accuracies"] = step / 100
    return record(step, **{f"rewards/{name}": value for name, value in rewards.items()}, **values)


def test_the_preferences_figure_shows_accuracy_margin_and_both_rewards(tmp_path):
    records = [preferences(step) for step in range(1, 101)]
    held_out = {"accuracies": (0.25, 0.75), "margins": (8, 16), "chosen": (-1, -2)}
    held_out["rejected"] = (-9, -18)
    for name, (middle, end) in held_out.items():
        records[49][f"eval/rewards/{name}"] = middle
        records[99][f"eval/rewards/{name}"] = end
    workdir = write_run(tmp_path, records)
    figure = preferences_figure(read_metrics(f"{workdir}/metrics.jsonl"), "a run")
    accuracy_axes, margin_axes, reward_axes, top = figure.axes
    steps = np.arange(1, 101)

    drawn = curves(accuracy_axes)
    np.testing.assert_allclose(drawn["accuracy of a step"], [steps, steps / 100])
    np.testing.assert_allclose(drawn["held-out data, 0.75 at the end"], [[50, 100], [0.25, 0.75]])
    assert set(drawn["chance"][1]) == {0.5} and accuracy_axes.get_ylim() == (0, 1.02)
    drawn = curves(margin_axes)
    np.testing.assert_allclose(drawn["margin of a step"], [steps, 1.5 * steps])
    np.testing.assert_allclose(drawn["held-out data, 16 at the end"], [[50, 100], [8, 16]])
    drawn = curves(reward_axes)
    np.testing.assert_allclose(drawn["chosen"], [steps, smooth(-0.5 * steps)])
    np.testing.assert_allclose(drawn["rejected"], [steps, smooth(-2.0 * steps)])
    np.testing.assert_allclose(drawn["chosen, held out"], [[50, 100], [-1, -2]])
    np.testing.assert_allclose(drawn["rejected, held out"], [[50, 100], [-9, -18]])

    assert accuracy_axes.get_title(loc="left") == "a run" and reward_axes.get_xlabel() == "step"
    assert top.get_xlim() == accuracy_axes.get_xlim() == reward_axes.get_xlim()


def test_preferences_of_a_run_of_one_step_are_points(tmp_path):
    workdir = write_run(tmp_path, [preferences(1)])
    figure = preferences_figure(read_metrics(f"{workdir}/metrics.jsonl"), "a run")
    for axes, label in zip(figure.axes[:2], ("accuracy", "margin"), strict=True):
        (line,) = [line for line in axes.lines if line.get_label() == f"{label} of a step"]
        assert line.get_marker() == "o"
    assert plot_preferences(workdir) == f"{workdir}/plots/preferences.png"
    plot_preferences(write_run(tmp_path, [{"step": 1}]))


def test_smoothing_keeps_level_and_slope_and_takes_noise():
    np.testing.assert_array_equal(smooth(np.array([5.0, 1.0, 3.0])), [5.0, 1.0, 3.0])
    np.testing.assert_allclose(smooth(np.full(1000, 2.5)), 2.5)
    line = np.linspace(7.0, 1.0, 1000)
    np.testing.assert_allclose(smooth(line)[50:-50], line[50:-50])
    noise = np.random.default_rng(0).standard_normal(1000)
    assert smooth(noise).std() < 0.25 * noise.std()


def test_bars_of_the_histogram_sum_to_the_examples():
    rng = np.random.default_rng(0)
    lengths = rng.lognormal(6, 1, 5000).astype(int) + 1
    edges, heights = log_histogram(lengths)
    assert len(heights) == 35 and heights.sum() == pytest.approx(5000)
    np.testing.assert_allclose(np.diff(np.log(edges)), np.log(edges[1] / edges[0]))
    counted, _ = np.histogram(lengths, edges)
    wide = np.diff(edges) > 20
    np.testing.assert_allclose(heights[wide], counted[wide], rtol=0.15, atol=3)


def test_bars_of_an_even_distribution_grow_evenly():
    # Each length once, in bins that hold now one whole number and now two or three.
    _, heights = log_histogram(np.repeat(np.arange(10, 101), 100))
    assert (np.diff(heights) > 0).all()


@pytest.mark.parametrize("lengths", [[7], [7] * 50, [1, 9000]])
def test_histograms_of_few_lengths(lengths):
    edges, heights = log_histogram(np.array(lengths))
    assert heights.sum() == pytest.approx(len(lengths))
    assert edges[0] == min(lengths) - 0.5 and edges[-1] == pytest.approx(max(lengths) + 0.5)


def test_the_lengths_figure_marks_mean_quartiles_and_what_is_too_long():
    lengths = np.array([100] * 4 + [200] * 4 + [600, 1200])
    (axes,) = lengths_figure(lengths, 1000).axes
    drawn = curves(axes)
    for label, length in (
        ("mean 300", 300),
        ("quartiles 100 · 200 · 200", 100),
        ("seq_len 1,000; longer: 1 (10.00%)", 1000),
    ):
        assert set(drawn[label][0]) == {length}
    assert axes.get_title(loc="left") == "examples: 10 · tokens: 3,000 · longest: 1,200"
    assert axes.get_xscale() == "log"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("tokens", "examples")
    (axes,) = lengths_figure(lengths, 1000, "pair").axes
    assert axes.get_title(loc="left") == "pairs: 10 · tokens: 3,000 · longest: 1,200"
    assert axes.get_ylabel() == "pairs"


def test_pictures_are_written_to_a_disk(tmp_path):
    path = plot_loss(write_run(tmp_path / "run", [record(step) for step in (1, 2, 3)]) + "/")
    assert path == str(tmp_path / "run" / "plots" / "loss.png")
    assert plot_lengths(np.array([3, 5]), 8, f"{tmp_path}/new/lengths.png")
    for picture in (path, tmp_path / "new" / "lengths.png"):
        height, width, _ = imread(picture).shape
        assert height > 500 and width == 1200
    names = [file.name for file in tmp_path.rglob("*") if file.is_file()]
    assert sorted(names) == ["lengths.png", "loss.png", "metrics.jsonl"]


def test_pictures_are_written_to_a_bucket():
    with running_bucket() as bucket:
        storage.write_bytes(f"{bucket}/run/metrics.jsonl", json.dumps(record(1)).encode() + b"\n")
        path = plot_loss(f"{bucket}/run")
        assert path == f"{bucket}/run/plots/loss.png"
        assert storage.read_bytes(path).startswith(b"\x89PNG")
        plot_lengths(np.array([3, 5]), 8, f"{bucket}/run/plots/lengths.png")
        assert list(storage.list_files(f"{bucket}/run/plots")) == ["lengths.png", "loss.png"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "plots").write_text("in the way")
    with pytest.raises(InputError, match="plots"):
        plot_loss(write_run(tmp_path, [record(1)]))


def test_nothing_is_kept_in_pyplot_and_no_display_is_needed(tmp_path):
    workdir = write_run(tmp_path, [record(1)])
    code = (
        "import sys; from easylm.plots import plot_loss; plot_loss(sys.argv[1]); "
        "assert not {'matplotlib.pyplot', 'jax'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, workdir], check=True)
