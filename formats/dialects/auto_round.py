"""How AutoRound spells a component; vLLM, vLLM-Omni and diffusers read it.

Integers: GPTQ's packing. NAME.qweight I32 [in * bits / 32, out]; NAME.scales F16 [in / group, out];
          NAME.qzeros I32 [in / group, out * bits / 32], zero points minus 1 with "auto_gptq"
MX:       NAME.weight_packed U8 [out, in / 2], even element in the low nibble; or NAME.weight F8_E4M3;
          NAME.weight_scale U8 [out, in / 32]
NVFP4:    NAME.weight_packed as above; NAME.weight_scale E4M3 [out, in / 16]; NAME.weight_global_scale F32 [1], the
          reciprocal of weight_scale_2; NAME.input_global_scale, that of input_scale
Block:    {"quant_method": "auto-round", "bits": 4, "group_size": 128, "packing_format": "auto_round:auto_gptq", ...};
          for MX and NVFP4 "packing_format": "auto_round:llm_compressor", and the same facts of activations as "act_..."
Readers:  vLLM-Omni 0.30.0 and 0.31.0rc1 read integers, and MXFP8 if no linear is left unquantized: they ignore
          `extra_config` there. 0.32.0rc1 reads all; its NVFP4 leaves a missing input_global_scale uninitialised.
Limits:   AWQ's packing, reordered columns (g_idx), bits other than 2, 4 and 8, MXINT4, NVFP4 with E5M3 scales and
          rotated weights are not read. Written are MXFP8, MXFP4, static NVFP4, W4A16, and integers with zero points
          that were read from a file; such integers are packed as a whole, since rows are columns on disk.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any

import torch

from omni_convert.formats.arithmetic.element import IntegerType
from omni_convert.formats.arithmetic.encoding import Encoding
from omni_convert.formats.arithmetic.mx import MX_BLOCK
from omni_convert.formats.arithmetic.nvfp4_scale import NVFP4_BLOCK
from omni_convert.formats.config import QuantizationConfig
from omni_convert.formats.containers.checkpoint import Checkpoint
from omni_convert.formats.containers.names import WEIGHT
from omni_convert.formats.dialects.awq import INTEGER_NAMES, awq_layer
from omni_convert.formats.dialects.base import (
    Dialect,
    Found,
    JudgedComponent,
    LayerError,
    Spelling,
    StoredLayer,
    WrittenSpelling,
    attempt,
)
from omni_convert.formats.dialects.block_findings import block_mismatch
from omni_convert.formats.dialects.codec import PackedValues, Reciprocal, Transposed
from omni_convert.formats.dialects.detection import signed_layers
from omni_convert.formats.dialects.packed_words import PackedColumns, check_order
from omni_convert.formats.dialects.verdict import (
    DIFFUSERS,
    OPENED,
    OURS,
    UNMARKED,
    VLLM_OMNI,
    VLLM_OMNI_CANDIDATE,
    Verdict,
)
from omni_convert.formats.errors import CheckpointError, RecipeError
from omni_convert.formats.families.family import Family
from omni_convert.formats.families.layers import VLLM_OMNI as VLLM_OMNI_SCOPE
from omni_convert.formats.families.layers import matching_groups
from omni_convert.formats.families.table import find_family, model_class
from omni_convert.formats.finding import Finding
from omni_convert.formats.format import Format
from omni_convert.formats.schemes.foreign import Scaled
from omni_convert.formats.schemes.int4 import Int4
from omni_convert.formats.schemes.mxfp4 import MXFP4
from omni_convert.formats.schemes.mxfp8 import MXFP8
from omni_convert.formats.schemes.nvfp4 import NVFP4

__all__ = ["AUTO_ROUND", "AUTO_ROUND_METHODS", "from_block", "named_in_runtime", "to_block"]

#: Values of `quant_method`.
AUTO_ROUND_METHODS = ("auto-round", "intel/auto-round")
METHODS = (*AUTO_ROUND_METHODS, "gptq")
# The packings that are written: of integers, and of MX and NVFP4.
PACKING = "auto_round:auto_gptq"
FLOAT_PACKING = "auto_round:llm_compressor"
PACKED_NAMES = {
    "weight": "weight_packed",
    "weight_scale_2": "weight_global_scale",
    "input_scale": "input_global_scale",
}
RECIPROCALS = {"weight_scale_2": Reciprocal(), "input_scale": Reciprocal()}
# Encoding of floats to bits, block, and data types of weights and activations.
FLOATS = {
    MXFP8: (8, MX_BLOCK, "mx_fp", "mx_fp"),
    MXFP4: (4, MX_BLOCK, "mx_fp", "mx_fp"),
    NVFP4: (4, NVFP4_BLOCK, "nv_fp", "nv_fp4_with_static_gs"),
}
# `checkpoint_format` of GPTQ's files whose zero points are stored as they are.
GPTQ_V2 = "gptq_v2"
# What makes a name of `extra_config` a pattern.
PATTERN_SIGNS = "*+?^$()[]{}|\\"
READABLE_BITS = (2, 4, 8)
# Keys that tell MXFP8, MXFP4 and NVFP4 apart.
CHECKED_KEYS = ("bits", "group_size", "data_type")
CALIBRATE = "calibrate, with --calib"
# Element types whose tensors look like MXFP4 or NVFP4 but hold other numbers.
UNREAD_TYPES = ("mx_int", "nvfp4_v2")
# Bits of the codes that are made here, and from how many on a layer is not quantized.
WRITTEN_BITS = 4
UNQUANTIZED_BITS = 16
UNQUANTIZED = {"bits": UNQUANTIZED_BITS, "data_type": "float"}
# Said beside it where the block quantizes inputs; diffusers would apply that to layers that stay as they are.
UNQUANTIZED_INPUTS = {"act_bits": UNQUANTIZED_BITS, "act_data_type": "float"}
# `group_size` where one scale serves the whole row.
WHOLE_ROW = -1
# The name of a stack of blocks, before their numbers.
STACK = re.compile(r"(.+?)\.\d+\.")


class AutoRound(Dialect):
    """See the module."""

    name = "auto-round"
    consumers = "vLLM, diffusers"
    names_quantized_blocks = True
    lists_runtime_names = True
    usual_verdicts = (
        Verdict(DIFFUSERS, "loads", "integers, with auto-round installed; MX as dequantized BF16"),
        UNMARKED,
    )
    strict_runtimes = (*Dialect.strict_runtimes, VLLM_OMNI_CANDIDATE)

    def recognises(self, found: Found) -> bool:
        return found.quant_method.replace("_", "-") in METHODS

    def stored_layers(self, found: Found) -> Iterator[StoredLayer | LayerError]:
        _check_elements(found)
        yield from (attempt(_integers, found, stem) for stem in found.stems("qweight"))
        yield from signed_layers(found, PACKED_NAMES, RECIPROCALS)
        yield from signed_layers(found)

    def spelling(self, fmt: Format, shape: tuple[int, int]) -> WrittenSpelling | str:
        if fmt.encoding in FLOATS:
            return _spelling_of_floats(fmt, shape)
        bits = _bits_of(fmt)
        if bits is None:
            return (
                "AutoRound's files are written for mxfp8, mxfp4, nvfp4, w4a16 and other integers with zero points, "
                f"found {fmt.label}" + (" with mul_scale" if fmt.is_smoothed else "")
            )
        rows = shape[0]
        codecs = {
            "weight": PackedColumns(bits, row_multiple=rows),
            "weight_scale": Transposed(torch.float16, row_multiple=rows),
            "weight_zero_point": PackedColumns(bits, along_rows=True, offset=1, row_multiple=rows),
        }
        return WrittenSpelling(INTEGER_NAMES, codecs)

    def block(self, layers: Mapping[str, Format], ignored: Collection[str]) -> dict[str, Any]:
        """The block that auto-round exports, and that vLLM-Omni and diffusers read.

        Raises:
            RecipeError: the layers have groups or codes of several sizes, which one block cannot express.
        """
        kinds = {fmt.encoding: fmt for fmt in layers.values()}
        if len(kinds) != 1:
            found = ", ".join(sorted({fmt.label for fmt in layers.values()}))
            raise RecipeError(f"found layers of {found}, expected one number of bits and one size of groups")
        ((encoding, fmt),) = kinds.items()
        assert encoding is not None, "such layers have no spelling"
        if encoding in FLOATS:
            block = _block({"sym": True, **_facts_of_floats(*FLOATS[encoding])}, layers, ignored)
            for exception in block["extra_config"].values():
                exception |= UNQUANTIZED_INPUTS
            return block
        bits, (_, group) = _bits_of(fmt), encoding.block
        assert bits is not None, "such layers have no spelling"
        block = to_block(WHOLE_ROW if group is None else group, layers, ignored)
        return block | {"bits": bits, "sym": encoding.is_symmetric}

    def verdicts(self, component: JudgedComponent) -> list[Verdict]:
        layers = component.layers
        encodings = {fmt.encoding for fmt in layers.values()}
        if encodings.isdisjoint(FLOATS):
            ours = Verdict(OURS, "loads", "W4A16 in GPTQ's packing, the same for all layers")
            return [Verdict(VLLM_OMNI, "loads", "integers on CUDA and XPU"), *self.usual_verdicts, ours]
        candidate = Verdict(VLLM_OMNI_CANDIDATE, "loads", "MX and NVFP4 on CUDA and XPU")
        if NVFP4 in encodings and not all(fmt.is_static for fmt in layers.values()):
            candidate = Verdict(VLLM_OMNI_CANDIDATE, "wrong", f"leaves input_global_scale unset; {CALIBRATE}")
        released = _released_verdict(encodings, layers, component.checkpoint)
        return [released, candidate, *self.usual_verdicts, OPENED]

    def is_run_opened(self, formats: Collection[Format]) -> bool:
        return bool(formats) and all(fmt.encoding in FLOATS for fmt in formats)

    def ignored_entries(self, block: Mapping[str, Any]) -> tuple[str, ...]:
        return tuple(name for name, exception in _exceptions(block) if _is_unquantized(exception))

    def declares_quantized(self, block: Mapping[str, Any], stem: str) -> bool:
        own = next((entry for name, entry in _exceptions(block) if _is_named(stem, name)), None)
        if own is not None:
            return not _is_unquantized(own)
        is_named = block.get("quant_method") in AUTO_ROUND_METHODS  # GPTQ's readers know the blocks of each model
        return is_named and not self.leaves_unlisted(block, stem)

    def leaves_unlisted(self, block: Mapping[str, Any], stem: str) -> bool:
        named = block.get("block_name_to_quantize")
        stacks = named.split(",") if isinstance(named, str) else named if isinstance(named, list) else []
        is_outside = bool(stacks) and not any(stem.startswith(f"{str(stack).strip()}.") for stack in stacks)
        return is_outside or super().leaves_unlisted(block, stem)

    def check(self, found: Found, layers: Mapping[str, StoredLayer], config: Mapping[str, Any]) -> Iterator[Finding]:
        yield from _check_exceptions(found.block.get("extra_config"), layers)
        yield from _check_stacks(found.block.get("block_name_to_quantize"), layers, find_family(model_class(config)))
        yield from _check_floats(found.block, layers)
        declared = found.block.get("group_size")
        for stem, layer in layers.items():
            encoding = layer.format.encoding
            if encoding is None or not isinstance(encoding.element, IntegerType):
                continue
            _, group = encoding.block
            is_row = declared in (WHOLE_ROW, None) or (type(declared) is int and declared >= layer.shape[1])
            if group != (None if is_row else declared):
                what = f"found groups of {group or 'a row'}, but the config says {declared}"
                yield block_mismatch(stem, what, self.consumers)


def _spelling_of_floats(fmt: Format, shape: tuple[int, int]) -> WrittenSpelling | str:
    _, block, *_ = FLOATS[fmt.encoding]  # type: ignore[index]  # the caller found it there
    if shape[1] % block:
        return f"AutoRound's {fmt.method} needs in_features % {block} == 0, found {shape[1]}"
    if fmt.encoding == MXFP8:
        return WrittenSpelling()
    if fmt.encoding == MXFP4:
        return WrittenSpelling({"weight": "weight_packed"}, {"weight": PackedValues("low")})
    if not fmt.is_static:
        return f"AutoRound's nvfp4 has an input_global_scale in every layer; {CALIBRATE}"
    return WrittenSpelling(PACKED_NAMES, RECIPROCALS)


def _facts_of_floats(bits: int, block: int, data_type: str, input_type: str) -> dict[str, Any]:
    """The keys of the config block that describe MX or NVFP4, as auto-round exports them."""
    return {
        "bits": bits,
        "group_size": block,
        "data_type": data_type,
        "act_bits": bits,
        "act_group_size": block,
        "act_sym": True,
        "act_dynamic": True,
        "act_data_type": input_type,
        "packing_format": FLOAT_PACKING,
    }


def _released_verdict(
    encodings: Collection[Encoding | None], layers: Collection[str], checkpoint: Checkpoint | None
) -> Verdict:
    """The verdict of vLLM-Omni 0.30.0 on MX and NVFP4; 0.31.0rc1 has the same code."""
    if NVFP4 in encodings:
        return Verdict(VLLM_OMNI, "refuses", "its AutoRound has no data_type nv_fp, nor has that of 0.31.0rc1")
    if MXFP4 in encodings:
        return Verdict(VLLM_OMNI, "refuses", "like 0.31.0rc1 it has no MXFP4 for the inputs of diffusion models")
    specs = {} if checkpoint is None else dict(checkpoint)
    kept = (name.removesuffix(WEIGHT) for name, spec in specs.items() if name.endswith(WEIGHT) and len(spec.shape) == 2)
    if any(stem not in layers for stem in kept):
        why = "like 0.31.0rc1 it runs all linears as MXFP8, those in extra_config too; some here are not"
        return Verdict(VLLM_OMNI, "wrong", why)
    return Verdict(VLLM_OMNI, "loads", "MXFP8 on XPU and CUDA")


def _bits_of(fmt: Format) -> int | None:
    """Bits of a code, if it is an integer with a zero point."""
    encoding = fmt.encoding
    is_integer = encoding is not None and encoding.has_unsigned_codes and encoding.has_zero_point
    if encoding is None or not is_integer or fmt.is_static:
        return None
    return encoding.element.bits if encoding.element.bits in READABLE_BITS else None


def to_block(group_size: int, layers: Collection[str], ignored: Collection[str]) -> dict[str, Any]:
    """The block of W4A16 layers.

    Args:
        group_size: columns that share a scale
        layers: their stems
        ignored: names of linears that are not quantized
    """
    facts = {"bits": WRITTEN_BITS, "group_size": group_size, "sym": True, "data_type": "int", "packing_format": PACKING}
    return _block(facts, layers, ignored)


def _block(facts: Mapping[str, Any], layers: Collection[str], ignored: Collection[str]) -> dict[str, Any]:
    stacks = sorted({match[1] for stem in layers if (match := STACK.match(stem))})
    exceptions = sorted(name for name in ignored if _layer_named_so(name, layers) is None)
    return {
        "quant_method": AUTO_ROUND_METHODS[0],
        **facts,
        "block_name_to_quantize": ",".join(stacks),
        "extra_config": {name: dict(UNQUANTIZED) for name in exceptions},
    }


def named_in_runtime(block: Mapping[str, Any], prefix: str, runtime_prefix: str) -> dict[str, Any]:
    """The block of a stage of vLLM-Omni, with names of blocks as the checkpoint and as the runtime has them.

    VLLM-Omni 0.30.0 renames those of the checkpoint, but looks layers up in the config as it was before
    (`OmniINCConfig.from_inc_config`).
    """
    named = block["block_name_to_quantize"].split(",")
    there = [f"{runtime_prefix}{name.removeprefix(prefix)}" for name in named]
    return {**block, "block_name_to_quantize": ",".join([*named, *there])}


def _layer_named_so(name: str, layers: Iterable[str]) -> str | None:
    """A layer that vLLM also takes an exception for, since it compares the ends of names.

    FLUX.1's `proj_out` would leave `single_transformer_blocks.0.proj_out` unquantized. It lies outside of the blocks to
    quantize, so that it needs no exception itself.
    """
    return next((stem for stem in layers if stem.endswith(f".{name}")), None)


def from_block(block: Any) -> QuantizationConfig | None:
    """Reads a block of W4A16 layers that are all alike and in the packing that `to_block` declares.

    Returns:
        None for any other block, such as AWQ's packing or layers with other numbers of bits
    """
    if not isinstance(block, Mapping) or block.get("quant_method") not in AUTO_ROUND_METHODS:
        return None
    group, exceptions = block.get("group_size"), block.get("extra_config") or {}
    is_written_here = (
        block.get("bits") == WRITTEN_BITS
        and block.get("data_type", "int") == "int"
        and block.get("packing_format", PACKING) == PACKING
        and type(group) is int
        and group > 0
        and isinstance(exceptions, Mapping)
        and all(_is_unquantized(each) for each in exceptions.values())
    )
    if not is_written_here:
        return None
    return QuantizationConfig(Int4.method, "none", ignored_layers=tuple(map(str, exceptions)), group_size=group)


def _check_floats(block: Mapping[str, Any], layers: Mapping[str, StoredLayer]) -> Iterator[Finding]:
    """The keys that MX and NVFP4 need, and the input scales of NVFP4."""
    for stem, layer in layers.items():
        encoding = layer.format.encoding
        if encoding not in FLOATS:
            continue
        expected = _facts_of_floats(*FLOATS[encoding])
        wrong = [key for key in CHECKED_KEYS if key in block and block[key] != expected[key]]
        if wrong:
            key = wrong[0]
            what = f"found {layer.format.label}, but the config says {key} {str(block[key])[:40]!r}"
            yield block_mismatch(stem, what, AutoRound.consumers)
        if encoding == NVFP4 and not layer.format.is_static:
            yield Finding(
                "error", "missing-companion", f"{stem}.input_global_scale", "found none, expected it with nvfp4",
                f"{VLLM_OMNI_CANDIDATE}: quantizes inputs with an unset scale", CALIBRATE,
            )  # fmt: skip


def _check_exceptions(exceptions: Any, layers: Collection[str]) -> Iterator[Finding]:
    if not isinstance(exceptions, Mapping):
        return
    for name, exception in exceptions.items():
        stem = _layer_named_so(str(name), layers)
        if stem is not None and _is_unquantized(exception):
            yield Finding(
                "error", "ignored-but-quantized", stem, f"found it quantized, but '{name}' listed in extra_config",
                "vLLM-Omni: compares the ends of names, and finds no weight of this layer", "remove the name",
            )  # fmt: skip


def _exceptions(block: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The items of `extra_config`: names, ends of names or patterns, each with its entry."""
    exceptions = block.get("extra_config")
    return [(str(name), entry) for name, entry in exceptions.items()] if isinstance(exceptions, Mapping) else []


def _check_stacks(listed: Any, layers: Collection[str], family: Family) -> Iterator[Finding]:
    """Layers of a model of diffusers that, under their names in vLLM-Omni, are in none of the listed stacks."""
    stacks = tuple(each.strip() for each in listed.split(",")) if isinstance(listed, str) else tuple(listed or ())
    if not stacks or family.stage is not None:
        return
    patterns = [each for each in family.layers if each.is_built_quantized(VLLM_OMNI_SCOPE, (), AUTO_ROUND.name)]
    with suppress(CheckpointError):  # an incomplete group is reported elsewhere
        for group in matching_groups(patterns, dict.fromkeys(layers, 0)):
            if not group.runtime_name.startswith(stacks):
                yield Finding(
                    "error", "ignored-but-quantized", group.members[0],
                    f"found it quantized, but no block_name_to_quantize that '{group.runtime_name}' begins with",
                    "vLLM-Omni: looks for this name, and finds no weight of this layer", "-m keep --dialect auto-round",
                )  # fmt: skip


def _is_unquantized(exception: Any) -> bool:
    bits = exception.get("bits") if isinstance(exception, Mapping) else None
    return isinstance(bits, int) and bits >= UNQUANTIZED_BITS


def _check_elements(found: Found) -> None:
    """Refuses a component whose tensors look like a readable format but hold other numbers.

    Raises:
        CheckpointError: integers with E8M0 scales, NVFP4 with E5M3 scales, or rotated weights.
    """
    layers = found.block.get("extra_config")
    blocks = [found.block, *(layers.values() if isinstance(layers, Mapping) else ())]
    for block in blocks:
        if not isinstance(block, Mapping):
            continue
        if str(block.get("data_type")) in UNREAD_TYPES:
            raise CheckpointError(
                f"{found.checkpoint.path}: found data_type {block['data_type']!r} in the config block, expected int, "
                "mx_fp or nv_fp; export as MXFP4, MXFP8 or NVFP4"
            )
        if block.get("rotation_config"):
            raise CheckpointError(
                f"{found.checkpoint.path}: found rotation_config in the config block, expected weights that are not "
                "rotated; export without a rotation"
            )


def _integers(found: Found, stem: str) -> StoredLayer:
    where = f"layer '{stem}'"
    packing = str(found.block.get("packing_format", PACKING))
    if "awq" in packing:
        return awq_layer(found, stem)
    bits, is_symmetric = _scheme_of(found.block, stem)
    if bits not in READABLE_BITS:
        what = f"found bits {bits!r:.20} in the config block, expected 2, 4 or 8"
        raise LayerError(found, stem, f"{where}: {what}")
    words, scales = found.checkpoint[f"{stem}.qweight"], found.get(stem, "scales")
    if len(words.shape) != 2 or scales is None or len(scales.shape) != 2 or not scales.shape[0]:
        what = "found qweight without scales [in / group, out], expected both"
        raise LayerError(found, stem, f"{where}: {what}", "missing-companion")
    rows, columns = words.shape[1], words.shape[0] * (32 // bits)
    group = None if scales.shape[0] == 1 else -(-columns // scales.shape[0])
    order = found.get(stem, "g_idx")
    if order is not None:
        check_order(found, stem, "g_idx", columns, group)
    is_gptq = "gptq" in packing or found.quant_method == "gptq"
    offset = 1 if is_gptq and found.block.get("checkpoint_format") != GPTQ_V2 else 0
    codecs = {
        "weight": PackedColumns(bits),
        "weight_scale": Transposed(),
        "weight_zero_point": PackedColumns(bits, along_rows=True, offset=offset),
    }
    fmt = Scaled(f"int{bits}", torch.uint8, group, has_zero_point=True, symmetric=is_symmetric)
    unused = () if order is None else (order.name,)
    return StoredLayer(stem, fmt, (rows, columns), Spelling(INTEGER_NAMES, codecs), unused=unused)


def _scheme_of(block: Mapping[str, Any], stem: str) -> tuple[Any, bool]:
    """Bits of a layer and whether it is symmetric: what the block says of it alone, or else of all.

    An entry that declares the layer unquantized contradicts its tensors, which `check` reports; it is passed over here.
    """
    own: Mapping[str, Any] = next(
        (
            entry
            for name, entry in _exceptions(block)
            if isinstance(entry, Mapping) and not _is_unquantized(entry) and _is_named(stem, name)
        ),
        {},
    )
    return own.get("bits", block.get("bits", WRITTEN_BITS)), own.get("sym", block.get("sym")) is True


def _is_named(stem: str, name: str) -> bool:
    """Whether a name of `extra_config` is that of a layer: whole, its end, or a pattern."""
    if stem == name or stem.endswith(f".{name}"):
        return True
    try:
        return any(sign in name for sign in PATTERN_SIGNS) and re.search(name, stem) is not None
    except re.error:
        return False


AUTO_ROUND = AutoRound()
