"""Train the bundled demo: a small Z-Image pipeline that draws coloured shapes from a description.

Everything is the real thing in a small size: `ZImagePipeline`, `ZImageTransformer2DModel`, a Qwen3 text encoder with
its own byte-level BPE tokenizer, `AutoencoderKL`, `FlowMatchEulerDiscreteScheduler`. The images are drawn here, so no
data set is needed. One seed fixes every draw; the run takes under an hour on two CPU cores with AVX512-BF16.

    python scripts/train_demo_pipeline.py --output convert/demo/pipeline
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

logger = logging.getLogger("train_demo_pipeline")

#: Draws captions, and images in [-1, 1] as float32 [count, 3, height, width].
Drawing = Callable[[random.Random, int], tuple[list[str], torch.Tensor]]
#: Gives for a step images, what a VAE makes of them, and a penalty on its latents.
Reconstruction = Callable[[int], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
ScheduledOptimizer = tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]

IMAGE_SIZE = 64
SUPERSAMPLING = 4
CAPTION_TOKENS = 32
EMPTY_CAPTION_RATE = 0.1
LM_LOSS_WEIGHT = 0.05

COLOURS = {
    "red": (214, 40, 40),
    "green": (46, 160, 67),
    "blue": (38, 84, 214),
    "yellow": (250, 210, 40),
    "orange": (245, 130, 32),
    "purple": (130, 60, 190),
    "white": (248, 248, 248),
    "black": (24, 24, 24),
    "gray": (136, 140, 148),
}
SHAPES = ("circle", "square", "triangle", "diamond", "star", "ring")
RADII = {"small": 7.0, "": 10.5, "large": 14.5}
PLACES = {
    "at the top left": (18, 18),
    "at the top": (32, 17),
    "at the top right": (46, 18),
    "on the left": (17, 32),
    "in the center": (32, 32),
    "on the right": (47, 32),
    "at the bottom left": (18, 46),
    "at the bottom": (32, 47),
    "at the bottom right": (46, 46),
}
# A shape of medium size drawn in one of these leaves room for another one in its partner.
PAIRED_PLACES = [
    ("on the left", "on the right"),
    ("at the top", "at the bottom"),
    ("at the top left", "at the bottom right"),
    ("at the bottom left", "at the top right"),
]


@dataclass(frozen=True)
class Shape:
    kind: str
    colour: str
    size: str
    place: str

    def describe(self) -> str:
        words = f"{self.size} {self.colour} {self.kind}".strip()
        article = "an" if words[0] in "aeiou" else "a"
        return f"{article} {words} {self.place}"


@dataclass(frozen=True)
class Scene:
    background: str
    shapes: tuple[Shape, ...]

    def describe(self) -> str:
        return " and ".join(shape.describe() for shape in self.shapes) + f" on a {self.background} background"


def random_scene(rng: random.Random) -> Scene:
    """One or two shapes of different colours on a background of a third."""
    background, *colours = rng.sample(list(COLOURS), 3)
    if rng.random() < 0.5:
        places = [rng.choice(list(PLACES))]
    else:
        places = list(rng.choice(PAIRED_PLACES))
        rng.shuffle(places)
    return Scene(
        background,
        tuple(
            Shape(rng.choice(SHAPES), colour, rng.choice(list(RADII)), place)
            for colour, place in zip(colours, places, strict=False)
        ),
    )


def outline(kind: str, x: float, y: float, radius: float) -> list[tuple[float, float]]:
    """Corner points of a polygon shape in pixels."""
    if kind == "square":
        half = radius * 0.88
        return [(x - half, y - half), (x + half, y - half), (x + half, y + half), (x - half, y + half)]
    corners, inner = {"triangle": (3, 1.0), "diamond": (4, 1.0), "star": (5, 0.42)}[kind]
    count = corners if inner == 1.0 else 2 * corners
    reach = radius * (1.12 if kind != "star" else 1.2)
    return [
        (
            x + reach * (1.0 if inner == 1.0 or i % 2 == 0 else inner) * math.sin(2 * math.pi * i / count),
            y - reach * (1.0 if inner == 1.0 or i % 2 == 0 else inner) * math.cos(2 * math.pi * i / count),
        )
        for i in range(count)
    ]


def draw(scene: Scene, rng: random.Random) -> np.ndarray:
    """uint8 RGB image [64, 64, 3]; places, sizes and colours vary a little, as in photographs of the same thing."""

    def vary(colour: str) -> tuple[int, ...]:
        return tuple(max(0, min(255, channel + rng.randint(-8, 8))) for channel in COLOURS[colour])

    scale = SUPERSAMPLING
    image = Image.new("RGB", (IMAGE_SIZE * scale, IMAGE_SIZE * scale), vary(scene.background))
    canvas = ImageDraw.Draw(image)
    for shape in scene.shapes:
        x, y = ((centre + rng.uniform(-1.5, 1.5)) * scale for centre in PLACES[shape.place])
        radius = RADII[shape.size] * rng.uniform(0.94, 1.06) * scale
        fill = vary(shape.colour)
        if shape.kind in ("circle", "ring"):
            box = (x - radius, y - radius, x + radius, y + radius)
            if shape.kind == "circle":
                canvas.ellipse(box, fill=fill)
            else:
                canvas.ellipse(box, outline=fill, width=round(radius * 0.42))
        else:
            canvas.polygon(outline(shape.kind, x, y, radius), fill=fill)
    return np.asarray(image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.LANCZOS))


def draw_batch(rng: random.Random, count: int) -> tuple[list[str], torch.Tensor]:
    """Captions, and images in [-1, 1] as float32 [count, 3, 64, 64]."""
    scenes = [random_scene(rng) for _ in range(count)]
    images = np.stack([draw(scene, rng) for scene in scenes])
    return [scene.describe() for scene in scenes], torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1.0


def build_tokenizer(captions: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE learned from the captions: any text can be encoded, the demo's words are one token each."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        captions,
        trainers.BpeTrainer(vocab_size=512, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        padding_side="right",
        model_max_length=512,
        chat_template="{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}",
    )


def build_vae() -> AutoencoderKL:
    """A quarter of the resolution, 8 channels: latents of [8, 16, 16] for an image."""
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(24, 48, 96),
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=8,
        sample_size=IMAGE_SIZE,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    # Start with a narrow posterior (log variance -6), or its noise drowns the first hundreds of steps.
    with torch.no_grad():
        vae.encoder.conv_out.bias[8:] = -6.0
    return vae


def build_text_encoder(vocab_size: int, pad: int, eos: int) -> Qwen3ForCausalLM:
    """Z-Image conditions on the output of the last layer but one, here the second of three."""
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=vocab_size,
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            max_position_embeddings=512,
            tie_word_embeddings=False,
            pad_token_id=pad,
            eos_token_id=eos,
            bos_token_id=None,
        )
    )


def build_transformer() -> ZImageTransformer2DModel:
    """17.7 million parameters; the output starts at zero, so that the first steps are not spent on unlearning noise."""
    model = ZImageTransformer2DModel(
        in_channels=8,
        dim=384,
        n_layers=6,
        n_refiner_layers=1,
        n_heads=6,
        n_kv_heads=6,
        cap_feat_dim=256,
        rope_theta=256.0,
        axes_dims=[16, 24, 24],
        axes_lens=[640, 64, 64],
    )
    torch.nn.init.zeros_(model.all_final_layer["2-1"].linear.weight)
    torch.nn.init.zeros_(model.all_final_layer["2-1"].linear.bias)
    return model


def train_demo_vae(vae: AutoencoderKL, rng: random.Random, steps: int, batch: int) -> None:
    """Trains with a slight pull of the latents towards a normal distribution."""

    def reconstruct(_step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        _, images = draw_batch(rng, batch)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(images).latent_dist
            decoded = vae.decode(posterior.sample()).sample
        return images, decoded, 1e-5 * posterior.kl().mean() / IMAGE_SIZE

    train_vae(vae, reconstruct, steps)


def train_vae(vae: torch.nn.Module, reconstruct: Reconstruction, steps: int) -> None:
    """Trains on the absolute and the squared error, and on the penalty."""
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=0.0, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.05)
    for step in range(steps):
        images, decoded, penalty = reconstruct(step)
        error = decoded.float() - images
        loss = error.abs().mean() + error.square().mean() + penalty
        descend(loss, [(optimizer, schedule)])
        if step % 50 == 0 or step == steps - 1:
            logger.info("vae %4d  loss %.4f  mae %.2f/255", step, loss.item(), error.abs().mean().item() * 127.5)


def descend(loss: torch.Tensor, optimizers: list[ScheduledOptimizer]) -> None:
    """Takes one step of every optimizer and its schedule; the norm of all gradients is at most 1."""
    loss.backward()  # type: ignore[no-untyped-call]  # torch has no types for it
    parameters = [p for optimizer, _ in optimizers for group in optimizer.param_groups for p in group["params"]]
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    for optimizer, schedule in optimizers:
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


@torch.no_grad()
def encode_data_set(
    vae: AutoencoderKL, draw_images: Drawing, rng: random.Random, count: int
) -> tuple[list[str], torch.Tensor]:
    """Captions and latents [count, 8, 16, 16] of unit variance, by the shift and scale that this sets in the VAE."""
    captions: list[str] = []
    latents = []
    while len(captions) < count:
        batch_captions, images = draw_images(rng, min(128, count - len(captions)))
        captions += batch_captions
        with torch.autocast("cpu", torch.bfloat16):
            latents.append(vae.encode(images).latent_dist.mean.float())
    stacked = torch.cat(latents)
    vae.register_to_config(shift_factor=stacked.mean().item(), scaling_factor=1.0 / stacked.std().item())
    return captions, (stacked - vae.config.shift_factor) * vae.config.scaling_factor


def split_parameters(
    transformer: ZImageTransformer2DModel, text_encoder: Qwen3ForCausalLM
) -> tuple[list[torch.nn.Parameter], list[torch.nn.Parameter]]:
    """Matrices inside repeated blocks, for Muon; everything else, for AdamW."""
    matrices: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = []
    for name, parameter in [*transformer.named_parameters(), *text_encoder.named_parameters()]:
        in_block = "layers." in name or "refiner." in name
        (matrices if in_block and parameter.ndim == 2 and "adaLN" not in name else others).append(parameter)
    return matrices, others


def flow_optimizers(
    matrices: list[torch.nn.Parameter], others: list[torch.nn.Parameter], *, rate: float, steps: int
) -> list[ScheduledOptimizer]:
    """Muon on the matrices of blocks with twice the rate, AdamW on everything else."""
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=2 * rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=rate, weight_decay=0.0, betas=(0.9, 0.98)),
    ]
    return [
        (each, torch.optim.lr_scheduler.LambdaLR(each, lambda step: warm_up_and_cosine(step, steps)))
        for each in optimizers
    ]


def warm_up_and_cosine(step: int, steps: int) -> float:
    return min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / steps))


def train_denoiser(
    transformer: ZImageTransformer2DModel,
    text_encoder: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    captions: list[str],
    latents: torch.Tensor,
    rng: random.Random,
    steps: int,
    batch: int,
) -> None:
    """Flow matching: the transformer learns `clean - noise`, the text encoder with it (and its own next-token loss)."""
    matrices, others = split_parameters(transformer, text_encoder)
    optimizers = flow_optimizers(matrices, others, rate=1e-3, steps=steps)
    started = time.monotonic()
    for step in range(steps):
        chosen = rng.sample(range(len(captions)), batch)
        texts = [
            f"<|im_start|>{'' if rng.random() < EMPTY_CAPTION_RATE else captions[index]}<|im_end|>" for index in chosen
        ]
        tokens = tokenizer(texts, padding="max_length", max_length=CAPTION_TOKENS, truncation=True, return_tensors="pt")
        clean = latents[chosen]
        noise = torch.randn_like(clean)
        sigma = torch.sigmoid(torch.randn(batch) * 1.0 + 0.2)
        noisy = (1 - sigma)[:, None, None, None] * clean + sigma[:, None, None, None] * noise
        with torch.autocast("cpu", torch.bfloat16):
            encoded = text_encoder(
                input_ids=tokens.input_ids,
                attention_mask=tokens.attention_mask,
                output_hidden_states=True,
                labels=tokens.input_ids.masked_fill(tokens.attention_mask == 0, -100),
            )
            mask = tokens.attention_mask.bool()
            features = [states[keep] for states, keep in zip(encoded.hidden_states[-2], mask, strict=True)]
            predicted = transformer(list(noisy.unsqueeze(2)), 1 - sigma, features, return_dict=False)[0]
        flow_loss = F.mse_loss(torch.stack(predicted).squeeze(2).float(), clean - noise)
        descend(flow_loss + LM_LOSS_WEIGHT * encoded.loss, optimizers)
        if step % 25 == 0 or step == steps - 1:
            elapsed = time.monotonic() - started
            logger.info(
                "flow %4d  loss %.4f  lm %.3f  %.2f s/step", step, flow_loss, encoded.loss, elapsed / (step + 1)
            )


def distinct_captions(rng: random.Random, count: int, taken: set[str]) -> list[str]:
    chosen: list[str] = []
    while len(chosen) < count:
        caption = random_scene(rng).describe()
        if caption not in taken:
            taken.add(caption)
            chosen.append(caption)
    return chosen


def main() -> None:
    """Trains all parts and writes the pipeline, its settings and the prompts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for the pipeline; must not exist")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vae-steps", type=int, default=2400)
    parser.add_argument("--steps", type=int, default=1250)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--images", type=int, default=30000, help="size of the data set that the transformer sees")
    arguments = parser.parse_args()
    if arguments.output.exists():
        parser.error(f"{arguments.output} exists")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")

    rng = random.Random(arguments.seed)
    torch.manual_seed(arguments.seed)
    tokenizer = build_tokenizer([random_scene(rng).describe() for _ in range(5000)])
    vae = build_vae()
    train_demo_vae(vae, rng, arguments.vae_steps, batch=8)
    captions, latents = encode_data_set(vae, draw_batch, rng, arguments.images)
    text_encoder = build_text_encoder(len(tokenizer), tokenizer.pad_token_id, tokenizer.eos_token_id)
    transformer = build_transformer()
    train_denoiser(
        transformer, text_encoder, tokenizer, captions, latents, rng, steps=arguments.steps, batch=arguments.batch
    )
    pipeline = ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=transformer,
    ).to(torch.bfloat16)
    pipeline.save_pretrained(arguments.output)
    settings = {"height": IMAGE_SIZE, "width": IMAGE_SIZE, "num_inference_steps": 20, "guidance_scale": 2.0}
    (arguments.output / "generation_defaults.json").write_text(json.dumps(settings, indent=2) + "\n")

    taken = set(captions)
    for name, count, comment in [
        ("prompts.txt", 40, "Calibration prompts of the demo pipeline, one a line."),
        ("evaluation_prompts.txt", 16, "Evaluation prompts of the demo pipeline: in neither training nor calibration."),
    ]:
        lines = [f"# {comment}", *distinct_captions(rng, count, taken)]
        (arguments.output.parent / name).write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
