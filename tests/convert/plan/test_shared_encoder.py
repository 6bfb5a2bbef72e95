"""Which text encoders may be quantized for vLLM-Omni."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from omni_convert.convert import Recipe
from omni_convert.convert.plan.shared_encoder import check_encoder
from omni_convert.convert.source.location import Source
from omni_convert.formats.errors import RecipeError


def test_an_encoder_whose_vision_tower_follows_no_rule_is_not_quantized(tmp_path: Path) -> None:
    encoder = {"model_type": "qwen3_vl", "text_config": {"num_hidden_layers": 2}, "vision_config": {"depth": 2}}
    for name, config in (("transformer", {"_class_name": "QwenImage21Transformer2DModel"}), ("text_encoder", encoder)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    source, methods = Source(tmp_path, "model"), {"transformer": "fp8", "text_encoder": "fp8"}
    with pytest.raises(RecipeError, match=r"text_encoder=fp8: .* vision tower .*; use --runtime diffusers"):
        check_encoder(source, methods, Recipe(component={"text_encoder": "fp8"}))
    check_encoder(source, methods, Recipe(component={"text_encoder": "fp8"}, runtime="diffusers"))
