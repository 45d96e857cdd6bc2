"""The pictures of a run: its loss, its preferences, and the lengths of what it was trained on."""

import io
import json
import math
import os

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from easylm import storage
from easylm.errors import InputError

BLUE, ORANGE, RED, GRAY = "#1f5fa8", "#d9730d", "#b3261e", "#6b7280"
DOTS_PER_INCH = 150
MAX_BINS = 60
ROUND = (1, 2, 5, 10)  # ticks are these times powers of ten
THOUSANDS = FuncFormatter(lambda number, _: f"{number:,.0f}")


def plot_loss(workdir: str) -> str:
    """Draws WORKDIR/metrics.jsonl as WORKDIR/plots/loss.png.

    Args:
      workdir: local or gs:// folder of a run.
    Returns:
      The path of the picture.
    Raises:
      InputError: there is no metrics.jsonl, nothing in it, or a line that is no step's metrics.
    """
    workdir = workdir.rstrip("/")
    columns = read_metrics(f"{workdir}/metrics.jsonl")
    return _write(loss_figure(columns, os.path.basename(workdir)), f"{workdir}/plots/loss.png")


def plot_preferences(workdir: str) -> str:
    """Draws the rewards in WORKDIR/metrics.jsonl as WORKDIR/plots/preferences.png.

    Args:
      workdir: local or gs:// folder of a run on preference pairs.
    Returns:
      The path of the picture.
    Raises:
      InputError: as `plot_loss`.
    """
    workdir = workdir.rstrip("/")
    columns = read_metrics(f"{workdir}/metrics.jsonl")
    figure = preferences_figure(columns, os.path.basename(workdir))
    return _write(figure, f"{workdir}/plots/preferences.png")


def plot_lengths(lengths: np.ndarray, seq_len: int, path: str, noun: str = "example") -> str:
    """Draws how long the examples are, as the PNG `path`, local or gs://; returns `path`.

    Args:
      lengths: int [examples], tokens of each example before any was cut; at least one.
      seq_len: tokens of a row.
      path: of the picture.
      noun: what the picture calls an example.
    Raises:
      InputError: the picture cannot be written.
    """
    return _write(lengths_figure(lengths, seq_len, noun), path)


def read_metrics(path: str) -> dict[str, np.ndarray]:
    """The numbers of a metrics.jsonl by name, float64 [lines]; NaN where a line has none.

    A last line that was cut off is left out.

    Raises:
      InputError: no such file, no whole line, or one that is not an object of numbers.
    """
    records = []
    for number, line in enumerate(storage.read_bytes(path).decode().splitlines(keepends=True), 1):
        if not line.endswith("\n"):
            break
        try:
            # float() reads the strings "nan" and "inf" too, which JSON has no numbers for.
            record = {
                name: float(value) for name, value in json.loads(line).items() if value is not None
            }
            record["step"] = int(record["step"])
        except (ValueError, TypeError, AttributeError, KeyError):
            raise InputError(
                f"{path}:{number}: found {line.strip()!r}; wanted a step's metrics"
            ) from None
        records.append(record)
    if not records:
        raise InputError(f"{path}: found no step; wanted one that has been trained")
    names = dict.fromkeys(name for record in records for name in record)
    return {name: np.array([record.get(name, np.nan) for record in records]) for name in names}


def smooth(values: np.ndarray) -> np.ndarray:
    """`values` [n] averaged with a Gaussian of standard deviation n / 100 around each.

    At both ends the weights that are left are scaled to sum to 1.
    """
    deviation = max(len(values) / 100, 1e-3)
    reach = int(3 * deviation)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / deviation) ** 2)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones_like(values), kernel, "same")


def loss_figure(columns: dict[str, np.ndarray], title: str) -> Figure:
    """Loss and learning rate over steps, with the epochs along the top.

    Args:
      columns: as `read_metrics` gives them: step, and loss, eval/loss, learning_rate, epoch where
        the run has them.
      title: of the picture.
    """
    figure = Figure(figsize=(8, 5.5), dpi=DOTS_PER_INCH, layout="constrained")
    loss_axes, rate_axes = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    _draw_curve(loss_axes, columns, "loss", "loss", BLUE)
    trained = ~np.isnan(_column(columns, "learning_rate"))
    for step in columns["step"][trained & ~np.isfinite(_column(columns, "loss"))]:
        loss_axes.axvline(step, color=RED, lw=1.2, label=f"not finite at step {step:,.0f}")
    _legend(loss_axes, "upper right")
    steps, rates = _finite(columns, "learning_rate")
    rate_axes.plot(steps, rates, color=GRAY, lw=1.4, marker=_marker(steps))
    rate_axes.set_ylim(bottom=0)
    rate_axes.yaxis.set_major_locator(MaxNLocator(2, steps=ROUND))
    rate_axes.yaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{rate:g}"))
    _over_steps({"loss": loss_axes, "learning rate": rate_axes}, columns, title)
    return figure


def preferences_figure(columns: dict[str, np.ndarray], title: str) -> Figure:
    """Accuracy, margin, and the rewards of both answers over steps, on held-out pairs too.

    The accuracy is the share of pairs whose chosen answer has the higher reward; the margin is how
    much higher it is on average.

    Args:
      columns: as `read_metrics` gives them: step, and rewards/..., eval/rewards/..., epoch where
        the run has them.
      title: of the picture.
    """
    figure = Figure(figsize=(8, 9), dpi=DOTS_PER_INCH, layout="constrained")
    accuracy_axes, margin_axes, reward_axes = figure.subplots(3, 1, sharex=True)
    accuracy_axes.axhline(0.5, color=GRAY, lw=1.1, ls=":", label="chance")
    _draw_curve(accuracy_axes, columns, "rewards/accuracies", "accuracy", BLUE)
    accuracy_axes.set_ylim(0, 1.02)
    _legend(accuracy_axes, "lower right")
    _draw_curve(margin_axes, columns, "rewards/margins", "margin", BLUE)
    _legend(margin_axes, "lower right")
    for answer, color in (("chosen", BLUE), ("rejected", RED)):
        _draw_rewards(reward_axes, columns, answer, color)
    _legend_above(reward_axes)
    for axes in (margin_axes, reward_axes):
        axes.axhline(0, color=GRAY, lw=1.1, ls=":")
    axes = {"accuracy": accuracy_axes, "margin of rewards": margin_axes, "reward": reward_axes}
    _over_steps(axes, columns, title)
    return figure


def _draw_curve(axes: Axes, columns: dict[str, np.ndarray], name: str, noun: str, color: str):
    """What each step gave, its smoothed course, and the values on held-out data."""
    steps, values = _finite(columns, name)
    style = {"color": color, "lw": 0.8, "alpha": 0.3, "marker": _marker(steps)}
    axes.plot(steps, values, **style, label=f"{noun} of a step")
    if len(steps):
        averages = smooth(values)
        label = f"smoothed, {averages[-1]:.4g} at the end"
        axes.plot(steps, averages, color=color, lw=1.8, label=label)
    eval_steps, eval_values = _finite(columns, f"eval/{name}")
    if len(eval_steps):
        label = f"held-out data, {eval_values[-1]:.4g} at the end"
        axes.plot(eval_steps, eval_values, color=ORANGE, lw=1.5, marker="o", ms=4, label=label)


def _draw_rewards(axes: Axes, columns: dict[str, np.ndarray], answer: str, color: str):
    steps, rewards = _finite(columns, f"rewards/{answer}")
    axes.plot(steps, rewards, color=color, lw=0.8, alpha=0.3, marker=_marker(steps))
    if len(steps):
        axes.plot(steps, smooth(rewards), color=color, lw=1.8, label=answer)
    eval_steps, eval_rewards = _finite(columns, f"eval/rewards/{answer}")
    if len(eval_steps):
        style = {"color": color, "lw": 1.2, "ls": "--", "marker": "o", "ms": 4}
        axes.plot(eval_steps, eval_rewards, **style, label=f"{answer}, held out")


def _legend(axes: Axes, corner: str) -> None:
    curves = axes.get_legend_handles_labels()  # none, if the run died at its first step
    axes.legend(*curves, loc=corner, edgecolor="none", framealpha=0.85)


def _legend_above(axes: Axes) -> None:
    curves = axes.get_legend_handles_labels()
    axes.legend(
        *curves,
        frameon=False,
        ncols=4,
        loc="lower left",
        bbox_to_anchor=(-0.02, 0.99),
        handlelength=1.5,
        columnspacing=1.5,
    )


def _over_steps(panels: dict[str, Axes], columns: dict[str, np.ndarray], title: str) -> None:
    """Labels panels that stand above each other, by what they show, and their common x axis."""
    for label, axes in panels.items():
        axes.set_ylabel(label)
        axes.margins(x=0.01)
        _tidy(axes)
    top, *_, bottom = panels.values()
    bottom.set_xlabel("step")
    bottom.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=ROUND, min_n_ticks=1))
    bottom.xaxis.set_major_formatter(THOUSANDS)
    _mark_epochs(top, columns)
    top.set_title(title, loc="left", fontweight="bold")


def _finite(columns: dict[str, np.ndarray], name: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) where `name` is a finite number."""
    values = _column(columns, name)
    known = np.isfinite(values)
    return columns["step"][known], values[known]


def _marker(steps: np.ndarray) -> str:
    return "o" if len(steps) == 1 else ""  # a line of one point cannot be seen


def _column(columns: dict[str, np.ndarray], name: str) -> np.ndarray:
    return columns.get(name, np.full(len(columns["step"]), np.nan))


def _mark_epochs(axes: Axes, columns: dict[str, np.ndarray]) -> None:
    """A second x axis along the top: the steps at which round numbers of epochs were seen."""
    steps, epochs = _finite(columns, "epoch")
    if not len(steps):
        return
    marks = MaxNLocator(8, steps=ROUND).tick_values(epochs[0], epochs[-1])
    marks = marks[(marks >= epochs[0]) & (marks <= epochs[-1])]
    labels = [f"{mark:g}" for mark in marks]
    labels[:1] = [f"epoch {label}" for label in labels[:1]]
    top = axes.twiny()
    top.set_xlim(axes.get_xlim())
    top.set_xticks(np.interp(marks, epochs, steps), labels)
    _tidy(top)


def lengths_figure(lengths: np.ndarray, seq_len: int, noun: str = "example") -> Figure:
    """A histogram over the logarithm of length, with its mean, its quartiles and `seq_len`.

    Arguments as of `plot_lengths`.
    """
    lengths = np.asarray(lengths)
    figure = Figure(figsize=(8, 4.2), dpi=DOTS_PER_INCH, layout="constrained")
    axes = figure.subplots()
    edges, heights = log_histogram(lengths)
    axes.stairs(heights, edges, fill=True, color=BLUE, alpha=0.35)
    axes.stairs(heights, edges, color=BLUE, lw=0.8)
    _mark_lengths(axes, lengths, seq_len)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(THOUSANDS)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(MaxNLocator(6, integer=True, steps=ROUND))
    axes.yaxis.set_major_formatter(THOUSANDS)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens")
    axes.set_ylabel(f"{noun}s")
    total = lengths.sum(dtype=np.int64)
    title = f"{noun}s: {len(lengths):,} · tokens: {total:,} · longest: {lengths.max():,}"
    axes.set_title(title, loc="left", fontweight="bold", pad=26)
    _legend_above(axes)
    _tidy(axes)
    return figure


def _mark_lengths(axes: Axes, lengths: np.ndarray, seq_len: int) -> None:
    quartiles = np.percentile(lengths, (25, 50, 75))
    names = " · ".join(f"{quartile:,.0f}" for quartile in quartiles)
    longer = int(np.count_nonzero(lengths > seq_len))
    axes.axvline(lengths.mean(), color=ORANGE, lw=1.6, label=f"mean {lengths.mean():,.0f}")
    labels = (f"quartiles {names}", None, None)
    for quartile, label in zip(quartiles, labels, strict=True):
        axes.axvline(quartile, color=GRAY, lw=1.1, ls=":", label=label)
    label = f"seq_len {seq_len:,}; longer: {longer:,} ({longer / len(lengths):.2%})"
    axes.axvline(seq_len, color=RED, lw=1.6, ls="--", label=label)


def log_histogram(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bins of equal width in log(length), and how many examples fall into each.

    A length n is spread evenly over n - 0.5 to n + 0.5: where bins are narrower than a token, or
    hold now one whole number and now two, counting would draw a comb.

    Args:
      lengths: int [examples], each at least 1.
    Returns:
      (edges [bins + 1], heights [bins]); the heights sum to the number of examples.
    """
    first, last = int(lengths.min()), int(lengths.max())
    # Few examples in many bins would show nothing but chance (Rice's rule).
    bins = min(MAX_BINS, last - first + 1, math.ceil(2 * len(lengths) ** (1 / 3)))
    edges = np.geomspace(first - 0.5, last + 0.5, bins + 1)
    whole = np.arange(first, last + 2) - 0.5
    below = np.concatenate([[0], np.cumsum(np.bincount(lengths - first))])
    return edges, np.diff(np.interp(edges, whole, below))


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e5e7eb", lw=0.8)
    axes.set_axisbelow(True)


def _write(figure: Figure, path: str) -> str:
    png = io.BytesIO()
    FigureCanvasAgg(figure).print_png(png)
    if storage.is_bucket(path):
        storage.write_bytes(path, png.getvalue())  # an object appears whole
        return path
    with storage.explained(path):
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    storage.write_bytes(f"{path}.tmp", png.getvalue())
    os.replace(f"{path}.tmp", path)
    return path
