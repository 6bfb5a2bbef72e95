"""What `compare` reports of the two models."""

from __future__ import annotations

from omni_convert.convert.calibration.generation import GenerationSettings
from omni_convert.convert.calibration.prompts import Prompt
from omni_convert.convert.comparison.comparison import Variant, compare


def test_a_report_names_the_bundled_demo() -> None:
    settings = GenerationSettings(steps=1, width=32, height=32)
    quantized = Variant("candidate", None, "int8")
    report = compare(Variant("reference", None), quantized, [Prompt("a star")], settings).report
    assert report["model"] == "omni-convert-demo"
    assert {config["model"] for config in report["variant_configs"].values()} == {"omni-convert-demo"}
