"""An embedder that grades identity and that the training does not optimise: self-grading proves nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel

from vflora.errors import UserError
from vflora.model_check import check_json, check_weights
from vflora.models.identity import Preprocessing
from vflora.sampling import Pipeline, is_text_to_video


def require_judge(folder: Path) -> None:
    """Looks at the folder of a judge, without loading it.

    Raises:
        UserError: if it is missing or incomplete.
    """
    advice = "give a folder of transformers, such as DINOv2's"
    if not (folder / "config.json").is_file():
        raise UserError(f"There is no model in {folder}: {advice}.")
    check_json(folder / "config.json", advice)
    check_weights(folder, advice)


class Judge:
    """Pooled features of a vision model of transformers, as unit vectors."""

    def __init__(self, model: nn.Module, preprocessing: Preprocessing, name: str):
        self.model = model.eval()
        self.preprocessing = preprocessing
        self.name = name

    @classmethod
    def from_pipeline(cls, pipeline: Pipeline) -> Self:
        """Takes the SigLIP encoder of an image-to-video pipeline, which every pipeline has.

        Raises:
            UserError: for a text-to-video pipeline, which has none.
        """
        if is_text_to_video(pipeline):
            raise UserError("compare starts from pictures: load an image-to-video model such as 480p_i2v.")
        encoder, side = pipeline.image_encoder, pipeline.image_encoder.config.image_size
        half = (0.5, 0.5, 0.5)
        return cls(encoder, Preprocessing((side, side), half, half), "the pipeline's SigLIP encoder")

    @classmethod
    def load(cls, folder: Path, device: torch.device | str = "cpu") -> Self:
        """Loads a vision model such as DINOv2 from a folder in the transformers layout.

        Raises:
            UserError: as `require_judge`.
        """
        require_judge(folder)
        model = AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
        model = getattr(model, "vision_model", model)  # CLIP and SigLIP come with a text half
        return cls(model.to(device), Preprocessing.read(folder, model.config), folder.resolve().name)

    @torch.no_grad()
    def embed(self, images: Tensor) -> Tensor:
        """Returns unit vectors [B, D], fp32, of images [B, 3, H, W] in [-1, 1]."""
        parameter = next(self.model.parameters())
        pixels = self.preprocessing(images.to(parameter.device)).to(parameter.dtype)
        return F.normalize(self.model(pixel_values=pixels).pooler_output.float(), dim=-1)
