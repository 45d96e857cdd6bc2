"""Tiny runs of `python -m easylm.sft` and `easylm.dpo`: data, options, and what they leave."""

import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterable, Sequence

import numpy as np
import torch
import transformers

from easylm import sft

TOPICS = ("sun", "moon", "rain", "snow", "wind", "sea")
ROWS = [
    {"instruction": f"Say {topic} {n} times.", "input": "", "output": " ".join([topic] * n)}
    for topic in TOPICS
    for n in range(1, 6)
] + [
    {
        "messages": [
            {"role": "user", "content": f"Do you like the {topic}?"},
            {"role": "assistant", "content": f"Yes, the {topic} is fine."},
            {"role": "user", "content": "Why?"},
            {"role": "assistant", "content": f"It is the {topic}."},
        ]
    }
    for topic in TOPICS
]
PAIRS = [
    {
        "prompt": "Do you like the " + " and the ".join((topic, "sun")[:n]) + "?",
        "chosen": "Yes. " * n + f"The {topic} is fine.",
        "rejected": "No." if n % 2 else f"No, the {topic} is bad.",
    }
    for topic in TOPICS
    for n in range(1, 6)
]
EVAL_PAIRS = [
    {
        "chosen": [question, {"role": "assistant", "content": f"Yes, the {topic}."}],
        "rejected": [question, {"role": "assistant", "content": "No. No."}],
    }
    for topic in TOPICS[:5]
    for question in [{"role": "user", "content": f"The {topic}?"}]
]
RANDOM = {
    "init_from": "random",
    "model.hidden_size": 32,
    "model.intermediate_size": 64,
    "model.num_hidden_layers": 2,
    "model.num_attention_heads": 4,
    "model.num_key_value_heads": 2,
    "model.max_position_embeddings": 128,
    "data.tokenizer_vocab_size": 320,
}
# Of runs on pairs: rows hold two or three.
PAIRS_OPTIONS = {"model.max_position_embeddings": 256, "data.seq_len": 240}
COMMON = {
    "data.seq_len": 80,
    "steps": 6,
    "batch_rows": 3,  # not a multiple of the eight devices: empty rows fill the batch
    "compute_dtype": "float32",
    "optimizer.learning_rate": 1e-2,
    "optimizer.warmup_ratio": 0,
    "checkpoint.every": 3,
    "export.dtype": "float32",
}
CONFIG = """\
from easylm.config import to_config_dict
from easylm.trainers.config import {name}


def get_config():
    return to_config_dict({name})
"""


def write_rows(path: pathlib.Path, rows: Iterable[dict]) -> pathlib.Path:
    """`path` with one JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_folder(path: pathlib.Path) -> pathlib.Path:
    """`path` with the rows and the config of tiny runs."""
    write_rows(path / "rows.jsonl", ROWS)
    (path / "config.py").write_text(CONFIG.format(name="SftConfig"))
    return path


def make_pairs_folder(path: pathlib.Path) -> pathlib.Path:
    """The same for runs on preference pairs; eval.jsonl holds other pairs."""
    write_rows(path / "rows.jsonl", PAIRS)
    write_rows(path / "eval.jsonl", EVAL_PAIRS)
    (path / "config.py").write_text(CONFIG.format(name="DpoConfig"))
    return path


def arguments(folder: pathlib.Path, workdir: pathlib.Path | str, options: dict) -> list[str]:
    """Of the command, for a run on the rows of `folder`; options by name, without "config."."""
    places = {"data.sources": str(folder / "rows.jsonl"), "data.cache": str(folder / "prepared")}
    return [
        f"--config={folder / 'config.py'}",
        f"--workdir={workdir}",
        *(f"--config.{name}={value}" for name, value in {**places, **COMMON, **options}.items()),
    ]


def start(
    arguments: list[str],
    without: str = "",
    *,
    program: Sequence[str] = ("-m", "easylm.sft"),
    before: Sequence[str] = (),
    **environment: str,
) -> subprocess.Popen:
    """The command in a process of its own, in the checkout; `without` a variable.

    `before` are the words of a program that is to start it.
    """
    environment = {**os.environ, **environment}
    environment.pop(without, None)
    return subprocess.Popen(
        [*before, sys.executable, *program, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=pathlib.Path(sft.__file__).parent.parent,
    )


def metrics(workdir: pathlib.Path) -> list[dict]:
    """The lines of metrics.jsonl; one that is being written is left out."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def conversations(rows: Iterable[dict]) -> list[list[dict]]:
    """The messages of rows of any of the three kinds that the runs here have."""
    found = []
    for row in rows:
        question = row.get("instruction") or row.get("prompt")
        answer = row.get("output") or row.get("completion")
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        found.append(row.get("messages") or turns)
    return found


def loss_by_transformers(folder: pathlib.Path, conversations: list[list[dict]]):
    """(mean loss of the assistants' tokens, how many they are) by transformers alone.

    Conversations are cut at seq_len, as in the runs.
    """
    longest = COMMON["data.seq_len"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    total = count = 0
    for messages in conversations:
        encoded = tokenizer.apply_chat_template(
            messages, return_dict=True, return_assistant_tokens_mask=True
        )
        ids = torch.tensor([encoded["input_ids"][:longest]])
        trained = torch.tensor(encoded["assistant_masks"][1:longest], dtype=torch.bool)
        with torch.no_grad():
            logprobs = model(ids).logits.log_softmax(-1)[0, :-1]
        total -= logprobs.gather(1, ids[0, 1:, None])[:, 0][trained].double().sum().item()
        count += trained.sum().item()
    return total / count, count


def logprobs_by_transformers(folder: pathlib.Path, pairs: Iterable[dict]) -> np.ndarray:
    """Log-probabilities of answers, summed over their tokens, by transformers alone.

    Of `pairs` as PAIRS or EVAL_PAIRS has them; float64 [pairs, 2], the chosen answer first. Each
    sequence has a forward pass of its own.
    """
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)

    def logprob(pair: dict, answer: str) -> float:
        messages = pair[answer]
        if "prompt" in pair:
            question = {"role": "user", "content": pair["prompt"]}
            messages = [question, {"role": "assistant", "content": pair[answer]}]
        encoded = tokenizer.apply_chat_template(
            messages, return_dict=True, return_assistant_tokens_mask=True
        )
        ids = torch.tensor([encoded["input_ids"]])
        scored = torch.tensor(encoded["assistant_masks"][1:], dtype=torch.bool)
        with torch.no_grad():
            logprobs = model(ids).logits.double().log_softmax(-1)[0, :-1]
        return logprobs.gather(1, ids[0, 1:, None])[:, 0][scored].sum().item()

    return np.array(
        [[logprob(pair, answer) for answer in ("chosen", "rejected")] for pair in pairs]
    )
