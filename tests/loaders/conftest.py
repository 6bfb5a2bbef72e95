"""Tiny models made of the real classes: a Z-Image pipeline, checkpoints quantized from it, and denoisers alone."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    HunyuanVideo15Transformer3DModel,
    QwenImageTransformer2DModel,
    WanTransformer3DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from omni_convert.formats.format import Format

BLOCKS = ("layers.", "noise_refiner.", "context_refiner.")
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
Quantize = Callable[..., Path]
Inputs = dict[str, Any]


def make_transformer() -> ZImageTransformer2DModel:
    return ZImageTransformer2DModel(
        in_channels=4,
        dim=48,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=32,
        axes_dims=[8, 8, 8],
        axes_lens=[128, 32, 32],
    )


def make_text_encoder() -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=16,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            max_position_embeddings=64,
            tie_word_embeddings=False,
        )
    )


def make_tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<unk>", "a", "red", "circle", "blue", "square", "on", "white"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", chat_template=CHAT_TEMPLATE
    )


@pytest.fixture(scope="session")
def pipeline_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """BF16, with random weights."""
    torch.manual_seed(0)
    transformer = make_transformer()
    for parameter in transformer.parameters():  # some start as zeros, and then nothing that happens in a block shows
        torch.nn.init.normal_(parameter, std=0.2)
    vae = AutoencoderKL(
        block_out_channels=(8,),
        norm_num_groups=4,
        latent_channels=4,
        shift_factor=0.0,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )
    pipeline = ZImagePipeline(
        FlowMatchEulerDiscreteScheduler(), vae, make_text_encoder(), make_tokenizer(), transformer
    )
    folder = tmp_path_factory.mktemp("bf16")
    pipeline.to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture
def quantize(pipeline_folder: Path, tmp_path: Path) -> Quantize:
    """Writes a copy of the pipeline in which the linears inside the blocks of a component are quantized."""

    def write(fmt: Format, block: dict[str, Any], component: str = "transformer", **extra: torch.Tensor) -> Path:
        folder = tmp_path / "quantized"
        if not folder.exists():
            shutil.copytree(pipeline_folder, folder)
        (file,) = (folder / component).glob("*.safetensors")
        tensors: dict[str, torch.Tensor] = {}
        for name, tensor in load_file(file).items():
            tensors |= _quantized(name, tensor, fmt) if _is_quantized(name, tensor, fmt) else {name: tensor}
        save_file(tensors | extra, file, metadata={"format": "pt"})
        config = folder / component / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": block}))
        return folder

    return write


def _is_quantized(name: str, tensor: torch.Tensor, fmt: Format) -> bool:
    is_block = (name.startswith(BLOCKS) and "adaLN" not in name) or name.startswith("model.layers.")
    return is_block and name.endswith(".weight") and tensor.dim() == 2 and fmt.unsupported(*tensor.shape) is None


def _quantized(name: str, weight: torch.Tensor, fmt: Format) -> dict[str, torch.Tensor]:
    if getattr(fmt, "static", False):
        tensors = type(fmt)().quantize(weight) | {"input_scale": torch.tensor(0.01234568)}
    else:
        tensors = fmt.quantize(weight)
    return {name.removesuffix("weight") + suffix: tensor for suffix, tensor in tensors.items()}


@pytest.fixture
def make_image() -> Callable[..., torch.Tensor]:
    def run(pipeline: Any, guidance_scale: float = 2.0) -> torch.Tensor:
        pipeline.set_progress_bar_config(disable=True)
        images = pipeline(
            ["a red circle"],
            num_inference_steps=2,
            height=16,
            width=16,
            guidance_scale=guidance_scale,
            generator=torch.Generator().manual_seed(0),
            output_type="np",
        ).images
        return torch.from_numpy(images)

    return run


def _noise(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


@pytest.fixture(scope="session")
def noise() -> Callable[..., torch.Tensor]:
    """Normal numbers of a shape and a seed, in bfloat16."""
    return _noise


def _flux() -> tuple[nn.Module, Callable[[int], Inputs]]:
    model = FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(8, 12, 12),
    )

    def inputs(step: int) -> Inputs:
        return {
            "hidden_states": _noise(1, 16, 16, seed=step),
            "encoder_hidden_states": _noise(1, 8, 32, seed=1),
            "pooled_projections": _noise(1, 32, seed=2),
            "timestep": torch.tensor([1 - step / 4]).bfloat16(),
            "img_ids": torch.zeros(16, 3),
            "txt_ids": torch.zeros(8, 3),
        }

    return model, inputs


def _wan() -> tuple[nn.Module, Callable[[int], Inputs]]:
    model = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=32,
        in_channels=4,
        out_channels=4,
        text_dim=32,
        freq_dim=32,
        ffn_dim=128,
        num_layers=3,
        rope_max_seq_len=32,
    )

    def inputs(step: int) -> Inputs:
        return {
            "hidden_states": _noise(1, 4, 1, 8, 8, seed=step),
            "timestep": torch.tensor([1000 - 200 * step]),
            "encoder_hidden_states": _noise(1, 8, 32, seed=1),
        }

    return model, inputs


def _qwen() -> tuple[nn.Module, Callable[[int], Inputs]]:
    model = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(8, 12, 12),
    )

    def inputs(step: int) -> Inputs:
        return {
            "hidden_states": _noise(1, 16, 16, seed=step),
            "encoder_hidden_states": _noise(1, 8, 32, seed=1),
            "timestep": torch.tensor([1 - step / 4]).bfloat16(),
            "img_shapes": [[(1, 4, 4)]],
        }

    return model, inputs


def _qwen_masked() -> tuple[nn.Module, Callable[[int], Inputs]]:
    """With a prompt shorter than its tokens, as of several prompts in one batch."""
    model, inputs = _qwen()

    def masked(step: int) -> Inputs:
        return {**inputs(step), "encoder_hidden_states_mask": torch.arange(8).unsqueeze(0) < 6}

    return model, masked


def _z_image() -> tuple[nn.Module, Callable[[int], Inputs]]:
    model = ZImageTransformer2DModel(
        in_channels=4,
        dim=128,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=4,
        n_kv_heads=4,
        cap_feat_dim=32,
        axes_dims=[8, 12, 12],
        axes_lens=[640, 32, 32],
    )

    def inputs(step: int) -> Inputs:
        return {
            "x": [_noise(4, 1, 8, 8, seed=step)],
            "t": torch.tensor([step / 4]).bfloat16(),
            "cap_feats": [_noise(8, 32, seed=1)],
        }

    return model, inputs


def _hunyuan_video_15() -> tuple[nn.Module, Callable[[int], Inputs]]:
    """Of its two prompts, one is shorter than its tokens and one is empty; there is no image."""
    model = HunyuanVideo15Transformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=32,
        num_layers=2,
        num_refiner_layers=1,
        patch_size=1,
        patch_size_t=1,
        text_embed_dim=32,
        text_embed_2_dim=32,
        image_embed_dim=32,
        rope_axes_dim=(8, 12, 12),
    )

    def inputs(step: int) -> Inputs:
        return {
            "hidden_states": _noise(1, 4, 1, 8, 8, seed=step),
            "timestep": torch.tensor([step / 4]).bfloat16(),
            "encoder_hidden_states": _noise(1, 8, 32, seed=1),
            "encoder_attention_mask": torch.arange(8)[None] < 6,
            "encoder_hidden_states_2": _noise(1, 4, 32, seed=2),
            "encoder_attention_mask_2": torch.zeros(1, 4, dtype=torch.bool),
            "image_embeds": torch.zeros(1, 3, 32).bfloat16(),
        }

    return model, inputs


class Denoiser(NamedTuple):
    """A tiny model, what runs it or a copy at a denoising step, and its inputs there."""

    model: Any
    run: Callable[..., torch.Tensor]
    inputs: Callable[[int], Inputs]


@pytest.fixture(scope="session")
def make_denoiser() -> Callable[[str], Denoiser]:
    """Builds one of these models with random weights, in bfloat16."""
    builders = {
        "flux": _flux,
        "wan": _wan,
        "qwen": _qwen,
        "qwen_masked": _qwen_masked,
        "z_image": _z_image,
        "hunyuan_video_15": _hunyuan_video_15,
    }

    def make(name: str) -> Denoiser:
        torch.manual_seed(0)
        model, inputs = builders[name]()
        for parameter in model.parameters():  # some start as zeros, and then nothing that happens in a block shows
            nn.init.normal_(parameter, std=0.1)

        def run(model: nn.Module, step: int = 0) -> torch.Tensor:
            with torch.no_grad():
                out = model(**inputs(step), return_dict=False)[0]
            return out[0] if isinstance(out, list) else out

        return Denoiser(nn.Module.to(model, torch.bfloat16).eval().requires_grad_(False), run, inputs)

    return make
