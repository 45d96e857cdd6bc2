"""Tülu 2+DPO 13B: Tülu 2 13B on UltraFeedback, trained as tulu2_7b.py describes.

    gcloud compute tpus tpu-vm ssh POD --worker=all --command="cd easylm && \
        python -m easylm.dpo --config=dpo/tulu2_13b --workdir=gs://BUCKET/tulu2_dpo_13b"

Pod: v3-32 (4 hosts). The paper had a v3-256, of which four packed rows would leave 28 of 32 row
groups idle: 40 heads are divided by 8 and not by 16.
Data: HuggingFaceH4/ultrafeedback_binarized:train_prefs, 61,135 pairs.
Expect: 5,731 steps (3 epochs of 32 pairs a step), more or less by whole rows.
Differs from the paper's run in what tulu2_7b.py lists.
Verified: the step compiles for this pod with the TPU's own compiler (python -m easylm.plan). It
takes 7.1 of the 15.5 GiB of a device, and the run at least 2.6 hours, an estimate, after the pass
of the reference. It has not been trained on a pod.
"""

from easylm.configs.dpo import tulu2_7b


def get_config():
    config = tulu2_7b.get_config()
    config.init_from = "allenai/tulu-2-13b"
    config.remat = "block_sharded"
    return config
