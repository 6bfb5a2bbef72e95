"""What the models' own code calls its tensors: the names that ComfyUI and stable-diffusion.cpp expect.

A tensor there may be several of diffusers', one after the other along the rows, and its halves may have changed places.
Codes of blocks along the columns, as GGUF's, go with their rows: joining changes no value.

Source: diffusers' conversions of single files (`loaders/single_file_utils.py`), the other way round.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from omni_convert.formats.containers.tensor_spec import Run, TensorSpec
from omni_convert.formats.families.wan_names import original_name

__all__ = ["SAME_NAMES", "original_runs"]

#: Classes whose own code has diffusers' names.
SAME_NAMES = ("QwenImageTransformer2DModel", "HiDreamImageTransformer2DModel")


@dataclass(frozen=True)
class _Renamed:
    """A module or a tensor of the model's own code, `{}` standing for the number of a block.

    Attributes:
        original: its name
        parts: what diffusers calls it, or the parts that it joins, in their order
        is_turned: its second half is the first in diffusers (scale and shift of a modulation)
    """

    original: str
    parts: tuple[str, ...]
    is_turned: bool = False


def _renamed(names: Mapping[str, str], original: str = "", diffusers: str = "") -> tuple[_Renamed, ...]:
    """Names that only differ, inside of a module."""
    return tuple(_Renamed(original + theirs, (diffusers + ours,)) for theirs, ours in names.items())


def _same(*names: str) -> tuple[_Renamed, ...]:
    """Names that do not differ."""
    return tuple(_Renamed(name, (name,)) for name in names)


def _joined(original: str, parent: str, *parts: str) -> _Renamed:
    return _Renamed(original, tuple(f"{parent}.{part}" for part in parts))


_QKV = ("to_q", "to_k", "to_v")
_ADDED_QKV = ("add_q_proj", "add_k_proj", "add_v_proj")
_DOUBLE, _OURS_DOUBLE = "double_blocks.{}.", "transformer_blocks.{}."
_SINGLE, _OURS_SINGLE = "single_blocks.{}.", "single_transformer_blocks.{}."
_MLP_EMBEDDER = {"in_layer": "linear_1", "out_layer": "linear_2"}

_FLUX_EMBEDDERS = _renamed({"img_in": "x_embedder", "txt_in": "context_embedder", "final_layer.linear": "proj_out"})
_FLUX_DOUBLE_ATTENTION = (
    _joined("double_blocks.{}.img_attn.qkv", "transformer_blocks.{}.attn", *_QKV),
    _joined("double_blocks.{}.txt_attn.qkv", "transformer_blocks.{}.attn", *_ADDED_QKV),
    *_renamed(
        {
            "img_attn.proj": "attn.to_out.0",
            "txt_attn.proj": "attn.to_add_out",
            "img_attn.norm.query_norm.scale": "attn.norm_q.weight",
            "img_attn.norm.key_norm.scale": "attn.norm_k.weight",
            "txt_attn.norm.query_norm.scale": "attn.norm_added_q.weight",
            "txt_attn.norm.key_norm.scale": "attn.norm_added_k.weight",
        },
        _DOUBLE,
        _OURS_DOUBLE,
    ),
)
_FLUX_SINGLE_NORMS = _renamed(
    {"norm.query_norm.scale": "attn.norm_q.weight", "norm.key_norm.scale": "attn.norm_k.weight"}, _SINGLE, _OURS_SINGLE
)
_FLUX_MODULATION = _Renamed("final_layer.adaLN_modulation.1", ("norm_out.linear",), is_turned=True)

_FLUX_1 = (
    *_FLUX_EMBEDDERS,
    *_renamed(_MLP_EMBEDDER, "time_in.", "time_text_embed.timestep_embedder."),
    *_renamed(_MLP_EMBEDDER, "vector_in.", "time_text_embed.text_embedder."),
    *_renamed(_MLP_EMBEDDER, "guidance_in.", "time_text_embed.guidance_embedder."),
    *_FLUX_DOUBLE_ATTENTION,
    *_renamed(
        {
            "img_mod.lin": "norm1.linear",
            "txt_mod.lin": "norm1_context.linear",
            "img_mlp.0": "ff.net.0.proj",
            "img_mlp.2": "ff.net.2",
            "txt_mlp.0": "ff_context.net.0.proj",
            "txt_mlp.2": "ff_context.net.2",
        },
        _DOUBLE,
        _OURS_DOUBLE,
    ),
    _joined("single_blocks.{}.linear1", "single_transformer_blocks.{}", *(f"attn.{part}" for part in _QKV), "proj_mlp"),
    *_renamed({"modulation.lin": "norm.linear", "linear2": "proj_out"}, _SINGLE, _OURS_SINGLE),
    *_FLUX_SINGLE_NORMS,
    _FLUX_MODULATION,
)

_FLUX_2 = (
    *_FLUX_EMBEDDERS,
    *_renamed(_MLP_EMBEDDER, "time_in.", "time_guidance_embed.timestep_embedder."),
    *_renamed(_MLP_EMBEDDER, "guidance_in.", "time_guidance_embed.guidance_embedder."),
    *_renamed(
        {
            f"{stream}.lin": f"{stream}.linear"
            for stream in ("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation")
        }
    ),
    *_FLUX_DOUBLE_ATTENTION,
    *_renamed(
        {
            "img_mlp.0": "ff.linear_in",
            "img_mlp.2": "ff.linear_out",
            "txt_mlp.0": "ff_context.linear_in",
            "txt_mlp.2": "ff_context.linear_out",
        },
        _DOUBLE,
        _OURS_DOUBLE,
    ),
    *_renamed({"linear1": "attn.to_qkv_mlp_proj", "linear2": "attn.to_out"}, _SINGLE, _OURS_SINGLE),
    *_FLUX_SINGLE_NORMS,
    _FLUX_MODULATION,
)


def _z_image_block(block: str) -> tuple[_Renamed, ...]:
    names = {"out": "to_out.0", "q_norm": "norm_q", "k_norm": "norm_k"}
    attention = f"{block}.{{}}.attention"
    rest = ("feed_forward", "attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2", "adaLN_modulation")
    return (
        _joined(f"{attention}.qkv", attention, *_QKV),
        *_renamed(names, f"{attention}.", f"{attention}."),
        *_same(*(f"{block}.{{}}.{part}" for part in rest)),
    )


_Z_IMAGE = (
    *_renamed({"x_embedder": "all_x_embedder.2-1", "final_layer": "all_final_layer.2-1"}),
    *_same("t_embedder", "cap_embedder", "siglip_embedder", "x_pad_token", "cap_pad_token", "siglip_pad_token"),
    *(
        name
        for block in ("layers", "noise_refiner", "context_refiner", "siglip_refiner")
        for name in _z_image_block(block)
    ),
)

_LTX = (
    *_renamed({"patchify_proj": "proj_in", "adaln_single": "time_embed"}),
    *_same("caption_projection", "proj_out", "scale_shift_table"),
    *_same("transformer_blocks.{}.ff", "transformer_blocks.{}.scale_shift_table"),
    *(
        name
        for attention in ("transformer_blocks.{}.attn1.", "transformer_blocks.{}.attn2.")
        for name in (
            *_renamed({"q_norm": "norm_q", "k_norm": "norm_k"}, attention, attention),
            *_same(*(attention + part for part in (*_QKV, "to_out"))),
        )
    ),
)

# Class in diffusers → what each tensor is called there.
_TABLES = {
    "FluxTransformer2DModel": _FLUX_1,
    "Flux2Transformer2DModel": _FLUX_2,
    "ZImageTransformer2DModel": _Z_IMAGE,
    "LTXVideoTransformer3DModel": _LTX,
}


def original_runs(model_class: str, specs: Mapping[str, TensorSpec]) -> dict[str, list[Run]] | None:
    """Original name → the rows of diffusers' tensors that the tensor consists of.

    Args:
        specs: the tensors of the model in diffusers

    Returns:
        None if the original names of the model, or of one of its tensors, are not known here; see `SAME_NAMES`
    """
    if model_class == "WanTransformer3DModel":
        originals = {name: original_name(name) for name in specs}
        known = {original: _kept(specs[name]) for name, original in originals.items() if original is not None}
        return known if len(known) == len(specs) else None
    if model_class not in _TABLES:
        return None
    runs: dict[str, list[Run]] = {}
    for name in specs:
        found = _found(name, _TABLES[model_class])
        if found is None:
            return None
        original, parts, is_turned = found
        if original in runs:
            continue
        if any(part not in specs for part in parts):
            return None
        runs[original] = [run for part in parts for run in (_turned if is_turned else _kept)(specs[part])]
    return runs


def _found(name: str, table: Sequence[_Renamed]) -> tuple[str, tuple[str, ...], bool] | None:
    """The tensor of the model's own code that a tensor of diffusers belongs to, its parts, and whether it is turned.

    None if that is not known.
    """
    for renamed in table:
        for part in renamed.parts:
            found = _pattern(part).fullmatch(name)
            if found is not None:
                *block, rest = found.groups()
                parts = tuple(other.format(*block) + rest for other in renamed.parts)
                return renamed.original.format(*block) + rest, parts, renamed.is_turned
    return None


@cache
def _pattern(name: str) -> re.Pattern[str]:
    """Of a module's tensors, or of one tensor: the block's number, if it has one, and what follows."""
    return re.compile(re.escape(name).replace(r"\{\}", r"(\d+)") + r"((?:\..+)?)")


def _kept(spec: TensorSpec) -> list[Run]:
    return [Run(spec.name, 0, spec.shape[0] if spec.shape else 1)]


def _turned(spec: TensorSpec) -> list[Run]:
    half = spec.shape[0] // 2
    return [Run(spec.name, half, spec.shape[0] - half), Run(spec.name, 0, half)]
