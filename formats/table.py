"""The one list of methods, and the format that each gives a weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from omni_convert.formats.containers.names import CANONICAL_COMPANIONS, WEIGHT
from omni_convert.formats.containers.tensor_spec import TensorSpec
from omni_convert.formats.format import Format, QuantizingFormat
from omni_convert.formats.options import DIALECT_OF_METHOD, FormatOptions
from omni_convert.formats.schemes.convrot_w4a4 import ConvrotW4A4
from omni_convert.formats.schemes.fp8 import Fp8
from omni_convert.formats.schemes.fp8_storage import Fp8Storage
from omni_convert.formats.schemes.gguf import Gguf
from omni_convert.formats.schemes.int4 import Int4
from omni_convert.formats.schemes.int8 import Int8
from omni_convert.formats.schemes.mxfp4 import Mxfp4
from omni_convert.formats.schemes.mxfp4_dualscale import Mxfp4DualScale
from omni_convert.formats.schemes.mxfp8 import Mxfp8
from omni_convert.formats.schemes.nf4 import Nf4
from omni_convert.formats.schemes.nvfp4 import Nvfp4
from omni_convert.formats.schemes.rotated_grid import W4a8, W6a8
from omni_convert.formats.schemes.svdquant import SvdQuantInt4, SvdQuantNvfp4

__all__ = ["FORMATS", "LOADABLE", "RUNNABLE", "build_format", "is_named_by_dialect", "layer_formats"]

#: Method to the class that holds its facts and builds its format.
FORMATS: dict[str, type[QuantizingFormat]] = {
    kind.method: kind
    for kind in (
        *(Fp8, Int8, Mxfp8, Mxfp4, Mxfp4DualScale, Nvfp4, Fp8Storage, Int4),
        *(ConvrotW4A4, W4a8, W6a8, Nf4, SvdQuantInt4, SvdQuantNvfp4, Gguf),
    )
}

#: Methods that our layers run. GGUF is for others' kernels.
RUNNABLE = tuple(name for name in FORMATS if name != Gguf.method)
#: Those that our loader quantizes to while it loads a model, and that a config block can then declare.
LOADABLE = tuple(
    name for name in RUNNABLE if DIALECT_OF_METHOD.get(name) != "comfyui" and not FORMATS[name].is_named_by_dialect
)


def is_named_by_dialect(method: str) -> bool:
    """Whether the tensors of a method have the names of its dialect; those of a mixture have canonical ones."""
    return method in FORMATS and FORMATS[method].is_named_by_dialect


def build_format(method: str, **options: Any) -> QuantizingFormat:
    """The format of a method.

    Args:
        options: fields of `FormatOptions`; a format ignores those that mean nothing to it
    """
    return FORMATS[method].build(FormatOptions(**options))


def layer_formats(specs: Mapping[str, TensorSpec], method: str | None = None) -> dict[str, Format]:
    """The format of every quantized layer of a checkpoint, read off the names, dtypes and shapes of its tensors.

    Args:
        method: the one in the config block. It tells apart what tensors alone do not: mxfp8 from mxfp4 without
            smoothing, and fp8 from fp8_storage

    Returns:
        state-dict stem (`layers.0.attention.to_q`) to format, in checkpoint order
    """
    declared = FORMATS.get(method or "")
    kinds = sorted(FORMATS.values(), key=lambda kind: kind is not declared)
    formats: dict[str, Format] = {}
    for name, spec in specs.items():
        stem = name.removesuffix(WEIGHT)
        is_matrix = len(spec.shape) == 2 or (declared is not None and declared.is_storage and len(spec.shape) > 2)
        if stem == name or not is_matrix:
            continue
        beside = [suffix for suffix in CANONICAL_COMPANIONS if f"{stem}.{suffix}" in specs]
        tensors = {suffix: specs[f"{stem}.{suffix}"] for suffix in ("weight", *beside)}
        found = next(filter(None, (kind.stored_in(tensors) for kind in kinds)), None) if beside else None
        if found is not None:
            formats[stem] = found
    return formats
