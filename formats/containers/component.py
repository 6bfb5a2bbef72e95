"""The components of a diffusers pipeline, as far as their names carry meaning."""

from __future__ import annotations

__all__ = ["BAGEL_WEIGHTS", "DENOISERS", "GGUF_SUFFIX"]


#: Components that run at every denoising step; a request that names no component means these.
DENOISERS = ("transformer", "transformer_2", "transformer_3", "unet")
#: Suffix of the one file of a component in GGUF.
GGUF_SUFFIX = ".gguf"
#: Name of the weights of BAGEL, beside which its VAE lies in a file of its own.
BAGEL_WEIGHTS = "ema.safetensors"
