"""Tülu 1 65B: LLaMA 65B on the Human+GPT mixture, trained as tulu1_7b.py describes.

Rows of 1,024 tokens and half the rate, as the paper has it for the larger models.

    gcloud compute tpus tpu-vm ssh POD --worker=all --command="cd easylm && \
        python -m easylm.sft --config=sft/tulu1_65b --workdir=gs://BUCKET/tulu1_65b"

Pod: v3-256 (32 hosts). The paper trained on GPUs (AMD MI250X).
Data: allenai/tulu-v1-sft-mixture, 489,818 examples.
Expect: 7,653 steps (2 epochs of 128 examples a step), more or less by whole rows.
Overrides for the token-weighted loss and the exported template's newline: see tulu1_7b.py.
Differs from the paper's run in what tulu1_7b.py lists; here 128 examples fill some 65
rows, and the mesh takes 80.
Verified: the step compiles for this pod with the TPU's own compiler (python -m easylm.plan). It
takes 4.8 of the 15.5 GiB of a device, and the run at least 5.5 hours, an estimate. It fits a v3-128
too, with --config.micro_batches=3: at least 9.9 hours. It has not been trained on a pod.
"""

from easylm.configs.sft import tulu1_7b


def get_config():
    config = tulu1_7b.get_config()
    config.init_from = "huggyllama/llama-65b"
    config.pod = "v3-256"
    config.mesh = "1,-1,16"
    config.remat = "block_sharded"
    config.data.seq_len = 1024
    config.optimizer.learning_rate = 1e-5
    return config
