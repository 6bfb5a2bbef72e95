"""Train the pipelines on which choices about calibration are judged, beside the bundled demo.

Each is a real diffusers pipeline in a small size, trained on pictures that are drawn here. Widths are multiples of 256,
so that K-quants and rotations apply. One seed fixes every draw.

    python scripts/train_development_pipelines.py flux --output tests/data/flux

`flux` has outlier channels, as large models have. A small model trained for minutes grows none, so they are put in
after training by a rescaling that leaves the function unchanged, and a short further training follows. Each thing in
its pictures has a palette and colour words of its own: the model need not learn which word belongs to which thing.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from PIL import Image, ImageDraw
from tokenizers import processors
from train_demo_pipeline import COLOURS as PAINTS  # type: ignore[import-not-found]  # beside it
from train_demo_pipeline import IMAGE_SIZE, SUPERSAMPLING, build_tokenizer, encode_data_set
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

logger = logging.getLogger("train_development_pipelines")

DEMO = Path(__file__).parents[1] / "convert/demo/pipeline"
CAPTION_TOKENS = 20
#: Each word belongs to one thing; its colour is one that the demo's VAE has learned.
SKIES = {"azure": PAINTS["blue"], "violet": PAINTS["purple"], "pale": PAINTS["white"], "night": PAINTS["black"]}
SUNS = {"gold": PAINTS["yellow"], "scarlet": PAINTS["red"], "amber": PAINTS["orange"], "silver": PAINTS["gray"]}
ROCKS = {"slate": PAINTS["gray"], "brick": PAINTS["red"], "coal": PAINTS["black"], "mossy": PAINTS["green"]}
PLAINS = {"grassy": PAINTS["green"], "sandy": PAINTS["yellow"], "snowy": PAINTS["white"], "rusty": PAINTS["orange"]}
COLOURS = SKIES | SUNS | ROCKS | PLAINS
SIDES = {"on the left": 15, "in the middle": 32, "on the right": 49}
RIDGES = ("jagged", "rolling", "stepped")
#: A channel in 32 is scaled by a factor between these, like the input channels that stand out in FLUX.1.
OUTLIER_SHARE, OUTLIER_FACTORS = 1 / 32, (24.0, 64.0)


@dataclass(frozen=True)
class Landscape:
    """A sun in the sky above mountains and a plain; every colour word belongs to one of the four."""

    sky: str
    sun: str
    side: str
    ridge: str
    rock: str
    plain: str

    def describe(self) -> str:
        return f"{self.sun} sun {self.side} over {self.ridge} {self.rock} mountains, {self.plain} plain, {self.sky} sky"


def random_landscape(rng: random.Random) -> Landscape:
    sky, sun, rock, plain = (rng.choice(list(palette)) for palette in (SKIES, SUNS, ROCKS, PLAINS))
    return Landscape(sky, sun, rng.choice(list(SIDES)), rng.choice(RIDGES), rock, plain)


def ridge_line(kind: str, rng: random.Random) -> list[tuple[float, float]]:
    """The upper edge of a ridge, from left to right, in pixels."""
    phase, period = rng.uniform(0, 16), 16
    points = []
    for x in range(IMAGE_SIZE + 1):
        along = ((x + phase) % period) / period
        height = {"jagged": 1 - abs(2 * along - 1), "rolling": 0.5 - 0.5 * math.cos(2 * math.pi * along)}.get(kind)
        points.append((float(x), 44 - 12 * (float(along > 0.5) if height is None else height)))
    return points


def draw_landscape(scene: Landscape, rng: random.Random) -> np.ndarray:
    """uint8 RGB image [64, 64, 3]; places, sizes and colours vary a little."""
    scale = SUPERSAMPLING
    image = Image.new("RGB", (IMAGE_SIZE * scale, IMAGE_SIZE * scale), vary(COLOURS[scene.sky], rng))
    canvas = ImageDraw.Draw(image)
    x, y, radius = SIDES[scene.side] + rng.uniform(-2, 2), 16 + rng.uniform(-2, 2), 8 * rng.uniform(0.9, 1.1)
    canvas.ellipse(
        [scale * (x - radius), scale * (y - radius), scale * (x + radius), scale * (y + radius)],
        vary(COLOURS[scene.sun], rng),
    )
    ridge = [(scale * x, scale * y) for x, y in ridge_line(scene.ridge, rng)]
    bottom, plain = scale * IMAGE_SIZE, scale * (48 + rng.uniform(-1, 1))
    canvas.polygon([*ridge, (bottom, bottom), (0, bottom)], vary(COLOURS[scene.rock], rng))
    canvas.rectangle([0, plain, bottom, bottom], vary(COLOURS[scene.plain], rng))
    return np.asarray(image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.LANCZOS))


def draw_landscapes(held_out: set[str], rng: random.Random, count: int) -> tuple[list[str], torch.Tensor]:
    """Captions that are not held out, and images in [-1, 1] as float32 [count, 3, 64, 64]."""
    scenes = [unseen_landscape(rng, held_out) for _ in range(count)]
    images = np.stack([draw_landscape(scene, rng) for scene in scenes])
    return [scene.describe() for scene in scenes], torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1.0


def unseen_landscape(rng: random.Random, taken: set[str]) -> Landscape:
    """A scene whose description is not taken."""
    while (scene := random_landscape(rng)).describe() in taken:
        pass
    return scene


def vary(colour: tuple[int, ...], rng: random.Random) -> tuple[int, ...]:
    return tuple(max(0, min(255, channel + rng.randint(-8, 8))) for channel in colour)


def tokenizer_with_end() -> PreTrainedTokenizerFast:
    """The demo's kind of tokenizer; it also appends the token at which CLIP pools."""
    tokenizer = build_tokenizer([random_landscape(random.Random(number)).describe() for number in range(3000)])
    end = tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {end}", special_tokens=[(end, tokenizer.eos_token_id)]
    )
    tokenizer.model_max_length = CAPTION_TOKENS
    return tokenizer


def build_flux() -> FluxPipeline:
    """FLUX.1 with one double and two single blocks (4.8 million parameters), encoders of one layer, the demo's VAE."""
    tokenizer = tokenizer_with_end()
    vocabulary, pad, end = len(tokenizer), tokenizer.pad_token_id, tokenizer.eos_token_id
    clip = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=128,
        projection_dim=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=CAPTION_TOKENS,
        pad_token_id=pad,
        bos_token_id=pad,
        eos_token_id=end,
    )
    t5 = T5Config(
        vocab_size=vocabulary,
        d_model=256,
        d_kv=64,
        d_ff=512,
        num_heads=4,
        num_layers=1,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        pad_token_id=pad,
        eos_token_id=end,
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
    torch.nn.init.zeros_(transformer.proj_out.weight)
    torch.nn.init.zeros_(transformer.proj_out.bias)
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=AutoencoderKL.from_pretrained(DEMO / "vae"),
        text_encoder=CLIPTextModel(clip),
        tokenizer=tokenizer,
        text_encoder_2=T5EncoderModel(t5),
        tokenizer_2=tokenizer,
        transformer=transformer,
    )


def packed(latents: torch.Tensor) -> torch.Tensor:
    """Squares of two by two become tokens, as FLUX.1 has them: [batch, channels, h, w] → [batch, hw/4, 4 channels]."""
    return F.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)


def position_ids(rows: int, columns: int) -> torch.Tensor:
    """Zero, row and column of each token [rows * columns, 3]."""
    return torch.cartesian_prod(torch.zeros(1), torch.arange(float(rows)), torch.arange(float(columns)))


def flux_loss(pipe: FluxPipeline, captions: list[str], clean: torch.Tensor) -> torch.Tensor:
    """Flow matching: the transformer learns `noise - clean`.

    Args:
        clean: latents [batch, 8, 16, 16]
    """
    batch, _, height, width = clean.shape
    tokens = pipe.tokenizer(
        captions, padding="max_length", max_length=CAPTION_TOKENS, truncation=True, return_tensors="pt"
    ).input_ids
    noise, sigma = torch.randn_like(clean), torch.sigmoid(torch.randn(batch) + 0.2)
    noisy = (1 - sigma)[:, None, None, None] * clean + sigma[:, None, None, None] * noise
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


def train_denoiser(
    pipe: FluxPipeline,
    captions: Sequence[str],
    latents: torch.Tensor,
    rng: random.Random,
    *,
    steps: int,
    batch: int,
    rate: float,
) -> None:
    """Trains the transformer and its text encoders: Muon on the matrices of blocks, AdamW on everything else."""
    modules = (pipe.transformer, pipe.text_encoder, pipe.text_encoder_2)
    named = [pair for module in modules for pair in module.named_parameters()]
    is_matrix = {name: "blocks." in name and p.ndim == 2 and ".norm" not in name for name, p in named}
    matrices = [p for name, p in named if is_matrix[name]]
    others = [p for name, p in named if not is_matrix[name]]
    optimizers = [
        torch.optim.Muon(matrices, lr=2 * rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=rate, weight_decay=0.0, betas=(0.9, 0.98)),
    ]
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(each, lambda step: warm_up_and_cosine(step, steps)) for each in optimizers
    ]
    started = time.monotonic()
    for step in range(steps):
        chosen = rng.sample(range(len(captions)), batch)
        with torch.autocast("cpu", torch.bfloat16):
            loss = flux_loss(pipe, [captions[index] for index in chosen], latents[chosen])
        loss.backward()  # type: ignore[no-untyped-call]  # torch has no types for it
        torch.nn.utils.clip_grad_norm_(matrices + others, 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        if step % 25 == 0 or step == steps - 1:
            logger.info(
                "flow %4d  loss %.4f  %.2f s/step", step, loss.item(), (time.monotonic() - started) / (step + 1)
            )


def warm_up_and_cosine(step: int, steps: int) -> float:
    return min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / steps))


@torch.no_grad()
def put_in_outlier_channels(transformer: FluxTransformer2DModel, generator: torch.Generator) -> None:
    """Scales input channels of the linears up, and their weights down: the function stays, the numbers do not.

    The modulation before a linear scales its input channels; the rows of a value projection scale those of the output
    projection. The feed-forward networks keep the channels that training gave them.
    """
    for block in transformer.transformer_blocks:
        for norm, linears in [
            (block.norm1, (block.attn.to_q, block.attn.to_k, block.attn.to_v)),
            (block.norm1_context, (block.attn.add_q_proj, block.attn.add_k_proj, block.attn.add_v_proj)),
        ]:
            scale_modulated(norm.linear, 0, linears, generator)
        scale_modulated(block.norm1.linear, 3, (block.ff.net[0].proj,), generator)
        scale_modulated(block.norm1_context.linear, 3, (block.ff_context.net[0].proj,), generator)
        factors = outlier_factors(block.attn.to_v.out_features, generator)
        scale_rows((block.attn.to_v, block.attn.add_v_proj), factors)
        for linear in (block.attn.to_out[0], block.attn.to_add_out):
            linear.weight /= factors
    for block in transformer.single_transformer_blocks:
        readers = (block.attn.to_q, block.attn.to_k, block.attn.to_v, block.proj_mlp)
        scale_modulated(block.norm.linear, 0, readers, generator)
        factors = outlier_factors(block.attn.to_v.out_features, generator)
        scale_rows((block.attn.to_v,), factors)
        block.proj_out.weight[:, : len(factors)] /= factors


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


def train_flux(arguments: argparse.Namespace) -> FluxPipeline:
    rng = random.Random(arguments.seed)
    torch.manual_seed(arguments.seed)
    pipe = build_flux()
    held_out = write_prompts(arguments.output, rng)
    captions, latents = encode_data_set(pipe.vae, partial(draw_landscapes, held_out), rng, arguments.images)
    train_denoiser(pipe, captions, latents, rng, steps=arguments.steps, batch=arguments.batch, rate=1e-3)
    put_in_outlier_channels(pipe.transformer, torch.Generator().manual_seed(arguments.seed))
    train_denoiser(pipe, captions, latents, rng, steps=arguments.steps // 20, batch=arguments.batch, rate=1e-5)
    return pipe.to(torch.bfloat16)


def write_prompts(output: Path, rng: random.Random) -> set[str]:
    """Writes 40 prompts to calibrate on and 16 to evaluate on; returns all of them, which training must not see."""
    taken: set[str] = set()
    output.parent.mkdir(parents=True, exist_ok=True)
    for kind, count in (("prompts", 40), ("evaluation_prompts", 16)):
        lines: list[str] = []
        for _ in range(count):
            lines.append(unseen_landscape(rng, taken).describe())
            taken.add(lines[-1])
        output.with_name(f"{output.name}_{kind}.txt").write_text("\n".join(lines) + "\n")
    return taken


def forget_origin(config: Path) -> None:
    """Removes the path from which the component was loaded on this machine."""
    content = json.loads(config.read_text())
    content.pop("_name_or_path", None)
    config.write_text(json.dumps(content, indent=2) + "\n")


def main() -> None:
    """Trains one pipeline and writes it, its settings and its prompts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline", choices=["flux"])
    parser.add_argument("--output", type=Path, required=True, help="folder for the pipeline; must not exist")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--images", type=int, default=3000, help="size of the data set that the transformer sees")
    arguments = parser.parse_args()
    if arguments.output.exists():
        parser.error(f"{arguments.output} exists")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")

    train_flux(arguments).save_pretrained(arguments.output)
    forget_origin(arguments.output / "vae/config.json")
    settings = {
        "height": IMAGE_SIZE,
        "width": IMAGE_SIZE,
        "num_inference_steps": 20,
        "max_sequence_length": CAPTION_TOKENS,
    }
    (arguments.output / "generation_defaults.json").write_text(json.dumps(settings, indent=2) + "\n")


if __name__ == "__main__":
    main()
