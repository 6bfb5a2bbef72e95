"""The one list of dialects.

A dialect is imported when it is first looked up, so that listing the names does not import torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from omni_convert.formats.dialects.base import Dialect, Found

__all__ = ["DIALECTS", "WRITTEN", "find_dialect"]

# Name → module and instance, in the order in which a checkpoint is compared with them: a container that says
# everything, then labels and config blocks, marks in the file, and last tensors that nothing describes.
PLACES = {
    "gguf": "gguf.GGUF",
    "msmodelslim": "msmodelslim.MSMODELSLIM",
    "modelopt": "modelopt.MODELOPT_DIALECT",
    "compressed-tensors": "compressed_tensors.COMPRESSED_TENSORS",
    "auto-round": "auto_round.AUTO_ROUND",
    "torchao": "torchao.TORCHAO",
    "awq": "awq.AWQ",
    "bitsandbytes": "bitsandbytes.BITSANDBYTES",
    "vllm-omni": "vllm_omni.VLLM_OMNI",
    "nunchaku": "nunchaku.NUNCHAKU",
    "nunchaku-lite": "nunchaku_lite.NUNCHAKU_LITE",
    "vllm-omni-svdquant": "svdquant.SVDQUANT",
    "transformers": "transformers.TRANSFORMERS",
    "unread": "unread.UNREAD",
    "comfyui": "comfyui.COMFYUI",
    "lightx2v": "lightx2v.LIGHTX2V",
    "bfl": "bfl.BFL",
}
READ_ONLY = ("gguf", "unread", "torchao", "awq", "lightx2v", "bfl")
#: Names of the dialects that conversions can write.
WRITTEN = tuple(name for name in PLACES if name not in READ_ONLY)


class _Dialects(Mapping[str, "Dialect"]):
    def __getitem__(self, name: str) -> Dialect:
        return _imported(PLACES[name])

    def __iter__(self) -> Iterator[str]:
        return iter(PLACES)

    def __len__(self) -> int:
        return len(PLACES)


@cache
def _imported(place: str) -> Dialect:
    module, _, instance = place.partition(".")
    found: Dialect = getattr(import_module(f"{__package__}.{module}"), instance)
    return found


DIALECTS: Mapping[str, Dialect] = _Dialects()


def find_dialect(found: Found) -> Dialect | None:
    """The first dialect that recognises a checkpoint, in the order of the table."""
    return next((dialect for dialect in DIALECTS.values() if dialect.recognises(found)), None)
