"""What the original code of Wan calls its tensors, and what diffusers calls them."""

from __future__ import annotations

import re
from collections.abc import Container, Mapping

__all__ = ["diffusers_name", "is_original_wan", "original_name"]

# Module or parameter in the original code → in diffusers.
OUTSIDE = {
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
    "img_emb.emb_pos": "condition_embedder.image_embedder.pos_embed",
    "head.modulation": "scale_shift_table",
    "head.head": "proj_out",
}
# Inside of a block, in the same way; the norms are numbered in the order of use there, by kind here.
IN_BLOCK = {
    "modulation": "scale_shift_table",
    "norm2": "norm3",
    "norm3": "norm2",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    "self_attn.q": "attn1.to_q",
    "self_attn.k": "attn1.to_k",
    "self_attn.v": "attn1.to_v",
    "self_attn.o": "attn1.to_out.0",
    "self_attn": "attn1",
    "cross_attn.q": "attn2.to_q",
    "cross_attn.k": "attn2.to_k",
    "cross_attn.v": "attn2.to_v",
    "cross_attn.o": "attn2.to_out.0",
    "cross_attn.k_img": "attn2.add_k_proj",
    "cross_attn.v_img": "attn2.add_v_proj",
    "cross_attn.norm_k_img": "attn2.norm_added_k",
    "cross_attn": "attn2",
}
# The same in both.
UNCHANGED = "patch_embedding."
# What diffusers' conversion of single files would drop: names in neither table, and one that it lacks.
LOST_BY_DIFFUSERS = ("condition_embedder.", "img_emb.emb_pos")
BLOCK = re.compile(r"(\w*blocks\.\d+)\.(.+)")


def is_original_wan(names: Container[str]) -> bool:
    """Whether a checkpoint has Wan's original names."""
    return any(name in names for name in ("blocks.0.self_attn.norm_q.weight", "blocks.0.cross_attn.norm_q.weight"))


def diffusers_name(name: str) -> str:
    """What diffusers calls a tensor of Wan; other names stay."""
    return _translated(name, OUTSIDE, IN_BLOCK)


def original_name(name: str) -> str | None:
    """What Wan's own code calls a tensor; None where that is not known, or not to diffusers' conversion."""
    original = _translated(name, *({theirs: ours for ours, theirs in table.items()} for table in (OUTSIDE, IN_BLOCK)))
    is_known = original != name or name.startswith(UNCHANGED)
    is_read_back = not original.startswith(LOST_BY_DIFFUSERS) and diffusers_name(original) == name
    return original if is_known and is_read_back else None


def _translated(name: str, outside: Mapping[str, str], in_block: Mapping[str, str]) -> str:
    """The name with its longest known beginning replaced, inside of its block if it is in one."""
    block = BLOCK.fullmatch(name)
    if block is not None:
        return f"{block[1]}.{_translated_start(block[2], in_block)}"
    return _translated_start(name, outside)


def _translated_start(name: str, table: Mapping[str, str]) -> str:
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        start = ".".join(parts[:count])
        if start in table:
            return ".".join([table[start], *parts[count:]])
    return name
