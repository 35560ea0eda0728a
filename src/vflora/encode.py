"""`vflora encode`: the prompts and pictures of a training, encoded ahead, so that it never loads their encoders.

The processes do not talk to each other. Which batches are whose follows from their numbers, an entry that is there is
whole, and whoever starts makes what is missing of its share: so they may stop, fail and go on one by one.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from vflora.atomic import require_writable
from vflora.clips import Clips, as_sampled
from vflora.data.pipeline import Place, TrainLoader
from vflora.data.schema import DataSet
from vflora.determinism import deterministic
from vflora.distributed.launch import process_count, process_number
from vflora.distributed.processes import claim_device
from vflora.errors import UserError
from vflora.models.conditions import ConditionEncoder
from vflora.models.loading import ENCODERS, require_pipeline
from vflora.prompts import prompt_maker
from vflora.settings import EncodeSettings, TrainSettings
from vflora.stopping import stop_requests
from vflora.teacher_source import PromptMaker, asked_by, drawn_prompts, drawn_together
from vflora.training_setup import asked_besides
from vflora.trajectories.folder import condition_folder
from vflora.trajectories.plan import Plan

logger = logging.getLogger(__name__)


def run(settings: EncodeSettings) -> Path:
    """Encodes what is missing of this process's share, and returns the folder.

    Raises:
        UserError: for bad input, or if the disk does not take it.
    """
    folder = condition_folder(settings)
    if folder is None:
        raise UserError("vflora encode needs --condition_cache: the folder that it shall fill.")
    rank, size = process_number(), process_count()
    device = settings.model.torch_device()
    claim_device(device, size)
    dataset = DataSet.open(settings.data.wds_root, settings.data.metadata_key, "train")
    # Of the transformer only the configuration is read; but what it lacks would stop the training, too.
    require_pipeline(settings.model.pipeline_dir, "vae", "transformer", *ENCODERS)
    settings = as_sampled(settings)
    require_writable(folder, "--condition_cache")
    make_prompt = prompt_maker(settings.prompts)
    besides = list(asked_besides(settings, dataset, make_prompt)) if rank == 0 else []
    if not _keeps_pictures(settings):
        logger.info("with --enable_augmentation every picture is cropped anew: prompts are kept, pictures are not")

    processes = settings.ahead.train_processes or max(1, size // settings.distributed.sp_size)
    plan = Plan.of(settings, processes)
    places = [plan.place(n) for n in range(rank, plan.rollouts(settings.optimizer.max_train_steps), size)]
    with deterministic(settings.speed.is_deterministic, device):  # the kernels of a training that encodes itself
        share = _Share(Clips.load(settings, dataset).encoder)
        loader = TrainLoader(dataset, settings.data, seed=settings.run.seed, places=places)
        try:
            done = _fill(share, besides, _goes(settings, loader, places, make_prompt), batches=len(places), rank=rank)
        finally:
            loader.close()
    if done < len(places):
        logger.warning("stopped after %d of %d batches; the same line goes on from there", done, len(places))
    else:
        _report(settings, folder, share, processes, size)
    return folder


class _Share:
    """What one process has seen to: a set of prompts, and the digests of pictures."""

    def __init__(self, encoder: ConditionEncoder):
        self._encoder = encoder
        self.prompts: set[str] = set()
        self.pictures: set[str] = set()

    def add(self, prompts: Sequence[str], pictures: Tensor) -> None:
        """Encodes what the folder lacks of these prompts and pictures, uint8 [N, 3, H, W], in one go."""
        self._encoder.prepare(prompts, pictures)
        self.prompts.update(prompts)
        self.pictures.update(self._encoder.keys("", picture)[1] for picture in pictures)


def _goes(
    settings: TrainSettings, loader: TrainLoader, places: Sequence[Place], make_prompt: PromptMaker
) -> Iterator[tuple[int, Sequence[str], Tensor]]:
    """Yields how many batches are encoded in a go, with their prompts, and the pictures that are worth keeping."""
    everything = slice(None) if _keeps_pictures(settings) else slice(0)
    goes = drawn_together(
        loader,
        [number for number, _ in places],
        prompts=drawn_prompts(make_prompt, settings.run.seed),
        lookahead=settings.prompts.condition_lookahead,
    )
    for together in goes:
        prompts, pictures = asked_by(together)
        yield len(together), prompts, pictures[everything]


def _fill(
    share: _Share,
    besides: Iterable[tuple[Sequence[str], Tensor]],
    goes: Iterator[tuple[int, Sequence[str], Tensor]],
    *,
    batches: int,
    rank: int,
) -> int:
    """Encodes one go after the other until a stop is asked for, and returns how many batches are done."""
    done = 0
    with stop_requests() as stop_requested, tqdm(total=batches, desc="encoding", unit="batch", disable=rank > 0) as bar:
        for prompts, pictures in besides:
            share.add(prompts, pictures)
        while not stop_requested() and done < batches:
            count, prompts, pictures = next(goes)
            share.add(prompts, pictures)
            done += count
            bar.update(count)
    return done


def _keeps_pictures(settings: TrainSettings) -> bool:
    """Whether pictures of the batches will be read again: where rollouts keep them, augmented ones, too."""
    return settings.run.trajectory_dir is not None or not settings.data.enable_augmentation


def _report(settings: TrainSettings, folder: Path, share: _Share, processes: int, size: int) -> None:
    logger.info(
        "%s holds %s %d prompts and %d pictures: %s, a training with the same flags on %s loads no %s",
        folder,
        "all" if size == 1 else "this process's share,",
        len(share.prompts),
        len(share.pictures),
        "from now on" if size == 1 else f"when all {size} processes have ended",
        "one process" if processes == 1 else f"{processes} data-parallel processes",
        "text or vision encoder" if _keeps_pictures(settings) else "text encoder onto its device",
    )
