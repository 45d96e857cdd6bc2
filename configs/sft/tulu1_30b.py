"""Tülu 1 30B: LLaMA 30B on the Human+GPT mixture, trained as tulu1_7b.py describes.

Rows of 1,024 tokens and half the rate, as the paper has it for the larger models.

    gcloud compute tpus tpu-vm ssh POD --worker=all --command="cd easylm && \
        python -m easylm.sft --config=sft/tulu1_30b --workdir=gs://BUCKET/tulu1_30b"

Pod: v3-128 (16 hosts); 52 heads divide by 4, not by 8, hence the mesh. The paper trained on GPUs
(AMD MI250X).
Data: allenai/tulu-v1-sft-mixture, 489,818 examples.
Expect: 7,653 steps (2 epochs of 128 examples a step), more or less by whole rows.
Overrides for the token-weighted loss and the exported template's newline: see tulu1_7b.py.
Differs from the paper's run in what tulu1_7b.py lists; here 128 examples fill some 65
rows, which 32 row groups take in three parts of one row each.
Verified: the step compiles for this pod with the TPU's own compiler (python -m easylm.plan). It
takes 8.0 of the 15.5 GiB of a device, and the run at least 5.3 hours, an estimate. It has not been
trained on a pod.
"""

from easylm.configs.sft import tulu1_7b


def get_config():
    config = tulu1_7b.get_config()
    config.init_from = "huggyllama/llama-30b"
    config.data.seq_len = 1024
    config.optimizer.learning_rate = 1e-5
    config.mesh = "1,-1,4"
    config.micro_batches = 3
    return config
