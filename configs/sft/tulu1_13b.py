"""Tülu 1 13B: LLaMA 13B on the Human+GPT mixture, trained as tulu1_7b.py describes.

    gcloud compute tpus tpu-vm ssh POD --worker=all --command="cd easylm && \
        python -m easylm.sft --config=sft/tulu1_13b --workdir=gs://BUCKET/tulu1_13b"

Pod: v3-128 (16 hosts). The paper trained on GPUs (AMD MI250X).
Data: allenai/tulu-v1-sft-mixture, 489,818 examples.
Expect: 7,653 steps (2 epochs of 128 examples a step), more or less by whole rows.
Overrides for the token-weighted loss and the exported template's newline: see tulu1_7b.py.
Differs from the paper's run in what tulu1_7b.py lists.
Verified: the step compiles for this pod with the TPU's own compiler (python -m easylm.plan). It
takes 9.2 of the 15.5 GiB of a device, and the run at least 2.1 hours, an estimate. It has not been
trained on a pod.
"""

from easylm.configs.sft import tulu1_7b


def get_config():
    config = tulu1_7b.get_config()
    config.init_from = "huggyllama/llama-13b"
    return config
