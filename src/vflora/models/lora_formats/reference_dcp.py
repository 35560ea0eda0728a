"""The LoRA inside a sharded training checkpoint of the reference implementation.

Such a checkpoint holds the whole transformer, 8.3 B parameters, under the original names; only the low-rank
matrices are read. Its index is a pickle: a restricted unpickler loads it, which knows the index's own record
types and nothing that could run code.
"""

from __future__ import annotations

import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from vflora.errors import UserError
from vflora.models.lora_formats.reading import from_state_dict
from vflora.models.lora_formats.weights import LoraWeights

_LORA_KEY = re.compile(r"^(?:model\.)?(?P<module>(?!optimizer\b|optim\b).+)\.(?P<part>lora_[AB])(?:\.[^.]+)?\.weight$")
_WRAPPER = "_checkpoint_wrapped_module."
_INDEX_TYPES = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"} | {name for name, value in vars(torch).items() if isinstance(value, torch.dtype)},
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath", "WindowsPath", "Path", "PurePosixPath", "PureWindowsPath"},
    "pathlib._local": {"PosixPath", "WindowsPath"},
}


def is_dcp(path: str | Path) -> bool:
    """Whether `path` is a sharded checkpoint, or a `checkpoint-N` folder with one in it."""
    return (Path(path) / ".metadata").is_file() or (Path(path) / "dcp" / ".metadata").is_file()


def read_reference_dcp(path: str | Path, alpha: float = 16.0) -> LoraWeights:
    """Reads the LoRA of a checkpoint that the reference implementation saved.

    Args:
        path: `checkpoint-N`, or the `dcp` folder in it.
        alpha: what the run was started with as `--lora_alpha`, which the checkpoint does not record; 16 is the
            reference's default.

    Raises:
        UserError: if this is no such checkpoint, or it holds no LoRA of HunyuanVideo-1.5.
    """
    if not is_dcp(path):
        raise UserError(f"{path} is no sharded checkpoint: give the folder that holds .metadata, often named dcp.")
    folder = Path(path) if (Path(path) / ".metadata").is_file() else Path(path) / "dcp"
    reader = _SafeReader(folder)
    index = reader.read_metadata().state_dict_metadata
    wanted: dict[str, Tensor] = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in index.items()
        if _LORA_KEY.match(key) and isinstance(entry, TensorStorageMetadata)
    }
    if not wanted:
        raise UserError(f"the checkpoint at {folder} holds no LoRA: it was saved with --use_lora false.")
    with warnings.catch_warnings():
        # one process reads here, whatever the number that wrote
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        load(wanted, storage_reader=reader, no_dist=True)
    named: dict[str, Tensor] = {}
    for key, tensor in wanted.items():
        if found := _LORA_KEY.match(key):
            module = found["module"].replace(_WRAPPER, "")
            named[f"{module}.{found['part']}.weight"] = tensor
            named[f"{module}.alpha"] = torch.tensor(alpha)
    return from_state_dict(named, {}, str(folder))


class _SafeReader(FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / ".metadata").open("rb") as file:
            try:
                metadata = _IndexUnpickler(file).load()
            except (pickle.UnpicklingError, EOFError) as error:
                raise UserError(f"the index of the checkpoint at {self.path} cannot be read: {error}.") from error
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in _INDEX_TYPES.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which has no place in an index")
        return super().find_class(module, name)
