"""A first run: train a tiny LLaMA from nothing on the examples that come with easylm.

python -m easylm.sft --config=sft/quickstart --workdir=quickstart_run
"""

import pathlib

import easylm.configs
from easylm.config import to_config_dict
from easylm.trainers.config import SftConfig

EXAMPLES = pathlib.Path(easylm.configs.__file__).parent / "quickstart" / "train.jsonl"


def get_config():
    config = to_config_dict(SftConfig)
    config.init_from = "random"
    config.steps = 300
    config.batch_rows = 8
    config.compute_dtype = "float32"
    config.remat = "none"
    config.model.hidden_size = 192
    config.model.intermediate_size = 512
    config.model.num_hidden_layers = 4
    config.model.num_attention_heads = 4
    config.model.max_position_embeddings = 512
    config.data.sources = str(EXAMPLES)
    config.data.tokenizer_vocab_size = 1000
    config.data.seq_len = 256
    config.optimizer.learning_rate = 1e-3
    config.checkpoint.every = 100
    config.export.dtype = "float32"
    return config
