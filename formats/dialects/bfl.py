"""How Black Forest Labs writes single files: nothing but the tensors tells how they are quantized.

Tensors:  the names of the formats; E4M3 with F32 [out] ("fp8r"), and NVFP4 as ModelOpt lays it out; linear scales
Limits:   MXFP6 is not read. A weight of MXFP8 that is stored as U8 is read as E4M3.
"""

from __future__ import annotations

from collections.abc import Iterator

from omni_convert.formats.dialects.base import Dialect, Found, JudgedComponent, LayerError, StoredLayer
from omni_convert.formats.dialects.detection import signed_layers
from omni_convert.formats.dialects.verdict import CONVERT_FIRST, DIFFUSERS, NO_BLOCK, UNMARKED, Verdict

__all__ = ["BFL"]

# Labels of the formats that diffusers' BFLQuantizationConfig reads.
READ_BY_DIFFUSERS = ("fp8 per row", "nvfp4")


class BlackForestLabs(Dialect):
    """See the module; every file with scales that no other dialect recognises is taken for one of these."""

    name = "bfl"
    consumers = "diffusers"
    usual_verdicts = (NO_BLOCK, CONVERT_FIRST, UNMARKED)
    declared_by = "nothing"

    def recognises(self, found: Found) -> bool:
        return any(True for leaf in ("weight_scale", "weight_scale_inv") for _ in found.stems(leaf))

    def stored_layers(self, found: Found) -> Iterator[StoredLayer | LayerError]:
        return signed_layers(found)

    def verdicts(self, component: JudgedComponent) -> list[Verdict]:
        unread = sorted({fmt.label for fmt in component.layers.values()} - {*READ_BY_DIFFUSERS})
        reader = Verdict(
            DIFFUSERS, "loads", "from_single_file with BFLQuantizationConfig, fp8 per row and nvfp4 with input_scale"
        )
        if unread:
            why = f"its BFLQuantizationConfig reads {' and '.join(READ_BY_DIFFUSERS)}, not {', '.join(unread)}"
            reader = Verdict(DIFFUSERS, "wrong", why)
        return [reader, *self.usual_verdicts]


BFL = BlackForestLabs()
