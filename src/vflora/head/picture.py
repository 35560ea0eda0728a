"""One picture of a validation, because people look rather than read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from vflora.head.validation import Validation, pair_cosines

_BINS = np.linspace(-1, 1, 81)


def draw_validation(validation: Validation, title: str, path: Path) -> None:
    """Writes a PNG: who resembles whom as a matrix, and cosines of same and different identities as histograms.

    Identities lie next to each other in the matrix, so bright squares along the diagonal and darkness elsewhere is
    what a good head looks like; in the histograms it is two hills that do not overlap.
    """
    figure = Figure(figsize=(11, 8.5))
    FigureCanvasAgg(figure)
    spacing = {"left": 0.05, "right": 0.98, "bottom": 0.06, "top": 0.92, "hspace": 0.3, "wspace": 0.15}
    grid = figure.subplots(2, 2, gridspec_kw=spacing)
    figure.suptitle(title)
    for (matrix, hills), kind in zip(grid, ("clean", "degraded"), strict=True):
        cosines, scores = validation.cosines[kind], getattr(validation, kind)
        image = matrix.imshow(cosines.numpy(), vmin=-1, vmax=1, cmap="magma", interpolation="nearest")
        figure.colorbar(image, ax=matrix, label="cosine")
        borders = np.flatnonzero(np.diff(validation.ids.numpy())) + 0.5
        if len(borders) < 64:
            matrix.hlines(borders, -0.5, len(cosines) - 0.5, colors="white", linewidth=0.3)
            matrix.vlines(borders, -0.5, len(cosines) - 0.5, colors="white", linewidth=0.3)
        matrix.set(title=f"{kind} pictures, sorted by identity", xlabel="picture", ylabel="picture")
        same, different = pair_cosines(cosines, validation.ids)
        for values, label, colour in ((different, "different identities", "tab:gray"), (same, "same", "tab:orange")):
            hills.hist(
                values.numpy(),
                _BINS.tolist(),
                density=True,
                histtype="stepfilled",
                alpha=0.7,
                label=label,
                color=colour,
            )
        hills.legend(loc="upper left")
        hills.set(
            title=f"{kind}: recall@1 {scores.recall_at_1:.3f}, MAP@R {scores.map_at_r:.3f}",
            xlabel="cosine",
            ylabel="density",
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
