"""How LightX2V writes files: nothing but the tensors tells how they are quantized.

Tensors:  the names of the formats, but `weight_global_scale`, the reciprocal of `weight_scale_2`, and
          `input_global_scale`, that of `input_scale`; int8 and fp8 with F32 [out, 1]; MX and NVFP4 with swizzled
          scales, even element in the low nibble
Limits:   MXFP6 is not read. A weight of MXFP8 that is stored as U8 is read as E4M3.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from omni_convert.formats.dialects.base import Dialect, Found, LayerError, StoredLayer
from omni_convert.formats.dialects.codec import Reciprocal
from omni_convert.formats.dialects.detection import signed_layers
from omni_convert.formats.dialects.verdict import CONVERT_FIRST, DIFFUSERS, NO_BLOCK, UNMARKED, Verdict

__all__ = ["LIGHTX2V"]

NAMES = {"weight_scale_2": "weight_global_scale", "input_scale": "input_global_scale"}


class LightX2V(Dialect):
    """Recognised by its own name of a scale, or by E8M0 scales."""

    name = "lightx2v"
    consumers = "LightX2V"
    usual_verdicts = (
        Verdict("LightX2V", "loads", "if its run-time JSON repeats the scheme"),
        NO_BLOCK,
        Verdict(DIFFUSERS, "wrong", "scales are not known to it"),
        CONVERT_FIRST,
        UNMARKED,
    )
    declared_by = "nothing"

    def recognises(self, found: Found) -> bool:
        if any(True for _ in found.stems("weight_global_scale")):
            return True
        scales = (spec for name, spec in found.checkpoint.items() if name.endswith(".weight_scale"))
        return any(spec.dtype is torch.float8_e8m0fnu for spec in scales)

    def stored_layers(self, found: Found) -> Iterator[StoredLayer | LayerError]:
        codecs = {"weight_scale_2": Reciprocal(), "input_scale": Reciprocal()}
        return signed_layers(found, NAMES, codecs, swizzled=True)


LIGHTX2V = LightX2V()
