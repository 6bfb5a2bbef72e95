"""Single files without a config: told by their tensors, or by `--config`, or refused with what is missing."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import gguf
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import Tensor

from omni_convert.convert.cli.main import main
from omni_convert.convert.conversion import convert_checkpoint
from omni_convert.convert.recipe import Recipe
from omni_convert.convert.source.single_file import derive_config
from omni_convert.formats.containers.tensor_spec import TensorSpec
from omni_convert.formats.containers.writer import bytes_of
from omni_convert.formats.errors import CheckpointError, RecipeError
from omni_convert.formats.families.table import find_family
from omni_convert.formats.schemes.fp8 import Fp8

WEIGHTS = "diffusion_pytorch_model.safetensors"
COMFYUI_PREFIX = "model.diffusion_model."
#: Models in their published widths and with few blocks: class, config, and the settings that no shape tells.
PUBLISHED: dict[str, tuple[str, dict[str, Any], set[str]]] = {
    "FLUX.1-dev": (
        "FluxTransformer2DModel", {"num_layers": 2, "num_single_layers": 3, "guidance_embeds": True}, set(),
    ),
    "FLUX.1-schnell": ("FluxTransformer2DModel", {"num_layers": 2, "num_single_layers": 3}, set()),
    "FLUX.2-dev": ("Flux2Transformer2DModel", {"num_layers": 1, "num_single_layers": 2}, set()),
    "Chroma": ("ChromaTransformer2DModel", {"num_layers": 1, "num_single_layers": 2}, set()),
    "Z-Image": ("ZImageTransformer2DModel", {"n_layers": 2}, set()),
    "Lumina 2": ("Lumina2Transformer2DModel", {"num_layers": 2, "cap_feat_dim": 2304}, set()),
    "Qwen-Image": ("QwenImageTransformer2DModel", {"num_layers": 2}, {"zero_cond_t"}),
    "Wan2.1-1.3B": ("WanTransformer3DModel", {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 2}, set()),
    "Wan2.1-I2V": (
        "WanTransformer3DModel",
        {"image_dim": 1280, "added_kv_proj_dim": 5120, "in_channels": 36, "num_layers": 1},
        set(),
    ),
    "Wan2.1-VACE": (
        "WanVACETransformer3DModel",
        {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 4, "vace_layers": [0, 2]},
        set(),
    ),
    "Wan-Animate": (
        "WanAnimateTransformer3DModel",
        {"num_layers": 5, "in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120},
        set(),
    ),
    "LTX-Video": ("LTXVideoTransformer3DModel", {}, set()),
    "LTX-2": ("LTX2VideoTransformer3DModel", {"num_layers": 1}, {"rope_type"}),
    "HunyuanVideo": (
        "HunyuanVideoTransformer3DModel", {"num_layers": 1, "num_single_layers": 1}, {"image_condition_type"},
    ),
    "HunyuanVideo-1.5": ("HunyuanVideo15Transformer3DModel", {"num_layers": 1}, {"task_type", "target_size"}),
    "SD3.5-large": (
        "SD3Transformer2DModel",
        {
            "num_layers": 2, "num_attention_heads": 38, "caption_projection_dim": 2432, "pos_embed_max_size": 192,
            "qk_norm": "rms_norm",
        },
        set(),
    ),
    "SD3.5-medium": (
        "SD3Transformer2DModel",
        {
            "num_layers": 2, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 384,
            "qk_norm": "rms_norm", "dual_attention_layers": [0],
        },
        set(),
    ),
    "Krea 2": ("Krea2Transformer2DModel", {"num_layers": 1}, set()),
    "SDXL": (
        "UNet2DConditionModel",
        {
            "block_out_channels": [320, 640, 1280],
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "attention_head_dim": [5, 10, 20],
            "transformer_layers_per_block": [1, 2, 10],
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        set(),
    ),
    "Stable Diffusion 1.5": (
        "UNet2DConditionModel", {"cross_attention_dim": 768, "transformer_layers_per_block": [1, 1, 1, 1]}, set(),
    ),
}  # fmt: skip
FLUX = {
    "in_channels": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "num_attention_heads": 1,
    "joint_attention_dim": 64,
    "pooled_projection_dim": 64,
}
#: A small model of which shapes tell the names alone: its heads are not those of published ones.
WAN = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 64, "ffn_dim": 256, "text_dim": 64}


@pytest.mark.parametrize("name", PUBLISHED)
def test_shapes_tell_the_config_under_names_of_either_kind(name: str) -> None:
    kind, settings, undecided = PUBLISHED[name]
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = getattr(diffusers, kind).from_config(settings)
    specs = {key: TensorSpec(key, torch.bfloat16, tuple(each.shape)) for key, each in model.state_dict().items()}
    originals = find_family(kind).original_tensors(specs)
    named = {key: TensorSpec(key, torch.bfloat16, each.shape) for key, each in (originals or {}).items()}
    for stored in filter(None, (specs, named)):
        found = derive_config(stored)  # type: ignore[arg-type]  # specs are all that is read
        assert found is not None
        assert found.config["_class_name"] == kind
        assert {*found.undecided} == undecided
        for key, value in found.config.items():
            if key != "_class_name" and model.config[key] is not None:
                assert _listed(value) == _listed(model.config[key]), key


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def saved(kind: str, settings: Mapping[str, Any], folder: Path) -> dict[str, Tensor]:
    """Saves a model with random weights as diffusers does; returns these."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model = getattr(diffusers, kind).from_config(settings).to(torch.bfloat16)
    model.save_pretrained(folder)
    return load_file(folder / WEIGHTS)


def original(tensors: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    """The tensors of a model under the names of its own code."""
    specs = {name: TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    found = find_family(kind).original_tensors(specs)
    assert found is not None
    return {
        name: torch.cat([tensors[run.source][run.start : run.start + run.count] for run in each.runs]).reshape(
            each.shape
        )
        for name, each in found.items()
    }


def layers_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / WEIGHTS)


@pytest.mark.parametrize("prefix", ["", COMFYUI_PREFIX, "diffusion_model."])
def test_a_file_is_converted_as_the_folder_of_its_model(prefix: str, tmp_path: Path) -> None:
    kind = "FluxTransformer2DModel"
    tensors = saved(kind, FLUX, tmp_path / "model")
    beside = {
        "vae.encoder.conv_in.weight": torch.ones(8, 3, 3, 3),
        "text_encoders.t5xxl.shared.weight": torch.ones(8, 8),
    }
    file = {f"{prefix}{name}": tensor for name, tensor in original(tensors, kind).items()}
    save_file(file | (beside if prefix else {}), tmp_path / "flux.safetensors")
    for options in ({"runtime": "diffusers"}, {"dialect": "comfyui"}):
        recipe = Recipe(device="cpu", **options)
        report = convert_checkpoint(tmp_path / "flux.safetensors", tmp_path / "out", recipe)
        convert_checkpoint(tmp_path / "model", tmp_path / "expected", recipe)
        found, wanted = layers_of(tmp_path / "out"), layers_of(tmp_path / "expected")
        assert found.keys() == wanted.keys()
        assert all(bytes_of(tensor) == bytes_of(wanted[name]) for name, tensor in found.items())
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        assert (config["_class_name"], config["num_single_layers"], config["guidance_embeds"]) == (kind, 1, False)
        notes = "\n".join(report.notes)
        assert "no config.json beside it; by its tensors it is FluxTransformer2DModel" in notes
        assert ("text_encoders (1 tensor), vae (1 tensor)" in notes) is bool(prefix)
        for folder in ("out", "expected"):
            (tmp_path / folder).rename(tmp_path / f"{folder} {options}")


def test_what_shapes_do_not_tell_is_named_and_given_by_config(tmp_path: Path) -> None:
    kind = "WanTransformer3DModel"
    tensors = original(saved(kind, WAN, tmp_path / "model"), kind)
    file = tmp_path / "wan.safetensors"
    save_file(tensors, file)
    with pytest.raises(
        CheckpointError,
        match=r"those of Wan \(WanTransformer3DModel\), do not tell its 'num_attention_heads'.*--config",
    ):
        convert_checkpoint(file, tmp_path / "out", Recipe())
    for config in (tmp_path / "model" / "config.json", tmp_path / "model"):
        arguments = [str(file), "-o", str(tmp_path / "out"), "--config", str(config), "--overwrite", "--quiet"]
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 0, result.output
        assert json.loads((tmp_path / "out" / "config.json").read_text())["num_attention_heads"] == 2
    convert_checkpoint(tmp_path / "model", tmp_path / "expected", Recipe())
    assert bytes_of(layers_of(tmp_path / "out")["blocks.0.attn1.to_q.weight"]) == bytes_of(
        layers_of(tmp_path / "expected")["blocks.0.attn1.to_q.weight"]
    )
    with pytest.raises(RecipeError, match=r"found no config\.json there"):
        convert_checkpoint(file, tmp_path / "none", Recipe(config=str(tmp_path)))


@pytest.mark.parametrize("prefix", ["", COMFYUI_PREFIX])
def test_comfyui_and_gguf_need_no_config(prefix: str, tmp_path: Path) -> None:
    kind = "WanTransformer3DModel"
    tensors = original(saved(kind, WAN, tmp_path / "model"), kind)
    file = tmp_path / "wan.safetensors"
    save_file({f"{prefix}{name}": tensor for name, tensor in tensors.items()}, file)
    convert_checkpoint(file, tmp_path / "comfyui", Recipe(dialect="comfyui", device="cpu"))
    found = layers_of(tmp_path / "comfyui")
    assert {name for name in found if not name.endswith(("weight_scale", "comfy_quant"))} == tensors.keys()
    assert found["blocks.0.self_attn.q.weight"].dtype is torch.float8_e4m3fn
    assert found["head.modulation"].equal(tensors["head.modulation"])
    assert not (tmp_path / "comfyui" / "config.json").exists()  # this one is not certain
    convert_checkpoint(file, tmp_path / "gguf", Recipe("gguf", device="cpu"))
    reader = gguf.GGUFReader(next((tmp_path / "gguf").glob("*.gguf")))
    assert {tensor.name for tensor in reader.tensors} == tensors.keys()
    assert reader.get_field("general.architecture").contents() == "wan"


def test_tensors_that_comfyui_reads_besides_stay_for_it_alone(tmp_path: Path) -> None:
    kind = "LTX2VideoTransformer3DModel"
    settings = {
        "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 64, "cross_attention_dim": 128,
        "audio_num_attention_heads": 2, "audio_attention_head_dim": 64, "audio_cross_attention_dim": 128,
        "caption_channels": 64,
    }  # fmt: skip
    tensors = original(saved(kind, settings, tmp_path / "model"), kind)
    connector = {"video_embeddings_connector.learnable_registers": torch.ones(8, 32, dtype=torch.bfloat16)}
    file = tmp_path / "ltx.safetensors"
    save_file({f"{COMFYUI_PREFIX}{name}": tensor for name, tensor in (tensors | connector).items()}, file)
    convert_checkpoint(file, tmp_path / "comfyui", Recipe(dialect="comfyui", device="cpu"))
    assert connector.keys() <= layers_of(tmp_path / "comfyui").keys()
    recipe = Recipe(device="cpu", config=str(tmp_path / "model"))
    report = convert_checkpoint(file, tmp_path / "fp8", recipe)
    assert connector.keys().isdisjoint(layers_of(tmp_path / "fp8"))
    assert any("left out what the model does not use: model (1 tensor)" in note for note in report.notes)


def test_a_model_that_nobody_knows_keeps_its_names_for_comfyui_and_is_refused_elsewhere(tmp_path: Path) -> None:
    layers = ("blocks.0.mixer", "blocks.0.out", "blocks.1.mixer", "blocks.1.out")
    tensors = {f"{COMFYUI_PREFIX}{layer}.weight": torch.randn(64, 64) for layer in layers}
    tensors |= {"first_stage_model.decoder.weight": torch.randn(64, 64)}
    file = tmp_path / "strange.safetensors"
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match="the tensors do not tell the model; expected --config"):
        convert_checkpoint(file, tmp_path / "out", Recipe())
    report = convert_checkpoint(file, tmp_path / "out", Recipe(dialect="comfyui", device="cpu"))
    assert {name.removesuffix(".comfy_quant") for name in layers_of(tmp_path / "out") if "comfy" in name} == {*layers}
    assert any("its tensors do not tell the model: their names stay" in note for note in report.notes)


def test_a_quantized_file_without_a_config_is_kept_under_the_names_of_its_reader(tmp_path: Path) -> None:
    kind = "FluxTransformer2DModel"
    saved(kind, FLUX, tmp_path / "model")
    convert_checkpoint(tmp_path / "model", tmp_path / "ours", Recipe("int8", runtime="diffusers", device="cpu"))
    convert_checkpoint(tmp_path / "ours", tmp_path / "comfyui", Recipe("keep", dialect="comfyui"))
    file = tmp_path / "flux.safetensors"
    (tmp_path / "comfyui" / WEIGHTS).rename(file)  # INT8: rows have scales of their own, so that layers can be joined
    convert_checkpoint(file, tmp_path / "back", Recipe("keep", runtime="diffusers"))
    found, wanted = layers_of(tmp_path / "back"), layers_of(tmp_path / "ours")
    assert found.keys() == wanted.keys()
    assert all(bytes_of(tensor) == bytes_of(wanted[name]) for name, tensor in found.items())
    arguments = ["dequantize", str(file), "-o", str(tmp_path / "plain"), "--config", str(tmp_path / "model"), "--quiet"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert layers_of(tmp_path / "plain").keys() == layers_of(tmp_path / "model").keys()


def test_the_verdict_of_comfyui_looks_at_names_without_a_config_too(tmp_path: Path) -> None:
    kind = "WanTransformer3DModel"
    tensors = saved(kind, WAN, tmp_path / "model")
    for name, file in (("refuses", tensors), ("loads", original(tensors, kind))):
        stem = "blocks.0.attn1.to_q" if name == "refuses" else "blocks.0.self_attn.q"
        layer = {f"{stem}.{suffix}": each for suffix, each in Fp8().quantize(file[f"{stem}.weight"].float()).items()}
        mark = torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
        save_file({**file, **layer, f"{stem}.comfy_quant": mark}, tmp_path / "wan.safetensors")
        shown = CliRunner().invoke(main, ["inspect", str(tmp_path / "wan.safetensors")]).output
        assert f"ComfyUI: {name}" in shown
