"""GGUF under the names of the models' own code: what ComfyUI-GGUF looks for, and what diffusers reads back."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import diffusers
import gguf
import pytest
import tiny_models
import torch
from click.testing import CliRunner
from diffusers import (
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    GGUFQuantizationConfig,
    LTXVideoTransformer3DModel,
    WanTransformer3DModel,
    ZImageTransformer2DModel,
)
from diffusers.quantizers.gguf.utils import GGUFParameter, dequantize_gguf_tensor
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from omni_convert.convert.cli.main import main
from omni_convert.convert.conversion import convert_checkpoint
from omni_convert.convert.plan.file_names import gguf_names
from omni_convert.convert.recipe import Recipe
from omni_convert.formats.containers.checkpoint import Checkpoint
from omni_convert.formats.containers.tensor_spec import TensorSpec
from omni_convert.formats.containers.writer import bytes_of
from omni_convert.formats.errors import RecipeError
from omni_convert.formats.families.table import find_family
from omni_convert.formats.views.original_names import shapes_of

WEIGHTS = "diffusion_pytorch_model.safetensors"
# By these ComfyUI-GGUF tells models apart; the others it refuses as those of diffusers.
DETECTED_BY = {
    "flux": ("double_blocks.0.img_attn.proj.weight",),
    "lumina2": ("cap_embedder.1.weight", "context_refiner.0.attention.qkv.weight"),
    "wan": ("blocks.0.self_attn.norm_q.weight", "text_embedding.2.weight", "head.modulation"),
    "ltxv": (
        "adaln_single.emb.timestep_embedder.linear_2.weight",
        "transformer_blocks.27.scale_shift_table",
        "caption_projection.linear_2.weight",
    ),
    "hyvid": (
        "double_blocks.0.img_attn_proj.weight",
        "txt_in.individual_token_refiner.blocks.1.self_attn_qkv.weight",
    ),
    "sd3": ("joint_blocks.0.x_block.attn.qkv.weight",),
    "sdxl": ("model.diffusion_model.label_emb.0.0.weight", "model.diffusion_model.output_blocks.5.2.conv.weight"),
    "krea2": ("txtfusion.projector.weight",),
}
BANNED = ("transformer_blocks.0.attn.norm_added_k.weight", "transformer_blocks.0.attn.add_q_proj.weight")
# Models as they are published.
PUBLISHED = {
    "FLUX.1-dev": (FluxTransformer2DModel, {"guidance_embeds": True}, "single_blocks.37.linear1.weight", (21504, 3072)),
    "FLUX.1-schnell": (FluxTransformer2DModel, {}, "double_blocks.18.txt_attn.qkv.weight", (9216, 3072)),
    "FLUX.2-dev": (Flux2Transformer2DModel, {}, "double_blocks.7.img_attn.qkv.weight", (18432, 6144)),
    "Z-Image": (ZImageTransformer2DModel, {}, "layers.29.attention.qkv.weight", (11520, 3840)),
    "LTX-Video": (LTXVideoTransformer3DModel, {}, "adaln_single.emb.timestep_embedder.linear_2.weight", (2048, 2048)),
    "Wan2.1-14B": (WanTransformer3DModel, {}, "blocks.39.cross_attn.k.weight", (5120, 5120)),
    "Chroma": (diffusers.ChromaTransformer2DModel, {}, "single_blocks.37.linear1.weight", (21504, 3072)),
    "Lumina 2": (
        diffusers.Lumina2Transformer2DModel, {"cap_feat_dim": 2304}, "layers.25.attention.qkv.weight", (3840, 2304),
    ),
    "LTX-2": (
        diffusers.LTX2VideoTransformer3DModel,
        {},
        "av_ca_a2v_gate_adaln_single.linear.weight",
        (4096, 4096),
    ),
    "HunyuanVideo": (
        diffusers.HunyuanVideoTransformer3DModel, {}, "double_blocks.19.txt_attn_qkv.weight", (9216, 3072),
    ),
    "SD3.5-large": (
        diffusers.SD3Transformer2DModel,
        {
            "num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "pos_embed_max_size": 192,
            "qk_norm": "rms_norm",
        },
        "joint_blocks.37.context_block.adaLN_modulation.1.weight",
        (4864, 2432),
    ),
    "Krea 2": (diffusers.Krea2Transformer2DModel, {}, "blocks.27.mod.lin", (36864,)),
    "SDXL": (
        diffusers.UNet2DConditionModel,
        {
            "block_out_channels": [320, 640, 1280],
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "attention_head_dim": [5, 10, 20],
            "transformer_layers_per_block": [1, 2, 10],
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "layers_per_block": 2,
            "class_embed_type": None,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        "model.diffusion_model.middle_block.1.transformer_blocks.9.attn2.to_k.weight",
        (1280, 2048),
    ),
}  # fmt: skip


@pytest.fixture(scope="session")
def flux2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "flux2"
    tiny_models.save_model("flux_2", folder)
    return folder


@pytest.fixture(scope="session")
def z_image_folder(tiny_pipeline_folder: Path) -> Path:
    return tiny_pipeline_folder / "transformer"


def hollow_checkpoint(model_class: Any, config: dict[str, Any], folder: Path) -> Path:
    """A file of a model's size whose numbers are all a hole on the disk."""
    header: dict[str, Any] = {}
    position = 0
    for name, shape in shapes_of(model_class, config).items():
        nbytes = torch.Size(shape).numel() * 2
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [position, position + nbytes]}
        position += nbytes
    text = json.dumps(header).encode()
    path = folder / WEIGHTS
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + position)
    return path


def converted(source: Path, output: Path, names: str | None = None, kind: str = "Q8_0", *, force: bool = False) -> Path:
    recipe = Recipe("gguf", gguf_type=kind, gguf_names=names, device="cpu", force=force, search=False)
    convert_checkpoint(source, output, recipe)
    (file,) = output.glob("*.gguf")
    return file


def numbers_of(file: Path) -> dict[str, Tensor]:
    """Each tensor as the `gguf` package reads it, under its name in the file."""
    return {
        tensor.name: torch.from_numpy(gguf.quants.dequantize(tensor.data.copy(), tensor.tensor_type))
        for tensor in gguf.GGUFReader(file).tensors
    }


def dequantized(folder: Path, output: Path) -> dict[str, Tensor]:
    convert_checkpoint(folder, output, Recipe("dequantize", dtype="float32", device="cpu"))
    return load_file(output / WEIGHTS)


def loaded(model_class: Any, file: Path) -> nn.Module:
    model: nn.Module = model_class.from_single_file(
        str(file),
        config=str(file.parent),
        quantization_config=GGUFQuantizationConfig(compute_dtype=torch.float32),
        torch_dtype=torch.float32,
    )
    return model


def sample_of(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    with torch.no_grad():
        if isinstance(model, ZImageTransformer2DModel):
            return torch.stack(model([noise(4, 1, 8, 8)], torch.ones(1), [noise(8, 64)]).sample)
        width = model.config.joint_attention_dim
        axes = len(model.config.axes_dims_rope)
        pooled = getattr(model.config, "pooled_projection_dim", None)
        return model(
            hidden_states=noise(1, 16, model.config.in_channels),
            encoder_hidden_states=noise(1, 8, width),
            timestep=torch.ones(1),
            img_ids=torch.zeros(16, axes),
            txt_ids=torch.zeros(8, axes),
            guidance=torch.ones(1) if model.config.guidance_embeds else None,
            **({"pooled_projections": noise(1, pooled)} if pooled else {}),
        ).sample


def check_that_diffusers_runs_the_same(model_class: Any, file: Path, plain: dict[str, Tensor]) -> None:
    """Compares with diffusers' model of the weights that the file stands for."""
    model = loaded(model_class, file)
    assert sum(type(module).__name__ == "GGUFLinear" for module in model.modules()) > 8
    for name, parameter in model.named_parameters():
        if isinstance(parameter, GGUFParameter):  # which diffusers dequantizes in FP16
            rounded = dequantize_gguf_tensor(parameter).float()
            torch.testing.assert_close(rounded, plain[name], rtol=0, atol=float(plain[name].abs().max()) * 2**-10)
            plain[name] = rounded
    reference = model_class.from_config(model_class.load_config(file.parent)).eval()
    reference.load_state_dict(plain, assign=True)
    sample = sample_of(reference)
    torch.testing.assert_close(sample_of(model), sample, rtol=0, atol=float(sample.abs().max()) * 1e-5)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_original_names_that_diffusers_reads_back(name: str, tmp_path: Path) -> None:
    model_class, config, joined, shape = PUBLISHED[name]
    with Checkpoint.open(hollow_checkpoint(model_class, config, tmp_path)) as checkpoint:
        names = gguf_names(checkpoint, {"_class_name": model_class.__name__, **config}, Recipe("gguf"))
        assert names.note.startswith("the names of the model's own code")
        assert names.checkpoint[joined].shape == shape
        assert names.checkpoint.keys() >= {*DETECTED_BY[find_family(model_class.__name__).gguf.architecture]}
        assert names.checkpoint.keys().isdisjoint(BANNED)
        assert sum(spec.nbytes for spec in names.checkpoint.values()) == sum(
            spec.nbytes for spec in checkpoint.values()
        )


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "BF16"])
@pytest.mark.parametrize(("model", "architecture"), [("flux2", "flux"), ("z_image", "lumina2")])
def test_a_file_under_original_names_stands_for_the_same_weights(
    model: str, architecture: str, kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    source: Path = request.getfixturevalue(f"{model}_folder")
    file = converted(source, tmp_path / "original", kind=kind)
    theirs = converted(source, tmp_path / "diffusers", "diffusers", kind)
    reader = gguf.GGUFReader(file)
    names = {tensor.name for tensor in reader.tensors}
    assert reader.get_field("general.architecture").contents() == architecture
    assert names >= {*DETECTED_BY[architecture]}
    assert names.isdisjoint(BANNED)
    plain = dequantized(tmp_path / "original", tmp_path / "plain")
    wanted = numbers_of(theirs)
    assert plain.keys() == wanted.keys() == load_file(source / WEIGHTS).keys()
    for name, numbers in wanted.items():
        assert plain[name].view(torch.int32).equal(numbers.reshape(plain[name].shape).view(torch.int32)), name
    model_class = getattr(diffusers, json.loads((source / "config.json").read_text())["_class_name"])
    check_that_diffusers_runs_the_same(model_class, file, plain)
    assert sample_of(loaded(model_class, file)).equal(sample_of(loaded(model_class, theirs)))


def test_rows_of_a_joined_weight_are_those_of_its_parts_bit_for_bit(z_image_folder: Path, tmp_path: Path) -> None:
    file = converted(z_image_folder, tmp_path / "out", kind="Q5_0")
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    original = load_file(z_image_folder / WEIGHTS)
    parts = torch.cat([original[f"layers.1.attention.to_{part}.weight"] for part in "qkv"])
    joined = found["layers.1.attention.qkv.weight"]
    assert joined.tensor_type.name == "Q5_0"
    assert joined.data.tobytes() == gguf.quants.quantize(parts.float().numpy(), joined.tensor_type).tobytes()
    assert found["x_pad_token"].tensor_type.name == "F32"
    assert found["noise_refiner.0.attention.qkv.weight"].tensor_type.name == "BF16"
    assert found["final_layer.linear.weight"].data.tobytes() == (
        original["all_final_layer.2-1.linear.weight"].float().numpy().tobytes()
    )


def test_inspect_says_who_loads_it_and_verify_finds_nothing(z_image_folder: Path, tmp_path: Path) -> None:
    converted(z_image_folder, tmp_path / "original")
    converted(z_image_folder, tmp_path / "diffusers", "diffusers")
    runner = CliRunner()
    shown = {
        names: runner.invoke(main, ["inspect", str(tmp_path / names)]).output for names in ("original", "diffusers")
    }
    assert "ComfyUI-GGUF: loads" in shown["original"]
    assert re.search(r"vLLM-Omni[^:]*: loads", shown["original"])
    assert "ComfyUI-GGUF: refuses" in shown["diffusers"]
    assert re.search(r"vLLM-Omni[^:]*: LOADS WRONG", shown["diffusers"])
    for reference in ([], ["--reference", str(z_image_folder)]):
        result = runner.invoke(main, ["verify", str(tmp_path / "original"), *reference])
        assert result.exit_code == 0, result.output
        assert "0 errors, 0 warnings" in result.output


def test_a_file_under_original_names_is_converted_like_one_under_diffusers(
    z_image_folder: Path, tmp_path: Path
) -> None:
    for names in ("original", "diffusers"):
        converted(z_image_folder, tmp_path / names, names)
        convert_checkpoint(tmp_path / names, tmp_path / f"{names}-fp8", Recipe("fp8", device="cpu"))
    ours, theirs = (load_file(tmp_path / f"{names}-fp8" / WEIGHTS) for names in ("original", "diffusers"))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert bytes_of(ours[name]) == bytes_of(tensor), name


def test_a_layer_stays_as_it_is_with_those_that_it_is_joined_with(z_image_folder: Path, tmp_path: Path) -> None:
    recipe = Recipe("gguf", ignored_layers=("layers.0.attention.to_k", "layers.1.attention.qkv"), device="cpu")
    report = convert_checkpoint(z_image_folder, tmp_path / "out", recipe)
    kept = {layer.name: layer.reason for layer in report.kept}
    assert kept["layers.0.attention.qkv"] == "ignored by 'layers.0.attention.to_k'"
    assert kept["layers.1.attention.qkv"] == "ignored by 'layers.1.attention.qkv'"
    (file,) = (tmp_path / "out").glob("*.gguf")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors}
    assert kinds["layers.0.attention.qkv.weight"] == kinds["layers.1.attention.qkv.weight"] == "BF16"
    assert kinds["layers.0.attention.out.weight"] == "Q8_0"
    with pytest.raises(RecipeError, match="'no_such_layer' matches no layer"):
        convert_checkpoint(z_image_folder, tmp_path / "none", Recipe("gguf", ignored_layers=("no_such_layer",)))


def test_parts_of_several_dtypes_are_joined_without_a_loss(z_image_folder: Path, tmp_path: Path) -> None:
    tensors = load_file(z_image_folder / WEIGHTS)
    name = "layers.0.attention.to_k.weight"
    tensors[name] = torch.randn(tensors[name].shape, generator=torch.Generator().manual_seed(1))
    (tmp_path / "model").mkdir()
    save_file(tensors, tmp_path / "model" / WEIGHTS)
    (tmp_path / "model" / "config.json").write_bytes((z_image_folder / "config.json").read_bytes())
    file = converted(tmp_path / "model", tmp_path / "out")
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}["layers.0.attention.qkv.weight"]
    parts = torch.cat([tensors[f"layers.0.attention.to_{part}.weight"].float() for part in "qkv"])
    assert found.data.tobytes() == gguf.quants.quantize(parts.numpy(), found.tensor_type).tobytes()


def test_a_width_that_diffusers_converts_not_keeps_its_names_unless_forced(flux_folder: Path, tmp_path: Path) -> None:
    report = convert_checkpoint(flux_folder, tmp_path / "auto", Recipe("gguf", device="cpu"))
    assert any("has diffusers' names, since diffusers would not load this model" in note for note in report.notes)
    with pytest.raises(RecipeError, match=r"--gguf-names original: found that diffusers would not load.*--force"):
        converted(flux_folder, tmp_path / "refused", "original")
    numbers = numbers_of(converted(flux_folder, tmp_path / "forced", "original", "BF16", force=True))
    tensors = {name: tensor.float() for name, tensor in load_file(flux_folder / WEIGHTS).items()}
    block = "single_transformer_blocks.0"
    parts = [f"{block}.attn.to_{part}.weight" for part in "qkv"] + [f"{block}.proj_mlp.weight"]
    assert numbers["single_blocks.0.linear1.weight"].equal(torch.cat([tensors[part] for part in parts]))
    for leaf in ("weight", "bias"):
        scale, shift = tensors[f"norm_out.linear.{leaf}"].chunk(2)
        assert numbers[f"final_layer.adaLN_modulation.1.{leaf}"].equal(torch.cat([shift, scale]))
    assert numbers["double_blocks.0.txt_attn.norm.key_norm.scale"].equal(
        tensors["transformer_blocks.0.attn.norm_added_k.weight"]
    )
    assert numbers.keys().isdisjoint(tensors)


def test_models_whose_original_names_nobody_knows_keep_those_of_diffusers(tmp_path: Path) -> None:
    save_file({"transformer_blocks.0.ff.weight": torch.zeros(4, 64)}, tmp_path / WEIGHTS)
    config = {"_class_name": "GlmImageTransformer2DModel"}
    with Checkpoint.open(tmp_path / WEIGHTS) as checkpoint:
        assert "are not all known here" in gguf_names(checkpoint, config, Recipe("gguf")).note
        with pytest.raises(RecipeError, match="expected --gguf-names diffusers"):
            gguf_names(checkpoint, config, Recipe("gguf", gguf_names="original"))


@pytest.mark.parametrize(
    ("model_class", "config"),
    [
        (ZImageTransformer2DModel, {"all_patch_size": (2, 1), "all_f_patch_size": (1, 1)}),
        (LTXVideoTransformer3DModel, {"norm_elementwise_affine": True}),
    ],
)
def test_a_model_with_a_tensor_whose_original_name_nobody_knows_keeps_those_of_diffusers(
    model_class: Any, config: dict[str, Any], tmp_path: Path
) -> None:
    with Checkpoint.open(hollow_checkpoint(model_class, config, tmp_path)) as checkpoint:
        names = gguf_names(checkpoint, {"_class_name": model_class.__name__, **config}, Recipe("gguf"))
        assert names.note.startswith("diffusers' names, since")
        assert names.checkpoint.keys() == checkpoint.keys()


@pytest.mark.parametrize("kind", ["FluxTransformer2DModel", "ZImageTransformer2DModel", "WanTransformer3DModel"])
def test_no_class_has_an_original_name_for_what_it_does_not_know(kind: str) -> None:
    stray = TensorSpec("nobody.knows.weight", torch.bfloat16, (4, 4))
    assert find_family(kind).original_tensors({stray.name: stray}) is None


def test_wan_keeps_diffusers_names_where_its_conversion_would_lose_a_tensor(tmp_path: Path) -> None:
    config = {"num_layers": 1, "num_attention_heads": 1, "image_dim": 32, "pos_embed_seq_len": 4}
    with Checkpoint.open(hollow_checkpoint(WanTransformer3DModel, config, tmp_path)) as checkpoint:
        names = gguf_names(checkpoint, {"_class_name": "WanTransformer3DModel", **config}, Recipe("gguf"))
        assert "condition_embedder.image_embedder.pos_embed" in names.checkpoint
        assert names.note.startswith("diffusers' names, since")


@pytest.mark.slow
def test_diffusers_runs_flux_in_its_real_width_from_original_names(tmp_path: Path) -> None:
    torch.manual_seed(0)
    with torch.device("meta"):
        model = FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True)
    model.to_empty(device="cpu").to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, 1.0 if ".attn.norm_" in name else 0.0, 0.02)
    (tmp_path / "model").mkdir()
    model.save_pretrained(tmp_path / "model")
    del model
    file = converted(tmp_path / "model", tmp_path / "out")
    names = {tensor.name for tensor in gguf.GGUFReader(file).tensors}
    assert names >= {*DETECTED_BY["flux"]}
    assert names.isdisjoint(BANNED)
    result = CliRunner().invoke(main, ["verify", str(tmp_path / "out"), "--reference", str(tmp_path / "model")])
    assert "0 errors, 0 warnings" in result.output, result.output
    plain = dequantized(tmp_path / "out", tmp_path / "plain")
    original = load_file(tmp_path / "model" / WEIGHTS)
    for name in ("transformer_blocks.0.attn.add_k_proj.weight", "single_transformer_blocks.0.proj_mlp.weight"):
        kind = gguf.GGMLQuantizationType.Q8_0
        blocks = gguf.quants.quantize(original[name].float().numpy(), kind)
        assert plain[name].equal(torch.from_numpy(gguf.quants.dequantize(blocks, kind)))
    assert plain["norm_out.linear.weight"].equal(original["norm_out.linear.weight"].float())
    del original
    check_that_diffusers_runs_the_same(FluxTransformer2DModel, file, plain)
