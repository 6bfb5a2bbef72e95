"""One small causal VAE for the pictures of Qwen-Image's shape and the videos of Wan's.

It is trained on single frames. Its convolutions have nothing at earlier frames, so that a video is its frames; in time
it halves what it is given by leaving every second frame out, and shows the others twice.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from development_pictures import Flight, House, Pictures  # type: ignore[import-not-found]  # beside it
from diffusers import AutoencoderKLQwenImage, AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageCausalConv3d
from train_demo_pipeline import train_vae  # type: ignore[import-not-found]  # beside it

CHANNELS, SPATIAL_FACTOR, TEMPORAL_FACTOR = 8, 4, 2
SIZES: dict[str, Any] = {
    "base_dim": 16,
    "z_dim": CHANNELS,
    "dim_mult": [1, 2, 3],
    "num_res_blocks": 1,
    "temperal_downsample": [False, True],
    "latents_mean": [0.0] * CHANNELS,
    "latents_std": [1.0] * CHANNELS,
}
#: Noise that the decoder is trained to bear, in standard deviations of the latents.
LATENT_NOISE = 0.07


@torch.no_grad()
def build_vae() -> AutoencoderKLQwenImage:
    """A quarter of the resolution, 8 channels; frames do not see each other.

    Norms go over the channels of a pixel, so that biases and residual branches would drown what little of the image a
    new network hands on. They start at zero, and the other convolutions keep the scale of their inputs.
    """
    vae = AutoencoderKLQwenImage(**SIZES)
    for name, module in vae.named_modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Conv3d):
            assert module.bias is not None
            torch.nn.init.zeros_(module.bias)
            fan_in = module.in_channels * math.prod(module.kernel_size[-2:])
            is_end_of_branch = name.endswith((".conv2", ".proj"))
            torch.nn.init.normal_(module.weight, std=0.0 if is_end_of_branch else 1 / math.sqrt(fan_in))
        if isinstance(module, QwenImageCausalConv3d):
            module.weight[:, :, :-1] = 0.0
        if name.endswith("time_conv"):
            keep = torch.eye(module.in_channels).repeat(module.out_channels // module.in_channels, 1)
            module.weight[:, :, -1, 0, 0] = keep
    return vae


@contextmanager
def single_frames(vae: AutoencoderKLQwenImage) -> Iterator[None]:
    """While it lasts, convolutions take one frame at a time, a third of the work."""
    convolutions = [module for module in vae.modules() if isinstance(module, QwenImageCausalConv3d)]
    for convolution in convolutions:
        convolution.forward = partial(convolve_frame, convolution)
    yield
    for convolution in convolutions:
        del convolution.forward


def convolve_frame(convolution: QwenImageCausalConv3d, frame: torch.Tensor) -> torch.Tensor:
    """What the convolution gives for a first frame [batch, channels, 1, height, width]."""
    padding = convolution.kernel_size[-1] // 2
    return F.conv2d(frame[:, :, 0], convolution.weight[:, :, -1], convolution.bias, padding=padding)[:, :, None]


def train_causal_vae(rng: random.Random, steps: int) -> AutoencoderKLQwenImage:
    """A VAE trained on houses and frames of flights in turn; latents are noisy, and kept small."""
    vae, houses, flights = build_vae(), Pictures(House.sample), Pictures(Flight.sample)

    def reconstruct(step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        _, videos = flights.draw(rng, 2, every=TEMPORAL_FACTOR) if step % 2 else houses.draw(rng, 6)
        images = videos.flatten(0, 1)[:, :, None]
        with torch.autocast("cpu", torch.bfloat16):
            means = encoded_means(vae, images)
            noise = LATENT_NOISE * means.detach().std() * torch.randn_like(means)
            decoded = vae.decoder(vae.post_quant_conv(means + noise))
        return images, decoded, 1e-4 * means.float().square().mean()

    with single_frames(vae):
        train_vae(vae, reconstruct, steps)
    return vae


def encoded_means(vae: AutoencoderKLQwenImage, images: torch.Tensor) -> torch.Tensor:
    """Means of the latents [count, 8, 1, height / 4, width / 4] of single frames [count, 3, 1, height, width]."""
    means: torch.Tensor = vae.quant_conv(vae.encoder(images)).chunk(2, dim=1)[0]
    return means


@torch.no_grad()
def encode_videos(
    vae: AutoencoderKLQwenImage, pictures: Pictures, rng: random.Random, count: int
) -> tuple[list[str], torch.Tensor]:
    """Captions and latents [count, 8, frames, height / 4, width / 4] of mean 0 and variance 1 by channel.

    Means and deviations go into the VAE's settings.
    """
    captions: list[str] = []
    latents = []
    with single_frames(vae):
        while len(captions) < count:
            drawn, videos = pictures.draw(rng, min(32, count - len(captions)), every=TEMPORAL_FACTOR)
            captions += drawn
            means = encoded_means(vae, videos.flatten(0, 1)[:, :, None])[:, :, 0]
            latents.append(means.view(*videos.shape[:2], *means.shape[1:]).transpose(1, 2))
    stacked = torch.cat(latents)
    mean, deviation = stacked.mean((0, 2, 3, 4)), stacked.std((0, 2, 3, 4))
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=deviation.tolist())
    return captions, (stacked - mean.view(-1, 1, 1, 1)) / deviation.view(-1, 1, 1, 1)


def load_vae(folder: Path) -> AutoencoderKLQwenImage:
    return AutoencoderKLQwenImage.from_pretrained(folder, torch_dtype=torch.float32)


def video_vae(vae: AutoencoderKLQwenImage) -> AutoencoderKLWan:
    """The same VAE in the class that Wan's pipeline takes."""
    settings = {name: vae.config[name] for name in SIZES}
    video = AutoencoderKLWan(**settings, scale_factor_spatial=SPATIAL_FACTOR, scale_factor_temporal=TEMPORAL_FACTOR)
    video.load_state_dict(vae.state_dict())
    return video
