"""How a choice of formats looks: size against noise, and what each layer got. Model cards get both as files."""

from __future__ import annotations

from collections.abc import Sequence

from omni_convert.convert.page.charts import line_chart, tile_chart
from omni_convert.convert.page.html import Markup
from omni_convert.convert.precision.advice import curve, shares
from omni_convert.convert.precision.analysis import Analysis
from omni_convert.convert.precision.mixture import Mixture

__all__ = ["LAYERS_PICTURE", "MEGA", "NOISE_PICTURE", "card_pictures", "chosen_point", "noise_curve"]

MEGA = 1e6
#: Files beside the model card.
NOISE_PICTURE, LAYERS_PICTURE = "size_and_noise.svg", "formats_of_layers.svg"


def card_pictures(mixture: Mixture) -> dict[str, str]:
    """Name of each file beside the model card → the SVG in it."""
    return {
        NOISE_PICTURE: f"{noise_curve(mixture.analysis, [chosen_point(mixture)], is_file=True)}\n",
        LAYERS_PICTURE: f"{_layers(mixture)}\n",
    }


def noise_curve(analysis: Analysis, marked: Sequence[tuple[float, float, str]], *, is_file: bool = False) -> Markup:
    """The curve of size against predicted noise.

    Args:
        marked: size in MB, noise ratio and name of points to mark
        is_file: it stands in a file of its own
    """
    points = [
        (each.size / MEGA, each.noise, f"{each.size / MEGA:.2f} MB, {each.noise:.2f}") for each in curve(analysis)
    ]
    return line_chart(points, ("MB of the layers", "predicted noise ratio"), marked, is_file=is_file)


def chosen_point(mixture: Mixture) -> tuple[float, float, str]:
    """The choice as a point of the curve."""
    size = mixture.point.size / MEGA
    return size, mixture.noise_ratio, f"chosen: {size:.2f} MB, {mixture.noise_ratio:.2f}"


def _layers(mixture: Mixture) -> Markup:
    """A tile for each group of layers: its share of the error colours it, its format stands on it."""
    parts = {row.unit.key: row.part for row in shares(mixture.analysis)}
    largest = max(parts.values()) or 1.0
    tiles = {
        f"{unit.component}.{name}": (parts[unit.key] / largest, option.name)
        for unit, option in zip(mixture.analysis.units, mixture.point.chosen, strict=True)
        for name in unit.names
    }
    return tile_chart("share of the error of each layer, and its format", tiles)
