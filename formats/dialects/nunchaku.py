"""How Nunchaku's own files spell SVDQuant: one file, in the order of its kernels, with layers merged as it builds them.

Tensors:  as `nunchaku_lite`, and
          NAME.smooth_factor_orig  as smooth_factor; its readers want it and use it for nothing
          modulations: NAME.qweight I32 [out / 4, in / 2], NAME.wscales and NAME.wzeros BF16 [in / 64, out], NAME.bias;
          the rows of their chunks (shift, scale, gate, ...) alternate
Names:    those of Nunchaku's classes: q, k and v are one layer, as are both halves of what enters a gated MLP
Header:   `quantization_config`: {"method": "svdquant", "weight": {"dtype": "int4" or "fp4_e2m1_all", "scale_dtype":
          null or [null, "fp8_e4m3_nan"], "group_size": 64 or 16}, "activation": alike, "rank": 32}; `model_class`;
          `config`, the text of the model's config.json. FLUX.1 has `comfy_config`, too, of which ComfyUI-nunchaku
          builds ComfyUI's model.
Block:    the header's, under "quant_method": "nunchaku", by which our loader knows it. Nunchaku reads the header.
Readers:  Nunchaku, ComfyUI with ComfyUI-nunchaku, SGLang. They build every linear of every block quantized, and
          modulations as AWQ W4A16, whatever the file holds.
Shift:    with int4, what comes from a GELU is shifted by 0.171875 and rounded without a sign. The bias of the layer
          lacks what this adds to outputs, and is BF16, so that it returns to 2^-8 of that.
Engine:   FLUX.1 runs in an engine of its own, with other names: lora_down, lora_up, smooth and smooth_orig; and with
          proj_out of single blocks as two layers, one for attention and one behind the GELU. Its scales of modulations
          are about 1, so that biases are, too; in BF16 these return to 2^-8.
Limits:   one precision and one rank. The engine is built for the 19 and 38 blocks of FLUX.1, 3072 wide.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from omni_convert.formats.config import QuantizationConfig
from omni_convert.formats.containers.checkpoint import Checkpoint
from omni_convert.formats.containers.tensor_spec import TensorSpec
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
from omni_convert.formats.dialects.nunchaku_order import (
    FORMATS,
    PRECISIONS,
    VECTOR,
    awq_layer,
    modulation,
    svdquant_codecs,
)
from omni_convert.formats.dialects.svdquant import DECODED, NVFP4_ELSEWHERE, SVDQUANT_NAMES, one_rank
from omni_convert.formats.dialects.verdict import DIFFUSERS, OURS, UNMARKED, Verdict
from omni_convert.formats.errors import RecipeError, listed
from omni_convert.formats.families.family import Family
from omni_convert.formats.families.layers import block_numbers
from omni_convert.formats.families.original_names import CutLayer, OriginalTensor, parts_of
from omni_convert.formats.families.table import FAMILIES
from omni_convert.formats.finding import Finding
from omni_convert.formats.format import Format, QuantizingFormat
from omni_convert.formats.schemes.awq import AwqInt4
from omni_convert.formats.schemes.svdquant import SvdQuant, SvdQuantInt4

__all__ = ["NUNCHAKU", "from_block"]

METHOD, ALGORITHM = "nunchaku", "svdquant"
#: Canonical suffix to the suffix on disk in files for the engine.
ENGINE_NAMES = {**SVDQUANT_NAMES, "smooth_factor": "smooth", "lora_a": "lora_down", "lora_b": "lora_up"}
#: What is added to the suffix of smooth_factor for a second tensor.
UNUSED = "_orig"
#: Dtype in the header to precision.
ELEMENTS = {"int4": "int4", "fp4_e2m1_all": "nvfp4"}
#: Above the negative of the lowest value of GELU, -0.17.
SHIFT = 0.171875
#: Double blocks, single blocks and width for which the engine is built; it leaves what a file lacks unset.
ENGINE_SIZE = (19, 38, 3072)
SUPPORTED = tuple(family.name for family in FAMILIES if family.nunchaku is not None)


class Nunchaku(Dialect):
    """See the module.

    Attributes:
        is_for_engine: whether it spells the model that Nunchaku runs in its engine
    """

    name = "nunchaku"
    consumers = "Nunchaku, ComfyUI-nunchaku, SGLang"
    runtimes = ("diffusers",)
    usual_verdicts = (
        Verdict("Nunchaku, ComfyUI-nunchaku, SGLang", "loads", "on CUDA: int4 on SM 7.5 to 8.9, nvfp4 on SM 12"),
        NVFP4_ELSEWHERE,
        Verdict(DIFFUSERS, "loads", "after `import omni_convert.loaders`; else it does not know the quant_method"),
        DECODED,
        UNMARKED,
    )
    strict_runtimes = (OURS, DIFFUSERS)
    has_exact_shapes = True
    is_single_file = True
    names_expected = "others"
    lists_built_layers = True
    low_precision_parts = ("weight_scale", "weight_scale_2", "channel_scale", "smooth_factor", "lora_a", "lora_b")

    def __init__(self, *, is_for_engine: bool = False) -> None:
        self.is_for_engine = is_for_engine

    def for_family(self, family: Family | None) -> Dialect:
        facts = None if family is None else family.nunchaku
        return FOR_ENGINE if facts is not None and facts.uses_engine else NUNCHAKU

    def cuts(self, family: Family) -> tuple[CutLayer, ...]:
        return () if family.nunchaku is None else family.nunchaku.cuts

    def recognises(self, found: Found) -> bool:
        is_declared = found.quant_method == METHOD or (
            found.block.get("method") == ALGORITHM and not found.quant_method
        )
        return is_declared and (_is_for_engine(found) or next(found.stems("proj_down"), None) is not None)

    def verdicts(self, component: JudgedComponent) -> list[Verdict]:
        readers, *others = self.usual_verdicts
        size = None if component.checkpoint is None else _engine_size(component.checkpoint)
        if size is not None and size != ENGINE_SIZE:
            found, built = ("{} double and {} single blocks, {} wide".format(*each) for each in (size, ENGINE_SIZE))
            readers = replace(readers, outcome="wrong", why=f"found {found}; Nunchaku's engine is built for {built}")
        return [readers, *others]

    def stored_layers(self, found: Found) -> Iterator[StoredLayer | LayerError]:
        is_for_engine = _is_for_engine(found)
        return (attempt(_layer, found, stem, is_for_engine=is_for_engine) for stem in found.stems("qweight"))

    def spelling(self, fmt: Format, shape: tuple[int, int]) -> WrittenSpelling | str:
        if isinstance(fmt, AwqInt4):
            if shape[0] % shape[1]:
                return f"Nunchaku's modulations have rows in multiples of columns, found {shape[0]} x {shape[1]}"
            return fmt.unsupported(*shape) or modulation(
                shape[0] // shape[1], shape[0], is_about_one=self.is_for_engine
            )
        if not isinstance(fmt, SvdQuant):
            return f"Nunchaku holds SVDQuant alone, found {fmt.label}"
        codecs, names = svdquant_codecs(shape[0])[PRECISIONS[fmt.method]], _names(is_for_engine=self.is_for_engine)
        copies = {names["smooth_factor"] + UNUSED: "smooth_factor"}
        return fmt.unsupported(*shape) or WrittenSpelling(names, codecs, bias=VECTOR, lacks_shift=True, copies=copies)

    def block(self, layers: Mapping[str, Format], ignored: Collection[str]) -> dict[str, Any]:
        """The block that our loader reads.

        Raises:
            RecipeError: the layers have several precisions or ranks; or layers are kept that its readers quantize.
        """
        if ignored:
            raise RecipeError(
                f"--dialect {self.name}: found {listed(sorted(ignored), 3)} kept, expected every layer quantized, as "
                "its readers build them; --dialect nunchaku-lite names those that are"
            )
        for stem, fmt in layers.items():
            if isinstance(fmt, SvdQuantInt4) and _is_unsigned(stem) is not bool(fmt.shift):
                raise RecipeError(
                    f"'{stem}': found {fmt.label}, expected inputs that are shifted and rounded without a sign behind "
                    "a GELU alone, as Nunchaku does; -m svdquant_int4 quantizes again"
                )
        return {"quant_method": METHOD, **_header(layers)}

    def metadata(self, layers: Mapping[str, Format], full_precision: Collection[str] = ()) -> dict[str, str]:
        return {"quantization_config": json.dumps(_header(layers))}

    def model_metadata(self, config: Mapping[str, Any], family: Family) -> dict[str, str]:
        assert family.nunchaku is not None, "others are refused"
        plain = {key: value for key, value in config.items() if key != "quantization_config"}
        comfy = {"comfy_config": json.dumps(_comfy_config(plain))} if family.nunchaku.uses_engine else {}
        return {"config": json.dumps(plain), "model_class": family.nunchaku.model_class, **comfy}

    def model_flaw(self, family: Family | None, methods: Collection[str]) -> str | None:
        facts = None if family is None else family.nunchaku
        if family is None or facts is None:
            found = "a model that no config names" if family is None else family.name
            return (
                f"found {found}, expected a model of {' or '.join(SUPPORTED)}, of which the names are known here; "
                "--dialect nunchaku-lite is for any model"
            )
        return None

    def fitted_format(self, fmt: QuantizingFormat, family: Family, stem: str) -> QuantizingFormat:
        if isinstance(fmt, SvdQuantInt4) and _is_unsigned(stem):
            return replace(fmt, shift=SHIFT)
        return fmt

    def own_format(self, family: Family, stem: str) -> QuantizingFormat | None:
        modulations = () if family.nunchaku is None else family.nunchaku.modulations
        return AwqInt4() if _is_any(modulations, stem) else None

    def tensors_of(self, family: Family, specs: Mapping[str, TensorSpec]) -> dict[str, OriginalTensor] | None:
        return family.nunchaku_tensors(specs)

    def are_names_of_readers(self, family: Family, names: Collection[str]) -> bool:
        return family.nunchaku is not None

    def model_stems(self, stem: str) -> tuple[str, ...]:
        tables = (family.nunchaku.names for family in FAMILIES if family.nunchaku is not None)
        return next(filter(None, (parts_of(table, stem) for table in tables)), (stem,))

    def part_of(self, stem: str) -> tuple[str, int] | None:
        cuts = (cut for family in FAMILIES if family.nunchaku is not None for cut in family.nunchaku.cuts)
        return next(filter(None, (cut.layer_of(stem) for cut in cuts)), None)

    def check(self, found: Found, layers: Mapping[str, StoredLayer], config: Mapping[str, Any]) -> Iterator[Finding]:
        rank, element = found.block.get("rank"), _part(found.block, "weight").get("dtype")
        for stem, layer in layers.items():
            fmt = layer.format
            if isinstance(fmt, SvdQuant) and (rank, ELEMENTS.get(str(element))) != (fmt.rank, PRECISIONS[fmt.method]):
                yield block_mismatch(stem, f"found {fmt.label}, but the header says otherwise", self.consumers)


def _is_any(templates: Sequence[str], stem: str) -> bool:
    return any(block_numbers(template, stem) is not None for template in templates)


def _is_unsigned(stem: str) -> bool:
    """Whether a layer's inputs come from a GELU, so that int4 rounds them without a sign."""
    return any(_is_any(family.nunchaku.unsigned, stem) for family in FAMILIES if family.nunchaku is not None)


def _header(layers: Mapping[str, Format]) -> dict[str, Any]:
    """What the header says of layers.

    Raises:
        RecipeError: they have several precisions or ranks.
    """
    branched = {stem: fmt for stem, fmt in layers.items() if isinstance(fmt, SvdQuant)}
    methods = sorted({fmt.method for fmt in branched.values()})
    if len(methods) != 1:
        raise RecipeError(f"found layers of {' and '.join(methods) or 'no SVDQuant'}, expected one precision")
    group = next(iter(branched.values())).group
    if PRECISIONS[methods[0]] == "int4":
        element, of_weight, of_input = "int4", None, None
    else:
        element, of_weight, of_input = "fp4_e2m1_all", [None, "fp8_e4m3_nan"], "fp8_e4m3_nan"
    return {
        "method": ALGORITHM,
        "weight": {"dtype": element, "scale_dtype": of_weight, "group_size": group},
        "activation": {"dtype": element, "scale_dtype": of_input, "group_size": group},
        "rank": one_rank(branched),
    }


def _part(block: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    part = block.get(name)
    return part if isinstance(part, Mapping) else {}


def from_block(block: Any) -> QuantizationConfig | None:
    """Reads a block of this dialect; None for any other block."""
    if not isinstance(block, Mapping) or block.get("quant_method") != METHOD:
        return None
    precision = ELEMENTS.get(str(_part(block, "weight").get("dtype")))
    return None if precision is None else QuantizationConfig(FORMATS[precision].method)


def _is_for_engine(found: Found) -> bool:
    return next(found.stems(ENGINE_NAMES["lora_a"]), None) is not None


def _engine_size(checkpoint: Checkpoint) -> tuple[int, int, int] | None:
    """Double blocks, single blocks and width of a model in files for the engine; None for other files."""
    end = f".out_proj.{ENGINE_NAMES['lora_a']}"
    found = [spec for name, spec in checkpoint.items() if name.endswith(end) and spec.shape]
    single = sum(spec.name.startswith("single_") for spec in found)
    return (len(found) - single, single, found[0].shape[0]) if found else None


def _names(*, is_for_engine: bool) -> dict[str, str]:
    return ENGINE_NAMES if is_for_engine else {**SVDQUANT_NAMES, "smooth_factor": "smooth_factor"}


def _comfy_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """What ComfyUI-nunchaku builds ComfyUI's model of FLUX.1 from.

    Args:
        config: the model's config in diffusers, where four channels are one of the latents
    """
    channels = config.get("in_channels", 64)
    heads, width = config.get("num_attention_heads", 24), config.get("attention_head_dim", 128)
    guidance = bool(config.get("guidance_embeds", False))
    model = {
        "image_model": "flux",
        "disable_unet_model_creation": True,
        "patch_size": 2,
        "in_channels": channels // 4,
        "out_channels": (config.get("out_channels") or channels) // 4,
        "hidden_size": heads * width,
        "num_heads": heads,
        "depth": config.get("num_layers", 19),
        "depth_single_blocks": config.get("num_single_layers", 38),
        "context_in_dim": config.get("joint_attention_dim", 4096),
        "vec_in_dim": config.get("pooled_projection_dim", 768),
        "axes_dim": list(config.get("axes_dims_rope", (16, 56, 56))),
        "theta": 10000,
        "mlp_ratio": 4.0,
        "qkv_bias": True,
        "guidance_embed": guidance,
    }
    return {"model_class": "Flux" if guidance else "FluxSchnell", "model_config": model}


def _layer(found: Found, stem: str, *, is_for_engine: bool) -> StoredLayer:
    names = _names(is_for_engine=is_for_engine)
    weight, scales, down = (found.get(stem, suffix) for suffix in ("qweight", "wscales", names["lora_a"]))
    assert weight is not None, "it has its name from it"
    if found.get(stem, "wzeros") is not None:
        return awq_layer(found, stem, is_about_one=is_for_engine)
    if weight.dtype is not torch.int8:
        raise LayerError(found, stem, f"layer '{stem}': found qweight in {weight.dtype}, expected int8")
    if scales is None or down is None or len(down.shape) != 2 or len(weight.shape) != 2:
        what = f"found '{stem}.qweight' without wscales, or without {names['lora_a']} as a matrix, expected both"
        raise LayerError(found, stem, what, "missing-companion")
    precision = "nvfp4" if scales.dtype is torch.float8_e4m3fn else "int4"
    shape, fmt = (weight.shape[0], 2 * weight.shape[1]), FORMATS[precision](down.shape[1])
    if isinstance(fmt, SvdQuantInt4) and _is_unsigned(stem):
        fmt = replace(fmt, shift=SHIFT)
    problem = fmt.unsupported(*shape)
    if problem is not None:
        raise LayerError(found, stem, f"layer '{stem}': {problem}")
    second = names["smooth_factor"] + UNUSED
    unused = (f"{stem}.{second}",) if found.get(stem, second) is not None else ()
    ones = tuple(
        suffix
        for suffix in ("channel_scale", "weight_scale_2")
        if precision == "nvfp4" and found.get(stem, SVDQUANT_NAMES[suffix]) is None
    )
    return StoredLayer(
        stem,
        fmt,
        shape,
        Spelling(names, svdquant_codecs()[precision], bias=VECTOR, lacks_shift=True),
        unused=unused,
        ones=ones,
    )


NUNCHAKU, FOR_ENGINE = Nunchaku(), Nunchaku(is_for_engine=True)
