"""Layers that have each other's scales are told from their values, and sound ones never are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from omni_convert.formats.checks.meaning import open_quantized
from omni_convert.formats.checks.scale_exchange import exchanged_scales, trace_of
from omni_convert.formats.config import QuantizationConfig
from omni_convert.formats.dialects import omni_convert
from omni_convert.formats.dialects.vllm_omni import config_of, to_block
from omni_convert.formats.finding import Finding
from omni_convert.formats.format import QuantizingFormat
from omni_convert.formats.schemes.fp8 import Fp8, Fp8Channel
from omni_convert.formats.schemes.int8 import Int8
from omni_convert.formats.schemes.mxfp4 import Mxfp4
from omni_convert.formats.schemes.mxfp4_dualscale import Mxfp4DualScale
from omni_convert.formats.schemes.mxfp8 import Mxfp8
from omni_convert.formats.schemes.nvfp4 import Nvfp4

FORMATS: dict[str, QuantizingFormat] = {
    "int8": Int8(),
    "fp8 per row": Fp8Channel(),
    "mxfp8": Mxfp8(search=False),
    "mxfp8 searched": Mxfp8(),
    "mxfp4": Mxfp4(search=False),
    "mxfp4_dualscale": Mxfp4DualScale(search=False),
    "nvfp4": Nvfp4(search=False),
}
#: The block as text encoders spell it.
PER_ROW = QuantizationConfig("fp8", per_channel=True)
#: Rows of normal numbers have maxima that are much the same, so that it hardly matters whose scale they have.
ALIKE = [("int8", "normal"), ("fp8 per row", "normal")]
STEMS = tuple(f"layers.{number}.linear" for number in range(10))


def weights(values: str) -> dict[str, Tensor]:
    """Layers that read the same stream, whose columns thus have magnitudes in common."""
    draw = torch.Generator().manual_seed(0)
    columns = torch.randn(512, generator=draw).exp()
    made = {}
    for stem in STEMS:
        numbers = torch.rand(1024, 512, generator=draw) * 2 - 1
        if values != "even":
            numbers = torch.randn(1024, 512, generator=draw)
        if values == "structured":
            numbers *= columns * torch.randn(1024, 1, generator=draw).mul(0.3).exp()
        made[stem] = numbers * 0.02
    return made


def findings_of(tensors: Mapping[str, Tensor], fmt: QuantizingFormat, folder: Path) -> list[Finding]:
    save_file(dict(tensors), folder / "model.safetensors")
    is_per_row = isinstance(fmt, Fp8Channel)
    block = to_block(config_of(dict.fromkeys(STEMS, fmt), ())) if not is_per_row else omni_convert.to_block(PER_ROW)
    (folder / "config.json").write_text(json.dumps({"quantization_config": block}))
    with open_quantized(folder) as opened:
        traces = [trace for layer in opened.layers.values() if (trace := trace_of(layer)) is not None]
        return list(exchanged_scales(traces, "vllm-omni"))


def quantized(fmt: QuantizingFormat, values: str) -> dict[str, Tensor]:
    return {
        f"{stem}.{suffix}": tensor
        for stem, weight in weights(values).items()
        for suffix, tensor in fmt.quantize(weight).items()
    }


@pytest.mark.parametrize(
    ("method", "values"),
    [(method, values) for method in FORMATS for values in ("structured", "normal") if (method, values) not in ALIKE],
)
def test_layers_with_each_others_scales_are_named(method: str, values: str, tmp_path: Path) -> None:
    fmt, first, second = FORMATS[method], STEMS[2], STEMS[7]
    tensors = quantized(fmt, values)
    for suffix in [name.rpartition(".")[2] for name in tensors if name.startswith(f"{first}.") and "scale" in name]:
        one, other = f"{first}.{suffix}", f"{second}.{suffix}"
        tensors[one], tensors[other] = tensors[other], tensors[one]
    found = findings_of(tensors, fmt, tmp_path)
    assert {each.layer for each in found} == {f"{first}.weight_scale", f"{second}.weight_scale"}
    assert all(each.check == "exchanged-scales" and each.severity == "warning" for each in found)


@pytest.mark.parametrize("method", [*FORMATS, "int8 shared", "fp8"])
@pytest.mark.parametrize("values", ["structured", "normal", "even"])
def test_sound_layers_are_never_named(method: str, values: str, tmp_path: Path) -> None:
    fmt = {**FORMATS, "int8 shared": Int8(shared_in_group=True), "fp8": Fp8()}[method]
    assert findings_of(quantized(fmt, values), fmt, tmp_path) == []


def test_a_copied_layer_is_no_exchange(tmp_path: Path) -> None:
    fmt = FORMATS["mxfp8"]
    tensors = quantized(fmt, "structured")
    for suffix in ("weight", "weight_scale"):
        tensors[f"{STEMS[1]}.{suffix}"] = tensors[f"{STEMS[0]}.{suffix}"].clone()
    assert findings_of(tensors, fmt, tmp_path) == []
