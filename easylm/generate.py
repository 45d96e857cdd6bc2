"""Answers prompts with a LLaMA.

python -m easylm.generate --model=DIR --prompt=TEXT
python -m easylm.generate --model=DIR --input=FILE.jsonl --output=FILE.jsonl
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import IO, TYPE_CHECKING, NoReturn, TypeVar

from tqdm import tqdm

from easylm import storage
from easylm.chat import encode_prompt
from easylm.command import COLUMNS, run_command, say
from easylm.compilation import CACHE, use_compilation_cache
from easylm.config import parse_mesh
from easylm.converters.weights import Weights, open_weights
from easylm.data.prompts import Prompt, list_problems, read_prompts, text_prompt
from easylm.errors import InputError
from easylm.models.llama.config import LlamaConfig
from easylm.models.llama.decoding import Completion, Decoding, check_prompt
from easylm.tokenizer import load_tokenizer, set_chat_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from easylm.models.llama.generate import Generator

_DESCRIPTION = """\
Answers prompts. A prompt is a user's message in the model's chat template; with
--raw it is a text to be continued. --model takes a Hugging Face folder or hub
name, or a native checkpoint (a workdir, its checkpoints folder, or one step),
local or gs://."""
_EXAMPLES = """\
examples:
  talk to the model that a run has made
    python -m easylm.generate --model=DIR/hf --prompt="Who are you?"
  answer a file; rows have "prompt", or "messages" that end with the user's, and
  come back with "completion" and "finish_reason" (stop or length)
    python -m easylm.generate --model=DIR --input=questions.jsonl \\
        --output=answers.jsonl --temperature=0.7 --top_p=0.95 --seed=1
  let a base model go on with a text
    python -m easylm.generate --model=meta-llama/Llama-2-7b-hf --raw \\
        --prompt="The capital of France is" --max_new_tokens=8"""
_PARTIAL = ".partial"

_Number = TypeVar("_Number", int, float)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}. See {self.prog} --help")


def main(argv: Sequence[str]) -> None:
    """Answers to --prompt go to stdout, those to --input into a file; all else is on stderr."""
    arguments = _parser().parse_args(argv)
    check_options(arguments)
    # What is wrong most often comes first: the rows, then the model's files, then devices.
    if arguments.input:
        prompts = read_prompts(arguments.input, raw=arguments.raw)
    else:
        prompts = [text_prompt(text, "--prompt") for text in arguments.prompt]
    weights = open_weights(arguments.model, hf_config=arguments.hf_config)
    say(f"{arguments.model}: {weights.kind}")
    tokenizer = open_tokenizer(arguments, weights)
    tokens = encode(tokenizer, prompts, weights.config, raw=arguments.raw)
    decoding = Decoding(
        max_new_tokens=arguments.max_new_tokens,
        stop_ids=stop_ids(weights.config, tokenizer),
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        seed=arguments.seed,
    )
    generator = start(arguments, weights)
    if arguments.input:
        answer_file(arguments.output, generator, tokenizer, prompts, tokens, decoding)
        return
    answers = generator.generate(tokens, decoding)
    for asked, completion in zip(arguments.prompt, answers, strict=True):
        if len(prompts) > 1:
            print(f"> {asked}")
        print(text_of(tokenizer, completion), flush=True)
        if completion.finish_reason == "length":
            limit = len(completion.tokens) == arguments.max_new_tokens
            why = "--max_new_tokens allows more" if limit else "the model has no more positions"
            say(f"cut off after {len(completion.tokens):,} tokens; {why}")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m easylm.generate",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, width=COLUMNS),
    )
    add = parser.add_argument
    path = {"metavar": "PATH", "type": os.path.expanduser, "default": ""}
    add("--model", **{**path, "required": True}, help="the weights and their tokenizer")
    add("--prompt", action="append", metavar="TEXT", help="what to answer; may be repeated")
    add("--input", **path, help="rows to answer: .jsonl, .json, .gz or .parquet, local or gs://")
    add("--output", **path, help="a new .jsonl file for them, in their order, local or gs://")
    add("--raw", action="store_true", help="continue prompts as they stand: no chat template")
    add(
        "--chat_template",
        default="own",
        metavar="NAME",
        help="own (the tokenizer's, the default), tulu, or a jinja file",
    )
    add("--tokenizer", **path, help="folder, file or hub name; the model's own by default")
    add("--hf_config", **path, help="config.json of the model, for an EasyLM stream")
    add(
        "--max_new_tokens",
        type=_number(int, 1),
        default=512,
        metavar="N",
        help="longest answer; it also ends at the model's last position (default 512)",
    )
    add(
        "--temperature",
        type=_number(float, 0),
        default=0.0,
        metavar="T",
        help="0, the default, takes the likeliest token; above it tokens are drawn",
    )
    add(
        "--top_p",
        type=_number(float, 0, 1),
        default=1.0,
        metavar="P",
        help="draw from the likeliest tokens of this total probability (default 1: all)",
    )
    add(
        "--seed",
        type=_number(int, 0, 2**32 - 1),
        default=0,
        metavar="N",
        help="of the draws: the same rows and seed give the same answers (default 0)",
    )
    add("--dtype", choices=("float32", "bfloat16"), help="to compute in; the weights' by default")
    add(
        "--mesh",
        default="",
        metavar="D,F,T",
        help="devices along data,fsdp,tensor; by default tensor takes all that divide the model",
    )
    add(
        "--batch_size",
        type=_number(int, 1),
        default=16,
        metavar="N",
        help="prompts answered at once, at most (default 16)",
    )
    return parser


def _number(
    kind: type[_Number], least: _Number, most: _Number = 2**31 - 1
) -> Callable[[str], _Number]:
    """Reads a number for argparse, which quotes what this raises."""
    wanted = f"{'an integer' if kind is int else 'a number'} from {least:,} to {most:,}"

    def read(text: str) -> _Number:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"found {text!r}; wanted {wanted}")
        return value

    return read


def check_options(arguments: argparse.Namespace) -> None:
    """Refuses options that do not go together, and an output that exists.

    Raises:
      InputError: as said.
    """
    if not arguments.model:
        raise InputError("--model: found an empty path; wanted the weights")
    if bool(arguments.prompt) == bool(arguments.input):
        found = "both" if arguments.input else "neither"
        raise InputError(f"--prompt and --input: found {found}; wanted one of them")
    if bool(arguments.input) != bool(arguments.output):
        given, missing = ("input", "output") if arguments.input else ("output", "input")
        raise InputError(f"--{given}: found without --{missing}; wanted both, or --prompt alone")
    if arguments.raw and arguments.chat_template != "own":
        raise InputError("--raw: found with --chat_template; wanted one of them")
    if arguments.top_p == 0:
        raise InputError("--top_p: found 0; wanted a number above 0, at most 1")
    if arguments.mesh:
        parse_mesh(arguments.mesh)
    if not arguments.output:
        return
    output, partial = arguments.output, arguments.output + _PARTIAL
    if storage.exists(output):
        raise InputError(f"--output: {output} exists; wanted a new file")
    if storage.exists(partial):
        raise InputError(
            f"--output: {partial} exists, the answers of a run that did not finish; wanted it "
            "moved away, or another name"
        )
    storage.check_writable(os.path.dirname(output))


def open_tokenizer(arguments: argparse.Namespace, weights: Weights) -> PreTrainedTokenizerFast:
    """The model's tokenizer, or the one asked for, with the chat template asked for."""
    if arguments.tokenizer:
        where = arguments.tokenizer
        tokenizer = load_tokenizer(where, chat_template=None)
    elif weights.tokenizer_files:
        where = arguments.model
        tokenizer = weights.tokenizer()
    else:
        raise InputError(
            f"{arguments.model}: found no tokenizer beside the weights; name one with --tokenizer"
        )
    if arguments.raw:
        say("prompts are continued as they stand (--raw)")
        return tokenizer
    template = arguments.chat_template
    if template == "own" and tokenizer.chat_template is None:
        raise InputError(
            f"{where}: the tokenizer has no chat template, as those of base models; wanted "
            "--chat_template=tulu or a jinja file for a chat model, or --raw to continue prompts "
            "as they stand"
        )
    set_chat_template(tokenizer, template, where)
    say(f"prompts are the user's messages in the chat template ({template})")
    return tokenizer


def encode(
    tokenizer: PreTrainedTokenizerFast, prompts: Sequence[Prompt], config: LlamaConfig, *, raw: bool
) -> list[list[int]]:
    """Token ids of prompts, up to where the answer begins.

    Raises:
      InputError: the chat template refuses some, or they are too long for the model.
    """
    encoded: list[list[int]] = []
    problems = []
    for messages, _, where in prompts:
        try:
            if raw:
                ids = tokenizer(messages[0]["content"], verbose=False)["input_ids"]
            else:
                ids = encode_prompt(tokenizer, messages).tolist()
            check_prompt(config, len(ids), where)
        except InputError as error:
            message = str(error)
            problems.append(message if message.startswith(where) else f"{where}: {message}")
            continue
        if max(ids) >= config.vocab_size:
            raise InputError(
                f"{where}: the tokenizer gives id {max(ids):,}; the model has "
                f"{config.vocab_size:,} (vocab_size). Name the model's own with --tokenizer"
            )
        encoded.append(ids)
    if len(problems) == 1:
        raise InputError(problems[0])
    if problems:
        raise InputError(
            f"{len(problems):,} of {len(prompts):,} prompts cannot be answered:\n"
            + list_problems(problems)
        )
    return encoded


def stop_ids(config: LlamaConfig, tokenizer: PreTrainedTokenizerFast) -> tuple[int, ...]:
    """Whatever the model's config or its tokenizer calls the end."""
    eos = config.eos_token_id
    ids = {*(eos if isinstance(eos, tuple) else (eos,)), tokenizer.eos_token_id}
    return tuple(sorted(ids - {None}))


def start(arguments: argparse.Namespace, weights: Weights) -> Generator:
    """Reads the weights onto the devices; jax loads here."""
    import jax
    import jax.numpy as jnp

    from easylm.models.llama.generate import Generator, split_layers
    from easylm.models.llama.sharding import param_shardings, tensor_sizes
    from easylm.sharding import make_mesh

    use_compilation_cache(CACHE)
    config, devices = weights.config, jax.device_count()
    # A token needs every weight once: they are split, not gathered from all devices each time.
    tensor = max(size for size in tensor_sizes(config) if devices % size == 0)
    mesh = make_mesh(arguments.mesh or f"-1,1,{tensor}")
    dtype = jnp.dtype(arguments.dtype or weights.dtype)
    params = split_layers(weights.load(config, param_shardings(config, mesh), dtype))
    return Generator(config, params, mesh, compute_dtype=dtype, batch_size=arguments.batch_size)


def answer_file(
    output: str,
    generator: Generator,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[Prompt],
    tokens: Sequence[Sequence[int]],
    decoding: Decoding,
) -> None:
    """Writes the rows with their answers, in order, each as soon as those before it are there."""
    waiting: dict[int, Completion] = {}
    written = produced = stopped = 0
    started = time.perf_counter()
    with new_file(output) as file, tqdm(total=len(prompts), unit=" rows") as bar:
        for index, completion in generator.stream(tokens, decoding):
            waiting[index] = completion
            while written in waiting:
                answer = waiting.pop(written)
                text = text_of(tokenizer, answer)
                row = {"completion": text, "finish_reason": answer.finish_reason}
                line = json.dumps({**prompts[written].row, **row}, ensure_ascii=False)
                file.write(f"{line}\n".encode())
                written += 1
            produced += len(completion.tokens)
            stopped += completion.finish_reason == "stop"
            rate = produced / (time.perf_counter() - started)
            bar.set_postfix_str(f"{rate:,.0f} tokens/s", refresh=False)
            bar.update()
    say(
        f"wrote {output}: {written:,} rows, {produced:,} tokens, {rate:,.0f} tokens/s; "
        f"{stopped:,} ended, {written - stopped:,} cut off"
    )


@contextlib.contextmanager
def new_file(path: str) -> Iterator[IO[bytes]]:
    """A file that appears under its name when the block ends well.

    On a disk what is written so far can be read beside it, in PATH.partial, which stays if the
    block raises. In a bucket there is nothing until the end.
    """
    if storage.is_bucket(path):
        with tempfile.TemporaryFile() as file:
            yield file
            file.seek(0)
            storage.write_bytes(path, file.read())
        return
    partial = path + _PARTIAL
    with storage.explained(path):
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    storage.write_bytes(partial, b"")
    try:
        with storage.explained(partial):
            with open(partial, "ab", buffering=0) as file:
                yield file
            os.rename(partial, path)
    except BaseException:
        if os.path.getsize(partial):
            say(f"{partial} holds what was finished")
        else:
            os.remove(partial)
        raise


def text_of(tokenizer: PreTrainedTokenizerFast, completion: Completion) -> str:
    """What a completion says.

    Decoded behind a letter, which is then cut off: tokenizers drop the space that a text begins
    with. Behind the prompt it would do too, if bytes of a broken character did not take those of
    the prompt before them along.
    """
    letter = tokenizer("a", add_special_tokens=False)["input_ids"][-1:]
    before, whole = (
        tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for ids in (letter, letter + completion.tokens)
    )
    return whole[len(before) :]


if __name__ == "__main__":
    run_command(main)
