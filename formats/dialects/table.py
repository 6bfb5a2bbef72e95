"""The one list of dialects, in the order in which a checkpoint is asked whether it is spelled so."""

from __future__ import annotations

from omni_convert.formats.dialects.auto_round import AUTO_ROUND
from omni_convert.formats.dialects.base import Dialect
from omni_convert.formats.dialects.comfyui import COMFYUI
from omni_convert.formats.dialects.compressed_tensors import COMPRESSED_TENSORS
from omni_convert.formats.dialects.gguf import GGUF
from omni_convert.formats.dialects.modelopt import MODELOPT_DIALECT
from omni_convert.formats.dialects.msmodelslim import MSMODELSLIM
from omni_convert.formats.dialects.transformers import TRANSFORMERS
from omni_convert.formats.dialects.unmarked import BFL, LIGHTX2V
from omni_convert.formats.dialects.vllm_omni import VLLM_OMNI

__all__ = ["DIALECTS"]

# A container that says everything, then descriptions and config blocks, marks in the file, and last tensors
# that say nothing of themselves.
DIALECTS: dict[str, Dialect] = {
    dialect.name: dialect
    for dialect in (
        GGUF,
        MSMODELSLIM,
        MODELOPT_DIALECT,
        COMPRESSED_TENSORS,
        AUTO_ROUND,
        VLLM_OMNI,
        TRANSFORMERS,
        COMFYUI,
        LIGHTX2V,
        BFL,
    )
}
