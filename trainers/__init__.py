"""The training step, the loop, and one small file per objective."""
