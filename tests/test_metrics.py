"""metrics.jsonl survives stops, and MFU counts what the model does."""

import json
import math

import jax
import jax.numpy as jnp
import pytest

from easylm import metrics
from easylm.errors import InputError
from easylm.metrics import MetricsWriter, ProgressBar, model_flops, rates
from tests.bucket import running_bucket


def read_lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_every_line_is_on_disk_at_once(tmp_path):
    writer = MetricsWriter(str(tmp_path / "new" / "run"))
    for step in (1, 2):
        writer.write({"step": step, "loss": 2.5 / step, "mfu": None})
        assert len(read_lines(tmp_path / "new" / "run")) == step
    writer.close()
    assert read_lines(tmp_path / "new" / "run")[1] == {"step": 2, "loss": 1.25, "mfu": None}


def test_resuming_drops_later_and_cut_lines(tmp_path):
    lines = [json.dumps({"step": step, "loss": 1.0}) + "\n" for step in (10, 20, 30)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines) + '{"step": 40, "lo')
    writer = MetricsWriter(str(tmp_path), last_step=20)
    writer.write({"step": 30, "loss": 0.5})
    writer.close()
    assert [line["step"] for line in read_lines(tmp_path)] == [10, 20, 30]
    assert read_lines(tmp_path)[-1]["loss"] == 0.5


def test_a_new_run_starts_an_empty_file(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    MetricsWriter(str(tmp_path)).close()
    assert read_lines(tmp_path) == []


def test_a_line_that_is_no_metric_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nhello\n')
    with pytest.raises(InputError, match=r"metrics.jsonl:2: found 'hello'"):
        MetricsWriter(str(tmp_path), last_step=5)


def test_numbers_that_json_lacks_stay_readable(tmp_path):
    writer = MetricsWriter(str(tmp_path))
    writer.write({"step": 1, "loss": math.nan, "grad_norm": -math.inf})
    writer.close()
    (line,) = read_lines(tmp_path)
    assert line == {"step": 1, "loss": "nan", "grad_norm": "-inf"}
    assert math.isnan(float(line["loss"]))


def test_a_bucket_gets_all_lines_on_close_and_keeps_them_on_resume(monkeypatch):
    with running_bucket() as bucket:
        workdir = f"{bucket}/run"
        writer = MetricsWriter(workdir)
        for step in (1, 2, 3):
            writer.write({"step": step})
        writer.close()
        monkeypatch.setattr(metrics, "UPLOAD_SECONDS", 0.0)
        writer = MetricsWriter(workdir, last_step=2)
        writer.write({"step": 4})
        stored = metrics.storage.read_bytes(f"{workdir}/metrics.jsonl").decode()
    assert [json.loads(line)["step"] for line in stored.splitlines()] == [1, 2, 4]


def test_model_flops_equal_what_xla_counts():
    # One segment, so that masked attention is the only work that XLA counts and we do not:
    # it computes all n * n pairs. A stack of two layers of one product each way.
    layers, heads, head_dim, n, width = 2, 4, 8, 16, 32
    kernels = jnp.ones((layers, 4, width, heads * head_dim))

    def loss(kernels, x):
        for q, k, v, o in kernels:
            split = (n, heads, head_dim)
            scores = jnp.einsum("qhd,khd->hqk", (x @ q).reshape(split), (x @ k).reshape(split))
            mixed = jnp.einsum("hqk,khd->qhd", scores, (x @ v).reshape(split))
            x = mixed.reshape(n, heads * head_dim) @ o
        return jnp.sum(x)

    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    counted = step.lower(kernels, jnp.ones((n, width))).compile().cost_analysis()["flops"]
    expected = model_flops(
        parameters=kernels.size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        head_dim=head_dim,
        tokens=n,
        causal_pairs=n * n,
    )
    assert counted == pytest.approx(expected, rel=0.05)


def test_rates():
    numbers = {"tokens": 600.0, "target_tokens": 150.0, "row_tokens": 800, "seconds": 2.0}
    assert rates(**numbers, flops=5e12, peak=1e13) == {
        "target_tokens": 150.0,
        "tokens": 600.0,
        "padding_fraction": 0.25,
        "step_seconds": 2.0,
        "tokens_per_second": 300.0,
        "target_tokens_per_second": 75.0,
        "mfu": 0.25,
    }
    assert rates(**numbers, flops=5e12, peak=None)["mfu"] is None


def test_the_progress_bar_fits_80_columns(capsys):
    bar = ProgressBar(20000, 20384)
    record = {"loss": 12.345678, "tokens_per_second": 1234567.0, "mfu": 0.4567}
    for _ in range(384):
        bar.step()
        bar.show(record)
    bar.close()
    bar_line = capsys.readouterr().err.split("\r")[-1].rstrip("\n")
    assert len(bar_line) <= 80
    for shown in ("20384/20384", "loss 12.35", "1.23M tok/s", "mfu 46%", "left"):
        assert shown in bar_line
