"""Tülu 2+DPO 70B: Tülu 2 70B on UltraFeedback, trained as tulu2_7b.py describes.

    gcloud compute tpus tpu-vm ssh POD --worker=all --command="cd easylm && \
        python -m easylm.dpo --config=dpo/tulu2_70b --workdir=gs://BUCKET/tulu2_dpo_70b"

Pod: v3-256 (32 hosts). The paper's run took about 7 days on a v3-512, of which four packed rows
would leave half idle (--config.mesh=1,8,64).
Data: HuggingFaceH4/ultrafeedback_binarized:train_prefs, 61,135 pairs.
Expect: 5,731 steps (3 epochs of 32 pairs a step), more or less by whole rows.
Differs from the paper's run in what tulu2_7b.py lists.
remat=block_sharded splits what a block leaves for the backward pass over `tensor`.
Verified: the step compiles for this pod with the TPU's own compiler (python -m easylm.plan). It
takes 4.8 of the 15.5 GiB of a device, and the run at least 2.0 hours, an estimate, after the pass
of the reference. It fits a v3-128 too, with --config.mesh=1,4,32: at least 3.6 hours. It has not
been trained on a pod.
"""

from easylm.configs.dpo import tulu2_7b


def get_config():
    config = tulu2_7b.get_config()
    config.init_from = "allenai/tulu-2-70b"
    config.pod = "v3-256"
    config.mesh = "1,-1,64"
    config.remat = "block_sharded"
    return config
