"""How NVIDIA's ModelOpt exports a component: vLLM, vLLM-Omni, SGLang and TensorRT-LLM read it.

Tensors:  NAME.weight, NAME.weight_scale, NAME.weight_scale_2, NAME.input_scale, as the formats define them;
          NAME.pre_quant_scale [in] where inputs are smoothed
          FP8                        E4M3, one scale, input_scale
          FP8_PER_CHANNEL_PER_TOKEN  E4M3, F32 [out]; also how one scale without input_scale is kept
          FP8_PB_WO                  E4M3, F32 [out / 128, 1, in / 128, 1], weight only
          MXFP8                      E4M3, U8 [out, in / 32]
          NVFP4, W4A16_NVFP4         low nibble first, linear scales; without input_scale weight only
Block:    {"quant_method": "modelopt", "quant_algo": ..., "config_groups": ..., "ignore": [...], "producer": ...} in
          config.json; in the older shape {"quantization": {"quant_algo": ..., "exclude_modules": [...]}} of a sidecar.
          MIXED_PRECISION has `quantized_layers`: {NAME: {"quant_algo": ...}}. Readers leave unquantized what is not
          listed; vLLM-Omni (0.30.0) looks merged layers up by its own names, `to_qkv`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from omni_convert.formats.dialects.base import Dialect, Found, StoredLayer, WrittenSpelling
from omni_convert.formats.dialects.codec import Plain, Repeated
from omni_convert.formats.dialects.modelopt_config import MODELOPT, spell_algorithms
from omni_convert.formats.dialects.unmarked import signed_layers
from omni_convert.formats.errors import CheckpointError
from omni_convert.formats.format import Format
from omni_convert.formats.fp8 import FP8, FP8_PER_ROW, fp8_block_size
from omni_convert.formats.mxfp8 import MXFP8
from omni_convert.formats.nvfp4 import NVFP4

__all__ = ["MODELOPT_DIALECT"]

NAMES = {"mul_scale": "pre_quant_scale"}


class ModelOpt(Dialect):
    """See the module."""

    name = "modelopt"
    lists_runtime_names = True
    is_dynamic_fp8_per_row = True

    def recognises(self, found: Found) -> bool:
        producer = found.block.get("producer")
        is_theirs = isinstance(producer, Mapping) and producer.get("name") == MODELOPT
        return is_theirs or found.quant_method.startswith(MODELOPT) or isinstance(found.block.get("quantization"), dict)

    def stored_layers(self, found: Found) -> Iterator[StoredLayer]:
        for stem in found.stems("svdquant_lora_a"):
            raise CheckpointError(
                f"{found.checkpoint.path}: tensor '{stem}.svdquant_lora_a': found SVDQuant's low-rank branch, expected "
                "a plain linear; export without SVDQuant"
            )
        return signed_layers(found, NAMES)

    def spelling(self, fmt: Format, shape: tuple[int, int]) -> WrittenSpelling | str:
        if fmt.encoding == FP8 and not fmt.is_static:
            return WrittenSpelling(codecs={"weight_scale": Repeated((shape[0],))})
        if fmt.encoding == FP8_PER_ROW and not fmt.is_static:
            return WrittenSpelling(codecs={"weight_scale": Plain(shape=(-1,))})
        if fmt.encoding in (FP8, NVFP4, MXFP8):
            return WrittenSpelling()
        if fp8_block_size(fmt) is not None:
            return "ModelOpt's FP8 in blocks is weight-only, which these weights were not made for"
        return f"ModelOpt has no reader for {fmt.label}"

    def block(self, layers: Mapping[str, Format], ignored: Collection[str]) -> dict[str, Any]:
        algorithms = {stem: _algorithm(fmt) for stem, fmt in layers.items()}
        return spell_algorithms(algorithms, ignored, is_mixed=len(set(algorithms.values())) > 1)


def _algorithm(fmt: Format) -> str:
    if fmt.encoding == NVFP4:
        return "NVFP4" if fmt.is_static else "W4A16_NVFP4"
    if fmt.encoding == MXFP8:
        return "MXFP8"
    return "FP8" if fmt.is_static else "FP8_PER_CHANNEL_PER_TOKEN"


MODELOPT_DIALECT = ModelOpt()
