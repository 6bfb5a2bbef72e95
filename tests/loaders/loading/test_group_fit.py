"""Quantizing while loading gives what a conversion gives, the scales of fused groups included."""

import json

import pytest
import torch
from diffusers import ZImageTransformer2DModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from omni_convert.convert import Recipe, convert_checkpoint
from omni_convert.loaders import build_quant_config, load_pipeline
from omni_convert.loaders.loading.diffusers_quantizer import DiffusersConfig
from omni_convert.loaders.loading.transformers_quantizer import TransformersConfig


@pytest.mark.parametrize("method", ["fp8", "int8", "mxfp8", "mxfp4", "mxfp4_dualscale", "nvfp4"])
def test_a_model_quantized_while_loading_is_saved_as_a_conversion_writes_it(tiny_pipeline_folder, tmp_path, method):
    recipe = Recipe(method=method, runtime="diffusers", component={"text_encoder": method})
    convert_checkpoint(tiny_pipeline_folder, tmp_path / "converted", recipe)
    spec = {"transformer": {"method": method}, "text_encoder": {"method": method}}
    load_pipeline(tiny_pipeline_folder, quantization=spec).save_pretrained(tmp_path / "saved")
    for component in ("transformer", "text_encoder"):
        (first,), (second,) = ((tmp_path / name / component).glob("*.safetensors") for name in ("converted", "saved"))
        converted, saved = load_file(first), load_file(second)
        assert converted.keys() == saved.keys()
        quantized = [name.removesuffix("_scale") for name in converted if name.endswith("weight_scale")]
        assert quantized
        for name in converted:
            if name in quantized or "scale" in name:
                assert converted[name].dtype is saved[name].dtype
                assert torch.equal(converted[name].float(), saved[name].float()), name


def test_members_of_a_group_in_different_shards_share_one_scale(tiny_pipeline_folder, tmp_path):
    plain = ZImageTransformer2DModel.from_pretrained(tiny_pipeline_folder / "transformer", dtype=torch.bfloat16)
    plain.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(set(json.loads(next(tmp_path.glob("*.index.json")).read_text())["weight_map"].values())) > 3
    config = DiffusersConfig.of(build_quant_config("fp8"))
    model = ZImageTransformer2DModel.from_pretrained(tmp_path, quantization_config=config, dtype=torch.bfloat16)
    attention = model.layers[0].attention
    largest = max(plain.layers[0].attention.get_submodule(leaf).weight.abs().max() for leaf in ("to_q", "to_k", "to_v"))
    for leaf in ("to_q", "to_k", "to_v"):
        assert attention.get_submodule(leaf).weight_scale == largest.float() / 448


def test_members_of_an_encoder_s_group_share_one_scale(tiny_pipeline_folder):
    config = TransformersConfig.of(build_quant_config("fp8"))
    model = AutoModelForCausalLM.from_pretrained(
        tiny_pipeline_folder / "text_encoder", quantization_config=config, dtype=torch.bfloat16
    )
    attention = model.model.layers[0].self_attn
    assert attention.q_proj.weight_scale == attention.k_proj.weight_scale == attention.v_proj.weight_scale
