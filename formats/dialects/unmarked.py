"""Files that say nothing about themselves: the tensors must tell. LightX2V and Black Forest Labs write such.

Tensors:  the names of the formats; LightX2V says `weight_global_scale`, the reciprocal of `weight_scale_2`
          Black Forest Labs  E4M3 with F32 [out] ("fp8r"); NVFP4 as ModelOpt lays it out
          LightX2V           int8 and fp8 with F32 [out, 1]; MX and NVFP4 with swizzled scales, low nibble first
Limits:   MXFP6 is not read. A weight of MXFP8 that is stored as U8 is read as E4M3.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from omni_convert.formats.arithmetic.e2m1 import NibbleOrder
from omni_convert.formats.containers.tensor_spec import DTYPE_NAMES, TensorSpec
from omni_convert.formats.dialects.base import Dialect, Found, Spelling, StoredLayer
from omni_convert.formats.dialects.codec import Codec, Reciprocal
from omni_convert.formats.dialects.detection import ROLES, Signature, read_signature
from omni_convert.formats.errors import CheckpointError

__all__ = ["BARE", "BFL", "LIGHTX2V", "signed_layers"]

LIGHTX2V_NAMES = {"weight_scale_2": "weight_global_scale", "input_scale": "input_global_scale"}
EIGHT_BITS = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8)


def signed_layers(
    found: Found,
    names: Mapping[str, str] | None = None,
    codecs: Mapping[str, Codec] | None = None,
    even: NibbleOrder = "low",
    *,
    swizzled: bool = False,
) -> Iterator[StoredLayer]:
    """The layers whose format shows in their tensors, for dialects that add nothing but names and orders.

    Args:
        names: canonical suffix to the suffix on disk, where they differ
        codecs: canonical suffix to codec, for those that the signature does not tell
        even: nibble of the even element, where codes are packed
        swizzled: block scales are in the order of cuBLAS

    Raises:
        CheckpointError: a weight has scales, but of no format that is known.
    """
    names, codecs = names or {}, codecs or {}
    for stem in found.stems(names.get("weight", "weight")):
        parts = parts_of(found, stem, names)
        if "weight_scale" in parts and len(parts["weight"].shape) == 2 and parts["weight"].dtype in EIGHT_BITS:
            signature = read_signature(parts, even, swizzled=swizzled)
            if signature is None:
                raise unknown_format(found, stem, parts)
            yield stored_layer(stem, signature, parts, codecs)


def parts_of(found: Found, stem: str, names: Mapping[str, str]) -> dict[str, TensorSpec]:
    """Role to tensor, of those that a layer has."""
    suffixes = {role: names.get(role, role) for role in ROLES}
    parts = {role: spec for role, suffix in suffixes.items() if (spec := found.get(stem, suffix)) is not None}
    if "weight_scale" not in parts and (inverse := found.get(stem, "weight_scale_inv")) is not None:
        parts["weight_scale"] = inverse
    return parts


def stored_layer(
    stem: str, signature: Signature, parts: Mapping[str, TensorSpec], codecs: Mapping[str, Codec] | None = None
) -> StoredLayer:
    """A layer of this signature, whose tensors are these."""
    roles = {suffix: signature.renamed.get(suffix, suffix) for suffix in signature.format.layout(*signature.shape)}
    places = {suffix: parts[role].name for suffix, role in roles.items() if role in parts}
    spelling = Spelling(codecs={**signature.codecs, **(codecs or {})})
    return StoredLayer(stem, signature.format, signature.shape, spelling, places=places)


def unknown_format(found: Found, stem: str, parts: Mapping[str, TensorSpec]) -> CheckpointError:
    """What to say about a weight whose scales fit no format."""
    shown = ", ".join(f"{role} {DTYPE_NAMES[spec.dtype]} {list(spec.shape)}" for role, spec in parts.items())
    return CheckpointError(
        f"{found.checkpoint.path}: layer '{stem}': found {shown}, which is no format that is read here"
    )


def _has_scales(found: Found, suffix: str) -> bool:
    return any(True for _ in found.stems(suffix))


class BlackForestLabs(Dialect):
    """Single files without a word in them, linear scales."""

    name = "bfl"

    def recognises(self, found: Found) -> bool:
        return _has_scales(found, "weight_scale") or _has_scales(found, "weight_scale_inv")

    def stored_layers(self, found: Found) -> Iterator[StoredLayer]:
        return signed_layers(found)


class LightX2V(Dialect):
    """Known by its own name of a scale, or by swizzled E8M0 scales."""

    name = "lightx2v"

    def recognises(self, found: Found) -> bool:
        scales = [spec for name, spec in found.checkpoint.items() if name.endswith(".weight_scale")]
        return _has_scales(found, "weight_global_scale") or any(spec.dtype is torch.float8_e8m0fnu for spec in scales)

    def stored_layers(self, found: Found) -> Iterator[StoredLayer]:
        codecs = {"weight_scale_2": Reciprocal(), "input_scale": Reciprocal()}
        return signed_layers(found, LIGHTX2V_NAMES, codecs, swizzled=True)


BFL = BlackForestLabs()
LIGHTX2V = LightX2V()
#: Names of both: whatever nothing but its tensors describes is taken for one of them.
BARE = (BFL.name, LIGHTX2V.name)
