"""Dialects whose owners' code is not at hand: files built here from their documented layouts, and files that lie."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from omni_convert.formats.arithmetic.e2m1 import encode_e2m1, pack_nibbles
from omni_convert.formats.arithmetic.swizzle import swizzle_scales
from omni_convert.formats.checks.meaning import open_quantized
from omni_convert.formats.checks.tensors import check_layer
from omni_convert.formats.dialects.base import JudgedComponent
from omni_convert.formats.dialects.codec import Reciprocal
from omni_convert.formats.dialects.table import DIALECTS
from omni_convert.formats.errors import CheckpointError
from omni_convert.formats.families.wan import wan_diffusers_name
from omni_convert.formats.format import Format
from omni_convert.formats.schemes.fp8 import Fp8
from omni_convert.formats.schemes.int8 import Int8
from omni_convert.formats.schemes.mxfp4 import Mxfp4
from omni_convert.formats.schemes.mxfp4_dualscale import Mxfp4DualScale
from omni_convert.formats.schemes.mxfp8 import Mxfp8
from omni_convert.formats.schemes.nvfp4 import Nvfp4
from omni_convert.formats.views.opened import QuantizedCheckpoint

STEM = "blocks.0.proj"


@pytest.fixture
def weight() -> Tensor:
    return torch.randn(192, 576, generator=torch.Generator().manual_seed(0)) * 0.05


def opened(
    tmp_path: Path,
    tensors: dict[str, Tensor],
    block: dict[str, object] | None = None,
    labels: dict[str, str] | None = None,
    metadata: dict[str, str] | None = None,
) -> QuantizedCheckpoint:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "model.safetensors", metadata)
    if block is not None:
        (tmp_path / "config.json").write_text(json.dumps({"quantization_config": block}))
    if labels is not None:
        (tmp_path / "quant_model_description.json").write_text(json.dumps(labels))
    return open_quantized(tmp_path)


def layer_tensors(tensors: dict[str, Tensor], stem: str = STEM) -> dict[str, Tensor]:
    return {f"{stem}.{suffix}": tensor for suffix, tensor in tensors.items()}


def packed(values: Tensor) -> Tensor:
    return pack_nibbles(encode_e2m1(values.float()))


def assert_reads(found: QuantizedCheckpoint, dialect: str, fmt: Format, expected: Tensor, stem: str = STEM) -> None:
    assert found.dialect == dialect
    layer = found.layers[stem]
    assert type(layer.format) is type(fmt)
    assert layer.shape == tuple(expected.shape)
    assert layer.dequantize(0, len(expected)).equal(expected)
    assert layer.dequantize(7, 131).equal(expected[7:131])  # across the tiles of swizzled scales


@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "smoothed"])
@pytest.mark.parametrize("container", ["packed", "values"])
def test_msmodelslim_dual_scale(tmp_path: Path, weight: Tensor, wrapped: bool, container: str) -> None:
    fmt = Mxfp4DualScale(search=False)
    made = fmt.quantize(weight)
    if wrapped:
        made["mul_scale"] = torch.linspace(0.5, 2, 576)
    expected = fmt.dequantize(made)
    codes = packed(made["weight"]) if container == "packed" else made["weight"]
    place = f"{STEM}.linear" if wrapped else STEM
    stored = {"weight": codes, "weight_scale": made["weight_scale"], "weight_dual_scale": made["weight_dual_scale"]}
    tensors = layer_tensors({**stored, "bias": torch.zeros(192)}, place)
    if wrapped:
        tensors[f"{STEM}.div.mul_scale"] = made["mul_scale"]
    labels = {f"{place}.weight": "W4A4_MXFP4_DUALSCALE", f"{place}.bias": "FLOAT"}
    found = opened(tmp_path, tensors, labels=labels)
    assert_reads(found, "msmodelslim", fmt, expected)
    assert found.kept == {f"{STEM}.bias": f"{place}.bias"}


def test_msmodelslim_int8_with_offsets_of_zero(tmp_path: Path, weight: Tensor) -> None:
    made = Int8().quantize(weight)
    tensors = layer_tensors({**made, "weight_offset": torch.zeros(192, 1)})
    labels = {f"{STEM}.weight": "W8A8_DYNAMIC"}
    assert_reads(opened(tmp_path, tensors, labels=labels), "msmodelslim", Int8(), Int8().dequantize(made))
    tensors[f"{STEM}.weight_offset"][5] = 1
    with pytest.raises(CheckpointError, match="weight_offset': found other numbers"):
        opened(tmp_path, tensors, labels=labels)


def test_msmodelslim_original_wan_names_become_those_of_diffusers(tmp_path: Path, weight: Tensor) -> None:
    made = Mxfp8(search=False).quantize(weight)
    name = "blocks.3.self_attn.q"
    tensors = {**layer_tensors(made, name), "blocks.0.self_attn.norm_q.weight": torch.ones(4)}
    found = opened(tmp_path, tensors, labels={f"{name}.weight": "W8A8_MXFP8"})
    assert set(found.layers) == {"blocks.3.attn1.to_q"}
    assert set(found.kept) == {"blocks.0.attn1.norm_q.weight"}


def test_wan_names_are_those_that_diffusers_gives() -> None:
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    attention = [f"{part}.{leaf}" for part in ("self_attn", "cross_attn") for leaf in ("q", "k", "v", "o")]
    blocks = [f"blocks.0.{name}.weight" for name in (*attention, "ffn.0", "ffn.2", "norm3", "cross_attn.norm_q")]
    others = ["time_embedding.0", "time_embedding.2", "text_embedding.0", "text_embedding.2", "time_projection.1"]
    images = ["blocks.0.cross_attn.k_img", "blocks.0.cross_attn.v_img", *(f"img_emb.proj.{n}" for n in (0, 1, 3, 4))]
    weights = [*blocks, *(f"{name}.weight" for name in (*others, *images, "head.head"))]
    names = [*weights, "head.modulation", "blocks.0.modulation"]
    for name in names:  # one at a time: order tells which became which
        (theirs,) = convert_wan_transformer_to_diffusers({name: torch.zeros(1)})
        assert wan_diffusers_name(name) == theirs, name


def test_lightx2v_mx_and_nvfp4(tmp_path: Path, weight: Tensor) -> None:
    mx8 = Mxfp8(search=False).quantize(weight)
    swizzled = {"weight": mx8["weight"], "weight_scale": swizzle_scales(mx8["weight_scale"]).view(torch.float8_e8m0fnu)}
    assert_reads(opened(tmp_path, layer_tensors(swizzled)), "lightx2v", Mxfp8(), Mxfp8().dequantize(mx8))
    as_bytes = {**swizzled, "weight": mx8["weight"].view(torch.uint8)}
    assert_reads(opened(tmp_path, layer_tensors(as_bytes)), "lightx2v", Mxfp8(), Mxfp8().dequantize(mx8))

    mx4 = Mxfp4(search=False).quantize(weight)
    scales = swizzle_scales(mx4["weight_scale"]).view(torch.float8_e8m0fnu)
    stored = layer_tensors({"weight": packed(mx4["weight"]), "weight_scale": scales})
    assert_reads(opened(tmp_path, stored), "lightx2v", Mxfp4(), Mxfp4().dequantize(mx4))

    nv4 = Nvfp4(search=False).quantize(weight)
    nv4["weight_scale_2"] = torch.tensor(2.0**-9)  # its reciprocal is exact
    stored = layer_tensors(
        {
            "weight": nv4["weight"],
            "weight_scale": swizzle_scales(nv4["weight_scale"]),
            "weight_global_scale": torch.tensor(2.0**9),
        }
    )
    assert_reads(opened(tmp_path, stored), "lightx2v", Nvfp4(), Nvfp4().dequantize(nv4))


def test_e5m2_with_one_scale(tmp_path: Path, weight: Tensor) -> None:
    codes = weight.to(torch.float8_e5m2)
    found = opened(
        tmp_path,
        layer_tensors({"weight": codes, "scale_weight": torch.tensor(0.5)})
        | {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e5m2)},
    )
    assert found.dialect == "comfyui"
    assert found.layers[STEM].dequantize(0, 192).equal(codes.float() * 0.5)
    assert found.kept == {}


def test_scales_in_other_floats_and_shapes_are_the_same_numbers(tmp_path: Path, weight: Tensor) -> None:
    made = Fp8().quantize(weight)
    scale = made["weight_scale"].to(torch.bfloat16)
    block: dict[str, object] = {"quant_method": "modelopt", "quant_algo": "FP8"}
    found = opened(tmp_path, layer_tensors({"weight": made["weight"], "weight_scale": scale.reshape(1)}), block)
    assert_reads(found, "modelopt", Fp8(), made["weight"].float() * scale.float())


def test_int8_with_one_scale_is_int8_with_equal_rows(tmp_path: Path, weight: Tensor) -> None:
    codes = (weight * 500).round().to(torch.int8)
    mark = torch.tensor(list(b'{"format": "int8_tensorwise"}'), dtype=torch.uint8)
    tensors = layer_tensors({"weight": codes, "weight_scale": torch.tensor(0.25), "comfy_quant": mark})
    assert_reads(opened(tmp_path, tensors), "comfyui", Int8(), codes.float() * 0.25)


def test_the_older_shape_of_modelopts_config_is_understood(tmp_path: Path, weight: Tensor) -> None:
    made = Nvfp4(search=False).quantize(weight)
    (tmp_path / "hf_quant_config.json").write_text(
        json.dumps({"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4", "exclude_modules": []}})
    )
    assert_reads(opened(tmp_path, layer_tensors(made)), "modelopt", Nvfp4(), Nvfp4().dequantize(made))


def test_a_plain_checkpoint_has_no_dialect(tmp_path: Path, weight: Tensor) -> None:
    found = opened(tmp_path, layer_tensors({"weight": weight}))
    assert (found.dialect, found.layers, found.kept) == (None, {}, {f"{STEM}.weight": f"{STEM}.weight"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight_scale": None}, "weight_scale|no format"),
        ({"weight_scale": torch.ones(192, 36)}, "weight_scale': found F32"),
        ({"weight_scale": torch.ones(192, 35).to(torch.float8_e4m3fn)}, r"found F8_E4M3 \[192, 35\]"),
        ({"weight_scale_2": torch.ones(192)}, r"weight_scale_2': found F32 \[192\]"),
    ],
    ids=["missing", "dtype", "shape", "per row"],
)
def test_a_tensor_that_is_not_what_the_dialect_says_is_named(
    tmp_path: Path, weight: Tensor, changes: dict[str, Tensor | None], message: str
) -> None:
    made = {**Nvfp4(search=False).quantize(weight), **changes}
    tensors = layer_tensors({suffix: tensor for suffix, tensor in made.items() if tensor is not None})
    mark = {f"{STEM}.comfy_quant": torch.tensor(list(b'{"format": "nvfp4"}'), dtype=torch.uint8)}
    if changes.get("weight_scale", 0) is not None:  # linear ones are wrong for ComfyUI, too
        mark = {}
    block: dict[str, object] = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
    with pytest.raises(CheckpointError, match=message) as caught:
        opened(tmp_path, tensors | mark, None if mark else block)
    assert STEM in str(caught.value)
    assert "\n" not in str(caught.value)


def test_linear_scales_where_comfyui_wants_swizzled_ones_are_refused(tmp_path: Path, weight: Tensor) -> None:
    made = Nvfp4(search=False).quantize(weight)
    mark = {"comfy_quant": torch.tensor(list(b'{"format": "nvfp4"}'), dtype=torch.uint8)}
    with pytest.raises(CheckpointError, match="weight_scale': found F8_E4M3"):
        opened(tmp_path, layer_tensors({**made, **mark}))


@pytest.mark.parametrize("text", [b"[]", b"{", b"\xff\xfe", b'{"format": "fp2"}', b'{"format": 7}'], ids=repr)
def test_marks_that_say_nothing_are_refused_by_name(tmp_path: Path, weight: Tensor, text: bytes) -> None:
    tensors = {**Fp8().quantize(weight), "comfy_quant": torch.tensor(list(text), dtype=torch.uint8)}
    with pytest.raises(CheckpointError, match=STEM) as caught:
        opened(tmp_path, layer_tensors(tensors))
    assert "\n" not in str(caught.value)


def test_reciprocals_come_back_where_a_float32_allows_it() -> None:
    numbers = torch.rand(2000, generator=torch.Generator().manual_seed(0)) * 0.01 + 1e-6
    codec = Reciprocal()
    kept = [number for number in numbers if codec.loss(number) is None]
    assert len(kept) > 1000
    for number in kept:
        assert codec.decode(codec.encode(number), Fp8().layout(1, 1)["weight_scale"]).equal(number)


@pytest.mark.parametrize("mark", ["tensor", "header", "legacy"])
def test_a_prefix_that_all_tensors_have_goes(tmp_path: Path, weight: Tensor, mark: str) -> None:
    made = Fp8().quantize(weight)
    if mark == "legacy":
        made = {"weight": made["weight"], "scale_weight": made["weight_scale"]}
    tensors = layer_tensors({**made, "bias": torch.zeros(192)}, f"model.diffusion_model.{STEM}")
    metadata = None
    if mark == "header":
        metadata = {"_quantization_metadata": json.dumps({"layers": {STEM: {"format": "float8_e4m3fn"}}})}
    elif mark == "tensor":
        text = b'{"format": "float8_e4m3fn"}'
        tensors[f"model.diffusion_model.{STEM}.comfy_quant"] = torch.tensor(list(text), dtype=torch.uint8)
    else:
        tensors["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    found = opened(tmp_path, tensors, metadata=metadata)
    assert_reads(found, "comfyui", Fp8(), Fp8().dequantize(Fp8().quantize(weight)))
    assert found.kept == {f"{STEM}.bias": f"model.diffusion_model.{STEM}.bias"}


def test_bytes_of_a_narrow_weight_are_not_taken_for_another_format(tmp_path: Path) -> None:
    block: dict[str, object] = {"quant_method": "modelopt", "quant_algo": "mxfp4", "producer": {"name": "modelopt"}}
    values = encode_e2m1(torch.randn(256, 128, generator=torch.Generator().manual_seed(0)))
    tensors = {"weight": pack_nibbles(values[:, :32]), "weight_scale": torch.full((256, 1), 127).byte()}
    layer = opened(tmp_path, layer_tensors(tensors), block).layers[STEM]
    assert layer.format.label == "mxfp4"
    assert layer.shape == (256, 32)
    scale = torch.full((256, 4), 127).byte().view(torch.float8_e8m0fnu)
    tensors = {"weight": pack_nibbles(values), "weight_scale": scale}
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match="which is no format that is read here"):  # or 64 columns of MXFP8
        opened(tmp_path, layer_tensors(tensors))


def test_weights_of_rotated_inputs_are_refused(tmp_path: Path) -> None:
    tensors = layer_tensors({"weight": torch.zeros(64, 64).char(), "weight_scale": torch.ones(64, 1)})
    labels = dict.fromkeys(tensors, "W8A8_DYNAMIC")
    assert opened(tmp_path, tensors, labels=labels).layers.keys() == {STEM}
    with pytest.raises(CheckpointError, match=r"heads_rotation'.*export without it"):
        opened(tmp_path, tensors | {f"{STEM}.heads_rotation": torch.eye(8)}, labels=labels)


@pytest.mark.parametrize("rank", [None, 4], ids=["AWQ", "SVDQuant"])
def test_modelopts_smoothed_nvfp4(tmp_path: Path, weight: Tensor, rank: int | None) -> None:
    factors = torch.linspace(0.25, 2, 576).bfloat16()
    fmt = Nvfp4(search=False)
    made = fmt.quantize(weight)
    expected = fmt.dequantize(made)
    stored = {**made, "pre_quant_scale": factors}
    if rank is not None:
        down, up = (torch.randn(*shape).bfloat16() * 0.1 for shape in ((rank, 576), (192, rank)))
        stored |= {"svdquant_lora_a": down, "svdquant_lora_b": up}
        expected = expected + up.float() @ down.float()
    algorithm = "NVFP4_AWQ" if rank is None else "NVFP4_SVD"
    block = {"quant_method": "modelopt", "quant_algo": algorithm, "producer": {"name": "modelopt"}, "ignore": []}
    with opened(tmp_path, layer_tensors(stored), block) as found:
        layer = found.layers[STEM]
        torch.testing.assert_close(layer.dequantize(0, 192), expected * factors.float(), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(layer.dequantize(7, 131), (expected * factors.float())[7:131], rtol=1e-6, atol=1e-6)
        assert not set(stored) & {name.removeprefix(f"{STEM}.") for name in found.kept}
        assert not list(check_layer(layer, "modelopt"))  # its factors are in the model's dtype
        verdicts = DIALECTS["modelopt"].verdicts(JudgedComponent({STEM: layer.format}))
    assert {verdict.outcome for verdict in verdicts if "vLLM-Omni" in verdict.runtime} == {"refuses"}
    assert not [verdict for verdict in verdicts if verdict.outcome == "loads"]


@pytest.mark.parametrize("product", ["with the weight's scale", "f32", "bits as i64"])
def test_msmodelslims_static_w8a8(tmp_path: Path, product: str) -> None:
    codes = torch.randint(-127, 128, (192, 576), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    scale, input_scale = torch.rand(192, 1) * 0.01 + 1e-4, torch.tensor([0.0625])
    both = (scale * input_scale).flatten()
    stored = {
        "weight": codes,
        "input_scale": input_scale,
        "input_offset": torch.tensor([3.0]),
        "deq_scale": both.view(torch.int32).to(torch.int64) if product == "bits as i64" else both,
        "quant_bias": -3 * codes.sum(1, dtype=torch.int32),
    }
    if product == "with the weight's scale":
        stored |= {"weight_scale": scale, "weight_offset": torch.zeros(192, 1)}
    tensors = layer_tensors(stored)
    labels = {**dict.fromkeys(tensors, "W8A8"), f"{STEM}.bias": "FLOAT", "model_quant_type": "W8A8"}
    tensors[f"{STEM}.bias"] = torch.ones(192)
    with opened(tmp_path, tensors, labels=labels) as found:
        assert found.dialect == "msmodelslim"
        torch.testing.assert_close(found.layers[STEM].dequantize(0, 192), codes * scale, rtol=1e-6, atol=0)
        torch.testing.assert_close(found.layers[STEM].dequantize(7, 131), (codes * scale)[7:131], rtol=1e-6, atol=0)
        assert found.kept.keys() == {f"{STEM}.bias"}


def test_the_declared_size_of_blocks_counts_where_scales_leave_several(tmp_path: Path) -> None:
    """Two scales along 192 rows: blocks of 128 with the last one cut short, or of 96."""
    codes = (torch.randn(192, 192, generator=torch.Generator().manual_seed(0)) * 50).to(torch.float8_e4m3fn)
    scale = torch.rand(2, 2, generator=torch.Generator().manual_seed(1)) * 1e-2
    stored = layer_tensors({"weight": codes, "weight_scale_inv": scale})
    for block in (96, 128):
        config = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [block, block]}
        spread = scale.repeat_interleave(block, 0).repeat_interleave(block, 1)[:192, :192]
        with opened(tmp_path, stored, config) as found:
            assert found.layers[STEM].dequantize(0, 192).equal(codes.float() * spread)
    with pytest.raises(CheckpointError, match=r"says blocks of \[64, 64\]"):
        opened(tmp_path, stored, {**config, "weight_block_size": [64, 64]})


@pytest.mark.parametrize(("rows", "block"), [(192, 96), (192, 128), (64, 64)])
def test_experts_have_the_declared_size_of_blocks(tmp_path: Path, rows: int, block: int) -> None:
    count = -(-rows // block)
    codes = (torch.randn(3, rows, rows, generator=torch.Generator().manual_seed(0)) * 50).to(torch.float8_e4m3fn)
    scale = torch.rand(3, count, count, generator=torch.Generator().manual_seed(1)) * 1e-2
    config = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [block, block]}
    tensors = {"experts.gate_up_proj": codes, "experts.gate_up_proj_scale_inv": scale}
    spread = scale.repeat_interleave(block, 1).repeat_interleave(block, 2)[:, :rows, :rows]
    with opened(tmp_path, tensors, config) as found:
        (layer,) = found.layers.values()
        assert layer.dequantize(0, 3).view(codes.shape).equal(codes.float() * spread)
