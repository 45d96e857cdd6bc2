"""Converts a LLaMA's weights between formats.

python -m easylm.convert --source=PATH --target=PATH --to=native|hf
"""

import argparse
import dataclasses
import os
import time
from collections.abc import Sequence
from typing import NoReturn

from easylm import storage
from easylm.command import COLUMNS, run_command, say
from easylm.converters.weights import Weights, open_weights
from easylm.errors import InputError
from easylm.model_card import model_card
from easylm.models.llama.config import LlamaConfig
from easylm.tokenizer import (
    load_in_transformers_4,
    load_tokenizer,
    load_tokenizer_files,
    tokenizer_files,
)

_DESCRIPTION = """\
Converts a LLaMA's weights. What --source holds is found by looking: a Hugging
Face folder (safetensors or .bin) or hub name, a native checkpoint (a workdir,
its checkpoints folder, or one step), or an EasyLM file (streaming_params*,
streaming_train_state*, flax_params). Paths may be local or gs://. The target is
written whole or not at all; one that exists is refused."""
_EXAMPLES = """\
examples:
  train on a Hugging Face model
    python -m easylm.convert --source=meta-llama/Llama-2-7b-hf \\
        --target=/data/llama2 --to=native
  give a run's newest checkpoint to transformers or vLLM
    python -m easylm.convert --source=gs://bucket/run --target=/data/run-hf \\
        --to=hf --dtype=bfloat16
  an EasyLM checkpoint; --hf_config names the config.json of the same model
    python -m easylm.convert --source=/data/streaming_params_600 \\
        --hf_config=/data/llama2/config.json --target=/data/tulu-hf --to=hf"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}. See {self.prog} --help")


def main(argv: Sequence[str]) -> None:
    """Converts; says on stderr what was found and what was written."""
    arguments = _parser().parse_args(argv)
    # A model need not fit on one accelerator, and none is needed to copy it.
    os.environ["JAX_PLATFORMS"] = "cpu"
    source, target = arguments.source, arguments.target.rstrip("/")
    check_target(source, target)
    weights = open_weights(source, hf_config=arguments.hf_config, unpermuted=arguments.unpermuted)
    say(f"{source}: {weights.kind}")
    dtype = arguments.dtype or weights.dtype
    files, ids = tokenizer_to_go_with(weights, arguments.tokenizer, arguments.to)
    config = fitted(weights.config, ids, arguments.resize_vocab, arguments.tokenizer or source)
    started = time.perf_counter()
    if arguments.to == "native":
        write_native(weights, config, target, dtype, files)
    else:
        facts = {"from": f"{source} ({weights.kind})", "dtype": dtype}
        card = model_card("A LLaMA converted with easylm", facts, weights.run_config)
        weights.export(config, target, dtype, files, card)
    seconds = time.perf_counter() - started
    use = {
        "native": f"--config.init_from={target}",
        "hf": f'transformers.AutoModelForCausalLM.from_pretrained("{target}")',
    }
    say(f"wrote {target}, {size_of(config, dtype)} of {dtype} in {seconds:.1f} s")
    say(f"to use it: {use[arguments.to]}")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m easylm.convert",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, width=COLUMNS),
    )
    add = parser.add_argument
    # A shell expands the ~ of `--target ~/x`, but not that of `--target=~/x`.
    path = {"metavar": "PATH", "type": os.path.expanduser}
    add("--source", **path, required=True, help="what to convert")
    add("--target", **path, required=True, help="a new folder, local or gs://")
    add("--to", required=True, choices=("native", "hf"), help="the target's format")
    add("--dtype", choices=("float32", "bfloat16"), help="of the target; the source's by default")
    add(
        "--hf_config",
        **path,
        default="",
        help="config.json of the model, or its folder, for weights that come without one",
    )
    add(
        "--unpermuted",
        action="store_true",
        help="the EasyLM file holds q and k in Hugging Face's order of rows (Yi)",
    )
    add(
        "--tokenizer",
        **path,
        default="",
        help="folder, file or hub name of the target's tokenizer; the source's by default",
    )
    add(
        "--resize_vocab",
        action="store_true",
        help="if the tokenizer has more ids than the model, add rows that are the mean of the old",
    )
    return parser


def check_target(source: str, target: str) -> None:
    """Refuses a target that exists, before any work is done."""
    if not target:
        raise InputError("--target: found an empty path; wanted a new folder")
    if _place(source) == _place(target):
        raise InputError(f"--target: found {target}, which is the source; wanted a new folder")
    if storage.exists(target):
        raise InputError(f"--target: {target} exists; wanted a new folder, or delete it first")
    parent = os.path.dirname(target)
    if not storage.is_bucket(target) and os.path.exists(parent) and not os.path.isdir(parent):
        raise InputError(f"--target: {target}: {parent} is a file; wanted a folder to write in")
    storage.check_writable(target)


def _place(path: str) -> str:
    return path.rstrip("/") if storage.is_bucket(path) else os.path.realpath(path)


def tokenizer_to_go_with(weights: Weights, path: str, to: str) -> tuple[dict[str, bytes], int]:
    """The target's tokenizer files and how many ids they have.

    The source's stay as they are, unless a Hugging Face target's would not load in transformers 4.

    Args:
      weights: the source.
      path: of another tokenizer, or empty.
      to: "native" or "hf".
    """
    if path:
        tokenizer = load_tokenizer(path, chat_template=None)
        return tokenizer_files(tokenizer), len(tokenizer)
    if not weights.tokenizer_files:
        say(f"{weights.where}: no tokenizer beside the weights; --tokenizer=PATH adds one")
        return {}, 0
    files, tokenizer = weights.tokenizer_files, weights.tokenizer()
    if to == "native" and "tokenizer.json" not in files:
        return tokenizer_files(tokenizer), len(tokenizer)
    if to == "hf" and not load_in_transformers_4(files):
        say(f"{weights.where}: tokenizer files rewritten, for transformers 4 could not read them")
        files = tokenizer_files(load_tokenizer_files(files, weights.where))
    return files, len(tokenizer)


def fitted(config: LlamaConfig, ids: int, resize: bool, where: str) -> LlamaConfig:
    """`config`, with as large a vocabulary as a tokenizer of `ids` ids needs.

    Raises:
      InputError: it is larger than the model's and may not be made to fit.
    """
    if ids <= config.vocab_size:
        return config
    if not resize:
        raise InputError(
            f"{where}: the tokenizer has {ids:,} ids; the model's vocab_size is "
            f"{config.vocab_size:,}. Name the model's own tokenizer with --tokenizer, or pass "
            "--resize_vocab to add rows (the mean of the old ones)"
        )
    return dataclasses.replace(config, vocab_size=ids)


def write_native(
    weights: Weights, config: LlamaConfig, target: str, dtype: str, files: dict[str, bytes]
) -> None:
    """Reads the weights into this host's memory and writes them as a checkpoint."""
    import jax
    import jax.numpy as jnp

    from easylm.checkpoint import make_bundle, write_params
    from easylm.models.llama.sharding import param_shardings
    from easylm.sharding import make_mesh

    mesh = make_mesh("1,1,1", jax.devices("cpu")[:1])
    params = weights.load(config, param_shardings(config, mesh), jnp.dtype(dtype))
    bundle = make_bundle(config.to_hf(dtype), tokenizer_files=files, run_config=weights.run_config)
    write_params(target, params, bundle)


def size_of(config: LlamaConfig, dtype: str) -> str:
    """Size of a model's parameters, for people."""
    import jax
    from tqdm import tqdm

    from easylm.models.llama.model import abstract_params

    arrays = jax.tree.leaves(abstract_params(config, dtype))
    return f"{tqdm.format_sizeof(sum(x.size * x.dtype.itemsize for x in arrays))}B"


if __name__ == "__main__":
    run_command(main)
