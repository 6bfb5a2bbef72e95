"""The generic rule: which linears to quantize in a model whose layers no family states.

*   Candidates are two-dimensional `.weight` tensors inside repeated blocks. A block is a prefix that ends in an integer
    (`layers.3`, the outermost one counts) with at least two candidates below it; so `t_embedder.mlp.0` is none.
*   Left alone by name, anywhere on the path: embedders (`emb`), norms, modulation (`modulation`, `adaln`, `img_mod`,
    `scale_shift`, Chroma's `distilled_guidance`), position biases, routers and gates. What lies outside the blocks
    stays, the final projection too.
*   Siblings that runtimes commonly merge (`to_q, to_k, to_v`; `w1, w3`; ...) form one fused group if all of them are
    there with one input width, and the attention is no cross-attention (`attn2`, `cross`), where inputs differ.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping

from omni_convert.formats.families.layers import ADDED_QKV, QKV, LayerGroup

__all__ = ["generic_groups"]

LEFT_ALONE = re.compile(r"emb|norm|modulation|adaln|ada_ln|scale_shift|distilled_guidance|bias|router|gate_logits")
LEFT_ALONE_WHOLE = re.compile(r"(.*_)?mod|gate")
CROSS_ATTENTION = re.compile(r"attn2|.*cross.*")
# Siblings that runtimes merge → the name of the merged layer.
FUSED_SIBLINGS = {
    QKV: "to_qkv",
    ADDED_QKV: "add_kv_proj",
    ("q_proj", "k_proj", "v_proj"): "qkv_proj",
    ("gate_proj", "up_proj"): "gate_up_proj",
    ("w1", "w3"): "w13",
}


def generic_groups(widths: Mapping[str, int]) -> list[LayerGroup]:
    """The groups that the generic rule chooses, in checkpoint order.

    Args:
        widths: stem to in_features of every linear
    """
    candidates = list(_in_blocks([stem for stem in widths if not _is_left_alone(stem)]))
    present = frozenset(candidates)
    groups: dict[str, LayerGroup] = {}
    for stem in candidates:
        group = _fused_siblings(stem, present, widths) or LayerGroup(stem, (stem,), is_fused=False)
        groups.setdefault(group.runtime_name, group)
    return list(groups.values())


def _is_left_alone(stem: str) -> bool:
    parts = stem.lower().split(".")
    return any(LEFT_ALONE.search(part) or LEFT_ALONE_WHOLE.fullmatch(part) for part in parts)


def _block_of(stem: str) -> str | None:
    """`layers.3` of `layers.3.attention.to_q`; None if no part but the first or last is an integer."""
    parts = stem.split(".")
    for position, part in enumerate(parts[1:-1], start=1):
        if part.isascii() and part.isdecimal():
            return ".".join(parts[: position + 1])
    return None


def _in_blocks(stems: list[str]) -> Iterator[str]:
    blocks = {stem: _block_of(stem) for stem in stems}
    sizes = Counter(blocks.values())
    return (stem for stem, block in blocks.items() if block is not None and sizes[block] > 1)


def _fused_siblings(stem: str, present: Collection[str], widths: Mapping[str, int]) -> LayerGroup | None:
    parent, _, leaf = stem.rpartition(".")
    if any(CROSS_ATTENTION.fullmatch(part) for part in parent.split(".")):
        return None
    for leaves, merged in FUSED_SIBLINGS.items():
        members = tuple(f"{parent}.{each}" for each in leaves)
        if leaf in leaves and all(each in present and widths[each] == widths[stem] for each in members):
            return LayerGroup(f"{parent}.{merged}", members, is_fused=True)
    return None
