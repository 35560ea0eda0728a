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
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed.checkpoint as dcp
import torch.distributed.checkpoint.api
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from vflora.atomic import MANIFEST, begin_folder, finish_folder, require_space, sha256, write_or_refuse
from vflora.distributed.processes import ALONE, World
from vflora.errors import UserError

T = TypeVar("T")

_NAME = re.compile(r"checkpoint-(\d+)")
_SPARE_BYTES = 64 << 20


@dataclass(frozen=True)
class RunState:
    """Where a run stands, besides its tensors.

    Attributes:
        step: optimizer steps done.
        batches: batches that each data-parallel process has used.
        data_fingerprint: of the training shards and their manifest.
        samples_per_step: of all processes and micro-batches together; 0 if it was not recorded.
        torch_version: that wrote the checkpoint; exact resume is promised for the same one.
        sources: digests of what the run learns from besides its data, by what it is called.
    """

    step: int
    batches: int
    data_fingerprint: str
    samples_per_step: int = 0
    torch_version: str = torch.__version__
    sources: dict[str, str] = field(default_factory=dict)


def save_checkpoint(
    output_dir: Path,
    state: RunState,
    tensors: dict[str, Tensor],
    config_yaml: str,
    write_adapter: Callable[[Path], None],
    *,
    keep: int | None,
    world: World = ALONE,
) -> Path:
    """Writes checkpoint-<step> and removes the oldest ones beyond `keep`; all processes call it together.

    Args:
        output_dir: of the run; on storage that all processes share.
        state: step and data position.
        tensors: LoRA and optimizer state by name, the same on every process.
        config_yaml: the resolved settings.
        write_adapter: writes the adapter into the folder it is given; called on the main process.
        keep: how many to keep; None for all.
        world: the processes.

    Raises:
        UserError: on every process, if the disk has no room; the checkpoints before stay as they are.
    """
    # A run that went back to an earlier checkpoint comes by this step again, and replaces what is there.
    final = output_dir / f"checkpoint-{state.step}"

    def begin() -> Path:
        output_dir.mkdir(parents=True, exist_ok=True)
        require_space(
            output_dir,
            2 * sum(t.numel() * t.element_size() for t in tensors.values()) + _SPARE_BYTES,
            "make room and resume from the last checkpoint, which is whole; --keep_checkpoints N bounds their number.",
        )
        return begin_folder(final)

    def finish() -> Path:
        (unfinished / "lora").mkdir()
        write_adapter(unfinished / "lora")
        (unfinished / "config.yaml").write_text(config_yaml)
        (unfinished / "state.json").write_text(json.dumps(asdict(state), indent=2))
        finish_folder(final)
        for old in list_checkpoints(output_dir)[: -keep if keep else 0]:
            shutil.rmtree(old)
        return final

    def told(write: Callable[[], T]) -> T:
        return write_or_refuse(write, "checkpoint", output_dir, go_on="go on with --resume_from_checkpoint latest")

    unfinished = world.from_main(lambda: told(begin))
    told(lambda: _save_tensors(tensors, unfinished / "dcp", world))
    return world.from_main(lambda: told(finish))


def _save_tensors(tensors: dict[str, Tensor], folder: Path, world: World) -> None:
    """Writes what every process holds alike, each process a share of it.

    Raises:
        OSError: on every process, if any could not write.
    """
    try:
        if world.size > 1:
            dcp.save(dict(tensors), checkpoint_id=folder, process_group=world.group)
            return
        with _single_process():
            dcp.save(dict(tensors), checkpoint_id=folder, no_dist=True)
    except dcp.api.CheckpointException as error:
        raise OSError(str(next(cause for cause, _ in error.failures.values()))) from error


class CheckpointWriter:
    """Saves now, or in a thread while the training goes on."""

    def __init__(self, world: World, *, asynchronous: bool):
        """Takes the processes; all of them make one."""
        self._world = world.aside() if asynchronous else world
        self._thread = _own_thread() if asynchronous else None
        self._pending: Future[Path] | None = None

    def save(self, output_dir: Path, state: RunState, tensors: dict[str, Tensor], *rest: Any, **options: Any) -> Path:
        """As `save_checkpoint`; in a thread it works on copies, and returns the folder that is going to be.

        Raises:
            UserError: if this one, or the one before in the thread, could not be written.
        """
        self.wait()
        if self._thread is None:
            return save_checkpoint(output_dir, state, tensors, *rest, **options, world=self._world)
        copies = {name: value.detach().to("cpu", copy=True) for name, value in tensors.items()}
        self._pending = self._thread.submit(
            save_checkpoint, output_dir, state, copies, *rest, **options, world=self._world
        )
        return output_dir / f"checkpoint-{state.step}"

    def wait(self) -> None:
        """Returns when everything is on the disk.

        Raises:
            UserError: if it could not be written.
        """
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def close(self) -> None:
        """Waits, and ends the thread."""
        try:
            self.wait()
        finally:
            if self._thread is not None:
                self._thread.shutdown()


def _own_thread() -> ThreadPoolExecutor:
    """A thread begins on GPU 0, where DCP would open a context of this process too, whichever GPU is its own."""
    on_gpu = torch.cuda.is_initialized()
    return ThreadPoolExecutor(
        1,
        thread_name_prefix="checkpoint",
        initializer=torch.cuda.set_device if on_gpu else None,
        initargs=(torch.cuda.current_device(),) if on_gpu else (),
    )


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Returns the checkpoints of a run, oldest first."""
    found = [p for p in output_dir.glob("checkpoint-*") if p.is_dir() and _NAME.fullmatch(p.name)]
    return sorted(found, key=lambda p: int(p.name.rsplit("-", 1)[1]))


def find_checkpoint(wanted: str, output_dir: Path) -> Path | None:
    """Returns the checkpoint folder that `--resume_from_checkpoint` means; None for `auto` at the very beginning.

    Raises:
        UserError: if there is none.
    """
    if wanted == "auto":
        return next(reversed(list_checkpoints(output_dir)), None)
    if wanted == "latest":
        found = list_checkpoints(output_dir)
        if not found:
            raise UserError(f"--resume_from_checkpoint latest: {output_dir} holds no checkpoint; drop the flag.")
        return found[-1]
    folder = Path(wanted)
    if not (folder / "state.json").is_file():
        raise UserError(f"--resume_from_checkpoint {wanted} is no checkpoint folder: give one, `latest`, or `auto`.")
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
    """Returns step and data position of a checkpoint.

    Raises:
        UserError: if it is none of `vflora train`.
    """
    if not (folder / "dcp").is_dir():
        raise UserError(f"{folder} is no checkpoint of `vflora train`, but of a head: go on with `vflora train-head`.")
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
