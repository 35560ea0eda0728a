"""`vflora compare`: base model and LoRA on the same pictures, prompts and seeds, as a page worth publishing."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any, Protocol

from torch import Tensor
from tqdm import tqdm

from vflora.adapters import AdapterInfo, read_adapter
from vflora.atomic import require_writable
from vflora.compare_config import CompareConfig, command_of
from vflora.config import require
from vflora.data.images import to_signed, to_tensor
from vflora.deviation import deviations_on, record_path
from vflora.devices import torch_device
from vflora.distributed.launch import is_first
from vflora.evaluate import Embedder, IdentityScores, deviation_by_sigma, embed_frames, identity_scores, score_video
from vflora.inference import load_with_adapters, names_text_to_video
from vflora.judge import Judge, require_judge
from vflora.models.identity import IdentityEmbedder, require_backbone
from vflora.models.lora_formats import thumbnail_uri, write_lora
from vflora.models.projection_head import find_head
from vflora.report import Clip, Comparison, Row, best_frame, write_card, write_page
from vflora.report.records import BASE
from vflora.run_header import base_model_name, hub_name
from vflora.samples import Sample, find_samples, readable
from vflora.sampling import Pipeline, default_guidance, default_steps, fit_image, generate_video
from vflora.video_io import enlarge, to_uint8_frames, write_mp4

log = logging.getLogger(__name__)

DEVIATION_POINTS = 5
_NAMED = 3  # of files that nobody asked for


class NamedJudge(Embedder, Protocol):
    """An embedder that the page can name."""

    name: str


def run(config: CompareConfig, judge: NamedJudge | None = None) -> Path | None:
    """Makes the page.

    Args:
        config: which LoRA, pictures and scales.
        judge: grades identity instead of the model that the configuration names.

    Returns:
        The page; None in the processes of a launcher other than the first, which have nothing to do.

    Raises:
        UserError: if a file is missing or does not fit.
    """
    if not is_first():
        return None
    _look_for_files(config)
    samples = find_samples(
        config.images,
        prompts=config.prompts,
        prompt_bank=config.prompt_bank,
        seeds=config.seeds,
        max_rows=config.max_rows,
    )
    log.info(
        "%d clips of %d frames: %d rows, each of the base and %d scales; --max_rows and --lora_scales make fewer, "
        "--num_inference_steps and --video_length make them sooner",
        len(samples) * (1 + len(config.lora_scales)),
        config.video_length,
        len(samples),
        len(config.lora_scales),
    )
    device = torch_device(config.device)
    pipeline, adapters = load_with_adapters(
        config.pipeline_dir,
        config.lora_path,
        [1.0],
        transformer_version=config.transformer_version,
        dtype=config.dtype,
        device=device,
        offloading=config.offloading,
        group_offloading=config.group_offloading,
        vae_tiling=config.vae_tiling,
        prompts=[sample.prompt for sample in samples],
    )
    if judge is None:
        judge = Judge.load(config.judge_model_dir, device) if config.judge_model_dir else Judge.from_pipeline(pipeline)
    trained = None
    if config.dino_model_dir is not None and config.dino_head_path is not None:
        trained = IdentityEmbedder.load(config.dino_model_dir, config.dino_head_path, device)
    rows = compare(
        pipeline,
        samples,
        config.output_dir,
        scales=config.lora_scales,
        judge=judge,
        trained=trained,
        frames=config.video_length,
        steps=config.num_inference_steps,
        guidance_scale=config.guidance_scale,
        fps=config.fps,
    )
    comparison = Comparison(
        title=config.title or _title(config.lora_path[0]),
        rows=rows,
        judge=judge.name,
        trained_judge=None if trained is None else f"{Path(str(config.dino_head_path)).name}",
        settings=_settings(config, pipeline, adapters),
        command=command_of(config),
        notice=config.notice,
        fps=config.fps,
        together=tuple(Path(path).resolve().name for path in config.lora_path) if len(config.lora_path) > 1 else (),
    )
    page = write_page(comparison, config.output_dir, max_megabytes=config.max_page_mb)
    card = write_card(comparison, config.output_dir, base_model=config.base_model or hub_name(config.pipeline_dir))
    if len(config.lora_path) == 1:
        thumbnail = {"modelspec.thumbnail": thumbnail_uri(best_frame(comparison))}
        write_lora(read_adapter(config.lora_path[0]), config.output_dir, "diffusers", thumbnail)
        log.info("wrote %s, and all that a model card needs beside it", page)
    else:
        log.info("wrote %s and a model card beside it, but no LoRA, since several acted together", page)
    if card.name != "README.md":
        log.warning(
            "%s is not as compare wrote it and stays: the new model card is %s", card.with_name("README.md"), card
        )
    strangers = _strangers(rows, config.output_dir)
    if strangers:
        log.warning(
            "%d files in pictures/ and videos/ are of an earlier comparison, and the page does not show them: delete "
            "them before you share %s (%s)",
            len(strangers),
            config.output_dir,
            ", ".join(file.name for file in strangers[:_NAMED]) + (", ..." if len(strangers) > _NAMED else ""),
        )
    return page


def _look_for_files(config: CompareConfig) -> None:
    """Checks what is used late, since a wrong path should show before minutes of loading and sampling."""
    require_writable(config.output_dir, "--output_dir")
    require(
        not names_text_to_video(config.pipeline_dir),
        f"{config.pipeline_dir} makes videos from text, and compare starts from pictures: load an image-to-video model "
        "such as 480p_i2v.",
    )
    if config.judge_model_dir is not None:
        require_judge(config.judge_model_dir)
    if config.dino_model_dir is not None and config.dino_head_path is not None:
        require_backbone(config.dino_model_dir)
        find_head(config.dino_head_path)


def compare(
    pipeline: Pipeline,
    samples: Sequence[Sample],
    folder: Path,
    *,
    scales: Sequence[float],
    judge: Embedder,
    trained: Embedder | None = None,
    frames: int,
    steps: int | None = None,
    guidance_scale: float | None = None,
    fps: float = 24,
) -> tuple[Row, ...]:
    """Generates and grades every sample with the base model and with the LoRA at each scale.

    Args:
        pipeline: image to video, with adapters loaded at scale 1.
        samples: what to make.
        folder: gets `pictures/` and `videos/`.
        scales: of the LoRA, positive.
        judge: grades identity; better an embedder that the training did not optimise.
        trained: the one that it did optimise, to grade as well.
        frames: of each video, 4n + 1.
        steps: of sampling; None for what the checkpoint was made for.
        guidance_scale: None for the pipeline's own.
        fps: frames per second of the mp4s.

    Returns:
        A row for each sample, in order.
    """
    for name in ("pictures", "videos"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    pipeline.set_progress_bar_config(desc="sampling", unit="step", leave=False)
    rows = []
    with tqdm(total=len(samples) * (1 + len(scales)), desc="comparing", unit="video") as bar:
        for index, sample in enumerate(samples):
            stem = f"{index:02d}-{re.sub(r'[^a-z0-9]+', '-', sample.character.lower()).strip('-') or 'character'}"
            picture = fit_image(pipeline, sample.picture)
            picture_file = folder / "pictures" / f"{stem}.png"
            picture.save(picture_file)
            reference = to_signed(to_tensor(picture))

            def generate(scale: float, sample: Sample = sample) -> Tensor:
                return generate_video(
                    pipeline,
                    sample.picture,
                    sample.prompt,
                    seed=sample.seed,
                    frames=frames,
                    steps=steps,
                    guidance_scale=guidance_scale,
                    lora_scale=scale,
                )

            clips: list[Clip] = []
            with record_path(pipeline, DEVIATION_POINTS, steps) as path:
                base_video = generate(BASE)
            for scale in (BASE, *sorted(scales)):
                video = base_video if scale == BASE else generate(scale)
                scores = score_video(video, reference, judge)
                deviations = deviations_on(pipeline, path, scale)
                clips.append(
                    Clip(
                        scale=scale,
                        path=write_mp4(
                            folder / "videos" / f"{stem}-{scale:g}.mp4", enlarge(to_uint8_frames(video)), fps
                        ),
                        scores=scores,
                        trained_identity=None if trained is None else _identity(video, reference, trained),
                        motion_ratio=scores.motion.ratio_to(clips[0].scores.motion if clips else scores.motion),
                        deviation=mean(deviations),
                        deviation_by_sigma=deviation_by_sigma([point.sigma for point in path], deviations),
                    )
                )
                bar.update()
            rows.append(Row(sample.character, sample.prompt, sample.seed, picture_file, tuple(clips)))
    return tuple(rows)


def _strangers(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Returns the pictures and videos in the folder that belong to no row."""
    own = {file for row in rows for file in (row.picture, *(clip.path for clip in row.clips))}
    return sorted(file for name in ("pictures", "videos") for file in (folder / name).iterdir() if file not in own)


def _identity(video: Tensor, reference: Tensor, embedder: Embedder) -> IdentityScores:
    return identity_scores(embed_frames(video, embedder), embed_frames(reference[:, None], embedder)[0])


def _title(lora_path: str) -> str:
    path = Path(lora_path).resolve()
    name = path.parent.name if path.name.startswith(("checkpoint-", "pytorch_lora_weights", "lora")) else path.stem
    return readable(name.replace("-", " ")).capitalize()


def _settings(config: CompareConfig, pipeline: Pipeline, adapters: Sequence[AdapterInfo]) -> dict[str, Any]:
    first = adapters[0]
    return {
        "Base model": config.base_model or base_model_name(config.pipeline_dir, config.transformer_version),
        "LoRA": ", ".join(Path(adapter.source).name for adapter in adapters),
        "Rank, alpha, layers": f"{first.rank}, {first.alpha:g}, {first.layers}",
        "Frames": config.video_length,
        "Sampling steps": config.num_inference_steps or default_steps(pipeline),
        "Guidance scale": default_guidance(pipeline) if config.guidance_scale is None else config.guidance_scale,
        "Seeds": ", ".join(map(str, config.seeds)),
        "Precision": config.dtype,
    }
