"""Save and resume everything, atomically.

checkpoint-<step>/
    dcp/            LoRA and optimizer state, in torch's distributed checkpoint format
    lora/           the adapter, ready to use: pytorch_lora_weights.safetensors
    config.yaml     the settings of the run
    state.json      step, data position, fingerprint of the data, versions
    manifest.json   sha256 of every file above

A checkpoint is written under another name, synced to disk, and renamed: it is there whole or not at all.
"""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from vflora.atomic import MANIFEST, require_space, sha256, write_folder
from vflora.errors import UserError

_NAME = re.compile(r"checkpoint-(\d+)")
_SPARE_BYTES = 64 << 20


@dataclass(frozen=True)
class RunState:
    """Where a run stands, besides its tensors.

    Attributes:
        step: optimizer steps done.
        batches: batches that each data-parallel process has used.
        data_fingerprint: of the training shards and their manifest.
        torch_version: that wrote the checkpoint; exact resume is promised for the same one.
    """

    step: int
    batches: int
    data_fingerprint: str
    torch_version: str = torch.__version__


def save_checkpoint(
    output_dir: Path,
    state: RunState,
    tensors: dict[str, Tensor],
    config_yaml: str,
    write_adapter: Callable[[Path], None],
    *,
    keep: int | None,
) -> Path:
    """Writes checkpoint-<step> and removes the oldest ones beyond `keep`.

    Args:
        output_dir: of the run.
        state: step and data position.
        tensors: LoRA and optimizer state by name.
        config_yaml: the resolved settings.
        write_adapter: writes the adapter into the folder it is given.
        keep: how many to keep; None for all.

    Raises:
        UserError: if the disk has no room, before anything is written.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    require_space(
        output_dir,
        2 * sum(t.numel() * t.element_size() for t in tensors.values()) + _SPARE_BYTES,
        "make room and resume from the last checkpoint, which is whole; --keep_checkpoints N bounds their number.",
    )

    def fill(folder: Path) -> None:
        with _single_process():
            dcp.save(dict(tensors), checkpoint_id=folder / "dcp", no_dist=True)
        (folder / "lora").mkdir()
        write_adapter(folder / "lora")
        (folder / "config.yaml").write_text(config_yaml)
        (folder / "state.json").write_text(json.dumps(asdict(state), indent=2))

    # A run that went back to an earlier checkpoint comes by this step again, and replaces what is there.
    final = write_folder(output_dir / f"checkpoint-{state.step}", fill)
    for old in list_checkpoints(output_dir)[: -keep if keep else 0]:
        shutil.rmtree(old)
    return final


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Returns the checkpoints of a run, oldest first."""
    found = [p for p in output_dir.glob("checkpoint-*") if p.is_dir() and _NAME.fullmatch(p.name)]
    return sorted(found, key=lambda p: int(p.name.rsplit("-", 1)[1]))


def find_checkpoint(wanted: str, output_dir: Path) -> Path:
    """Returns the checkpoint folder that `--resume_from_checkpoint` means.

    Raises:
        UserError: if there is none.
    """
    if wanted == "latest":
        found = list_checkpoints(output_dir)
        if not found:
            raise UserError(f"--resume_from_checkpoint latest: {output_dir} holds no checkpoint; drop the flag.")
        return found[-1]
    folder = Path(wanted)
    if not (folder / "state.json").is_file():
        raise UserError(f"--resume_from_checkpoint {wanted} is no checkpoint folder: give one, or `latest`.")
    return folder


def verify_checkpoint(folder: Path) -> None:
    """Compares every file with the manifest, since a flipped bit would load without a sound.

    Raises:
        UserError: naming the file that is missing or differs.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} has no readable manifest.json: resume from another checkpoint.") from error
    for name, expected in manifest.items():
        path = folder / name
        if not path.is_file():
            raise UserError(f"{path} is missing: resume from another checkpoint.")
        if sha256(path) != expected:
            raise UserError(f"{path} is damaged (its sha256 differs): resume from another checkpoint.")


def read_state(folder: Path) -> RunState:
    """Returns step and data position of a checkpoint."""
    return RunState(**json.loads((folder / "state.json").read_text()))


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Returns every tensor of a checkpoint, on the CPU, whatever number of processes wrote it."""
    reader = dcp.FileSystemReader(folder / "dcp")
    tensors = {
        name: torch.empty(meta.size, dtype=meta.properties.dtype)
        for name, meta in reader.read_metadata().state_dict_metadata.items()
        if isinstance(meta, TensorStorageMetadata)
    }
    with _single_process():
        dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors


@contextmanager
def _single_process() -> Iterator[None]:
    """Silences DCP's remark that it is alone, which is what `no_dist` asked for."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield
