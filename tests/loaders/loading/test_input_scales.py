"""Static activation scales come from a statistics file, as in a conversion, while a model is quantized as it loads."""

from pathlib import Path

import pytest
import torch

from omni_convert.convert import Recipe, convert_checkpoint
from omni_convert.formats.containers.checkpoint import Checkpoint
from omni_convert.formats.errors import CalibrationError, RecipeError
from omni_convert.formats.statistics.layer_statistics import InputRecorder, observe
from omni_convert.formats.statistics.recording_header import Identity
from omni_convert.formats.statistics.statistics import Statistics
from omni_convert.loaders import QuantizedLinear, build_quant_config, kernel_report, load_pipeline


def record(component: Path, *, fingerprint: str | None = None) -> Statistics:
    """Statistics of random inputs, different for every linear of a component."""
    layers = {}
    with Checkpoint.open(component) as checkpoint:
        for number, (name, spec) in enumerate(checkpoint.items()):
            if name.endswith(".weight") and len(spec.shape) == 2:
                recorder = InputRecorder()
                inputs = torch.randn(8, spec.shape[1], generator=torch.Generator().manual_seed(number))
                recorder.record(observe(inputs * (1 + number)), 0)
                layers[f"{component.name}.{name.removesuffix('.weight')}"] = recorder.statistics()
        identity = Identity({component.name: fingerprint or checkpoint.fingerprint()}, ())
    return Statistics(identity, {name: layer for name, layer in layers.items() if layer is not None})


@pytest.mark.parametrize("method", ["fp8", "nvfp4"])
def test_the_scales_are_those_of_a_conversion(method: str, tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    statistics = tmp_path / "stats.safetensors"
    record(tiny_pipeline_folder / "transformer").save(statistics)
    recipe = Recipe(method=method, calibration=(str(statistics),), rounding="nearest", runtime="diffusers")
    convert_checkpoint(tiny_pipeline_folder, tmp_path / "converted", recipe)
    expected = load_pipeline(tmp_path / "converted").transformer.state_dict()
    pipeline = load_pipeline(tiny_pipeline_folder, quantization={"method": method, "input_scales": statistics})
    found = pipeline.transformer.state_dict()
    layers = [name for name, layer in pipeline.transformer.named_modules() if isinstance(layer, QuantizedLinear)]
    assert layers
    assert found.keys() == expected.keys()
    for name in layers:
        assert torch.equal(found[f"{name}.input_scale"], expected[f"{name}.input_scale"])
        assert torch.equal(found[f"{name}.weight"].view(torch.uint8), expected[f"{name}.weight"].view(torch.uint8))
    pipeline.save_pretrained(tmp_path / "saved")
    assert kernel_report(load_pipeline(tmp_path / "saved")) == kernel_report(pipeline)


def test_statistics_of_another_model_are_refused(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    statistics = tmp_path / "stats.safetensors"
    record(tiny_pipeline_folder / "transformer", fingerprint="f" * 64).save(statistics)
    with pytest.raises(CalibrationError, match="transformer: the statistics belong to another model"):
        load_pipeline(tiny_pipeline_folder, quantization={"method": "fp8", "input_scales": statistics})


def test_layers_that_the_statistics_do_not_cover_are_refused(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    statistics = tmp_path / "stats.safetensors"
    record(tiny_pipeline_folder / "transformer").save(statistics)
    spec = {"text_encoder": {"method": "fp8", "input_scales": statistics}}
    with pytest.raises(CalibrationError, match="the statistics do not cover this layer of 'text_encoder'"):
        load_pipeline(tiny_pipeline_folder, quantization=spec)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"method": "int8", "input_scales": "x"}, "found input_scales with int8, expected a method with static"),
        ({"method": "fp8", "activation_scheme": "dynamic", "input_scales": "x"}, "found input_scales with dynamic"),
        ({"method": "fp8", "weight_block_size": [128, 128], "input_scales": "x"}, "expected fp8 and dynamic ones"),
        ({"method": "fp8", "input_scales": 7}, "found input_scales 7, expected a statistics file"),
    ],
    ids=str,
)
def test_a_request_that_has_no_static_scales_is_refused(spec: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        build_quant_config(spec)
