"""Tülu 2 70B: LLaMA 2 70B on the Tülu 2 mixture, trained as tulu2_7b.py describes.

Half the learning rate of the smaller models, as in the paper.

    gcloud compute tpus tpu-vm ssh POD --worker=all --command="cd easylm && \
        python -m easylm.sft --config=sft/tulu2_70b --workdir=gs://BUCKET/tulu2_70b"

Pod: v3-256 (32 hosts), as in the paper.
Data: allenai/tulu-v2-sft-mixture, 326,154 examples.
Expect: 5,096 steps (2 epochs of 128 examples a step), more or less by whole rows.
Overrides for the token-weighted loss and the exported template's newline: see tulu2_7b.py.
Differs from the paper's run in what tulu2_7b.py lists, but for rms_norm_eps, which was 1e-5 there
too. remat=block_sharded splits what a block leaves for the backward pass over `tensor`.
Verified: the step compiles for this pod with the TPU's own compiler (python -m easylm.plan). It
takes 6.5 of the 15.5 GiB of a device, and the run at least 13 hours, an estimate. It fits a v3-128
too, with --config.mesh=1,4,32 --config.micro_batches=5: at least 17 hours, since fewer rows are
empty. It has not been trained on a pod.
"""

from easylm.configs.sft import tulu2_7b


def get_config():
    config = tulu2_7b.get_config()
    config.init_from = "meta-llama/Llama-2-70b-hf"
    config.optimizer.learning_rate = 1e-5
    config.remat = "block_sharded"
    return config
