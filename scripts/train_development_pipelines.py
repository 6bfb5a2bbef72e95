"""Train the pipelines on which choices about calibration are judged, beside the bundled demo.

Each is a real diffusers pipeline in a small size, trained on pictures or videos that are drawn here. Widths are
multiples of 256, so that K-quants and rotations apply. One seed fixes every draw.

    python scripts/train_development_pipelines.py flux --output tests/data/flux
    python scripts/train_development_pipelines.py vae --output causal-vae
    python scripts/train_development_pipelines.py qwen_image --vae causal-vae --output tests/data/qwen_image
    python scripts/train_development_pipelines.py wan --vae causal-vae --output tests/data/wan

`flux` and `qwen_image` have outlier channels, as large models have. A small model trained for minutes grows none, so
they are put in after training by a rescaling that leaves the function unchanged, and a short further training follows.
`wan` has those that training gave it, which hardly stand out.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from development_pictures import (  # type: ignore[import-not-found]  # beside it
    FRAMES,
    VIDEO_SIZE,
    Flight,
    House,
    Landscape,
    Pictures,
    Scene,
)
from development_vae import (  # type: ignore[import-not-found]  # beside it
    CHANNELS,
    encode_videos,
    load_vae,
    train_causal_vae,
    video_vae,
)
from diffusers import (
    AutoencoderKL,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    WanPipeline,
    WanTransformer3DModel,
)
from tokenizers import processors
from train_demo_pipeline import (  # type: ignore[import-not-found]
    IMAGE_SIZE,
    build_tokenizer,
    descend,
    encode_data_set,
    flow_optimizers,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

logger = logging.getLogger("train_development_pipelines")

DEMO = Path(__file__).parents[1] / "convert/demo/pipeline"
CAPTION_TOKENS = 20
#: A channel in 32 is scaled by a factor between these, like the input channels that stand out in FLUX.1.
OUTLIER_SHARE, OUTLIER_FACTORS = 1 / 32, (24.0, 64.0)

#: The loss of a pipeline on captions, and on the latents of their pictures.
Loss = Callable[[Any, list[str], torch.Tensor], torch.Tensor]


def captions_of(draw: Callable[[random.Random], Scene]) -> list[str]:
    """Captions from which a tokenizer learns its words."""
    return [draw(random.Random(number)).describe() for number in range(3000)]


def tokenizer_with_end(draw: Callable[[random.Random], Scene]) -> PreTrainedTokenizerFast:
    """The demo's kind of tokenizer; it also appends the token at which CLIP pools."""
    tokenizer = build_tokenizer(captions_of(draw))
    end = tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {end}", special_tokens=[(end, tokenizer.eos_token_id)]
    )
    tokenizer.model_max_length = CAPTION_TOKENS
    return tokenizer


def build_flux() -> FluxPipeline:
    """FLUX.1 with one double and two single blocks (4.8 million parameters), encoders of one layer, the demo's VAE."""
    tokenizer = tokenizer_with_end(Landscape.sample)
    clip = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        projection_dim=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=CAPTION_TOKENS,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    transformer = FluxTransformer2DModel(
        in_channels=32,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=64,
        num_attention_heads=4,
        joint_attention_dim=256,
        pooled_projection_dim=64,
        axes_dims_rope=(16, 24, 24),
    )
    start_at_zero(transformer.proj_out)
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=AutoencoderKL.from_pretrained(DEMO / "vae"),
        text_encoder=CLIPTextModel(clip),
        tokenizer=tokenizer,
        text_encoder_2=T5EncoderModel(T5Config(**small_t5(tokenizer))),
        tokenizer_2=tokenizer,
        transformer=transformer,
    )


def build_qwen_image(vae: AutoencoderKLQwenImage) -> QwenImagePipeline:
    """Qwen-Image with two blocks (5.1 million parameters), and a Qwen2.5-VL of one layer whose vision is not used."""
    template = QwenImagePipeline(*(None,) * 5).prompt_template_encode
    texts = [*captions_of(House.sample), *re.split(r"<\|\w+\|>|\{\}", template)]
    tokenizer = build_tokenizer(texts)
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 12, 12]},
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    vision = {"depth": 1, "hidden_size": 64, "num_heads": 2, "intermediate_size": 64, "out_hidden_size": 256}
    text_encoder = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True)
    )
    text_encoder.model.visual.requires_grad_(False)
    transformer = QwenImageTransformer2DModel(
        in_channels=4 * CHANNELS,
        out_channels=CHANNELS,
        num_layers=2,
        attention_head_dim=64,
        num_attention_heads=4,
        joint_attention_dim=256,
        axes_dims_rope=(16, 24, 24),
    )
    start_at_zero(transformer.proj_out)
    return QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=transformer,
    )


def build_wan(vae: AutoencoderKLWan) -> WanPipeline:
    """Wan with four blocks (4.9 million parameters), and a UMT5 of one layer."""
    tokenizer = tokenizer_with_end(Flight.sample)
    umt5 = UMT5Config(**small_t5(tokenizer))
    transformer = WanTransformer3DModel(
        patch_size=(1, 3, 3),
        num_attention_heads=4,
        attention_head_dim=64,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        text_dim=256,
        ffn_dim=1024,
        num_layers=4,
        rope_max_seq_len=64,
    )
    start_at_zero(transformer.proj_out)
    return WanPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=vae,
        text_encoder=UMT5EncoderModel(umt5),
        tokenizer=tokenizer,
        transformer=transformer,
    )


def start_at_zero(linear: torch.nn.Linear) -> None:
    """Lets a transformer begin with no output, so that the first steps are not spent on unlearning noise."""
    torch.nn.init.zeros_(linear.weight)
    torch.nn.init.zeros_(linear.bias)


def small_t5(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Settings of a T5 encoder of one layer."""
    return {
        "vocab_size": len(tokenizer),
        "d_model": 256,
        "d_kv": 64,
        "d_ff": 512,
        "num_heads": 4,
        "num_layers": 1,
        "feed_forward_proj": "gated-gelu",
        "dropout_rate": 0.0,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }


def packed(latents: torch.Tensor) -> torch.Tensor:
    """Squares of two by two become tokens, as FLUX.1 has them: [batch, channels, h, w] → [batch, hw/4, 4 channels]."""
    return F.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)


def position_ids(rows: int, columns: int) -> torch.Tensor:
    """Zero, row and column of each token [rows * columns, 3]."""
    return torch.cartesian_prod(torch.zeros(1), torch.arange(float(rows)), torch.arange(float(columns)))


def noised(clean: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Noisy latents, the noise, and its share in each of the latents [batch]."""
    noise, sigma = torch.randn_like(clean), torch.sigmoid(torch.randn(len(clean)) + 0.2)
    level = sigma.view(-1, *(1,) * (clean.ndim - 1))
    return (1 - level) * clean + level * noise, noise, sigma


def flux_loss(pipe: FluxPipeline, captions: list[str], clean: torch.Tensor) -> torch.Tensor:
    """Flow matching: the transformer learns `noise - clean`.

    Args:
        clean: latents [batch, 8, 16, 16]
    """
    _, _, height, width = clean.shape
    tokens = pipe.tokenizer(
        captions, padding="max_length", max_length=CAPTION_TOKENS, truncation=True, return_tensors="pt"
    ).input_ids
    noisy, noise, sigma = noised(clean)
    predicted = pipe.transformer(
        hidden_states=packed(noisy),
        timestep=sigma,
        pooled_projections=pipe.text_encoder(tokens).pooler_output,
        encoder_hidden_states=pipe.text_encoder_2(tokens)[0],
        txt_ids=torch.zeros(CAPTION_TOKENS, 3),
        img_ids=position_ids(height // 2, width // 2),
        return_dict=False,
    )[0]
    return F.mse_loss(predicted.float(), packed(noise - clean))


def qwen_image_loss(pipe: QwenImagePipeline, captions: list[str], clean: torch.Tensor) -> torch.Tensor:
    """Flow matching on latents [batch, 8, 1, 16, 16]."""
    images = clean[:, :, 0]
    batch, _, height, width = images.shape
    encoded, mask = pipe.encode_prompt(captions)
    noisy, noise, sigma = noised(images)
    predicted = pipe.transformer(
        hidden_states=packed(noisy),
        timestep=sigma,
        encoder_hidden_states=encoded,
        encoder_hidden_states_mask=mask,
        img_shapes=[[(1, height // 2, width // 2)]] * batch,
        return_dict=False,
    )[0]
    return F.mse_loss(predicted.float(), packed(noise - images))


def wan_loss(pipe: WanPipeline, captions: list[str], clean: torch.Tensor) -> torch.Tensor:
    """Flow matching on latents [batch, 8, 5, 12, 12]."""
    encoded, _ = pipe.encode_prompt(
        captions, do_classifier_free_guidance=False, max_sequence_length=CAPTION_TOKENS, dtype=torch.float32
    )
    noisy, noise, sigma = noised(clean)
    predicted = pipe.transformer(
        hidden_states=noisy, timestep=1000 * sigma, encoder_hidden_states=encoded, return_dict=False
    )[0]
    return F.mse_loss(predicted.float(), noise - clean)


def train_denoiser(
    pipe: Any,
    loss_of: Loss,
    data: tuple[list[str], torch.Tensor],
    rng: random.Random,
    *,
    steps: int,
    batch: int,
    rate: float,
) -> None:
    """Trains the transformer and its text encoders.

    Args:
        data: captions, and latents [captions, ...]
    """
    captions, latents = data
    names = ("transformer", "text_encoder", "text_encoder_2")
    modules = [pipe.components[name] for name in names if name in pipe.components]
    named = [pair for module in modules for pair in module.named_parameters() if pair[1].requires_grad]
    matrices = [p for name, p in named if is_matrix_of_block(name, p)]
    others = [p for name, p in named if not is_matrix_of_block(name, p)]
    optimizers = flow_optimizers(matrices, others, rate=rate, steps=steps)
    started = time.monotonic()
    for step in range(steps):
        chosen = rng.sample(range(len(captions)), batch)
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(pipe, [captions[index] for index in chosen], latents[chosen])
        descend(loss, optimizers)
        if step % 25 == 0 or step == steps - 1:
            logger.info(
                "flow %4d  loss %.4f  %.2f s/step", step, loss.item(), (time.monotonic() - started) / (step + 1)
            )


def is_matrix_of_block(name: str, parameter: torch.nn.Parameter) -> bool:
    """Whether a parameter is a matrix of a transformer block, modulations apart."""
    return "blocks." in name and parameter.ndim == 2 and ".norm" not in name and "_mod." not in name


@torch.no_grad()
def put_outliers_into_flux(transformer: FluxTransformer2DModel, generator: torch.Generator) -> None:
    """Scales input channels of the linears up, and their weights down: the function stays, the numbers do not.

    The modulation before a linear scales its input channels; the rows of a value projection scale those of the output
    projection. The feed-forward networks keep the channels that training gave them.
    """
    for block in transformer.transformer_blocks:
        image, text = (block.norm1.linear, block.ff), (block.norm1_context.linear, block.ff_context)
        put_outliers_into_streams(block.attn, image, text, generator)
    for block in transformer.single_transformer_blocks:
        readers = (block.attn.to_q, block.attn.to_k, block.attn.to_v, block.proj_mlp)
        scale_modulated(block.norm.linear, 0, readers, generator)
        factors = outlier_factors(block.attn.to_v.out_features, generator)
        scale_rows((block.attn.to_v,), factors)
        block.proj_out.weight[:, : len(factors)] /= factors


@torch.no_grad()
def put_outliers_into_qwen_image(transformer: QwenImageTransformer2DModel, generator: torch.Generator) -> None:
    """As in FLUX.1, whose blocks of two streams these are, by other names."""
    for block in transformer.transformer_blocks:
        image, text = (block.img_mod[1], block.img_mlp), (block.txt_mod[1], block.txt_mlp)
        put_outliers_into_streams(block.attn, image, text, generator)


def put_outliers_into_streams(
    attention: Any,
    image: tuple[torch.nn.Linear, Any],
    text: tuple[torch.nn.Linear, Any],
    generator: torch.Generator,
) -> None:
    """Does so in a block of two streams, each with a modulation and a feed-forward network."""
    (image_modulation, image_network), (text_modulation, text_network) = image, text
    scale_modulated(image_modulation, 0, (attention.to_q, attention.to_k, attention.to_v), generator)
    text_readers = (attention.add_q_proj, attention.add_k_proj, attention.add_v_proj)
    scale_modulated(text_modulation, 0, text_readers, generator)
    scale_modulated(image_modulation, 3, (image_network.net[0].proj,), generator)
    scale_modulated(text_modulation, 3, (text_network.net[0].proj,), generator)
    factors = outlier_factors(attention.to_v.out_features, generator)
    scale_rows((attention.to_v, attention.add_v_proj), factors)
    for linear in (attention.to_out[0], attention.to_add_out):
        linear.weight /= factors


def outlier_factors(channels: int, generator: torch.Generator) -> torch.Tensor:
    """A factor for each channel [channels]: 1, or in a few channels one of `OUTLIER_FACTORS`, evenly on a log scale."""
    low, high = (math.log(factor) for factor in OUTLIER_FACTORS)
    factors = torch.ones(channels)
    chosen = torch.randperm(channels, generator=generator)[: round(channels * OUTLIER_SHARE)]
    factors[chosen] = torch.exp(low + (high - low) * torch.rand(len(chosen), generator=generator))
    return factors


def scale_rows(linears: tuple[torch.nn.Linear, ...], factors: torch.Tensor) -> None:
    for linear in linears:
        linear.weight.mul_(factors[:, None])
        linear.bias.mul_(factors)


def scale_modulated(
    modulation: torch.nn.Linear, first: int, linears: tuple[torch.nn.Linear, ...], generator: torch.Generator
) -> None:
    """Scales what a modulation gives to linears: `norm(x) * (1 + scale) + shift`.

    Args:
        modulation: its outputs are chunks of one width each
        first: number of the chunk that is the shift; the next one is the scale
    """
    width = linears[0].in_features
    factors = outlier_factors(width, generator)
    shift, scale = (slice((first + chunk) * width, (first + chunk + 1) * width) for chunk in (0, 1))
    for chunk in (shift, scale):
        modulation.weight[chunk] *= factors[:, None]
        modulation.bias[chunk] *= factors
    modulation.bias[scale] += factors - 1
    for linear in linears:
        linear.weight /= factors


@dataclass(frozen=True)
class Training:
    """What a pipeline is trained on, and for how long.

    Attributes:
        scene: draws a scene
        steps: number of optimizer steps
        batch: number of captions in a step
        pictures: number of pictures or videos in the data set
        settings: how the pipeline is run
    """

    scene: Callable[[random.Random], Scene]
    steps: int
    batch: int
    pictures: int
    settings: dict[str, Any]


PICTURE = {"height": IMAGE_SIZE, "width": IMAGE_SIZE, "num_inference_steps": 20}
VIDEO = {"height": VIDEO_SIZE, "width": VIDEO_SIZE, "num_frames": FRAMES, "num_inference_steps": 20}
TRAININGS = {
    "flux": Training(Landscape.sample, 800, 24, 3000, PICTURE | {"max_sequence_length": CAPTION_TOKENS}),
    "qwen_image": Training(House.sample, 620, 16, 1000, PICTURE | {"max_sequence_length": 32, "guidance_scale": 1.0}),
    "wan": Training(
        Flight.sample_rising, 2400, 16, 1500, VIDEO | {"max_sequence_length": CAPTION_TOKENS, "guidance_scale": 1.0}
    ),
}
VAE_STEPS = 2000


def train_flux(training: Training, pictures: Pictures, rng: random.Random, arguments: argparse.Namespace) -> Any:
    def draw(rng: random.Random, count: int) -> tuple[list[str], torch.Tensor]:
        captions, videos = pictures.draw(rng, count)
        return captions, videos[:, 0]

    pipe = build_flux()
    data = encode_data_set(pipe.vae, draw, rng, training.pictures)
    train_denoiser(pipe, flux_loss, data, rng, steps=training.steps, batch=training.batch, rate=1e-3)
    put_outliers_into_flux(pipe.transformer, torch.Generator().manual_seed(arguments.seed))
    train_denoiser(pipe, flux_loss, data, rng, steps=training.steps // 20, batch=training.batch, rate=1e-5)
    return pipe


def train_qwen_image(training: Training, pictures: Pictures, rng: random.Random, arguments: argparse.Namespace) -> Any:
    pipe = build_qwen_image(load_vae(arguments.vae))
    data = encode_videos(pipe.vae, pictures, rng, training.pictures)
    train_denoiser(pipe, qwen_image_loss, data, rng, steps=training.steps, batch=training.batch, rate=1e-3)
    put_outliers_into_qwen_image(pipe.transformer, torch.Generator().manual_seed(arguments.seed))
    train_denoiser(pipe, qwen_image_loss, data, rng, steps=training.steps // 20, batch=training.batch, rate=1e-5)
    return pipe


def train_wan(training: Training, pictures: Pictures, rng: random.Random, arguments: argparse.Namespace) -> Any:
    vae = load_vae(arguments.vae)
    data = encode_videos(vae, pictures, rng, training.pictures)
    pipe = build_wan(video_vae(vae))
    train_denoiser(pipe, wan_loss, data, rng, steps=training.steps, batch=training.batch, rate=1e-3)
    return pipe


TRAINERS = {"flux": train_flux, "qwen_image": train_qwen_image, "wan": train_wan}


def write_prompts(output: Path, pictures: Pictures, rng: random.Random) -> frozenset[str]:
    """Writes 40 prompts to calibrate on and 16 to evaluate on; returns all of them, which training must not see."""
    taken: set[str] = set()
    output.parent.mkdir(parents=True, exist_ok=True)
    for kind, count in (("prompts", 40), ("evaluation_prompts", 16)):
        lines: list[str] = []
        for _ in range(count):
            lines.append(pictures.scene(rng, taken).describe())
            taken.add(lines[-1])
        output.with_name(f"{output.name}_{kind}.txt").write_text("\n".join(lines) + "\n")
    return frozenset(taken)


def forget_origin(config: Path) -> None:
    """Removes the path from which the component was loaded on this machine."""
    content = json.loads(config.read_text())
    content.pop("_name_or_path", None)
    config.write_text(json.dumps(content, indent=2) + "\n")


def main() -> None:
    """Trains one pipeline and writes it, its settings and its prompts; or the VAE that two of them have."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline", choices=["vae", *TRAININGS])
    parser.add_argument("--output", type=Path, required=True, help="folder for the pipeline; must not exist")
    parser.add_argument("--vae", type=Path, help="folder of the trained VAE, for qwen_image and wan")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.output.exists():
        parser.error(f"{arguments.output} exists")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")

    rng = random.Random(arguments.seed)
    torch.manual_seed(arguments.seed)
    if arguments.pipeline == "vae":
        train_causal_vae(rng, VAE_STEPS).to(torch.bfloat16).save_pretrained(arguments.output)
        return
    training = TRAININGS[arguments.pipeline]
    held_out = write_prompts(arguments.output, Pictures(training.scene), rng)
    pictures = Pictures(training.scene, held_out)
    pipe = TRAINERS[arguments.pipeline](training, pictures, rng, arguments)
    pipe.to(torch.bfloat16).save_pretrained(arguments.output)
    forget_origin(arguments.output / "vae/config.json")
    (arguments.output / "generation_defaults.json").write_text(json.dumps(training.settings, indent=2) + "\n")


if __name__ == "__main__":
    main()
