"""Cosmos 3.

Source: vLLM-Omni 0.30.0, `diffusion/models/cosmos3/`: the names of `pipeline_cosmos3.py`'s `_remap_ckpt_key` and the
prefixes of `transformer_cosmos3.py`. The two pathways of a layer are separate modules there, and nothing is merged.
"""

from __future__ import annotations

from omni_convert.formats.families.family import Family, GgufFacts
from omni_convert.formats.families.layers import LayerPattern

__all__ = ["COSMOS_3"]

_UNDERSTANDING = "language_model.layers.{}"
_GENERATION = "gen_layers.{}"


def _renamed(runtime_parent: str, parent: str, names: dict[str, str]) -> tuple[LayerPattern, ...]:
    """Rows for linears of a layer: name in the checkpoint to name in the runtime, each below its parent."""
    return tuple(
        LayerPattern(f"{runtime_parent}.{theirs}", (f"layers.{{}}.{parent}.{ours}",)) for ours, theirs in names.items()
    )


_MLP = {name: name for name in ("gate_proj", "up_proj", "down_proj")}

COSMOS_3 = Family(
    name="Cosmos 3",
    model_classes=("Cosmos3OmniTransformer",),
    layers=(
        *_renamed(f"{_UNDERSTANDING}.self_attn", "self_attn", {x: x for x in ("to_q", "to_k", "to_v", "to_out")}),
        *_renamed(
            f"{_GENERATION}.cross_attention",
            "self_attn",
            {"add_q_proj": "to_q", "add_k_proj": "to_k", "add_v_proj": "to_v", "to_add_out": "to_out"},
        ),
        *_renamed(f"{_UNDERSTANDING}.mlp", "mlp", _MLP),
        *_renamed(f"{_GENERATION}.mlp", "mlp_moe_gen", _MLP),
    ),
    gguf=GgufFacts("cosmos"),
)
