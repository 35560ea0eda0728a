"""Numbers of a run: metrics.jsonl always, TensorBoard or Weights & Biases beside it."""

from __future__ import annotations

import importlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from vflora.atomic import replace_file
from vflora.errors import UserError


def require_logger(logger: str) -> None:
    """Refuses a logger that is not installed.

    Raises:
        UserError: with the command that installs it.
    """
    if logger == "wandb" and importlib.util.find_spec("wandb") is None:
        raise UserError("--logger wandb needs the package: pip install 'vflora[wandb]'.")


class RunLog:
    """Writes scalars by step; going back to an earlier step removes the lines after it."""

    def __init__(self, output_dir: Path, logger: str, *, start_step: int, config: dict[str, Any]):
        """Opens the logs.

        Args:
            output_dir: of the run.
            logger: tensorboard, wandb or none.
            start_step: steps already done; later lines belong to a run that was cut off and are dropped.
            config: shown beside the curves.

        Raises:
            UserError: if wandb is asked for and not installed.
        """
        output_dir.mkdir(parents=True, exist_ok=True)
        path = output_dir / "metrics.jsonl"
        _drop_lines_after(path, start_step)
        self._file = path.open("a")
        self._board = self._wandb = None
        if logger == "tensorboard":
            self._board = SummaryWriter(str(output_dir / "tensorboard"), purge_step=start_step + 1)
        elif logger == "wandb":
            require_logger(logger)
            wandb = importlib.import_module("wandb")

            self._wandb = wandb.init(project="vflora", dir=str(output_dir), config=config, resume="allow")

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Logs numbers under the optimizer steps done."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        if self._board:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
        if self._wandb:
            self._wandb.log(values, step=step)

    def histogram(self, step: int, name: str, values: Tensor) -> None:
        """Logs a distribution, where the logger can show one."""
        if self._board:
            self._board.add_histogram(name, values, step)

    def picture(self, step: int, name: str, image: Image.Image) -> None:
        """Logs a picture, where the logger can show one."""
        if self._board:
            self._board.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")
        if self._wandb:
            wandb = importlib.import_module("wandb")
            self._wandb.log({name: wandb.Image(image)}, step=step)

    def close(self) -> None:
        """Flushes and closes."""
        self._file.close()
        if self._board:
            self._board.close()
        if self._wandb:
            self._wandb.finish()


class NoLog:
    """What the processes beside the main one write to."""

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Nothing."""

    def histogram(self, step: int, name: str, values: Tensor) -> None:
        """Nothing."""

    def picture(self, step: int, name: str, image: Image.Image) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


def _drop_lines_after(path: Path, step: int) -> None:
    if not path.is_file():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except ValueError:
            continue  # a line cut short by a kill
    text = "".join(line + "\n" for line in kept)
    replace_file(path, lambda unfinished: unfinished.write_text(text))
