from __future__ import annotations

import json
import math

import numpy as np
import pytest

from omni_convert.convert.comparison.metrics import image_metrics, rmse, sequence_metrics, summary_of
from omni_convert.formats.errors import RecipeError


def image(value: int, size: int = 4) -> np.ndarray:
    return np.full((size, size, 3), value, dtype=np.uint8)


def test_metrics_of_a_known_pair() -> None:
    metrics = image_metrics(image(100), image(110))
    assert metrics["mae"] == metrics["rmse"] == metrics["max_abs"] == 10
    assert metrics["mse"] == 100
    assert metrics["relative_l2"] == pytest.approx(0.1)
    assert metrics["cosine_similarity"] == pytest.approx(1)
    assert metrics["psnr_db"] == pytest.approx(20 * math.log10(255 / 10))


def test_equal_images_have_infinite_psnr_and_no_error() -> None:
    metrics = image_metrics(image(7), image(7))
    assert metrics["psnr_db"] == math.inf
    assert sequence_metrics([image(7)], [image(7)])["image0_metrics"]["psnr_db"] is None
    assert metrics["relative_l2"] == 0


@pytest.mark.parametrize(
    ("reference", "candidate", "cosine", "relative"), [(0, 0, 1, 0), (0, 9, 0, math.inf), (9, 0, 0, 1)]
)
def test_black_images_have_defined_metrics(reference: int, candidate: int, cosine: float, relative: float) -> None:
    metrics = image_metrics(image(reference), image(candidate))
    assert metrics["cosine_similarity"] == cosine
    assert metrics["relative_l2"] == relative


def test_a_sequence_reports_first_middle_and_all() -> None:
    metrics = sequence_metrics([image(0), image(10), image(20)], [image(1), image(12), image(23)])
    assert metrics["num_frames"] == metrics["num_images"] == 3
    assert metrics["mid_frame_index"] == 1
    assert metrics["frame0_metrics"]["mae"] == 1
    assert metrics["mid_image_metrics"]["mae"] == 2
    assert metrics["all_images_metrics"]["mae"] == 2


def test_rmse_is_pooled_over_all_pixels() -> None:
    assert rmse([image(0), image(0)], [image(3), image(4)]) == pytest.approx(math.sqrt((9 + 16) / 2))


@pytest.mark.parametrize("candidate", [[], [image(0)], [image(0), image(0, size=5)]])
def test_what_cannot_be_compared_is_an_error(candidate: list[np.ndarray]) -> None:
    with pytest.raises(RecipeError, match="compare: found"):
        sequence_metrics([image(0), image(0)] if candidate else [], candidate)


def test_the_summary_tells_of_every_image_and_of_the_worst() -> None:
    summary = summary_of(sequence_metrics([image(0), image(10), image(20)], [image(0), image(14), image(21)]))
    assert (summary["num_images"], summary["worst_image_index"]) == (3, 1)
    assert summary["per_image_mae"] == [0, 4, 1]
    assert summary["per_image_psnr_db"][0] is None
    assert summary["worst_image_psnr_db"] == pytest.approx(20 * math.log10(255 / 4))
    assert summary["all_images_mae"] == pytest.approx(5 / 3)
    assert summary["per_image_relative_l2"] == pytest.approx([0, 0.4, 0.05])
    assert summary["worst_image_cosine_similarity"] == pytest.approx(1)
    json.dumps(summary, allow_nan=False)


def test_the_summary_of_one_image_says_it_once() -> None:
    assert summary_of(sequence_metrics([image(0)], [image(0)])) == {
        "image0_psnr_db": None,
        "image0_mae": 0,
        "image0_cosine_similarity": 1,
        "image0_relative_l2": 0,
    }
