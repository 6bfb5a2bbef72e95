"""Files whose weights two readers would take for different numbers: every command refuses them, and `verify` says so.

Each case is a pipeline with INT8 or FP8 layers in which one fact was hidden where a reader may overlook it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from omni_convert.convert import Recipe, convert_checkpoint
from omni_convert.convert.inspection.contents import inspect_source
from omni_convert.convert.inspection.verification import verify_source
from omni_convert.convert.source.location import resolve_source
from omni_convert.formats.arithmetic.rotation import rotate
from omni_convert.formats.errors import CheckpointError
from omni_convert.loaders.loading.refusal import refuse_undeclared

CLASS, WEIGHTS = "SomethingNew2DModel", "diffusion_pytorch_model.safetensors"
STEMS = [f"blocks.{block}.{layer}" for block in range(12) for layer in ("attn.to_q", "ff.0")]
ROWS, COLUMNS, GROUP = 64, 128, 32
FP8 = {"quant_method": "fp8", "is_checkpoint_fp8_serialized": True, "activation_scheme": "dynamic"}
INT8 = {"quant_method": "int8", "is_checkpoint_int8_serialized": True, "activation_scheme": "dynamic"}
MODELOPT = {"quant_method": "modelopt", "quant_algo": "FP8_PER_CHANNEL_PER_TOKEN", "ignore": []}
INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP}
ROTATED = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 64}
PLAIN = {"format": "int8_tensorwise"}


def compressed(layout: str, **others: Any) -> dict[str, Any]:
    groups = {"group_0": {"targets": ["Linear"], "weights": INT4}}
    return {"quant_method": "compressed-tensors", "format": layout, "config_groups": groups, "ignore": [], **others}


def weight(seed: int) -> Tensor:
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(seed)) * 0.03


def fp8(values: Tensor) -> dict[str, Tensor]:
    scale = values.abs().max() / 448
    return {"weight": (values / scale).to(torch.float8_e4m3fn), "weight_scale": scale}


def fp8_rows(values: Tensor) -> dict[str, Tensor]:
    scale = values.abs().amax(1) / 448
    return {"weight": (values / scale[:, None]).to(torch.float8_e4m3fn), "weight_scale": scale}


def int8(values: Tensor) -> dict[str, Tensor]:
    scale = values.abs().amax(1, keepdim=True) / 127
    return {"weight": (values / scale).round().to(torch.int8), "weight_scale": scale}


def int4(values: Tensor, groups: Tensor) -> dict[str, Tensor]:
    """Packed as compressed-tensors does, columns in the order of `groups`."""
    scale = torch.stack([values[:, groups == each].abs().amax(1) for each in range(COLUMNS // GROUP)], 1) / 7
    codes = ((values / scale[:, groups]).round() + 8).to(torch.int64).view(ROWS, -1, 8)
    words = sum(codes[..., place] << (4 * place) for place in range(8))
    shape = torch.tensor([ROWS, COLUMNS])
    packed = torch.as_tensor(words).to(torch.uint32).view(torch.int32)
    return {"weight_packed": packed, "weight_scale": scale, "weight_shape": shape, "weight_g_idx": groups.int()}


def marked(mark: dict[str, Any]) -> dict[str, Tensor]:
    return {"comfy_quant": torch.tensor(list(json.dumps(mark).encode()), dtype=torch.uint8)}


def header(mark: dict[str, Any]) -> dict[str, str]:
    return {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": dict.fromkeys(STEMS, mark)})}


IN_ORDER = torch.arange(COLUMNS) // GROUP
SHUFFLED = IN_ORDER[torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(0))]
FACTORS = torch.linspace(0.5, 2, COLUMNS)
DOWN, UP = torch.full((4, COLUMNS), 0.1), torch.full((ROWS, 4), 0.05)

Layer = Callable[[Tensor], dict[str, Tensor]]
#: Tensors of a layer, config block, header.
GOOD: dict[str, tuple[Layer, dict[str, Any] | None, dict[str, str]]] = {
    "columns in order": (lambda values: int4(values, IN_ORDER), compressed("pack-quantized"), {}),
    "marks that say what the block says": (lambda values: int8(values) | marked(PLAIN), INT8, {}),
    "a header that says what the block says": (int8, INT8, header(PLAIN)),
    "no transform": (int8, compressed("int-quantized", transform_config={}), {}),
    "scales of the cache": (lambda values: fp8_rows(values) | {"k_scale": torch.ones(())}, MODELOPT, {}),
    "a bias": (lambda values: fp8(values) | {"bias": torch.ones(ROWS)}, FP8, {}),
}
DOUBTFUL: dict[str, tuple[Layer, dict[str, Any] | None, dict[str, str]]] = {
    "reordered columns": (lambda values: int4(values, SHUFFLED), compressed("pack-quantized"), {}),
    "a transform": (int8, compressed("int-quantized", transform_config={"config_groups": {"R1": {}}}), {}),
    "marks of a rotation": (lambda values: int8(rotate(values, 64)) | marked(ROTATED), INT8, {}),
    "a header with a rotation": (lambda values: int8(rotate(values, 64)), INT8, header(ROTATED)),
    **{
        f"smoothing called {name}": (
            lambda values, name=name: fp8_rows(values / FACTORS) | {name: FACTORS.clone()}, block, {},
        )
        for name in ("smooth_factor", "smooth_scale", "act_scale", "awq_scale")
        for block in (MODELOPT,)
    },
    **{
        f"a branch called {down}": (
            lambda values, down=down, up=up: fp8(values - UP @ DOWN) | {down: DOWN.clone(), up: UP.clone()}, FP8, {},
        )
        for down, up in (("lora_a", "lora_b"), ("proj_down", "proj_up"), ("svdquant_lora_a", "svdquant_lora_b"))
    },
}  # fmt: skip


def pipeline(folder: Path, layer: Layer, block: dict[str, Any] | None, metadata: dict[str, str]) -> Path:
    component = folder / "transformer"
    component.mkdir(parents=True)
    stored = {
        f"{stem}.{suffix}": tensor.clone()
        for seed, stem in enumerate(STEMS)
        for suffix, tensor in layer(weight(seed)).items()
    }
    save_file(stored, component / WEIGHTS, {"format": "pt", **metadata})
    config = {"_class_name": CLASS} | ({"quantization_config": block} if block else {})
    (component / "config.json").write_text(json.dumps(config))
    index = {"_class_name": "SomePipeline", "transformer": ["diffusers", CLASS]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("case", GOOD)
def test_what_is_certain_has_one_value(tmp_path: Path, case: str) -> None:
    layer, block, metadata = GOOD[case]
    model = pipeline(tmp_path / "model", layer, block, metadata)
    convert_checkpoint(model, tmp_path / "out", Recipe("dequantize", device="cpu"))
    tensors = load_file(tmp_path / "out" / "transformer" / WEIGHTS)
    limit = 0.12 if "columns" in case else 0.03
    for seed, stem in enumerate(STEMS):
        error = (tensors[f"{stem}.weight"].float() - weight(seed)).norm() / weight(seed).norm()
        assert error < limit, stem
    (inspected,) = inspect_source(resolve_source(model))
    assert inspected.doubt is None


@pytest.mark.parametrize("case", DOUBTFUL)
def test_what_is_doubtful_is_refused_by_every_command(tmp_path: Path, case: str) -> None:
    layer, block, metadata = DOUBTFUL[case]
    model = pipeline(tmp_path / "model", layer, block, metadata)
    for method in ("dequantize", "int8", "keep"):
        with pytest.raises(CheckpointError):
            convert_checkpoint(model, tmp_path / method, Recipe(method, runtime="diffusers", device="cpu"))
    with pytest.raises(CheckpointError):
        refuse_undeclared(model)
    (verified,) = verify_source(resolve_source(model))
    assert any(finding.severity == "error" for finding in verified.findings)
    (inspected,) = inspect_source(resolve_source(model))
    assert inspected.doubt is not None


@pytest.mark.parametrize("lost", [0, 7, 13, len(STEMS) - 1])
def test_one_lost_scale_among_weights_that_are_only_cast_is_found(tmp_path: Path, lost: int) -> None:
    """Whichever layer it is: a sample of layers would miss it."""

    def layer(values: Tensor) -> dict[str, Tensor]:
        return {"weight": fp8(values)["weight"] if values.equal(weight(lost)) else values.to(torch.float8_e4m3fn)}

    model = pipeline(tmp_path / "model", layer, None, {})
    for method in ("dequantize", "int8"):
        with pytest.raises(CheckpointError, match=rf"{STEMS[lost]}.*no scale"):
            convert_checkpoint(model, tmp_path / method, Recipe(method, runtime="diffusers", device="cpu"))
    with pytest.raises(CheckpointError, match="no scale"):
        refuse_undeclared(model)
    (verified,) = verify_source(resolve_source(model))
    assert [finding.layer for finding in verified.findings if finding.severity == "error"] == [STEMS[lost]]
