"""A run: model, objective and data brought together on the devices, from start or checkpoint."""

import dataclasses
import functools
import time
from collections.abc import Callable
from contextlib import closing

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from easylm import hosts
from easylm.checkpoint import latest_step, read_bundle, read_state
from easylm.command import say
from easylm.config import write_json
from easylm.data.batches import BatchStream
from easylm.errors import InputError
from easylm.metrics import MetricsWriter
from easylm.models.llama.config import LlamaConfig
from easylm.track import open_trackers
from easylm.trainers.build import Program, build
from easylm.trainers.config import RunConfig
from easylm.trainers.evaluate import evaluator
from easylm.trainers.loop import not_finite, train
from easylm.trainers.memory import compiled_bytes
from easylm.trainers.objective import Objective
from easylm.trainers.overview import overview
from easylm.trainers.place import batches_on
from easylm.trainers.profile import Profile
from easylm.trainers.report import Reporter
from easylm.trainers.save import Saver
from easylm.trainers.step import TrainState, init_state
from easylm.watchdog import METRICS, Watchdog

LoadParams = Callable[[dict, jnp.dtype], dict]  # (shardings, dtype) -> parameters on the mesh


def fit(
    config: RunConfig,
    *,
    model: LlamaConfig,
    mesh: Mesh,
    objective: Objective,
    stream: BatchStream,
    eval_stream: BatchStream | None,
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
      objective: what to train for.
      stream: the run's batches.
      eval_stream: batches that are not trained on, if any.
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
    program = build(
        config,
        model=model,
        mesh=mesh,
        loss_fn=objective.loss_fn,
        batch=objective.batch,
        total_steps=len(stream),
    )
    last_step = hosts.on_first("looking for checkpoints", lambda: latest_step(workdir) or 0)
    step_folder = f"{workdir}/checkpoints/{last_step}"
    if last_step:
        say(f"going on after step {last_step} of {len(stream)}")
        _check_same_data(read_bundle(step_folder), bundle, objective.noun, workdir)
    state = _start(program, step_folder, last_step, load_params)
    # What the run starts from is good: only now does it leave a trace.
    if hosts.is_first():
        write_json(config, f"{workdir}/config.json")
    saver = Saver(config, workdir, export, bundle)
    saver.export(last_step, state.params)  # it may have been cut off
    if last_step >= len(stream):
        saver.close()
        return state.params
    with closing(saver):
        state = _train(
            config, program, state, model, objective, stream, eval_stream, saver, workdir
        )
    return state.params


def _train(
    config: RunConfig,
    program: Program,
    state: TrainState,
    model: LlamaConfig,
    objective: Objective,
    stream: BatchStream,
    eval_stream: BatchStream | None,
    saver: Saver,
    workdir: str,
) -> TrainState:
    """Compiles the step, says what comes, and takes the steps that are left."""
    last_step = int(state.step)
    step_fn = _compile(program)
    memory = step_fn.memory_analysis()
    say(overview(config, model, program.mesh, objective, stream, memory, last_step))
    expected = None if memory is None else compiled_bytes(memory)
    reporter = _reporter(config, workdir, model, program, stream, last_step, expected)
    saver.tell = reporter.note
    profile = Profile(
        config.profile,
        workdir,
        last_step=last_step,
        total_steps=len(stream),
        tell=reporter.note,
    )
    profile.after(last_step)
    watchdog = Watchdog(last_step, tell=reporter.note, last_steps=hosts.last_steps)

    def report(step: int, metrics: dict[str, float], seconds: float) -> None:
        hosts.tell_step(step)
        watchdog.done(step, seconds)
        with watchdog.doing(METRICS):
            reporter(step, metrics, seconds)
        if step == 1 and not not_finite(metrics):
            objective.check_first(metrics)

    def save(step: int, state: TrainState) -> None:
        reporter.store()  # a run that goes on from this step does not write its lines again
        saver.save(step, state)

    def evaluate_at(step: int) -> bool:
        return eval_stream is not None and (step % config.eval_every == 0 or step == len(stream))

    held_out = functools.partial(batches_on, program.mesh, eval_stream)
    batches = batches_on(program.mesh, stream, range(last_step, len(stream)))
    with hosts.stop_noticed() as stopped, closing(reporter), closing(profile), closing(watchdog):
        return train(
            state,
            step_fn,
            watchdog.waiting(batches),
            last_step=last_step,
            total_steps=len(stream),
            report=report,
            save_at=saver.due,
            save=watchdog.paused(save),
            evaluate_at=evaluate_at,
            evaluate=watchdog.paused(evaluator(program, objective.loss_fn, held_out)),
            pause_at=profile.due,
            pause=watchdog.paused(profile.after),
            stopped=stopped,
        )


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
    config: RunConfig,
    workdir: str,
    model,
    program: Program,
    stream: BatchStream,
    last_step: int,
    expected: int | None,
) -> Reporter:
    writers = []
    if hosts.is_first():
        trackers = {"tensorboard": config.tensorboard, "wandb": config.wandb}
        writers = [
            MetricsWriter(workdir, last_step),
            *open_trackers(workdir, last_step, config=dataclasses.asdict(config), **trackers),
        ]
    return Reporter(
        model=model,
        mesh=program.mesh,
        stream=stream,
        schedule=program.schedule,
        last_step=last_step,
        every=config.log_every,
        expected=expected,
        writers=writers,
    )


def _check_same_data(stored: dict, bundle: dict, noun: str, workdir: str) -> None:
    text = "{examples:,} {noun}s of {tokens:,} tokens, {steps:,} steps, content {content:.8}"
    found, wanted = (text.format(noun=noun, **data) for data in (bundle["data"], stored["data"]))
    if bundle["data"] != stored["data"]:
        raise InputError(
            f"{workdir}: its checkpoints were trained on other data: found {found}; wanted "
            f"{wanted}. Give the files it started with, or use a new folder"
        )
