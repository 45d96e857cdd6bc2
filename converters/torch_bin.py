"""PyTorch weights, `pytorch_model.bin`, through torch's restricted loader only."""

import importlib.util
import os
import pickle
import tempfile

import numpy as np

from easylm import storage
from easylm.converters.safetensors_io import check_index, read_index
from easylm.converters.tensors import BFLOAT16, TensorInfo, files_and_size, refuse
from easylm.errors import InputError

SINGLE = "pytorch_model.bin"
INDEX = "pytorch_model.bin.index.json"
# numpy has the same names; torch spells the others (complex, quantized, 8-bit) differently.
_DTYPES = ("float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8", "bool")


class TorchBinSource:
    """A Hugging Face folder with `pytorch_model.bin`, or with shards and their index.

    A `TensorSource`. Files are mapped into memory, so only what is read is loaded; from gs:// they
    are first copied to a temporary folder, and a copy is deleted as soon as it is mapped: its space
    is given back when the source is dropped, or the process dies. Nothing but tensors is unpickled,
    so a file cannot run code.

    Raises:
      InputError: torch is not installed, a file is missing, damaged or holds more than tensors, or
        files and index disagree.
    """

    def __init__(self, folder: str, config: dict | None, config_path: str):
        self.folder, self.config, self.config_path = folder, config, config_path
        if importlib.util.find_spec("torch") is None:
            raise InputError(
                f"{folder}: PyTorch .bin files need torch to read: `pip install torch`. Or name a "
                "folder with safetensors"
            )
        files = storage.list_files(folder)
        index = None if SINGLE in files else read_index(f"{folder}/{INDEX}")
        shards = [SINGLE] if index is None else sorted(set(index.values()))
        self._torch_tensors = {}
        self.tensors: dict[str, TensorInfo] = {}
        problems = []
        for shard in shards:
            if shard in files:
                problems += self._add(shard)
        if index is not None:
            problems += check_index(INDEX, index, self.tensors, set(files))
        refuse(problems, folder)
        size = sum(files[shard] for shard in shards)
        self.kind = f"Hugging Face PyTorch .bin, {files_and_size(len(shards), size)}"

    def _add(self, shard: str) -> list[str]:
        """Maps one file and notes its tensors; returns what is wrong with them."""
        path = f"{self.folder}/{shard}"
        problems = []
        for name, tensor in _map(path).items():
            dtype = _numpy_dtype(tensor)
            if dtype is None:
                problems.append(
                    f"{shard}: {name}: found {_kind(tensor)}; wanted a tensor of numbers"
                )
            elif name in self.tensors:
                problems.append(f"{shard}: tensor {name} is in {self.tensors[name].where} too")
            else:
                self.tensors[name] = TensorInfo(tuple(tensor.shape), dtype, shard)
                self._torch_tensors[name] = tensor
        return problems

    def read(self, name: str, start_row: int = 0, end_row: int | None = None) -> np.ndarray:
        """Rows `[start_row, end_row)` of a tensor, as a view of the mapped file."""
        import torch

        tensor = self._torch_tensors[name]
        if tensor.ndim:
            tensor = tensor[start_row:end_row]
        if tensor.dtype == torch.bfloat16:
            return tensor.view(torch.int16).numpy().view(BFLOAT16)
        return tensor.numpy()


def _map(path: str) -> dict:
    """The state dict of one file, wherever it lies."""
    if not storage.is_bucket(path):
        return _load(os.path.expanduser(path), path)
    with tempfile.TemporaryDirectory() as folder:
        local = f"{folder}/{os.path.basename(path)}"
        storage.copy_to_disk(path, local)
        return _load(local, path)


def _load(local: str, path: str) -> dict:
    """The state dict of one file; its tensors are mapped, not read. `path` is for messages."""
    import torch

    try:
        state = torch.load(local, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path}: holds more than tensors, which only running its code would load; refused. "
            "Save the model again as safetensors where you trust the file"
        ) from error
    except (RuntimeError, OSError, ValueError, EOFError) as error:
        raise InputError(
            f"{path}: not a file of torch.save's zip format, or truncated "
            f"({str(error).splitlines()[0]})"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise InputError(f"{path}: found {_kind(state)}; wanted a state dict, name → tensor")
    return state


def _kind(value: object) -> str:
    """What a value in a file is, for messages."""
    import torch

    if isinstance(value, torch.Tensor):
        return f"a tensor of {value.dtype}, {value.layout}"
    return f"a {type(value).__name__}"


def _numpy_dtype(value: object) -> np.dtype | None:
    """The dtype `read` gives a tensor, or None for anything that is not a dense tensor."""
    import torch

    if not isinstance(value, torch.Tensor) or value.layout != torch.strided:
        return None
    if value.dtype == torch.bfloat16:
        return BFLOAT16
    name = str(value.dtype).removeprefix("torch.")
    return np.dtype(name) if name in _DTYPES else None
