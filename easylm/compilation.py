"""Compiled programs that later starts use again."""

import os

CACHE = "~/.cache/easylm/xla"


def use_compilation_cache(folder: str) -> None:
    """Keeps what jax compiles from here on.

    Args:
      folder: local or gs://; empty: nothing is kept.
    """
    import jax  # commands name the folder in their help, which does without

    # Whoever sets jax's own variable means it.
    if folder and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(folder))
