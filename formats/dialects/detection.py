"""Finds the format of a stored layer from the dtypes and shapes of its tensors alone.

Dialects agree on these signatures and differ in names, in the order of nibbles and scales, and in what they leave out.
The names below are canonical, whatever the file calls the tensors.

    weight            weight_scale                  and                   format
    E4M3, E5M2        one number                                          fp8
    E4M3, E5M2        [out] or [out, 1]                                   fp8 per row
    E4M3              [out / N, in / K] or [out / N, 1, in / K, 1]        fp8 in blocks
    E4M3              bytes [out, in / 32]                                mxfp8
    I8                one number, [out] or [out, 1]                       int8
    U8 [out, in / 2]  bytes [out, in / 32]                                mxfp4, packed
    U8 [out, in / 2]  E4M3 [out, in / 16]           weight_scale_2        nvfp4
    E4M3, E5M2, I8 [a, b, c, ...]   one number, [a], or a number for each block     fp8 or int8 of several dimensions
    U8 [a, b, c / 2]  bytes [a, b, c / 32]                                mxfp4 of several dimensions
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch

from omni_convert.formats.arithmetic.e2m1 import NibbleOrder
from omni_convert.formats.arithmetic.mx import MX_BLOCK
from omni_convert.formats.arithmetic.swizzle import padded_scale_shape
from omni_convert.formats.containers.tensor_spec import DTYPE_NAMES, TensorSpec
from omni_convert.formats.dialects.base import Found, LayerError, Spelling, StoredLayer
from omni_convert.formats.dialects.codec import (
    Codec,
    Exponents,
    OneForAll,
    PackedValues,
    Plain,
    SwappedNibbles,
    Swizzled,
)
from omni_convert.formats.format import Format
from omni_convert.formats.schemes.foreign import Scaled, Smoothed, Spread
from omni_convert.formats.schemes.fp8 import Fp8, Fp8Block, block_size_of
from omni_convert.formats.schemes.int8 import Int8
from omni_convert.formats.schemes.mxfp4 import Mxfp4
from omni_convert.formats.schemes.mxfp4_dualscale import Mxfp4DualScale
from omni_convert.formats.schemes.mxfp8 import Mxfp8
from omni_convert.formats.schemes.nvfp4 import Nvfp4

__all__ = ["Signature", "parts_of", "read_signature", "signed_layers", "stored_layer", "unknown_format"]

#: Canonical suffixes of everything that may stand beside a weight.
ROLES = (
    "weight",
    "weight_scale",
    "weight_scale_2",
    "weight_dual_scale",
    "weight_zero_point",
    "mul_scale",
    "input_scale",
)

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
BYTES = (torch.uint8, torch.float8_e8m0fnu)
EIGHT_BITS = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8)


@dataclass(frozen=True)
class Signature:
    """A format, the shape [out, in] of the weight, and the codecs of its tensors where they are not plain.

    Attributes:
        renamed: canonical suffix to the role under which the tensor was given, where the two differ
    """

    format: Format
    shape: tuple[int, int]
    codecs: dict[str, Codec] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)


def read_signature(
    parts: Mapping[str, TensorSpec], even: NibbleOrder = "low", *, swizzled: bool = False
) -> Signature | None:
    """The format that these tensors make up, or None if it is none of the table.

    Args:
        parts: role (one of `ROLES`) to tensor
        even: nibble of the even element, where codes are packed
        swizzled: block scales are in the order of cuBLAS
    """
    found = _read(parts, even, swizzled=swizzled)
    if found is None or "mul_scale" not in parts or "mul_scale" in found.format.layout(*found.shape):
        return found
    smoothed = found.format.with_mul_scale() or Smoothed(found.format)
    return replace(found, format=smoothed)


def _read(parts: Mapping[str, TensorSpec], even: NibbleOrder, *, swizzled: bool) -> Signature | None:
    weight, scale = parts["weight"], parts.get("weight_scale")
    if scale is None or len(weight.shape) < 2:
        return None
    if len(weight.shape) > 2:
        return _spread(weight, scale)
    if weight.dtype is torch.int8:
        return _integers(parts, weight, scale)
    if weight.dtype in FLOAT8:
        return _bytes_of_floats(parts, weight, scale, swizzled=swizzled)
    if weight.dtype is torch.uint8:
        return _packed(parts, weight, scale, even, swizzled=swizzled)
    return None


def _spread(weight: TensorSpec, scale: TensorSpec) -> Signature | None:
    """More than two dimensions, with scales for none of them, the first, or blocks of any."""
    is_packed = weight.dtype is torch.uint8 and scale.dtype in BYTES and len(weight.shape) == 3
    first, *rest = (*weight.shape[:-1], 2 * weight.shape[-1]) if is_packed else weight.shape
    counts = scale.shape if len(scale.shape) == len(weight.shape) else (scale.elements, *[1] * len(rest))
    if (weight.dtype not in (*FLOAT8, torch.int8) and not is_packed) or counts[0] not in (1, first):
        return None
    if is_packed and counts != (first, rest[0], rest[1] // MX_BLOCK):
        return None
    sizes = [_block_of(size, count) for size, count in zip(rest, counts[1:], strict=True)]
    blocks = tuple(size for size in sizes if size is not None)
    if len(blocks) < len(rest) or 0 in weight.shape:
        return None
    codecs: dict[str, Codec] = {"weight_scale": Exponents()} if scale.dtype in BYTES else {}
    if is_packed:
        codecs["weight"] = PackedValues()
    method = "mxfp4" if is_packed else "int8" if weight.dtype is torch.int8 else "fp8"
    element = torch.float8_e4m3fn if is_packed else weight.dtype
    fmt = Spread(method, element, tuple(rest), blocks, is_shared=counts[0] == 1)
    return Signature(fmt, (first, math.prod(rest)), codecs)


def _block_of(size: int, count: int) -> int | None:
    """Entries of a dimension that share a scale, if there are so many scales; None if that does not tell."""
    if count in (1, size):
        return size // count
    block = block_size_of((size, size), (count, count))[0]
    return block if -(-size // block) == count else None


def _integers(parts: Mapping[str, TensorSpec], weight: TensorSpec, scale: TensorSpec) -> Signature | None:
    rows, columns = weight.shape
    zero, static = "weight_zero_point" in parts, "input_scale" in parts
    if scale.elements not in (1, rows):
        return _grouped_integers(parts, weight, scale)
    codecs: dict[str, Codec] = {} if scale.elements == rows else {"weight_scale": OneForAll()}
    fmt = Scaled("int8", torch.int8, has_zero_point=zero, static=static) if zero or static else Int8()
    return Signature(fmt, (rows, columns), codecs)


def _grouped_integers(parts: Mapping[str, TensorSpec], weight: TensorSpec, scale: TensorSpec) -> Signature | None:
    rows, columns = weight.shape
    if len(scale.shape) != 2 or scale.shape[0] != rows or not scale.shape[1] or columns % scale.shape[1]:
        return None
    group = columns // scale.shape[1]
    return Signature(Scaled("int8", torch.int8, group, "weight_zero_point" in parts), (rows, columns))


def _bytes_of_floats(
    parts: Mapping[str, TensorSpec], weight: TensorSpec, scale: TensorSpec, *, swizzled: bool
) -> Signature | None:
    rows, columns = weight.shape
    shape, static = (rows, columns), "input_scale" in parts
    if "weight_dual_scale" in parts:
        return Signature(Mxfp4DualScale(), shape)
    if scale.dtype in BYTES and len(scale.shape) == 2 and scale.shape[0] >= rows:
        return Signature(Mxfp8(), shape, _order("weight_scale", swizzled=swizzled))
    if weight.dtype is torch.float8_e4m3fn and scale.elements == 1:
        return Signature(Fp8(static=static), shape)
    is_per_row = scale.elements == rows and scale.shape[0] == rows  # blocks may be as many: 16384 columns of 128
    if is_per_row or scale.elements == 1:
        codecs: dict[str, Codec] = {} if is_per_row else {"weight_scale": OneForAll()}
        return Signature(Scaled("fp8", weight.dtype, static=static), shape, codecs)
    blocks = scale.shape[::2] if len(scale.shape) == 4 else scale.shape
    if weight.dtype is torch.float8_e4m3fn and len(blocks) == 2:
        return Signature(Fp8Block(block_size_of(shape, blocks)), shape, renamed={"weight_scale_inv": "weight_scale"})
    return None


def _packed(
    parts: Mapping[str, TensorSpec], weight: TensorSpec, scale: TensorSpec, even: NibbleOrder, *, swizzled: bool
) -> Signature | None:
    rows, width = weight.shape
    shape = (rows, 2 * width)
    codecs = _order("weight_scale", swizzled=swizzled)
    if "weight_scale_2" in parts:
        if even == "high":
            codecs["weight"] = SwappedNibbles()
        return Signature(Nvfp4(static="input_scale" in parts), shape, codecs)
    if scale.dtype not in BYTES or len(scale.shape) != 2:
        return None
    # MXFP8 codes may also be stored as U8. A narrow weight may be either, since its scales are padded.
    is_packed = scale.shape[1] == _scale_columns(rows, 2 * width, swizzled=swizzled)
    is_mxfp8 = scale.shape[1] == _scale_columns(rows, width, swizzled=swizzled)
    if is_packed and width % MX_BLOCK:
        is_mxfp8 = False
    if is_packed == is_mxfp8:
        return None
    if is_mxfp8:
        return Signature(Mxfp8(), (rows, width), codecs | {"weight": Plain(torch.uint8)})
    packed = PackedValues(even)
    if "weight_dual_scale" in parts:
        return Signature(Mxfp4DualScale(), shape, codecs | {"weight": packed})
    return Signature(Mxfp4(), shape, codecs | {"weight": packed})


def _scale_columns(rows: int, columns: int, *, swizzled: bool) -> int:
    blocks = -(-columns // MX_BLOCK)
    return padded_scale_shape(rows, blocks)[1] if swizzled else blocks


def _order(suffix: str, *, swizzled: bool) -> dict[str, Codec]:
    return {suffix: Swizzled()} if swizzled else {}


def signed_layers(
    found: Found,
    names: Mapping[str, str] | None = None,
    codecs: Mapping[str, Codec] | None = None,
    even: NibbleOrder = "low",
    *,
    swizzled: bool = False,
) -> Iterator[StoredLayer | LayerError]:
    """The layers whose format shows in their tensors, for dialects that add nothing but names and orders.

    Args:
        names: canonical suffix to the suffix on disk, where they differ
        codecs: canonical suffix to codec, for those that the signature does not tell
        even: nibble of the even element, where codes are packed
        swizzled: block scales are in the order of cuBLAS

    Returns:
        in place of a weight whose scales are of no known format, the error that says so
    """
    names, codecs = names or {}, codecs or {}
    for stem in found.stems(names.get("weight", "weight")):
        parts = parts_of(found, stem, names)
        if "weight_scale" in parts and len(parts["weight"].shape) == 2 and parts["weight"].dtype in EIGHT_BITS:
            signature = read_signature(parts, even, swizzled=swizzled)
            if signature is None:
                yield unknown_format(found, stem, parts)
            else:
                yield stored_layer(stem, signature, parts, codecs)


def parts_of(found: Found, stem: str, names: Mapping[str, str]) -> dict[str, TensorSpec]:
    """The tensors of a layer, by role."""
    suffixes = {role: names.get(role, role) for role in ROLES}
    parts = {role: spec for role, suffix in suffixes.items() if (spec := found.get(stem, suffix)) is not None}
    if "weight_scale" not in parts and (inverse := found.get(stem, "weight_scale_inv")) is not None:
        parts["weight_scale"] = inverse
    return parts


def stored_layer(
    stem: str, signature: Signature, parts: Mapping[str, TensorSpec], codecs: Mapping[str, Codec] | None = None
) -> StoredLayer:
    """A layer with this signature and these tensors."""
    roles = {suffix: signature.renamed.get(suffix, suffix) for suffix in signature.format.layout(*signature.shape)}
    places = {suffix: parts[role].name for suffix, role in roles.items() if role in parts}
    spelling = Spelling(codecs={**signature.codecs, **(codecs or {})})
    return StoredLayer(stem, signature.format, signature.shape, spelling, places=places)


def unknown_format(found: Found, stem: str, parts: Mapping[str, TensorSpec]) -> LayerError:
    """The error about a weight whose scales fit no format."""
    scale = parts.get("weight_scale")
    # NVFP4's block scales mean nothing without the scale above them.
    is_complete = scale is not None and (scale.dtype is not torch.float8_e4m3fn or "weight_scale_2" in parts)
    check = "unreadable-layer" if is_complete else "missing-companion"
    shown = ", ".join(f"{role} {DTYPE_NAMES[spec.dtype]} {list(spec.shape)}" for role, spec in parts.items())
    return LayerError(found, stem, f"layer '{stem}': found {shown}, which is no format that is read here", check)
