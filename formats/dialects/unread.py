"""Quantized checkpoints of other tools that are named for what they are, and refused by every command.

Nunchaku   NAME.qweight and NAME.wscales in the order of its kernels; header: svdquant
quanto     NAME.weight._data and NAME.weight._scale
others     by `quant_method` alone
"""

from __future__ import annotations

from collections.abc import Iterator

from omni_convert.formats.dialects.base import Dialect, Found, LayerError, StoredLayer
from omni_convert.formats.dialects.verdict import DIFFUSERS, OURS, UNMARKED, VLLM_OMNI, Verdict
from omni_convert.formats.errors import CheckpointError

__all__ = ["UNREAD"]

NUNCHAKU, QUANTO = "Nunchaku's SVDQuant", "optimum-quanto's layers"
#: `quant_method` → what such a checkpoint is.
METHODS = {
    "svdquant": NUNCHAKU,
    "nunchaku": NUNCHAKU,
    "quanto": QUANTO,
    "sdnq": "SDNQ's layers",
    "hqq": "HQQ's layers",
    "quark": "AMD Quark's layers",
    "eetq": "EETQ's layers",
    "aqlm": "AQLM's codebooks",
    "vptq": "VPTQ's codebooks",
    "higgs": "HIGGS' codebooks",
    "spqr": "SpQR's layers",
    "fbgemm_fp8": "FBGEMM's FP8",
}
# A leaf of names that only one tool has → what it is.
LEAVES = {"wscales": NUNCHAKU, "_data": QUANTO}


class Unread(Dialect):
    """See the module."""

    name = "unread"
    consumers = "every runtime but that of the tool that wrote it"
    usual_verdicts = (
        Verdict(VLLM_OMNI, "refuses", "has no loader for such files"),
        Verdict(DIFFUSERS, "refuses", "unless it has a quantizer for them and the tool is installed"),
        Verdict(OURS, "refuses", "does not read it; take the original model"),
        UNMARKED,
    )

    def shown_name(self, found: Found) -> str:
        return _kind(found) or self.name

    def recognises(self, found: Found) -> bool:
        return _kind(found) is not None

    def stored_layers(self, found: Found) -> Iterator[StoredLayer | LayerError]:
        raise CheckpointError(
            f"{found.checkpoint.path}: found {_kind(found)}, which only its own runtime reads, expected plain weights "
            "or one of the formats in formats/README.md; take the original model"
        )


def _kind(found: Found) -> str | None:
    """The kind of a checkpoint by its block or header, or else by its names; None if it is none of these."""
    method = found.quant_method or str(found.block.get("method", ""))
    by_name = (kind for leaf, kind in LEAVES.items() if next(iter(found.stems(leaf)), None) is not None)
    return METHODS.get(method) or next(by_name, None)


UNREAD = Unread()
