"""A first run: a tiny LLaMA learns the examples that come with easylm by heart.

    python -m easylm.sft --config=sft/quickstart --workdir=runs/quickstart

Machine: anything; two CPU cores take a minute and a half. Nothing is downloaded: the tokenizer of
1,000 ids is trained on the examples first, the weights (2.2M) are random.
Data: 301 short conversations about easylm, in configs/quickstart/train.jsonl; 11,704 tokens, seen
40 times.
Expect: a loss of 6.9 at step 1, below 1 at step 100, about 0.03 at step 240; then WORKDIR/hf
answers the prompts of the training file, nearly all of them word for word. On a CPU it runs on 8
virtual devices, the weights in pieces on all of them, as it would on a slice of a pod.
"""

import pathlib

import easylm.configs
from easylm.config import to_config_dict
from easylm.trainers.config import SftConfig

EXAMPLES = pathlib.Path(easylm.configs.__file__).parent / "quickstart"


def get_config():
    config = to_config_dict(SftConfig)
    config.init_from = "random"
    config.cpu_devices = 8
    config.steps = 240
    config.batch_rows = 8
    config.compute_dtype = "float32"
    config.remat = "none"
    config.eval_every = 60

    config.model.hidden_size = 192
    config.model.intermediate_size = 512
    config.model.num_hidden_layers = 4
    config.model.num_attention_heads = 4
    config.model.max_position_embeddings = 512

    config.data.sources = str(EXAMPLES / "train.jsonl")
    config.data.eval_sources = str(EXAMPLES / "eval.jsonl")
    config.data.tokenizer_vocab_size = 1000
    config.data.seq_len = 256

    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_ratio = 0.1
    config.optimizer.b2 = 0.95

    config.checkpoint.every = 120
    config.export.dtype = "float32"
    return config
