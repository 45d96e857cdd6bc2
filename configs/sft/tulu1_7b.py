"""Tülu 1 7B: LLaMA 7B on the Human+GPT mixture (Wang et al. 2023, arXiv:2306.04751).

    gcloud compute tpus tpu-vm ssh POD --worker=all --command="cd easylm && \
        python -m easylm.sft --config=sft/tulu1_7b --workdir=gs://BUCKET/tulu1_7b"

Pod: v3-128 (16 hosts, 128 devices of 16 GB). The paper trained on GPUs (AMD MI250X).
Data: allenai/tulu-v1-sft-mixture from the hub, 489,818 examples (the paper's count is 490,445).
Expect: 7,653 steps (2 epochs of 128 examples a step); whole rows make it a few per cent more or
less, and the run says so at its start.

Optimizer: torch's AdamW, b1 0.9, b2 0.999, eps 1e-8, no clipping, no weight decay; 2e-5 after a
linear warm-up over 3% of the steps (rounded up; open-instruct rounded down), then linearly to 0.
Loss: every 2 examples weigh the same (open-instruct's micro-batch on each GPU);
--config.loss_weighting=token weighs every trained token the same.
Text: the newline after </s> is not seen, as with the slow tokenizer of that time;
--config.data.eos_newline=keep trains on exactly what the exported chat template writes.

Differs from the paper's run:
- Rows are packed; open-instruct padded to the longest example of each micro-batch. By the lengths
  in the paper's Table 1, 128 examples fill some 45 rows of 2,048 tokens; the mesh takes 48.
- No <pad> token is added to the vocabulary: it stays at 32,000 ids.
- Rows with an empty message are skipped and counted.
- The batch of 128 is that of open-instruct's script; the paper does not name it.
Verified: the step compiles for this pod with the TPU's own compiler (python -m easylm.plan). It
takes 5.7 of the 15.5 GiB of a device, and the run at least 1.1 hours, an estimate. It fits a v3-8
too, with --config.micro_batches=45 --config.remat=block_sharded: at least 21 hours. It has not been
trained on a pod.
"""

from easylm.config import to_config_dict
from easylm.trainers.config import SftConfig


def get_config():
    config = to_config_dict(SftConfig)
    config.init_from = "huggyllama/llama-7b"
    config.epochs = 2
    config.batch_examples = 128
    config.loss_weighting = "microbatch"
    config.loss_group = 2

    config.pod = "v3-128"
    config.mesh = "1,-1,8"
    config.param_dtype = "float32"
    config.compute_dtype = "bfloat16"
    config.remat = "dots"
    config.micro_batches = 1
    config.loss_chunk = 512

    config.data.sources = "allenai/tulu-v1-sft-mixture"
    config.data.expected_examples = 489_818
    config.data.expected_mean_tokens = 720.0
    config.data.seq_len = 2048
    config.data.eos_newline = "strip"
    config.data.on_bad_row = "skip"

    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 2e-5
    config.optimizer.schedule = "linear"
    config.optimizer.warmup_ratio = 0.03
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.999
    config.optimizer.eps = 1e-8
    config.optimizer.weight_decay = 0.0
    config.optimizer.clip_norm = None

    config.checkpoint.every = 250
    return config
