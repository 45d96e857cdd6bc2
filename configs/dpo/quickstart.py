"""A first preference run: the model of the SFT quickstart learns to answer in whole sentences.

    python -m easylm.sft --config=sft/quickstart --workdir=runs/quickstart
    python -m easylm.dpo --config=dpo/quickstart --workdir=runs/quickstart_dpo
"""

import pathlib

import easylm.configs
from easylm.config import to_config_dict
from easylm.trainers.config import DpoConfig

EXAMPLES = pathlib.Path(easylm.configs.__file__).parent / "quickstart"


def get_config():
    config = to_config_dict(DpoConfig)
    config.init_from = "runs/quickstart/hf"
    config.cpu_devices = 8
    config.steps = 100
    config.batch_rows = 8
    config.compute_dtype = "float32"
    config.remat = "none"
    config.eval_every = 20

    config.dpo.loss = "sigmoid"
    config.dpo.beta = 0.1

    config.data.sources = str(EXAMPLES / "pairs.jsonl")
    config.data.eval_sources = str(EXAMPLES / "eval_pairs.jsonl")
    config.data.seq_len = 256

    config.optimizer.learning_rate = 1e-4
    config.optimizer.warmup_ratio = 0.1
    config.optimizer.b2 = 0.95

    config.checkpoint.every = 50
    config.export.dtype = "float32"
    return config
