"""A run: model, objective and data brought together on the devices, from start or checkpoint."""

import dataclasses
import time
from collections.abc import Callable, Iterator
from contextlib import closing

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from easylm.checkpoint import Checkpointer, latest_step, read_bundle, read_state
from easylm.command import say
from easylm.compilation import use_compilation_cache
from easylm.config import write_json
from easylm.data.batches import BatchStream, prefetch
from easylm.errors import InputError
from easylm.models.llama.config import LlamaConfig
from easylm.preemption import stop_noticed
from easylm.sharding import batch_sharding
from easylm.track import open_trackers
from easylm.trainers.build import Program, build
from easylm.trainers.config import RunConfig
from easylm.trainers.evaluate import evaluator
from easylm.trainers.loop import train
from easylm.trainers.overview import overview
from easylm.trainers.report import Reporter
from easylm.trainers.save import Saver
from easylm.trainers.step import Batch, LossFn, TrainState, init_state

LoadParams = Callable[[dict, jnp.dtype], dict]  # (shardings, dtype) -> parameters on the mesh


def fit(
    config: RunConfig,
    *,
    model: LlamaConfig,
    mesh: Mesh,
    stream: BatchStream,
    eval_stream: BatchStream | None,
    loss_fn: LossFn,
    load_params: LoadParams,
    export: Callable[[int, dict], None],
    bundle: dict,
    workdir: str,
) -> dict:
    """Trains to the end of `stream`, going on from the newest checkpoint of `workdir`, if any.

    Args:
      config: the run's.
      model: sizes of the model.
      mesh: where it runs.
      stream: the run's batches.
      eval_stream: batches that are not trained on, if any.
      loss_fn: the objective, see trainers/step.py.
      load_params: makes the parameters to start from; not called where a checkpoint is found.
      export: (step, parameters) writes the model for others; does nothing if it is there already.
      bundle: what makes a checkpoint self-contained; see easylm/checkpoint.py. Its "data" says what
        is trained on, and must not change between two starts.
      workdir: of the run.
    Returns:
      The trained parameters, on the mesh.
    Raises:
      FloatingPointError: a loss is not finite.
      InputError: the checkpoint is damaged, or of other data.
      PreemptedError: the run was told to stop; the state is saved.
    """
    use_compilation_cache(config.compilation_cache)
    program = build(
        config,
        model=model,
        mesh=mesh,
        loss_fn=loss_fn,
        batch_rows=stream.rows_per_batch,
        total_steps=len(stream),
    )
    last_step = latest_step(workdir) or 0
    step_folder = f"{workdir}/checkpoints/{last_step}"
    if last_step:
        say(f"going on after step {last_step} of {len(stream)}")
        _check_same_data(read_bundle(step_folder), bundle, workdir)
    state = _start(program, step_folder, last_step, load_params)
    # What the run starts from is good: only now does it leave a trace.
    checkpointer = Checkpointer(workdir, keep=config.checkpoint.keep)
    write_json(config, f"{workdir}/config.json")
    saver = Saver(config, checkpointer, export, bundle)
    saver.export(last_step, state.params)  # it may have been cut off
    if last_step >= len(stream):
        checkpointer.close()
        return state.params
    step_fn = _compile(program)
    memory = step_fn.memory_analysis()
    say(overview(config, model=model, mesh=mesh, stream=stream, memory=memory, last_step=last_step))
    report = _reporter(config, workdir, model, program, stream, last_step)
    with stop_noticed() as stopped, closing(checkpointer), closing(report):
        state = train(
            state,
            step_fn,
            _on_mesh(stream, mesh, last_step),
            last_step=last_step,
            total_steps=len(stream),
            report=report,
            save_at=saver.due,
            save=saver.save,
            evaluate_at=lambda step: (
                eval_stream is not None and (step % config.eval_every == 0 or step == len(stream))
            ),
            evaluate=evaluator(program, loss_fn, lambda: _on_mesh(eval_stream, mesh)),
            stopped=stopped,
        )
    return state.params


def _start(
    program: Program, step_folder: str, last_step: int, load_params: LoadParams
) -> TrainState:
    """The state after `last_step`: loaded, or restored from its checkpoint `step_folder`."""
    state = program.state
    if last_step == 0:
        dtype = jax.tree.leaves(state.params)[0].dtype
        params = load_params(program.shardings.params, dtype)
        return init_state(params, program.optimizer, program.shardings)
    params, opt_state = read_state(step_folder, state.params, state.opt_state)
    step = jax.device_put(jnp.int32(last_step), state.step.sharding)
    return TrainState(step, params, opt_state)


def _compile(program: Program):
    """The step, compiled before the clock of the first step starts."""
    started = time.perf_counter()
    compiled = program.jitted().lower(program.state, program.batch).compile()
    say(f"compiled the step in {time.perf_counter() - started:.1f} s")
    return compiled


def _reporter(
    config: RunConfig, workdir: str, model, program: Program, stream: BatchStream, last_step: int
) -> Reporter:
    return Reporter(
        workdir,
        model=model,
        mesh=program.mesh,
        stream=stream,
        schedule=program.schedule,
        last_step=last_step,
        every=config.log_every,
        trackers=open_trackers(
            workdir,
            last_step,
            tensorboard=config.tensorboard,
            wandb=config.wandb,
            config=dataclasses.asdict(config),
        ),
    )


def _check_same_data(stored: dict, bundle: dict, workdir: str) -> None:
    found, wanted = (
        "{examples:,} examples of {tokens:,} tokens, {steps:,} steps, content {content:.8}".format(
            **data
        )
        for data in (bundle["data"], stored["data"])
    )
    if bundle["data"] != stored["data"]:
        raise InputError(
            f"{workdir}: its checkpoints were trained on other data: found {found}; wanted "
            f"{wanted}. Give the files it started with, or use a new folder"
        )


def _on_mesh(stream: BatchStream, mesh: Mesh, last_step: int = 0) -> Iterator[Batch]:
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

    for batch in prefetch(stream, last_step, slice(first, last)):
        yield {name: place(rows) for name, rows in batch.items()}
