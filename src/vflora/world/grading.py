"""Marks for generated videos, independent of every loss: the renderer knows what should have happened."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vflora.world.grader import Grader
from vflora.world.poses import best_poses
from vflora.world.renderer import render
from vflora.world.retrieval import Lineup, ranks
from vflora.world.scenes import Scenes
from vflora.world.tracking import path_direction, path_length, track


@dataclass(frozen=True)
class Grades:
    """Marks of B videos.

    Attributes:
        rank: how many of the line-up look more like each frame than the right character does, [B, F]; 0 is right.
        cosine: of each frame to the right character's vector [B, F].
        iou: of the body with the best pose of the right character [B, F].
        palette_error: of the body's colours, RGB in [0, 1], [B, F].
        direction_right: whether the path leads where the prompt says, bool [B].
        path_ratio: length of the path over the true length [B].
        limb_changes: how often the best pose changes its limb phase, per frame [B].
        true_limb_changes: how often it should [B].
    """

    rank: Tensor
    cosine: Tensor
    iou: Tensor
    palette_error: Tensor
    direction_right: Tensor
    path_ratio: Tensor
    limb_changes: Tensor
    true_limb_changes: Tensor

    def summary(self) -> dict[str, float]:
        """Returns means over all videos; identity by quarters of the frames.

        The first quarter begins with the given frame, which a model need only copy; `first_generated` are as many
        frames after it.
        """
        frames = self.rank.shape[1]
        quarter = max(1, frames // 4)
        numbers = {}
        parts = {
            "first_quarter": slice(0, quarter),
            "first_generated": slice(1, 1 + quarter),
            "last_quarter": slice(frames - quarter, frames),
        }
        for name, part in parts.items():
            numbers[f"retrieval_{name}"] = float((self.rank[:, part] == 0).float().mean())
            numbers[f"cosine_{name}"] = float(self.cosine[:, part].mean())
            numbers[f"iou_{name}"] = float(self.iou[:, part].mean())
            numbers[f"palette_error_{name}"] = float(self.palette_error[:, part].mean())
        numbers["direction_accuracy"] = float(self.direction_right.float().mean())
        numbers["path_ratio"] = float(self.path_ratio.mean())
        numbers["limb_ratio"] = float(self.limb_changes.mean() / self.true_limb_changes.mean().clamp_min(1e-6))
        return numbers


@torch.no_grad()
def grade(video: Tensor, scenes: Scenes, *, grader: Grader, lineup: Lineup) -> Grades:
    """Marks videos against the scenes that they should show.

    Args:
        video: [B, 3, F, H, W] in [-1, 1], on the grader's device.
        scenes: of the same clips, drawn with `posts=0`.
        grader: trained apart from everything that is graded.
        lineup: who could be in the videos.

    Raises:
        ValueError: if videos and scenes do not fit, or scenes have posts.
    """
    if len(scenes) != len(video) or scenes.frames != video.shape[2] or scenes.domain != lineup.domain:
        raise ValueError("videos, scenes and line-up do not belong together: grade the clips of these scenes")
    if bool(scenes.post.isfinite().any()):
        raise ValueError("clips with posts cannot be tracked: draw the scenes with posts=0")
    scenes = scenes.to(video.device)
    frames = video.shape[2]
    pictures = video.clamp(-1, 1).transpose(1, 2).flatten(0, 1)
    vectors = torch.cat([grader.embed(part) for part in pictures.split(512)]).view(len(video), frames, -1)
    characters = scenes.character[:, None].expand(-1, frames)
    own = lineup.vectors[lineup.row_of(scenes.character)][:, None]
    way = track(video)
    poses = best_poses(video.clamp(-1, 1), way.mask, way.centers, scenes.character, scenes.radius, domain=scenes.domain)
    truth = render(scenes, size=video.shape[-1], device=video.device)
    # the true path goes through the same tracker, so that the tracker's own jitter cancels
    true_length = path_length(track(truth.video).centers)
    return Grades(
        rank=ranks(vectors, characters, lineup),
        cosine=(vectors * own).sum(-1),
        iou=poses.iou,
        palette_error=poses.palette_error,
        direction_right=path_direction(way.centers) == scenes.direction,
        path_ratio=path_length(way.centers) / true_length,
        limb_changes=(poses.phase.diff(dim=1) != 0).float().mean(1),
        true_limb_changes=(truth.phases.diff(dim=1) != 0).float().mean(1),
    )
