"""Tülu 2+DPO 7B: Tülu 2 7B on UltraFeedback (Ivison et al. 2023, arXiv:2311.10702).

    gcloud compute tpus tpu-vm ssh POD --worker=all --command="cd easylm && \
        python -m easylm.dpo --config=dpo/tulu2_7b --workdir=gs://BUCKET/tulu2_dpo_7b"

Pod: v3-32 (4 hosts, 32 devices of 16 GB). The paper had a v3-256, but 32 pairs fill four packed
rows, and more row groups than four are idle.
Data: HuggingFaceH4/ultrafeedback_binarized:train_prefs from the hub, 61,135 pairs, and the 2,000 of
test_prefs to evaluate on. A pair is some 1,000 tokens, both answers with their prompt.
Expect: 5,731 steps (3 epochs of 32 pairs a step), a few per cent more or less by whole rows, after
one pass over all pairs for the reference.

Loss: DPO, beta 0.1, sums of log-probabilities over the last answer, </s> included; all pairs weigh
the same. It starts at ln 2 = 0.693, but for the rounding of bfloat16.
Optimizer: EasyLM's AdamW, b1 0.9, b2 0.95, eps 1e-8, gradients clipped at norm 1, no weight decay;
5e-7 after a linear warm-up over a tenth of the steps, then linearly to 0.

Differs from the paper's run:
- Pairs are packed. 32 of them fill about 4 rows of 8,192 tokens, where EasyLM padded 64 answers to
  a row each.
- 8,192 tokens are for both answers of a pair together. A pair that is longer is cut and counted;
  --config.data.too_long=drop leaves it out.
- The reference is computed once and kept, so no second model is in memory.
- The data is the hub's revision of January 2024. The paper's had 61,966 pairs, among them prompts
  of TruthfulQA and 2,628 answers whose score was wrong (10 for 1).
- How EasyLM's file spelled the prompts is not known; here they are in the Tülu format of the SFT.
- The order of the data is another one: seed 42 means something else here.
Verified: the step compiles for this pod with the TPU's own compiler (python -m easylm.plan). It
takes 9.8 of the 15.5 GiB of a device, and the run at least 1.1 hours, an estimate, after the pass
of the reference. The paper's v3-256 with --config.mesh=1,8,32 --config.remat=block_sharded, half of
it idle: at least 0.5 hours. A v3-8 with --config.micro_batches=4 --config.remat=block_sharded: at
least 5.5 hours. It has not been trained on a pod.
"""

from easylm.config import to_config_dict
from easylm.trainers.config import DpoConfig


def get_config():
    config = to_config_dict(DpoConfig)
    config.init_from = "allenai/tulu-2-7b"
    config.epochs = 3
    config.batch_examples = 32
    config.eval_every = 500

    config.pod = "v3-32"
    config.mesh = "1,-1,8"
    config.param_dtype = "float32"
    config.compute_dtype = "bfloat16"
    config.remat = "dots"
    config.micro_batches = 1
    config.loss_chunk = 512

    config.dpo.loss = "sigmoid"
    config.dpo.beta = 0.1
    config.dpo.reference = "policy"

    config.model.max_position_embeddings = 8192

    config.data.sources = "HuggingFaceH4/ultrafeedback_binarized:train_prefs"
    config.data.eval_sources = "HuggingFaceH4/ultrafeedback_binarized:test_prefs"
    config.data.expected_examples = 61_135
    config.data.expected_mean_tokens = 1000.0
    config.data.seq_len = 8192
    config.data.on_bad_row = "skip"

    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 5e-7
    config.optimizer.schedule = "linear"
    config.optimizer.warmup_ratio = 0.1
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.95
    config.optimizer.eps = 1e-8
    config.optimizer.weight_decay = 0.0
    config.optimizer.clip_norm = 1.0

    config.checkpoint.every = 500
    return config
