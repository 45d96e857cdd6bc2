"""Tülu 2+DPO 70B: Tülu 2 70B on UltraFeedback, trained as tulu2_7b.py describes.

    gcloud compute tpus tpu-vm ssh POD --worker=all --command="cd easylm && \
        python -m easylm.dpo --config=dpo/tulu2_70b --workdir=gs://BUCKET/tulu2_dpo_70b"

Pod: v3-512 (64 hosts), as in the paper, which took about 7 days.
Data: HuggingFaceH4/ultrafeedback_binarized:train_prefs, 61,135 pairs.
Expect: 5,731 steps (3 epochs of 32 pairs a step), more or less by whole rows.
Differs from the paper's run in what tulu2_7b.py lists; the mesh takes 16 rows, so 12 are empty.
remat=block_sharded splits what a block leaves for the backward pass over `tensor`.
Verified: the step compiles for a v3-512 with the TPU's own compiler (16 rows of 8,192 tokens, of up
to 100 pairs) and takes 3.3 of the 15.5 GiB of a device. It has not been trained on a pod, and
runs over several hosts are not there yet.
"""

from easylm.configs.dpo import tulu2_7b


def get_config():
    config = tulu2_7b.get_config()
    config.init_from = "allenai/tulu-2-70b"
    config.pod = "v3-256"
    config.mesh = "1,-1,64"
    config.remat = "block_sharded"
    return config
