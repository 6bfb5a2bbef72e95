"""Pairs of pictures: one over the other behind a slider, and their difference. Everything is in the file."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
import numpy.typing as npt

from omni_convert.convert.page.html import Markup, element

__all__ = ["picture_pair"]

#: Longer sides are scaled down to it.
LARGEST = 512
#: Up to this side, pictures lose nothing.
SMALL = 160
QUALITY = 82
AMPLIFIED = 8


def picture_pair(reference: npt.NDArray[Any], candidate: npt.NDArray[Any], caption: str) -> Markup:
    """Two pictures of one size, uint8 [height, width, 3], with a slider between them and a view of their difference."""
    difference = np.abs(candidate.astype(np.int16) - reference.astype(np.int16)) * AMPLIFIED
    stage = element(
        "div",
        element("img", src=_data(reference), alt="reference"),
        element("img", src=_data(candidate), alt="candidate", class_="over"),
        element("img", src=_data(difference.clip(0, 255).astype(np.uint8)), alt="difference", class_="apart"),
        class_="stage",
    )
    slider = element("input", type="range", min=0, max=100, value=50, aria_label="reference | candidate")
    box = element("label", element("input", type="checkbox"), f" difference, {AMPLIFIED} times as strong")
    return element("figure", stage, slider, box, element("figcaption", caption), class_="pair")


def _data(pixels: npt.NDArray[Any]) -> str:
    """The address of a picture that is in the page."""
    from PIL import Image

    image = Image.fromarray(pixels)
    is_small = max(image.size) <= SMALL
    if max(image.size) > LARGEST:
        image.thumbnail((LARGEST, LARGEST))
    kind, options = ("PNG", {}) if is_small else ("WEBP", {"quality": QUALITY})
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(stream.getvalue()).decode()}"
