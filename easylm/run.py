"""A run on the devices, whatever it trains for: from its streams to what it leaves for others."""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerFast

from easylm import hosts
from easylm.checkpoint import make_bundle
from easylm.command import say
from easylm.data.batches import BatchStream
from easylm.errors import InputError
from easylm.finish import Exporter, say_how_to_chat
from easylm.models.llama.config import LlamaConfig
from easylm.plots import plot_lengths, plot_loss
from easylm.tokenizer import tokenizer_files
from easylm.trainers.config import RunConfig
from easylm.trainers.fit import LoadParams, fit
from easylm.trainers.objective import Objective


def run(
    config: RunConfig,
    workdir: str,
    *,
    model: LlamaConfig,
    tokenizer: PreTrainedTokenizerFast,
    mesh: Mesh,
    objective: Objective,
    stream: BatchStream,
    eval_stream: BatchStream | None,
    load_params: LoadParams,
    data: dict,
    lengths: np.ndarray,
    plots: Sequence[Callable[[str], str]] = (plot_loss,),
) -> None:
    """Trains, exports the model to WORKDIR/hf and draws the pictures.

    Args:
      config, workdir: of the run.
      model: sizes of the model.
      tokenizer: is exported with it.
      mesh, objective, stream, eval_stream, load_params: as of `easylm.trainers.fit.fit`.
      data: what is trained on, in values of JSON: `content` (a hash), `tokens`. A run that goes on
        must find the same.
      lengths: int [examples], tokens before any were cut, for a picture.
      plots: draw the metrics of a workdir.
    Raises:
      FloatingPointError, InputError, PreemptedError: as `fit`.
    """
    files = tokenizer_files(tokenizer)
    bundle = make_bundle(model.to_hf(config.param_dtype), files, dataclasses.asdict(config))
    bundle["data"] = {**data, "examples": stream.num_examples, "steps": len(stream)}
    hosts.check_same("data", bundle["data"])
    export = Exporter(config, workdir, model, files, total_steps=len(stream))
    try:
        params = fit(
            config,
            model=model,
            mesh=mesh,
            objective=objective,
            stream=stream,
            eval_stream=eval_stream,
            load_params=load_params,
            export=export,
            bundle=bundle,
            workdir=workdir,
        )
    except FloatingPointError:
        # They show how the loss got there, if they can.
        with contextlib.suppress(InputError):
            if hosts.is_first():
                _draw(plots, workdir)
        raise
    folder = export(len(stream), params)
    if hosts.is_first():
        _draw(plots, workdir)
        picture = f"{workdir}/plots/lengths.png"
        plot_lengths(lengths, config.data.seq_len, picture, objective.noun)
        say(f"plots are in {workdir}/plots")
        say_how_to_chat(folder)


def _draw(plots: Sequence[Callable[[str], str]], workdir: str) -> None:
    for plot in plots:
        plot(workdir)
