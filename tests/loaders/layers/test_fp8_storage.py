"""FP8 storage halves the weights of encoders and VAEs, and their own forward runs on what the codes stand for."""

import copy
import io
import json
from pathlib import Path

import diffusers
import pytest
import torch
from accelerate import cpu_offload
from diffusers import AutoencoderKL, AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from diffusers.hooks import apply_group_offloading
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from omni_convert.convert import Recipe, convert_checkpoint
from omni_convert.convert.inspection.contents import inspect_source
from omni_convert.convert.inspection.verification import verify_source
from omni_convert.convert.source.location import resolve_source
from omni_convert.formats.errors import CheckpointError, RecipeError
from omni_convert.formats.schemes.fp8 import Fp8
from omni_convert.loaders import apply_fp8_weight_storage, kernel_report, load_pipeline
from omni_convert.loaders.layers.fp8_storage import Fp8WeightStorage

LAYERS = [nn.Linear(6, 4), nn.Conv2d(3, 4, 3), nn.Conv3d(3, 4, 2, padding_mode="circular")]
every_layer = pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: type(layer).__name__)
STORED = {"transformer": "none", "text_encoder": "fp8_storage", "vae": "fp8_storage"}
TOKENS = torch.tensor([[3, 4, 5]])


def input_of(layer):
    generator = torch.Generator().manual_seed(0)
    shape = (6,) if isinstance(layer, nn.Linear) else (3,) + (5,) * (layer.weight.dim() - 2)
    return torch.randn(2, *shape, generator=generator)


def saved_and_loaded(layer):  # plain pickle cannot hold float8 tensors
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def stored_bytes(model):
    return sum(tensor.nbytes for tensor in model.state_dict().values())


def stored_names(model):
    return {name for name, layer in model.named_modules() if isinstance(layer, Fp8WeightStorage)}


@pytest.fixture(scope="module")
def wan_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline whose VAE has convolutions of its own class, and whose encoder asks for the dtype of a weight."""
    torch.manual_seed(0)
    words = Tokenizer(WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", pad_token="<unk>")
    encoder = UMT5EncoderModel(UMT5Config(vocab_size=16, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2))
    vae = AutoencoderKLWan(base_dim=8, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[True])
    transformer = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        text_dim=32,
        freq_dim=16,
        ffn_dim=32,
        num_layers=1,
    )
    pipeline = WanPipeline(tokenizer, encoder, vae, UniPCMultistepScheduler(), transformer)
    folder = tmp_path_factory.mktemp("wan")
    pipeline.to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def converted_folder(wan_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("stored") / "out"
    convert_checkpoint(wan_folder, out, Recipe(runtime="diffusers", component=STORED))
    return out


@every_layer
def test_a_layer_computes_with_what_its_codes_stand_for(layer):
    plain = copy.deepcopy(layer)
    stored = apply_fp8_weight_storage(copy.deepcopy(layer))
    assert isinstance(stored, type(layer))
    assert stored.state_dict()["weight"].dtype is torch.float8_e4m3fn
    assert stored.state_dict()["weight"].shape == plain.weight.shape
    rows = plain.weight.detach().flatten(1)
    plain.weight.data = Fp8().dequantize(Fp8().quantize(rows)).view(plain.weight.shape)
    x = input_of(layer)
    for again in (stored, copy.deepcopy(stored), saved_and_loaded(stored)):
        assert torch.equal(again(x), plain(x))


@every_layer
def test_a_stored_layer_survives_offload_and_casts(layer):
    model = nn.Sequential(apply_fp8_weight_storage(copy.deepcopy(layer)))
    x = input_of(layer)
    expected, codes = model(x), model.state_dict()["0.weight"].float()
    assert torch.equal(cpu_offload(copy.deepcopy(model), torch.device("cpu"), offload_buffers=True)(x), expected)
    grouped = copy.deepcopy(model)
    apply_group_offloading(grouped, onload_device=torch.device("cpu"), offload_type="leaf_level")
    assert torch.equal(grouped(x), expected)
    model.to(torch.float16).to("cpu", torch.float32)
    assert model[0].state_dict()["weight"].dtype is torch.float8_e4m3fn
    assert model[0].state_dict()["weight_scale"].dtype is torch.float32
    assert torch.equal(model.state_dict()["0.weight"].float(), codes)
    assert torch.allclose(model(x), expected, atol=2e-3)  # the bias went through float16
    meta = copy.deepcopy(model).to("meta")
    meta.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(meta(x), model(x))


def test_a_vae_takes_half_the_bytes():
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(32,), norm_num_groups=4, latent_channels=4).to(torch.bfloat16).eval()
    image = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = vae(image.bfloat16()).sample.float()
    before = stored_bytes(vae)
    apply_fp8_weight_storage(vae)
    assert stored_bytes(vae) < 0.55 * before
    with torch.no_grad():
        error = (vae.to(torch.float32)(image).sample - expected).norm() / expected.norm()
    assert 0 < error < 0.15


def test_a_tied_weight_stays_and_the_rest_is_stored():
    model = nn.ModuleDict({"embed": nn.Embedding(5, 4), "head": nn.Linear(4, 5), "other": nn.Linear(4, 4)})
    model["head"].weight = model["embed"].weight
    apply_fp8_weight_storage(model)
    assert model["head"].weight is model["embed"].weight
    assert stored_names(model) == {"other"}


def test_what_cannot_be_stored_is_refused():
    with pytest.raises(RecipeError, match="no Linear, Conv2d or Conv3d"):
        apply_fp8_weight_storage(nn.LayerNorm(4))
    linear = nn.Linear(2, 2)
    nn.init.constant_(linear.weight, float("nan"))
    with pytest.raises(CheckpointError, match=r"0.weight holds NaN or Inf"):
        apply_fp8_weight_storage(nn.Sequential(linear))


def test_a_stored_layer_compiles_without_a_graph_break():
    stored = apply_fp8_weight_storage(nn.Linear(6, 4))
    compiled = torch.compile(stored, fullgraph=True, backend="eager")
    assert torch.equal(compiled(input_of(stored)), stored(input_of(stored)))


def test_a_converted_encoder_and_vae_load_in_every_way_and_compute_the_same(wan_folder, converted_folder, tmp_path):
    plain = WanPipeline.from_pretrained(wan_folder, dtype=torch.bfloat16)
    apply_fp8_weight_storage(plain.vae)
    ours = load_pipeline(converted_folder)
    theirs = diffusers.DiffusionPipeline.from_pretrained(converted_folder, dtype=torch.bfloat16)
    vae = AutoencoderKLWan.from_pretrained(converted_folder / "vae", dtype=torch.bfloat16)
    encoder = UMT5EncoderModel.from_pretrained(converted_folder / "text_encoder", dtype=torch.bfloat16)
    streamed = load_pipeline(wan_folder, quantization={"vae": {"method": "fp8_storage"}, "text_encoder": "fp8_storage"})
    assert stored_names(ours.vae) == stored_names(plain.vae) == stored_names(streamed.vae)
    assert "decoder.conv_in" in stored_names(ours.vae)
    latents = torch.randn(1, 4, 3, 2, 2, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = plain.vae.decode(latents).sample
        assert expected.shape[2] == 5  # the cache of frames found its convolutions
        for found in (ours.vae, theirs.vae, vae, streamed.vae):
            assert torch.equal(found.decode(latents).sample, expected)
        hidden = ours.text_encoder(TOKENS).last_hidden_state
        assert torch.equal(encoder(TOKENS).last_hidden_state, hidden)
        reference = plain.text_encoder(TOKENS).last_hidden_state
        assert 0 < (hidden - reference).norm() < 0.1 * reference.norm()
    ours.save_pretrained(tmp_path)
    for component in ("vae", "text_encoder"):
        (first,), (again,) = ((folder / component).glob("*.safetensors") for folder in (converted_folder, tmp_path))
        first, again = load_file(first), load_file(again)
        assert first.keys() == again.keys()
        assert all(torch.equal(first[name].float(), again[name].float()) for name in first)


def test_a_converted_vae_is_inspected_and_dequantized(converted_folder, wan_folder, tmp_path):
    (vae,) = (c for c in inspect_source(resolve_source(converted_folder)) if c.name == "vae")
    assert {layer.format for layer in vae.layers} == {"fp8_storage"}
    convert_checkpoint(converted_folder, tmp_path / "bf16", Recipe(method="dequantize"))
    (before,), (after,) = ((folder / "vae").glob("*.safetensors") for folder in (wan_folder, tmp_path / "bf16"))
    before, after = load_file(before), load_file(after)
    assert {name: tensor.shape for name, tensor in before.items()} == {n: t.shape for n, t in after.items()}
    assert all((after[n] - before[n]).norm() <= 0.05 * before[n].norm() for n in before)
    WanPipeline.from_pretrained(tmp_path / "bf16")


def test_stored_layers_are_reported_and_no_fallback(converted_folder):
    pipe = load_pipeline(converted_folder, strict=True)
    report = kernel_report(pipe)
    assert {layer.name.partition(".")[0] for layer in report} == {"text_encoder", "vae"}
    assert {(layer.format, layer.kernel, layer.why) for layer in report} == {
        ("fp8_storage", "dequantize", "stored only, computes in bfloat16")
    }
    for layer in report:
        component, _, name = layer.name.partition(".")
        module = getattr(pipe, component).get_submodule(name)
        bias = 0 if module.bias is None else module.bias.nbytes
        assert layer.bytes == module.codes.numel() + 4 + bias
        assert layer.elements == module.codes.numel()


def test_stored_components_are_verified_and_kept(converted_folder, wan_folder, tmp_path):
    verified = verify_source(resolve_source(converted_folder), resolve_source(wan_folder))
    assert {component.name: bool(component.layers) for component in verified} == {
        "text_encoder": True,
        "transformer": False,
        "vae": True,
    }
    assert not [finding for component in verified for finding in component.findings]
    convert_checkpoint(converted_folder, tmp_path / "kept", Recipe(method="keep", runtime="diffusers"))
    for component in ("text_encoder", "vae"):
        (before,), (after,) = (
            (folder / component).glob("*.safetensors") for folder in (converted_folder, tmp_path / "kept")
        )
        before, after = load_file(before), load_file(after)
        assert before.keys() == after.keys()
        assert all(before[name].dtype is after[name].dtype for name in before)
        assert all(torch.equal(before[name].float(), after[name].float()) for name in before)
    load_pipeline(tmp_path / "kept")


@pytest.mark.parametrize("options", [{}, {"runtime": "diffusers", "dialect": "modelopt"}, {"dialect": "comfyui"}])
def test_stored_components_are_kept_for_our_loader_alone(converted_folder, tmp_path, options):
    with pytest.raises(CheckpointError, match=r"layer '.*': found fp8_storage, which our loader alone reads"):
        convert_checkpoint(converted_folder, tmp_path / "kept", Recipe(method="keep", **options))


def test_storing_is_refused_where_a_runtime_would_misread_it(wan_folder, tiny_pipeline_folder, tmp_path):
    with pytest.raises(RecipeError, match=r"--component vae=fp8_storage: found with --runtime vllm-omni"):
        Recipe(component={"vae": "fp8_storage"})
    recipe = Recipe(runtime="diffusers", component={"text_encoder": "fp8_storage"})
    with pytest.raises(RecipeError, match=r"text_encoder=fp8_storage: the runtime builds this text encoder with the"):
        convert_checkpoint(tiny_pipeline_folder, tmp_path / "out", recipe)


def test_a_stored_tensor_that_is_damaged_is_refused(converted_folder, tmp_path):
    config = json.loads((converted_folder / "vae" / "config.json").read_text())
    tensors = load_file(next((converted_folder / "vae").glob("*.safetensors")))
    for name in ("decoder.conv_in.weight", "decoder.conv_in.weight_scale"):
        damaged = {**tensors, name: torch.full_like(tensors[name].float(), float("nan")).to(tensors[name].dtype)}
        (tmp_path / "config.json").write_text(json.dumps(config))
        save_file(damaged, tmp_path / "diffusion_pytorch_model.safetensors")
        with pytest.raises(CheckpointError, match=name):
            AutoencoderKLWan.from_pretrained(tmp_path)
