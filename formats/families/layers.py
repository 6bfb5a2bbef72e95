"""Rows that state which linears a runtime builds quantized, and their match with the tensors of a checkpoint.

`{}` stands for a block's number. Names are relative to the component.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

from omni_convert.formats.containers.tensor_spec import TensorSpec
from omni_convert.formats.errors import CheckpointError

__all__ = [
    "ADDED_QKV",
    "COMFYUI",
    "DIFFUSERS",
    "DOUBLE_STREAM_ATTENTION",
    "EVERY_RUNTIME",
    "QKV",
    "VLLM_OMNI",
    "WHOLE_BLOCK_RUNTIMES",
    "LayerGroup",
    "LayerPattern",
    "block_numbers",
    "experts",
    "kept",
    "linear_widths",
    "linears",
    "matching_groups",
    "merged",
    "renamed",
]

VLLM_OMNI = "vllm-omni"
DIFFUSERS = "diffusers"
COMFYUI = "comfyui"
EVERY_RUNTIME = (VLLM_OMNI, DIFFUSERS, COMFYUI)
#: Runtimes that run any linear of a block quantized, not only those that they build so.
WHOLE_BLOCK_RUNTIMES = (DIFFUSERS, COMFYUI)

QKV = ("to_q", "to_k", "to_v")
ADDED_QKV = ("add_q_proj", "add_k_proj", "add_v_proj")


@dataclass(frozen=True)
class LayerPattern:
    """One linear of a block, or several that the runtime merges into one.

    Attributes:
        runtime_name: the layer's prefix in the runtime
        members: state-dict stems, in the order in which the runtime stacks them
        is_fused: the runtime's layer has several logical widths, each with a slot for a scale
        loads_merged: a checkpoint may also hold the members already merged, under the runtime's name
        runtimes: the runtimes whose scope includes the layer
        methods: the methods with which the runtime builds it quantized; empty for all
        dialects: the dialects in which it does so; empty for all
        keep_reason: why the layer stays as it is although the runtime builds it quantized, or None
        stack: name of the runtime's layer that holds all experts of a block, or None
    """

    runtime_name: str
    members: tuple[str, ...]
    is_fused: bool = False
    loads_merged: bool = False
    runtimes: tuple[str, ...] = EVERY_RUNTIME
    keep_reason: str | None = None
    stack: str | None = None
    methods: tuple[str, ...] = ()
    dialects: tuple[str, ...] = ()

    def is_built_quantized(self, runtime: str, methods: Collection[str], dialect: str | None) -> bool:
        """Whether a runtime builds it quantized with one of these methods, in this dialect.

        Args:
            methods: empty for any
            dialect: None for the default one
        """
        is_method = not self.methods or not methods or any(method in self.methods for method in methods)
        return runtime in self.runtimes and is_method and (not self.dialects or dialect in self.dialects)

    def numbered(self, numbers: tuple[str, ...], members: tuple[str, ...] | None = None) -> LayerGroup:
        """The layer in the block, and of the expert, of these numbers.

        Args:
            members: what the checkpoint holds instead of the pattern's members
        """
        members = members or tuple(_filled(member, numbers) for member in self.members)
        stack = None if self.stack is None else _filled(self.stack, numbers)
        return LayerGroup(_filled(self.runtime_name, numbers), members, self.is_fused, self.keep_reason, stack)


@dataclass(frozen=True)
class LayerGroup:
    """Linears that are quantized together: all of them or none, sharing the scales that the runtime merges.

    Attributes:
        runtime_name: the layer's name in the runtime
        members: state-dict stems (names without `.weight`), in the order in which the runtime stacks them
        is_fused: the runtime's layer has several logical widths; a single tensor may too (FLUX.2's `ff.linear_in`)
        keep_reason: why the group stays as it is although the runtime would build it quantized (it must then be
            listed as ignored), or None
        stack: name of the runtime's layer that holds all experts of a block, which are quantized all or none; or None
    """

    runtime_name: str
    members: tuple[str, ...]
    is_fused: bool
    keep_reason: str | None = None
    stack: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Every name by which a runtime may look the layer up: its own and those of its parts.

        A runtime that knows how its layers are merged asks for the parts; one that does not asks for the merged layer.
        A checkpoint's `to_out.0` is also listed as `to_out`, since Qwen-Image uses both. Experts have the name of their
        stack alone.
        """
        if self.stack is not None:
            return (self.stack,)
        names = dict.fromkeys((self.runtime_name, *self.members))
        return (*names, *(name.removesuffix(".0") for name in names if name.endswith(".to_out.0")))


def linears(parent: str, *leaves: str, runtimes: tuple[str, ...] = EVERY_RUNTIME) -> tuple[LayerPattern, ...]:
    """Linears that have one name in the runtime and in the checkpoint."""
    return tuple(LayerPattern(f"{parent}.{leaf}", (f"{parent}.{leaf}",), runtimes=runtimes) for leaf in leaves)


def renamed(parent: str, leaf: str, runtime_leaf: str) -> LayerPattern:
    """A linear that has another name in the runtime."""
    return LayerPattern(f"{parent}.{runtime_leaf}", (f"{parent}.{leaf}",))


def merged(
    parent: str,
    runtime_leaf: str,
    leaves: Iterable[str],
    *,
    loads_merged: bool = True,
    runtimes: tuple[str, ...] = EVERY_RUNTIME,
) -> LayerPattern:
    """Linears that the runtime stacks into one layer."""
    members = tuple(f"{parent}.{leaf}" for leaf in leaves)
    return LayerPattern(f"{parent}.{runtime_leaf}", members, True, loads_merged, runtimes)


def experts(parent: str) -> tuple[LayerPattern, ...]:
    """Experts of a mixture, which the runtime builds as one layer: gate and up of each share scales."""
    one = f"{parent}.experts.{{}}"
    stack = f"{parent}.experts"
    gate_up = (f"{one}.gate_proj", f"{one}.up_proj")
    return (
        LayerPattern(f"{one}.gate_up_proj", gate_up, is_fused=True, stack=stack),
        LayerPattern(f"{one}.down_proj", (f"{one}.down_proj",), stack=stack),
    )


def kept(stem: str, reason: str, runtime_name: str = "") -> LayerPattern:
    """A linear that vLLM-Omni would run quantized, but that is better left alone; it may have another name there."""
    return LayerPattern(runtime_name or stem, (stem,), runtimes=(VLLM_OMNI,), keep_reason=reason)


#: The joint attention of image and text streams, as diffusers' MMDiT models name it.
DOUBLE_STREAM_ATTENTION = (
    merged("transformer_blocks.{}.attn", "to_qkv", QKV),
    *linears("transformer_blocks.{}.attn", "to_out.0"),
    merged("transformer_blocks.{}.attn", "add_kv_proj", ADDED_QKV),
    *linears("transformer_blocks.{}.attn", "to_add_out"),
)


def linear_widths(specs: Mapping[str, TensorSpec]) -> dict[str, int]:
    """Stem to in_features of every tensor that can be a linear's weight."""
    return {
        name.removesuffix(".weight"): spec.shape[1]
        for name, spec in specs.items()
        if name.endswith(".weight") and len(spec.shape) == 2
    }


def matching_groups(patterns: Collection[LayerPattern], widths: Mapping[str, int]) -> list[LayerGroup]:
    """The groups of a checkpoint that the patterns describe, in checkpoint order.

    Args:
        widths: stem to in_features of every linear

    Raises:
        CheckpointError: a group is incomplete, its members differ in input width, or it is there twice.
    """
    groups: dict[str, LayerGroup] = {}
    for stem in widths:
        found = _group_of(stem, patterns, widths)
        if found is None:
            continue
        if groups.setdefault(found.runtime_name, found) != found:
            raise CheckpointError(
                f"{found.runtime_name}: found both the merged layer and its parts, expected one of them"
            )
    return list(groups.values())


@lru_cache
def _compiled(template: str) -> re.Pattern[str]:
    return re.compile(re.escape(template).replace(re.escape("{}"), "([0-9]+)"))


def _filled(template: str, numbers: tuple[str, ...]) -> str:
    """A template with its `{}` replaced by the first of these numbers, in their order."""
    for number in numbers:
        template = template.replace("{}", number, 1)
    return template


def block_numbers(template: str, stem: str) -> tuple[str, ...] | None:
    """The numbers that each `{}` stands for in `stem`, or None if the template does not match."""
    match = _compiled(template).fullmatch(stem)
    return None if match is None else match.groups()


def _group_of(stem: str, patterns: Collection[LayerPattern], widths: Mapping[str, int]) -> LayerGroup | None:
    for pattern in patterns:
        for template in pattern.members:
            numbers = block_numbers(template, stem)
            if numbers is not None:
                return _complete_group(pattern, numbers, stem, widths)
        numbers = block_numbers(pattern.runtime_name, stem)
        if numbers is not None and len(pattern.members) > 1:
            return _merged_group(pattern, numbers, stem)
    return None


def _complete_group(
    pattern: LayerPattern, numbers: tuple[str, ...], stem: str, widths: Mapping[str, int]
) -> LayerGroup:
    group = pattern.numbered(numbers)
    for member in group.members:
        if member not in widths:
            raise CheckpointError(
                f"{member}.weight: found no such matrix, expected it beside '{stem}.weight', with which it is fused; "
                f"complete the checkpoint"
            )
        if widths[member] != widths[stem]:
            raise CheckpointError(
                f"{member}.weight: found in_features {widths[member]}, expected {widths[stem]} as in '{stem}.weight', "
                f"with which it is fused"
            )
    return group


def _merged_group(pattern: LayerPattern, numbers: tuple[str, ...], stem: str) -> LayerGroup:
    """The group of a checkpoint that already holds the members merged."""
    if not pattern.loads_merged:
        parts = ", ".join(template.rpartition(".")[2] for template in pattern.members)
        raise CheckpointError(f"{stem}.weight: found a merged layer, expected its parts ({parts}); split it first")
    return pattern.numbered(numbers, (stem,))
