"""One of two processes with four devices each: loads a model, says what it read, exports it.

    python -m tests.converters.two_processes PROCESS PORT HF_FOLDER OUTPUT ORDER [MIN_READ_BYTES]

Writes OUTPUT.PROCESS.json, a list of [tensor, first row, last row, bytes], and the folder OUTPUT.
ORDER "interleaved" lets the mesh alternate between the processes' devices.
"""

import json
import sys

import jax
import numpy as np
from jax.sharding import Mesh

from easylm.converters import load
from easylm.converters.export import export_hf
from easylm.converters.safetensors_io import SafetensorsSource
from easylm.models.llama.config import LlamaConfig
from easylm.models.llama.sharding import param_shardings
from easylm.sharding import MESH_AXES


class RecordingSource(SafetensorsSource):
    """Remembers what was read."""

    def read(self, name, start_row=0, end_row=None):
        rows = super().read(name, start_row, end_row)
        READS.append([name, start_row, end_row, rows.nbytes])
        return rows


READS: list = []


def main(process: str, port: str, hf_folder: str, output: str, order: str, *min_read_bytes: str):
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", 2, int(process))
    for value in min_read_bytes:
        load.MIN_READ_BYTES = int(value)
    with open(f"{hf_folder}/config.json") as file:
        config = LlamaConfig.from_hf(json.load(file), hf_folder)
    devices = np.array(jax.devices())
    if order == "interleaved":
        devices = devices.reshape(2, 4).T
    mesh = Mesh(devices.reshape(2, 2, 2), MESH_AXES)
    source = RecordingSource(hf_folder, None, "config.json")
    params = load.load_params(
        source, config, param_shardings(config, mesh), np.float32, progress=False
    )
    with open(f"{output}.{process}.json", "w") as file:
        json.dump(READS, file)
    texts = {"tokenizer_files": {}, "model_card": ""}
    export_hf(params, config, output, dtype="float32", progress=False, **texts)


if __name__ == "__main__":
    main(*sys.argv[1:])
