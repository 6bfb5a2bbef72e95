"""Which layers of real (tiny) models are converted, for which runtime, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file

from omni_convert.convert import Recipe, convert_checkpoint
from omni_convert.convert.inspection.verification import verify_source
from omni_convert.convert.plan.plan import plan_conversion
from omni_convert.convert.recipe import METHODS
from omni_convert.convert.source.location import resolve_source
from omni_convert.formats.checks.meaning import open_quantized
from omni_convert.formats.dialects.table import WRITTEN
from omni_convert.formats.errors import RecipeError

WAN = {"num_attention_heads": 2, "attention_head_dim": 32, "text_dim": 32, "freq_dim": 16, "ffn_dim": 128}
FLUX = {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2, "attention_head_dim": 32}


def saved(model: torch.nn.Module, folder: Path) -> Path:
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def wan(folder: Path, **changes: Any) -> Path:
    return saved(diffusers.WanTransformer3DModel(**(WAN | {"num_layers": 6} | changes)), folder)


def flux(folder: Path) -> Path:
    model = diffusers.FluxTransformer2DModel(
        **FLUX, joint_attention_dim=32, pooled_projection_dim=16, in_channels=4, axes_dims_rope=(8, 12, 12)
    )
    return saved(model, folder)


def in_pipeline(transformer: Path, folder: Path) -> Path:
    shutil.copytree(transformer, folder / "transformer")
    index = {"_class_name": "WanPipeline", "transformer": ["diffusers", "WanTransformer3DModel"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def flux_parts(stem: str) -> list[str]:
    """The layers of diffusers of which a layer of ComfyUI consists, in a model of FLUX.1."""
    _, number, layer = stem.split(".", 2)
    single, double = f"single_transformer_blocks.{number}", f"transformer_blocks.{number}"
    return {
        "linear1": [f"{single}.attn.to_q", f"{single}.attn.to_k", f"{single}.attn.to_v", f"{single}.proj_mlp"],
        "linear2": [f"{single}.proj_out"],
        "img_attn.qkv": [f"{double}.attn.to_q", f"{double}.attn.to_k", f"{double}.attn.to_v"],
        "txt_attn.qkv": [f"{double}.attn.add_{part}_proj" for part in "qkv"],
        "img_attn.proj": [f"{double}.attn.to_out.0"],
        "txt_attn.proj": [f"{double}.attn.to_add_out"],
        "img_mlp.0": [f"{double}.ff.net.0.proj"],
        "img_mlp.2": [f"{double}.ff.net.2"],
        "txt_mlp.0": [f"{double}.ff_context.net.0.proj"],
        "txt_mlp.2": [f"{double}.ff_context.net.2"],
    }[layer]


def quantized_layers(output: Path) -> set[str]:
    return {name.removesuffix(".weight_scale") for name in load_all(output) if name.endswith(".weight_scale")}


def load_all(output: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in output.glob("*.safetensors") for name, tensor in load_file(file).items()}


def ignored(output: Path) -> list[str]:
    return list(json.loads((output / "config.json").read_text())["quantization_config"]["ignored_layers"])


def test_wan_dual_scale_keeps_five_blocks_as_the_runtime_does_online(tmp_path: Path) -> None:
    convert_checkpoint(wan(tmp_path / "wan"), tmp_path / "out", Recipe(method="mxfp4_dualscale", search=False))
    assert {name.split(".")[1] for name in quantized_layers(tmp_path / "out")} == {"5"}
    assert {"blocks.0.attn1.to_qkv", "blocks.4.ffn.net_0.proj"} <= set(ignored(tmp_path / "out"))
    assert "blocks.5.attn1.to_qkv" not in ignored(tmp_path / "out")


def test_the_number_of_bf16_blocks_can_be_chosen(tmp_path: Path) -> None:
    recipe = Recipe(method="mxfp4_dualscale", search=False, bf16_blocks=1)
    report = convert_checkpoint(wan(tmp_path / "wan", num_layers=2), tmp_path / "out", recipe)
    assert {name.split(".")[1] for name in quantized_layers(tmp_path / "out")} == {"1"}
    assert {layer.reason for layer in report.kept} == {"one of the first 1 blocks"}


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(method="gguf", bf16_blocks=1),
        Recipe(component={"transformer": "fp8_storage"}, runtime="diffusers", bf16_blocks=1),
    ],
    ids=["gguf", "fp8_storage"],
)
def test_leading_blocks_stay_whatever_reads_the_result(tmp_path: Path, recipe: Recipe) -> None:
    source = wan(tmp_path / "wan", num_layers=2)
    if recipe.component:
        source = in_pipeline(source, tmp_path / "pipeline")
    convert_checkpoint(source, tmp_path / "out", recipe)
    opened = open_quantized(tmp_path / "out" / "transformer" if recipe.component else tmp_path / "out")
    assert {stem.split(".")[1] for stem in opened.layers if stem.startswith("blocks.")} == {"1"}


def test_leading_blocks_are_those_of_the_transformer(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    recipe = Recipe(component={"text_encoder": "fp8"}, runtime="diffusers", bf16_blocks=1)
    report = convert_checkpoint(tiny_pipeline_folder, tmp_path / "out", recipe)
    leading = [layer.name for layer in report.layers if ".layers.0." in layer.name]
    assert leading
    assert all(name.startswith("text_encoder.") for name in leading)


def test_wan_5b_is_refused_with_four_bit_activations_unless_forced(tmp_path: Path) -> None:
    source = wan(tmp_path / "wan", num_layers=1, in_channels=48, out_channels=48)
    with pytest.raises(RecipeError, match=r"TI2V-5B.*--force"):
        convert_checkpoint(source, tmp_path / "out", Recipe(method="mxfp4"))
    convert_checkpoint(source, tmp_path / "fp8", Recipe(method="fp8"))
    convert_checkpoint(source, tmp_path / "forced", Recipe(method="mxfp4", force=True))


def test_wan_cross_attention_is_not_fused(tmp_path: Path) -> None:
    model = diffusers.WanTransformer3DModel(**WAN, num_layers=1)
    for factor, leaf in enumerate(("to_q", "to_k", "to_v"), 1):
        for attention in (model.blocks[0].attn1, model.blocks[0].attn2):
            getattr(attention, leaf).weight.data *= factor
    convert_checkpoint(saved(model, tmp_path / "wan"), tmp_path / "out")
    tensors = load_all(tmp_path / "out")
    scales = {name: tensor.item() for name, tensor in tensors.items() if name.endswith("weight_scale")}
    assert len({scales[f"blocks.0.attn1.{leaf}.weight_scale"] for leaf in ("to_q", "to_k", "to_v")}) == 1
    assert len({scales[f"blocks.0.attn2.{leaf}.weight_scale"] for leaf in ("to_q", "to_k", "to_v")}) == 3


def test_flux_double_blocks_are_for_our_loader_only(tmp_path: Path) -> None:
    source = flux(tmp_path / "flux")
    convert_checkpoint(source, tmp_path / "vllm")
    assert {name.partition(".")[0] for name in quantized_layers(tmp_path / "vllm")} == {"single_transformer_blocks"}
    convert_checkpoint(source, tmp_path / "ours", Recipe(runtime="diffusers"))
    assert {name.partition(".")[0] for name in quantized_layers(tmp_path / "ours")} == {
        "single_transformer_blocks",
        "transformer_blocks",
    }


def test_flux_double_blocks_are_packed_for_auto_round_and_their_norms_listed(tmp_path: Path) -> None:
    source = flux(tmp_path / "flux")
    report = convert_checkpoint(source, tmp_path / "out", Recipe(method="w4a16", group_size=32))
    packed = {name.removesuffix(".qweight") for name in load_all(tmp_path / "out") if name.endswith(".qweight")}
    convert_checkpoint(source, tmp_path / "ours", Recipe(runtime="diffusers"))
    assert packed == quantized_layers(tmp_path / "ours")
    block = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert block["block_name_to_quantize"] == "single_transformer_blocks,transformer_blocks"
    assert {"transformer_blocks.0.norm1.linear", "norm_out.linear"} <= block["extra_config"].keys()
    assert "proj_out" not in block["extra_config"]  # their reader compares ends of names
    assert not any("only the single blocks" in note for note in report.notes)


def test_a_file_for_comfyui_obeys_the_scope_of_comfyui(tmp_path: Path) -> None:
    source = flux(tmp_path / "flux")
    report = convert_checkpoint(source, tmp_path / "comfyui", Recipe(dialect="comfyui"))
    convert_checkpoint(source, tmp_path / "ours", Recipe(runtime="diffusers"))
    stems = quantized_layers(tmp_path / "comfyui")
    assert quantized_layers(tmp_path / "ours") == {part for stem in stems for part in flux_parts(stem)}
    assert not any("vLLM-Omni" in note for note in report.notes)
    convert_checkpoint(source, tmp_path / "vllm", Recipe(dialect="comfyui", runtime="vllm-omni"))
    assert {name.partition(".")[0] for name in quantized_layers(tmp_path / "vllm")} == {"single_blocks"}


@pytest.mark.parametrize(
    ("model", "stack"),
    [
        (
            diffusers.QwenImage21Transformer2DModel(
                num_layers=1,
                attention_head_dim=32,
                num_attention_heads=2,
                context_in_dim=32,
                axes_dims_rope=(8, 12, 12),
            ),
            "transformer.transformer_blocks",
        ),
        (
            diffusers.Cosmos3OmniTransformer(
                head_dim=32,
                hidden_size=64,
                intermediate_size=64,
                num_attention_heads=2,
                num_key_value_heads=2,
                num_hidden_layers=1,
                vocab_size=32,
            ),
            "gen_layers",
        ),
    ],
    ids=["Qwen-Image-2.1", "Cosmos 3"],
)
def test_auto_round_quantizes_blocks_by_the_names_that_the_runtime_gives_them(
    tmp_path: Path, model: torch.nn.Module, stack: str
) -> None:
    convert_checkpoint(saved(model, tmp_path / "m"), tmp_path / "out", Recipe(method="w4a16", group_size=32))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    block = config["quantization_config"]
    assert stack in block["block_name_to_quantize"].split(",")
    (good,) = verify_source(resolve_source(tmp_path / "out"))
    assert not good.findings
    block["block_name_to_quantize"] = "transformer_blocks,layers"  # the names in the checkpoint alone
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    (bad,) = verify_source(resolve_source(tmp_path / "out"))
    assert "ignored-but-quantized" in {finding.check for finding in bad.findings if finding.severity == "error"}


def test_wan_in_nvfp4_is_refused_by_the_runtime_that_cannot_load_it_alone(tmp_path: Path) -> None:
    source = wan(tmp_path / "wan", num_layers=1)
    with pytest.raises(RecipeError, match=r"vLLM-Omni 0\.30\.0 and 0\.32\.0rc1 cannot load ModelOpt blocks"):
        convert_checkpoint(source, tmp_path / "vllm", Recipe(method="nvfp4", search=False))
    convert_checkpoint(source, tmp_path / "comfyui", Recipe(method="nvfp4", dialect="comfyui", search=False))
    layers = {name.removesuffix(".weight_scale_2") for name in load_all(tmp_path / "comfyui") if "scale_2" in name}
    assert {"blocks.0.self_attn.q", "blocks.0.cross_attn.o", "blocks.0.ffn.2"} <= layers


def test_layers_that_comfyui_would_pad_stay_as_they_are(tmp_path: Path) -> None:
    source = wan(tmp_path / "wan", num_layers=1, ffn_dim=72)
    report = convert_checkpoint(source, tmp_path / "out", Recipe(method="nvfp4", dialect="comfyui", search=False))
    assert {layer.name for layer in report.kept} == {"blocks.0.ffn.0", "blocks.0.ffn.2"}
    assert any("ComfyUI pads nvfp4 to multiples of 16" in layer.reason for layer in report.kept)


def test_a_family_that_the_runtime_does_not_quantize_is_refused(tmp_path: Path) -> None:
    model = diffusers.SD3Transformer2DModel(
        sample_size=8, num_layers=1, attention_head_dim=32, num_attention_heads=2, joint_attention_dim=32,
        caption_projection_dim=64, pooled_projection_dim=32,
    )  # fmt: skip
    source = saved(model, tmp_path / "sd3")
    with pytest.raises(RecipeError, match=r"vLLM-Omni.*--runtime diffusers"):
        convert_checkpoint(source, tmp_path / "out")
    convert_checkpoint(source, tmp_path / "ours", Recipe(runtime="diffusers"))
    assert all(name.startswith("transformer_blocks.0.") for name in quantized_layers(tmp_path / "ours"))


def test_fp8_blocks_that_cut_a_fused_layer_leave_it_alone(tmp_path: Path) -> None:
    source = wan(tmp_path / "wan", num_layers=1)
    report = convert_checkpoint(source, tmp_path / "out", Recipe(weight_block_size=(128, 128)))
    assert {layer.name for layer in report.kept} == {f"blocks.0.attn1.{leaf}" for leaf in ("to_q", "to_k", "to_v")}
    assert "blocks.0.attn1.to_qkv" in ignored(tmp_path / "out")


def test_recommended_layers_are_printed_and_applied_only_on_request(tmp_path: Path) -> None:
    model = diffusers.QwenImageTransformer2DModel(
        num_layers=1, attention_head_dim=32, num_attention_heads=2, joint_attention_dim=32, axes_dims_rope=(8, 12, 12)
    )
    source = saved(model, tmp_path / "qwen")
    plain = convert_checkpoint(source, tmp_path / "plain")
    assert any("img_mlp" in note and "--recommended" in note for note in plain.notes)
    assert any("img_mlp" in name for name in quantized_layers(tmp_path / "plain"))
    convert_checkpoint(source, tmp_path / "careful", Recipe(recommended=True))
    assert not any("img_mlp" in name for name in quantized_layers(tmp_path / "careful"))


def test_bf16_blocks_that_name_no_layer_are_refused(tmp_path: Path) -> None:
    recipe = Recipe(bf16_blocks=1)
    with pytest.raises(RecipeError, match=r"^--bf16-blocks: found 1, but none .* --ignored-layers"):
        convert_checkpoint(flux(tmp_path / "flux"), tmp_path / "out", recipe)


@pytest.mark.parametrize(("width", "is_short"), [(128, True), (512, False)])
def test_a_short_last_group_is_said_to_be_unrun(tmp_path: Path, width: int, is_short: bool) -> None:
    model = wan(tmp_path / "wan", num_layers=1, num_attention_heads=width // 32, ffn_dim=512)
    recipe = Recipe(method="mxfp4_dualscale", search=False, bf16_blocks=0)
    notes = convert_checkpoint(model, tmp_path / "out", recipe).notes
    assert any("not run on hardware yet" in note for note in notes) == is_short


#: Dialect to the methods that it can hold of the tiny pipeline, without statistics.
HELD = {
    "vllm-omni": ("fp8", "int8", "mxfp8", "mxfp4", "mxfp4_dualscale", "nvfp4"),
    "modelopt": ("fp8", "mxfp8", "nvfp4"),
    "comfyui": ("fp8", "int8", "mxfp8", "nvfp4", "convrot_w4a4", "w4a8", "w6a8"),
    "compressed-tensors": ("fp8", "int8", "mxfp8", "mxfp4", "nvfp4"),
    "transformers": ("mxfp8",),
    "auto-round": ("w4a16", "mxfp8", "mxfp4"),
    "msmodelslim": ("int8", "mxfp8", "mxfp4"),
    "bitsandbytes": ("nf4",),
    "vllm-omni-svdquant": (),
    "nunchaku": (),
    "nunchaku-lite": (),
}
# Methods of which the tiny pipeline has too few rows, and the one that is a kind of file by itself.
OTHERS = ("svdquant_int4", "svdquant_nvfp4", "gguf")
ALONE = {method: next(name for name in HELD if method in HELD[name]) for method in METHODS if method not in OTHERS}
ALONE = {method: name for method, name in ALONE.items() if name != "vllm-omni"}


# The dialects that every method is quickly tried with.
QUICK = ("vllm-omni", "modelopt")
PAIRS = [
    pytest.param(method, dialect, marks=() if method in ALONE and dialect in QUICK else pytest.mark.slow)
    for method in METHODS
    for dialect in WRITTEN
    if method not in OTHERS
]


@pytest.mark.parametrize(("method", "dialect"), PAIRS)
def test_a_method_goes_where_it_is_held_or_names_the_dialects_that_hold_it(
    tiny_pipeline_folder: Path, method: str, dialect: str
) -> None:
    group = 32 if method == "w4a16" else None
    recipe = Recipe(
        method, dialect=dialect, search=False, group_size=group, force="nunchaku" in dialect or "svdquant" in dialect
    )
    if method in HELD[dialect] or (dialect == "vllm-omni" and method in ALONE):
        (component,) = plan_conversion(resolve_source(tiny_pipeline_folder), recipe).components
        said = [note for note in component.notes if "the only one that holds it" in note]
        assert bool(said) == (method in ALONE)
        assert all(f"in the dialect {ALONE[method]}," in note for note in said)
        return
    with pytest.raises(RecipeError) as refused:
        plan_conversion(resolve_source(tiny_pipeline_folder), recipe)
    message = str(refused.value)
    if (method, dialect) == ("nvfp4", "auto-round"):
        assert "calibrate, with --calib" in message
    elif method == "fp8" and dialect == "transformers":
        assert "128" in message or "block" in message
    else:
        holding = [name for name in HELD if method in HELD[name]]
        assert f"--dialect {' or '.join(sorted(holding, key=WRITTEN.index))} can hold it" in message


@pytest.mark.parametrize("dialect", [name for name in WRITTEN if name != "comfyui"])
def test_a_rotation_is_refused_where_the_reader_would_ignore_it(dialect: str) -> None:
    with pytest.raises(RecipeError, match=f"--rotate: found with --dialect {dialect}, expected --dialect comfyui"):
        Recipe("int8", dialect=dialect, rotate=True)


def test_vllm_omni_reads_no_svdquant_of_integers(tmp_path: Path) -> None:
    folder = flux(tmp_path / "model")
    with pytest.raises(RecipeError, match="svdquant_int4"):
        plan_conversion(resolve_source(folder), Recipe("svdquant_int4", dialect="vllm-omni-svdquant", force=True))
