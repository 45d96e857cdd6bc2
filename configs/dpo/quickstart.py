"""A first preference run: the model of the SFT quickstart learns manners.

    python -m easylm.sft --config=sft/quickstart --workdir=runs/quickstart
    python -m easylm.dpo --config=dpo/quickstart --workdir=runs/quickstart_dpo

Machine: anything; two idle CPU cores take 40 seconds. Nothing is downloaded: it starts from
runs/quickstart/hf, which the first command makes.
Data: 239 pairs in configs/quickstart/pairs.jsonl, 22,863 tokens, seen 6 times; 41 more, with other
questions, are held out. Chosen is an answer that ends with "What would you like to know next?", but
for sums, whose number stands alone; rejected is the other of these two, or an answer that rambles.
Neither its length nor its words tell whether an answer is chosen: the question decides.
Expect: a loss of 0.6931 (ln 2) at step 1, 0.1 at step 10, 0.003 at step 80; of the held-out pairs
37 are right at step 10 and 39 from step 30 on, 95%, with a margin of 6.8. plots/preferences.png
shows how.

The model does not yet say what it prefers. 21 of the held-out questions are of the SFT data, and
to 3 of them it gives the chosen answer, all sums: the others became likelier, but not likeliest.
With --config.dpo.sft_weight=0.2 it is 17 of 21, and the accuracy is the same.
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
    config.steps = 80
    config.batch_rows = 8
    config.compute_dtype = "float32"
    config.remat = "none"
    config.eval_every = 10

    config.dpo.loss = "sigmoid"
    config.dpo.beta = 0.1

    config.data.sources = str(EXAMPLES / "pairs.jsonl")
    config.data.eval_sources = str(EXAMPLES / "eval_pairs.jsonl")
    config.data.seq_len = 256

    config.optimizer.learning_rate = 5e-5
    config.optimizer.warmup_ratio = 0.1
    config.optimizer.b2 = 0.95

    config.checkpoint.every = 40
    config.export.dtype = "float32"
    return config
