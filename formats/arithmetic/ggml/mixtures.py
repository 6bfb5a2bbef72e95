"""Mixtures of GGUF's types, such as Q4_K_M: which layers get more bits than the rest.

The rules are those of ComfyUI-GGUF's patch of llama.cpp for image models. The first rule whose pattern matches a
tensor's name decides; all other layers get the base type. Importing this module needs no torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

__all__ = ["MIXTURES", "Mixture", "types_of"]


@dataclass(frozen=True)
class Role:
    """Layers with the same task in every block.

    Attributes:
        patterns: parts of tensors' names, with fnmatch's `*`
    """

    name: str
    patterns: tuple[str, ...]

    def has(self, tensor: str) -> bool:
        return any(fnmatchcase(tensor, f"*{pattern}*") for pattern in self.patterns)


VALUE = Role(
    "value projections",
    (
        "attn_v.weight",
        ".to_v.weight",
        ".v.weight",
        ".attn.w1v.weight",
        ".attn.w2v.weight",
        "_attn.v_proj.weight",
    ),
)
FUSED_QKV = Role("joined q, k and v", ("attn_qkv.weight", "attn.qkv.weight", "attention.qkv.weight"))
DOWN = Role(
    "down projections",
    (
        "ffn_down",
        "experts.*.w2.weight",
        ".ffn.2.weight",
        ".ff.net.2.weight",
        ".mlp.layer2.weight",
        ".adaln_modulation_mlp.2.weight",
        ".feed_forward.w2.weight",
    ),
)


@dataclass(frozen=True)
class Rule:
    """The types of the layers of a role.

    Attributes:
        first: number of layers that get `type`, in the file's order, before the others get `rest`; None for all
        rest: None for the base type
    """

    role: Role
    type: str
    first: int | None = None
    rest: str | None = None

    def __str__(self) -> str:
        if self.first is None:
            return f"{self.role.name} {self.type}"
        others = f", the others {self.rest}" if self.rest else ""
        return f"the first {self.first} {self.role.name} {self.type}{others}"


@dataclass(frozen=True)
class Mixture:
    """A base type, and the layers that differ."""

    base: str
    rules: tuple[Rule, ...] = ()

    def __str__(self) -> str:
        return "; ".join([self.base, *map(str, self.rules)])


MIXTURES: dict[str, Mixture] = {
    "Q5_K_M": Mixture("Q5_K", (Rule(VALUE, "Q6_K"), Rule(FUSED_QKV, "Q6_K"), Rule(DOWN, "Q6_K"))),
    "Q5_K_S": Mixture("Q5_K"),
    "Q4_K_M": Mixture("Q4_K", (Rule(VALUE, "Q6_K"), Rule(FUSED_QKV, "Q5_K"), Rule(DOWN, "Q6_K"))),
    "Q4_K_S": Mixture("Q4_K", (Rule(VALUE, "Q5_K", first=4), Rule(DOWN, "Q5_K"))),
    "Q3_K_L": Mixture("Q3_K", (Rule(VALUE, "Q5_K"), Rule(FUSED_QKV, "Q4_K"), Rule(DOWN, "Q5_K"))),
    "Q3_K_M": Mixture("Q3_K", (Rule(VALUE, "Q5_K", first=2, rest="Q4_K"), Rule(FUSED_QKV, "Q4_K"), Rule(DOWN, "Q4_K"))),
    "Q3_K_S": Mixture("Q3_K"),
}


def types_of(name: str, tensors: Iterable[str]) -> dict[str, str]:
    """The type of each tensor that is quantized.

    Args:
        name: of a type, which all get, or of a mixture
        tensors: names in the file, in its order
    """
    mixture = MIXTURES.get(name, Mixture(name))
    seen = dict.fromkeys(mixture.rules, 0)
    types = {}
    for tensor in tensors:
        types[tensor] = mixture.base
        rule = next((rule for rule in mixture.rules if rule.role.has(tensor)), None)
        if rule is not None:
            is_first = rule.first is None or seen[rule] < rule.first
            types[tensor] = rule.type if is_first else rule.rest or mixture.base
            seen[rule] += 1
    return types
