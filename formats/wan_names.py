"""What the original code of Wan calls its tensors, and what diffusers calls them."""

from __future__ import annotations

import re
from collections.abc import Container

__all__ = ["diffusers_name", "is_original_wan", "original_name"]

# In this order; the first two blocks of rows are about the same words.
SUBSTITUTIONS = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^time_embedding\.0\.", "condition_embedder.time_embedder.linear_1."),
        (r"^time_embedding\.2\.", "condition_embedder.time_embedder.linear_2."),
        (r"^text_embedding\.0\.", "condition_embedder.text_embedder.linear_1."),
        (r"^text_embedding\.2\.", "condition_embedder.text_embedder.linear_2."),
        (r"^time_projection\.1\.", "condition_embedder.time_proj."),
        (r"^head\.modulation$", "scale_shift_table"),
        (r"^head\.head\.", "proj_out."),
        (r"\.modulation$", ".scale_shift_table"),
        (r"\.ffn\.0\.", ".ffn.net.0.proj."),
        (r"\.ffn\.2\.", ".ffn.net.2."),
        (r"\.norm2\.", ".norm__."),
        (r"\.norm3\.", ".norm2."),
        (r"\.norm__\.", ".norm3."),
        (r"^img_emb\.proj\.0\.", "condition_embedder.image_embedder.norm1."),
        (r"^img_emb\.proj\.1\.", "condition_embedder.image_embedder.ff.net.0.proj."),
        (r"^img_emb\.proj\.3\.", "condition_embedder.image_embedder.ff.net.2."),
        (r"^img_emb\.proj\.4\.", "condition_embedder.image_embedder.norm2."),
        (r"^img_emb\.emb_pos$", "condition_embedder.image_embedder.pos_embed"),
        (r"\.self_attn\.", ".attn1."),
        (r"\.cross_attn\.", ".attn2."),
        (r"\.(attn[12])\.([qkv])\.", r".\1.to_\2."),
        (r"\.(attn[12])\.o\.", r".\1.to_out.0."),
        (r"\.attn2\.([kv])_img\.", r".attn2.add_\1_proj."),
        (r"\.attn2\.norm_k_img\.", ".attn2.norm_added_k."),
    )
)

# The way back; `norm1` of a block has no tensors.
BACK = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^condition_embedder\.time_embedder\.linear_1\.", "time_embedding.0."),
        (r"^condition_embedder\.time_embedder\.linear_2\.", "time_embedding.2."),
        (r"^condition_embedder\.text_embedder\.linear_1\.", "text_embedding.0."),
        (r"^condition_embedder\.text_embedder\.linear_2\.", "text_embedding.2."),
        (r"^condition_embedder\.time_proj\.", "time_projection.1."),
        (r"^condition_embedder\.image_embedder\.norm1\.", "img_emb.proj.0."),
        (r"^condition_embedder\.image_embedder\.ff\.net\.0\.proj\.", "img_emb.proj.1."),
        (r"^condition_embedder\.image_embedder\.ff\.net\.2\.", "img_emb.proj.3."),
        (r"^condition_embedder\.image_embedder\.norm2\.", "img_emb.proj.4."),
        (r"^scale_shift_table$", "head.modulation"),
        (r"^proj_out\.", "head.head."),
        (r"\.scale_shift_table$", ".modulation"),
        (r"\.ffn\.net\.0\.proj\.", ".ffn.0."),
        (r"\.ffn\.net\.2\.", ".ffn.2."),
        (r"^(blocks\.\d+)\.norm2\.", r"\1.norm3."),
        (r"\.(attn[12])\.to_([qkv])\.", r".\1.\2."),
        (r"\.(attn[12])\.to_out\.0\.", r".\1.o."),
        (r"\.attn2\.add_([kv])_proj\.", r".attn2.\1_img."),
        (r"\.attn2\.norm_added_k\.", ".attn2.norm_k_img."),
        (r"\.attn1\.", ".self_attn."),
        (r"\.attn2\.", ".cross_attn."),
    )
)


def is_original_wan(names: Container[str]) -> bool:
    """Whether a checkpoint has Wan's original names."""
    return any(name in names for name in ("blocks.0.self_attn.norm_q.weight", "blocks.0.cross_attn.norm_q.weight"))


def diffusers_name(name: str) -> str:
    """What diffusers calls a tensor of Wan; other names stay."""
    for pattern, replacement in SUBSTITUTIONS:
        name = pattern.sub(replacement, name)
    return name


def original_name(name: str) -> str | None:
    """What Wan's own code calls a tensor; None for one whose original name diffusers' conversion does not know."""
    original = name
    for pattern, replacement in BACK:
        original = pattern.sub(replacement, original)
    is_known = not original.startswith("condition_embedder.") and diffusers_name(original) == name
    return original if is_known else None
