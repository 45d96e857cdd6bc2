"""Tülu 2 7B: LLaMA 2 7B on the Tülu 2 mixture (Ivison et al. 2023, arXiv:2311.10702).

    gcloud compute tpus tpu-vm ssh POD --worker=all --command="cd easylm && \
        python -m easylm.sft --config=sft/tulu2_7b --workdir=gs://BUCKET/tulu2_7b"

Pod: v3-256 (32 hosts, 256 devices of 16 GB), as in the paper.
Data: allenai/tulu-v2-sft-mixture from the hub, 326,154 examples of 1,097 tokens on average.
Expect: 5,096 steps (2 epochs of 128 examples a step); whole rows make it a few per cent more or
less, and the run says so at its start.

Optimizer: EasyLM's AdamW, b1 0.9, b2 0.95, eps 1e-8, gradients clipped at norm 1, no weight decay;
2e-5 after a linear warm-up over 3% of the steps (rounded up), then linearly to 0.
Loss: every group of 32 examples weighs the same (EasyLM's micro-batches, four a step);
--config.loss_weighting=token weighs every trained token the same.
Text: the newline after </s> is not seen, as with EasyLM's tokenizer; --config.data.eos_newline=keep
trains on exactly what the exported chat template writes.

Differs from the paper's run:
- Rows are packed, so 128 examples fill about 17 rows of 8,192 tokens where EasyLM padded 128. The
  mesh takes 32 rows, 15 of them empty; --config.mesh=1,16,16 --config.batch_examples=118 fills
  exactly its 16, half the work a step, in some 5,500 steps.
- Rows with an empty message (about 270 are known) are skipped and counted.
- rms_norm_eps is 1e-5, as the weights say; EasyLM ran them with the 1e-6 of LLaMA 1.
- The order of the data is another one: seed 42 means something else here.
Verified: the step compiles for this pod with the TPU's own compiler (python -m easylm.plan). It
takes 6.9 of the 15.5 GiB of a device, and the run at least 1.0 hours, an estimate. 15 of the 32 row
groups are idle, so the pod is 5.1 times as fast as its eighth, a v3-32 with
--config.micro_batches=5 (at least 5.2 hours). It fits a v3-8 too, with --config.micro_batches=17
--config.remat=block_sharded: at least 22 hours. It has not been trained on a pod.
"""

from easylm.config import to_config_dict
from easylm.trainers.config import SftConfig


def get_config():
    config = to_config_dict(SftConfig)
    config.init_from = "meta-llama/Llama-2-7b-hf"
    config.epochs = 2
    config.batch_examples = 128
    config.loss_weighting = "microbatch"
    config.loss_group = 32

    config.pod = "v3-256"
    config.mesh = "1,-1,8"
    config.param_dtype = "float32"
    config.compute_dtype = "bfloat16"
    config.remat = "dots"
    config.micro_batches = 1
    config.loss_chunk = 512

    config.model.max_position_embeddings = 8192  # LLaMA 2 was made for 4,096

    config.data.sources = "allenai/tulu-v2-sft-mixture"
    config.data.expected_examples = 326_154
    config.data.expected_mean_tokens = 1097.0
    config.data.seq_len = 8192
    config.data.eos_newline = "strip"
    config.data.on_bad_row = "skip"

    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 2e-5
    config.optimizer.schedule = "linear"
    config.optimizer.warmup_ratio = 0.03
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.95
    config.optimizer.eps = 1e-8
    config.optimizer.weight_decay = 0.0
    config.optimizer.clip_norm = 1.0

    config.checkpoint.every = 250
    return config
