"""A run: model, objective and data brought together on the devices, from start or checkpoint."""

import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from easylm.checkpoint import Checkpointer
from easylm.command import say
from easylm.data.batches import BatchStream, prefetch
from easylm.errors import InputError
from easylm.models.llama.config import LlamaConfig
from easylm.models.llama.model import abstract_params, graph_definition
from easylm.models.llama.sharding import execution_on, param_shardings
from easylm.optimizer import adamw, linear_schedule, warmup_steps
from easylm.sharding import batch_sharding
from easylm.trainers.config import OptimizerConfig, SftConfig
from easylm.trainers.loop import train
from easylm.trainers.report import Reporter
from easylm.trainers.step import (
    Batch,
    LossFn,
    TrainState,
    abstract_batch,
    compile_step,
    init_state,
    make_train_step,
    state_shardings,
)

LoadParams = Callable[[dict, jnp.dtype], dict]  # (shardings, dtype) -> parameters on the mesh


def fit(
    config: SftConfig,
    *,
    model: LlamaConfig,
    mesh: Mesh,
    stream: BatchStream,
    loss_fn: LossFn,
    load_params: LoadParams,
    bundle: dict,
    workdir: str,
) -> dict:
    """Trains to the end of `stream`, going on from the newest checkpoint of `workdir`, if any.

    Args:
      config: the run's.
      model: sizes of the model.
      mesh: where it runs.
      stream: the run's batches.
      loss_fn: the objective, see trainers/step.py.
      load_params: makes the parameters to start from; not called where a checkpoint is found.
      bundle: what makes a checkpoint self-contained; see easylm/checkpoint.py. Its "data" says what
        is trained on, and must not change between two starts.
      workdir: of the run.
    Returns:
      The trained parameters, on the mesh.
    Raises:
      FloatingPointError: a loss is not finite.
      InputError: the checkpoint is damaged, or of other data.
    """
    schedule, optimizer = make_optimizer(config.optimizer, len(stream))
    abstract = abstract_params(model, jnp.dtype(config.param_dtype))
    shardings = state_shardings(abstract, param_shardings(model, mesh), optimizer, mesh)
    checkpointer = Checkpointer(workdir, keep=config.checkpoint.keep)
    last_step = checkpointer.latest_step() or 0
    if last_step:
        say(f"going on after step {last_step} of {len(stream)}")
        _check_same_data(checkpointer.bundle(last_step), bundle, workdir)
        state = _restore(checkpointer, last_step, abstract, optimizer, shardings)
    else:
        params = load_params(shardings.params, jnp.dtype(config.param_dtype))
        state = init_state(params, optimizer, shardings)
    if last_step >= len(stream):
        checkpointer.close()
        return state.params
    step_fn = _compile(config, model, mesh, stream, loss_fn, optimizer, shardings, state)
    report = Reporter(
        workdir,
        model=model,
        mesh=mesh,
        stream=stream,
        schedule=schedule,
        last_step=last_step,
        every=config.log_every,
    )
    try:
        state = train(
            state,
            step_fn,
            _on_mesh(stream, last_step, mesh, config.data.workers),
            last_step=last_step,
            total_steps=len(stream),
            save_every=config.checkpoint.every,
            report=report,
            save=lambda step, state: checkpointer.save(
                step, state.params, state.opt_state, {**bundle, "step": step}
            ),
        )
    finally:
        report.close()
        checkpointer.close()
    return state.params


def make_optimizer(
    options: OptimizerConfig, total_steps: int
) -> tuple[optax.Schedule, optax.GradientTransformation]:
    """(learning rate of step i, counted from 0; the optimizer that follows it)."""
    warmup = warmup_steps(options.warmup_ratio, total_steps)
    schedule = linear_schedule(options.learning_rate, warmup, total_steps)
    optimizer = adamw(
        schedule,
        b1=options.b1,
        b2=options.b2,
        eps=options.eps,
        weight_decay=options.weight_decay,
        clip_norm=options.clip_norm,
    )
    return schedule, optimizer


def _compile(config, model, mesh, stream, loss_fn, optimizer, shardings, state):
    """The run's step, compiled before the clock of the first step starts."""
    execution = execution_on(
        model,
        mesh,
        compute_dtype=jnp.dtype(config.compute_dtype),
        remat=config.remat,
        attention_backend=config.attention,
    )
    step = make_train_step(
        graph_definition(model, execution),
        loss_fn,
        optimizer,
        micro_batches=config.micro_batches,
        seed=config.seed,
    )
    started = time.perf_counter()
    batch = abstract_batch(stream.rows_per_batch, stream.seq_len)
    compiled = compile_step(step, shardings, mesh).lower(state, batch).compile()
    say(f"compiled the step in {time.perf_counter() - started:.1f} s")
    return compiled


def _check_same_data(stored: dict, bundle: dict, workdir: str) -> None:
    if stored.get("data") != bundle["data"]:
        raise InputError(
            f"{workdir}: its checkpoints were trained on other data: found {bundle['data']}; "
            f"wanted {stored.get('data')}. Give the files it started with, or use a new folder"
        )


def _restore(checkpointer, step, abstract, optimizer, shardings: TrainState) -> TrainState:
    def placed(arrays, where):
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), arrays, where
        )

    params, opt_state = checkpointer.restore(
        step,
        placed(abstract, shardings.params),
        placed(jax.eval_shape(optimizer.init, abstract), shardings.opt_state),
    )
    return TrainState(jax.device_put(jnp.int32(step), shardings.step), params, opt_state)


def _on_mesh(stream: BatchStream, last_step: int, mesh: Mesh, workers: int) -> Iterator[Batch]:
    """The batches after `last_step` as global arrays; this process builds only its own rows."""
    sharding = batch_sharding(mesh)
    total = stream.rows_per_batch
    places = sharding.addressable_devices_indices_map((total,)).values()
    bounds = [rows.indices(total) for (rows,) in places]
    first, last = min(start for start, _, _ in bounds), max(stop for _, stop, _ in bounds)

    def place(rows):
        def part(index):
            start, stop, _ = index[0].indices(total)
            return rows[start - first : stop - first]

        return jax.make_array_from_callback((total, stream.seq_len), sharding, part)

    for batch in prefetch(stream, last_step, slice(first, last), workers):
        yield {name: place(rows) for name, rows in batch.items()}
