"""Code Tülu 2 7B: Code Llama 7B on the Tülu 2 mixture, trained as tulu2_7b.py describes.

    gcloud compute tpus tpu-vm ssh POD --worker=all --command="cd easylm && \
        python -m easylm.sft --config=sft/code_tulu2_7b --workdir=gs://BUCKET/code_tulu2_7b"

Pod: v3-256 (32 hosts), as in the paper.
Data: allenai/tulu-v2-sft-mixture, 326,154 examples.
Expect: 5,096 steps (2 epochs of 128 examples a step), more or less by whole rows.
Overrides for the token-weighted loss and the exported template's newline: see tulu2_7b.py.
Differs from the paper's run in what tulu2_7b.py lists, and in RoPE's base: 1e6, as the
weights say. EasyLM's Code Llama of that time had no setting for it, so it seems to have run at 1e4.
Verified: the step compiles for this pod with the TPU's own compiler (python -m easylm.plan). It
takes 6.9 of the 15.5 GiB of a device, and the run at least 1.0 hours, an estimate. Smaller slices
are those of tulu2_7b.py. It has not been trained on a pod.
"""

from easylm.configs.sft import tulu2_7b


def get_config():
    config = tulu2_7b.get_config()
    config.init_from = "codellama/CodeLlama-7b-hf"
    config.model.max_position_embeddings = None  # Code Llama was made for 16,384
    return config
