"""Settings that every test shares; they must be in place before jax is imported."""

import os
import pathlib
import signal
import subprocess
import sys

import pytest

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# libtpu compiles without a TPU when it neither asks the cloud for one nor locks others out.
os.environ["TPU_SKIP_MDS_QUERY"] = "1"
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
# Programs compiled once are shared by the tests, the commands they start, and later runs.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR",
    str(pathlib.Path(__file__).resolve().parent.parent / ".cache" / "jax"),
)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.5"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
# A shell starts background jobs with Ctrl-C ignored, and the commands that tests start inherit it.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def transformers_446(tmp_path_factory):
    """`transformers_446(code, *args)` runs Python under transformers 4.46 and gives its output.

    torch and the rest are those of this environment. Skips where no package index answers.
    """
    folder = tmp_path_factory.mktemp("transformers_446")
    uv = [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--system-certs"]
    target = ["--python", sys.executable, "--target", str(folder)]
    installed = subprocess.run(
        [*uv, *target, "transformers==4.46.3"], capture_output=True, text=True
    )
    if installed.returncode and "error sending request" in installed.stderr:
        pytest.skip("the package index does not answer")
    assert installed.returncode == 0, installed.stderr

    def run(code, *args):
        command = [sys.executable, "-c", code, *map(str, args)]
        env = {**os.environ, "PYTHONPATH": str(folder)}
        result = subprocess.run(command, env=env, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return result.stdout

    return run
