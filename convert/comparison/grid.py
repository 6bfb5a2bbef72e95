"""The image of a comparison: one row per prompt with the reference, the candidates and their amplified differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image as PillowImage
from PIL import ImageDraw

from omni_convert.convert.comparison.metrics import Image

__all__ = ["comparison_image"]

HEADER = 18
GAP = 4
MIDDLE_GREY = 128.0


def comparison_image(
    reference: Sequence[Image], candidates: Mapping[str, Sequence[Image]], *, amplify: float = 8.0, scale: int = 1
) -> PillowImage.Image:
    """Draws a column for the reference, and two for each candidate: its images and their differences.

    A difference of zero is middle grey.

    Args:
        reference: one image per prompt, uint8 [height, width, 3]
        candidates: title → one image per prompt
        amplify: factor on the difference
        scale: whole-number enlargement, for small images
    """
    columns: list[tuple[str, Sequence[Image]]] = [("reference", reference)]
    for title, images in candidates.items():
        columns.append((title, images))
        columns.append(
            (f"difference x{amplify:g}", [_difference(*pair, amplify) for pair in zip(reference, images, strict=True)])
        )
    height, width = (length * scale for length in reference[0].shape[:2])
    canvas = PillowImage.new(
        "RGB", (len(columns) * (width + GAP) - GAP, HEADER + len(reference) * (height + GAP) - GAP), "white"
    )
    pen = ImageDraw.Draw(canvas)
    for column, (title, images) in enumerate(columns):
        left = column * (width + GAP)
        pen.text((left + 2, 3), title, fill="black")
        for row, image in enumerate(images):
            tile = PillowImage.fromarray(image).resize((width, height), PillowImage.Resampling.NEAREST)
            canvas.paste(tile, (left, HEADER + row * (height + GAP)))
    return canvas


def _difference(reference: Image, candidate: Image, amplify: float) -> Image:
    difference = candidate.astype(np.float64) - reference.astype(np.float64)
    return np.clip(np.rint(difference * amplify + MIDDLE_GREY), 0, 255).astype(np.uint8)
