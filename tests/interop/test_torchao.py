"""torchao's tensor classes on the codes and scales of our files, bit for bit, and its exponent rules beside ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from omni_convert.convert import Recipe, convert_checkpoint
from omni_convert.formats.arithmetic.swizzle import swizzle_scales, unswizzle_scales
from omni_convert.formats.checks.meaning import open_quantized
from omni_convert.formats.schemes.mxfp4 import Mxfp4
from omni_convert.formats.schemes.mxfp8 import Mxfp8
from omni_convert.formats.views.opened import QuantizedLayer

WEIGHTS = "diffusion_pytorch_model.safetensors"
CASES = {
    "fp8": ("vllm-omni", {}),
    "fp8 blocks": ("vllm-omni", {"weight_block_size": (64, 64)}),
    "int8": ("vllm-omni", {}),
    "mxfp8": ("vllm-omni", {}),
    "mxfp8 swizzled": ("comfyui", {}),
    "mxfp4": ("compressed-tensors", {}),
    "nvfp4": ("modelopt", {}),
    "nvfp4 swizzled": ("comfyui", {}),
}


@pytest.fixture
def dequantized(import_peer):  # type: ignore[no-untyped-def]
    """A function of stored tensors, by suffix: the weight in float32, by torchao."""

    def block_scaled(codes: Tensor, scale: Tensor, *, is_swizzled: bool) -> Tensor:
        module = import_peer("torchao.prototype.mx_formats.mx_tensor")
        kernel = import_peer("torchao.quantization.quantize_.common").KernelPreference.EMULATED
        element = torch.float4_e2m1fn_x2 if codes.dtype is torch.uint8 else codes.dtype
        scale = scale.view(torch.float8_e8m0fnu)
        return module.MXTensor(codes, scale, element, 32, torch.float32, kernel, None, is_swizzled).dequantize()

    def dequantize(method: str, parts: dict[str, Tensor]) -> Tensor:
        codes = parts.get("weight", parts.get("weight_packed"))
        scale = parts.get("weight_scale", parts.get("weight_scale_inv"))
        assert codes is not None
        assert scale is not None
        is_swizzled = method.endswith("swizzled")
        if method.startswith("mx"):
            return block_scaled(codes, scale, is_swizzled=is_swizzled)
        if method.startswith("nvfp4"):
            module = import_peer("torchao.prototype.mx_formats.nvfp4_tensor")
            if is_swizzled:  # ComfyUI has the even element in the high nibble
                codes = (codes << 4) | (codes >> 4)
            overall = parts["weight_scale_2"]
            return module.NVFP4Tensor(
                codes, scale, 16, torch.float32, overall, is_swizzled_scales=is_swizzled
            ).dequantize()
        name = "Int8Tensor" if method == "int8" else "Float8Tensor"
        kind = getattr(import_peer("torchao.quantization"), name)
        scale = scale if scale.dim() else scale.reshape(1, 1)
        sizes = [size // count for size, count in zip(codes.shape, scale.shape, strict=True)]
        return kind(codes, scale, block_size=sizes, dtype=torch.float32).dequantize()

    return dequantize


def stored(tensors: dict[str, Tensor], layer: QuantizedLayer) -> dict[str, Tensor]:
    names = [name for name in tensors if name.startswith(f"{layer.stem}.") and name in layer.sources]
    return {name.removeprefix(f"{layer.stem}."): tensors[name] for name in names}


@pytest.mark.parametrize("case", CASES)
def test_what_we_write_is_dequantized_by_torchao(  # type: ignore[no-untyped-def]
    dequantized, tiny_pipeline_folder: Path, tmp_path: Path, case: str
) -> None:
    dialect, options = CASES[case]
    recipe = Recipe(method=case.split()[0], dialect=dialect, **options)  # type: ignore[arg-type]  # as typed there
    convert_checkpoint(tiny_pipeline_folder, tmp_path / "ours", recipe)
    folder = tmp_path / "ours" / "transformer"
    tensors = load_file(folder / WEIGHTS)
    with open_quantized(folder) as opened:
        assert opened.dialect == dialect
        assert opened.layers
        for stem, layer in opened.layers.items():
            assert layer.dequantize(0, layer.shape[0]).equal(dequantized(case, stored(tensors, layer))), stem


@pytest.mark.parametrize("shape", [(128, 4), (192, 6), (3840, 120), (1, 1)], ids=str)
def test_scales_are_swizzled_as_torchao_swizzles_them(import_peer, shape: tuple[int, int]) -> None:  # type: ignore[no-untyped-def]
    module = import_peer("torchao.prototype.mx_formats.utils")
    scales = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    ours = swizzle_scales(scales)
    assert ours.flatten().equal(module.to_blocked(scales))
    assert module.from_blocked(ours, *shape).equal(scales)
    assert unswizzle_scales(module.to_blocked(scales).view(ours.shape), *shape).equal(scales)


@pytest.mark.parametrize("rule", ["floor", "ceil", "even", "rceil"])
@pytest.mark.parametrize("method", ["mxfp8", "mxfp4"])
def test_a_scale_rule_gives_the_bytes_of_torchao(import_peer, method: str, rule: str) -> None:  # type: ignore[no-untyped-def]
    module = import_peer("torchao.prototype.mx_formats.mx_tensor")
    mode = import_peer("torchao.prototype.mx_formats.config").ScaleCalculationMode(rule)
    weight = torch.randn(64, 320, generator=torch.Generator().manual_seed(0)) * 0.05
    fmt: Any = {"mxfp8": Mxfp8, "mxfp4": Mxfp4}[method](scale_rule=rule, search=False)
    ours = fmt.quantize_rows(weight, fmt.fit([], None))
    element = torch.float8_e4m3fn if method == "mxfp8" else torch.float4_e2m1fn_x2
    theirs = module.MXTensor.to_mx(weight, element, 32, mode)
    assert ours["weight_scale"].equal(theirs.scale.view(torch.uint8))
    assert fmt.dequantize(ours).equal(theirs.dequantize(torch.float32))
