"""The report of `compare` about the two models."""

from __future__ import annotations

import numpy as np
import pytest

from omni_convert.convert.calibration.generation import GenerationSettings
from omni_convert.convert.calibration.prompts import Prompt
from omni_convert.convert.comparison.comparison import RunOptions, Variant, compare, run_variant


def test_a_report_names_the_bundled_demo() -> None:
    settings = GenerationSettings(steps=1, width=32, height=32)
    quantized = Variant("candidate", None, "int8")
    report = compare(Variant("reference", None), quantized, [Prompt("a star")], settings).report
    assert report["model"] == "omni-convert-demo"
    assert {config["model"] for config in report["variant_configs"].values()} == {"omni-convert-demo"}


@pytest.mark.parametrize(
    "options",
    [RunOptions(offload="model"), RunOptions(offload="layerwise"), RunOptions(vae_slicing=True, vae_tiling=True)],
    ids=["cpu offload", "layerwise offload", "slicing and tiling"],
)
def test_what_saves_memory_changes_no_image(options: RunOptions) -> None:
    settings = GenerationSettings(steps=2, width=32, height=32)
    quantized = Variant("candidate", None, "int8")
    plain, saving = (run_variant(quantized, [Prompt("a star")], settings, 0, each) for each in (None, options))
    assert np.array_equal(plain.images[0], saving.images[0])
