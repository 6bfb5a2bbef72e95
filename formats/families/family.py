"""Which linears of a model may be quantized, in which groups, under which names.

The facts are in `families`; here they are applied to the tensors of a checkpoint.

Known families match state-dict names exactly. Everything else falls under the *generic rule*:

*   Candidates are two-dimensional `.weight` tensors inside repeated blocks. A block is a prefix that ends in an integer
    (`layers.3`, the outermost one counts) with at least two candidates below it; so `t_embedder.mlp.0` is none.
*   Left alone by name, anywhere on the path: embedders (`emb`), norms, modulation (`modulation`, `adaln`, `img_mod`,
    `scale_shift`), position biases, routers and gates. What lies outside the blocks stays, the final projection too.
*   Siblings that runtimes commonly merge (`to_q, to_k, to_v`; `w1, w3`; ...) form one fused group if all of them are
    there with one input width, and the attention is no cross-attention (`attn2`, `cross`), where inputs differ.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Container, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

from omni_convert.formats.containers.tensor_spec import TensorSpec
from omni_convert.formats.errors import CheckpointError
from omni_convert.formats.families.families import (
    ADDED_QKV,
    EVERY_RUNTIME,
    FAMILIES,
    QKV,
    FamilyFacts,
    LayerPattern,
    Recommendation,
)

__all__ = ["Family", "LayerGroup", "Recommendation", "find_family"]

MAX_ENCODER_LAYERS = 1024

LEFT_ALONE = re.compile(r"emb|norm|modulation|adaln|ada_ln|scale_shift|bias|router|gate_logits")
LEFT_ALONE_WHOLE = re.compile(r"(.*_)?mod|gate")
CROSS_ATTENTION = re.compile(r"attn2|.*cross.*")
# What runtimes merge, and the name of the merged layer.
FUSED_SIBLINGS = {
    QKV: "to_qkv",
    ADDED_QKV: "add_kv_proj",
    ("q_proj", "k_proj", "v_proj"): "qkv_proj",
    ("gate_proj", "up_proj"): "gate_up_proj",
    ("w1", "w3"): "w13",
}


@dataclass(frozen=True)
class LayerGroup:
    """Linears that are quantized together: all of them or none, with the scales that the runtime merges in common.

    Attributes:
        runtime_name: the layer's name in the runtime
        members: state-dict stems (names without `.weight`), in the order in which the runtime stacks them
        is_fused: the runtime's layer has several logical widths (also a single tensor may: FLUX.2's `ff.linear_in`)
        keep_reason: why the group stays as it is although the runtime would build it quantized (it must then be
            listed as ignored), or None
    """

    runtime_name: str
    members: tuple[str, ...]
    is_fused: bool
    keep_reason: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Every name by which a runtime may look the layer up: its own, and those of the parts.

        A runtime that knows how its layers are merged asks for the parts, one that does not asks for the merged layer.
        Where a checkpoint says `to_out.0`, the plain `to_out` is one too: Qwen-Image uses both.
        """
        names = dict.fromkeys((self.runtime_name, *self.members))
        return (*names, *(name.removesuffix(".0") for name in names if name.endswith(".to_out.0")))


@dataclass(frozen=True)
class Family:
    """A model family: its facts, applied to the tensors of a checkpoint."""

    facts: FamilyFacts
    is_generic: bool = False

    @property
    def name(self) -> str:
        return self.facts.name

    @property
    def model_classes(self) -> tuple[str, ...]:
        return self.facts.model_classes

    def unsupported(self, runtime: str, method: str | None = None) -> str | None:
        """Why the runtime cannot run this family quantized (in `method`, if given), or None."""
        assert runtime in EVERY_RUNTIME, runtime
        for refusing, reason in self.facts.unsupported:
            if refusing == runtime:
                return reason
        for refusing, refused, reason in self.facts.unsupported_methods:
            if (refusing, refused) == (runtime, method):
                return reason
        return None

    def refused_variant(self, config: Mapping[str, object], method: str) -> str | None:
        """Why the model of this config should not be converted to this method, or None."""
        for refusal in self.facts.refused_variants:
            if method in refusal.methods and config.get(refusal.config_key) == refusal.config_value:
                return refusal.reason
        return None

    def bf16_blocks(self, method: str) -> int:
        """How many leading blocks the runtime's own quantizing leaves in BF16."""
        return dict(self.facts.bf16_blocks).get(method, 0)

    def layer_groups(self, specs: Mapping[str, TensorSpec], runtime: str) -> list[LayerGroup]:
        """Groups of linears that the runtime builds quantized, in checkpoint order.

        Empty if the runtime runs nothing of this family quantized; `unsupported` then says why. Groups with a
        `keep_reason` are among them, for the list of ignored layers.

        Args:
            specs: tensors of the checkpoint, by name
            runtime: `vllm-omni` or `diffusers`

        Raises:
            CheckpointError: a member of a fused group is missing or has another input width; or the checkpoint holds
                none of the family's layers.
        """
        if self.unsupported(runtime) is not None:
            return []
        widths = _linear_widths(specs)
        if not self.facts.layers:
            return _generic_groups(widths)
        patterns = [pattern for pattern in self.facts.layers if runtime in pattern.runtimes]
        groups = _matching_groups(patterns, widths)
        if not groups:
            raise CheckpointError(
                f"{self.name}: found none of its layers among {len(specs)} tensors, expected names such as "
                f"'{patterns[0].members[0].replace('{}', '0')}.weight', as diffusers spells them"
            )
        return groups

    def recommended_ignored(self, method: str) -> tuple[Recommendation, ...]:
        """Layers that are better left alone with this method; a choice of the user's."""
        return tuple(each for each in self.facts.recommendations if method in each.methods or not each.methods)

    def notes(self, method: str, runtime: str, tensors: Container[str]) -> tuple[str, ...]:
        """What the user should know before quantizing this model with this method for this runtime.

        Args:
            tensors: names of the model's
        """
        notes = [
            note.text
            for note in self.facts.notes
            if (method in note.methods or not note.methods) and (not note.layer or f"{note.layer}.weight" in tensors)
        ]
        if self.is_generic and runtime != "diffusers":
            notes.append(
                f"{self.model_classes[0] or 'this model'} is unknown here: a generic rule chose the layers, and "
                f"{runtime} may build others quantized; check that it does before serving the result"
            )
        return tuple(notes)

    def shared_encoder_layers(self, text_encoder_config: Mapping[str, object]) -> tuple[str, ...]:
        """Linears of the text encoder that vLLM-Omni builds from the transformer's block, as it calls them.

        Those that are not stored quantized must be in the block's list of ignored layers, or they load as garbage.

        Args:
            text_encoder_config: `text_encoder/config.json`

        Raises:
            CheckpointError: the config does not say how many layers there are.
        """
        encoder = self.facts.shared_encoder
        if encoder is None:
            return ()
        if encoder.model_types and text_encoder_config.get("model_type") not in encoder.model_types:
            return ()
        count = _encoder_layer_count(text_encoder_config)
        layers = (name.replace("{}", str(index)) for index in range(count) for name in encoder.per_layer)
        return (*layers, *encoder.others)


def find_family(model_class: str) -> Family:
    """The family of a model class (`_class_name` or `architectures` of its config); the generic rule's if unknown."""
    for facts in FAMILIES:
        if model_class in facts.model_classes:
            return Family(facts)
    return Family(FamilyFacts("generic", (model_class,)), is_generic=True)


def _linear_widths(specs: Mapping[str, TensorSpec]) -> dict[str, int]:
    """Stem to in_features of every tensor that can be a linear's weight."""
    return {
        name.removesuffix(".weight"): spec.shape[1]
        for name, spec in specs.items()
        if name.endswith(".weight") and len(spec.shape) == 2
    }


@lru_cache
def _compiled(template: str) -> re.Pattern[str]:
    return re.compile(re.escape(template).replace(re.escape("{}"), "([0-9]+)"))


def _block_number(template: str, stem: str) -> str | None:
    """The number that `{}` stands for in `stem` ("" if there is no `{}`), or None if the template does not match."""
    match = _compiled(template).fullmatch(stem)
    return None if match is None else "".join(match.groups())


def _matching_groups(patterns: Collection[LayerPattern], widths: Mapping[str, int]) -> list[LayerGroup]:
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


def _group_of(stem: str, patterns: Collection[LayerPattern], widths: Mapping[str, int]) -> LayerGroup | None:
    for pattern in patterns:
        for template in pattern.members:
            number = _block_number(template, stem)
            if number is not None:
                return _complete_group(pattern, number, stem, widths)
        number = _block_number(pattern.runtime_name, stem)
        if number is not None and len(pattern.members) > 1:
            return _merged_group(pattern, number, stem)
    return None


def _complete_group(pattern: LayerPattern, number: str, stem: str, widths: Mapping[str, int]) -> LayerGroup:
    members = tuple(template.replace("{}", number) for template in pattern.members)
    for member in members:
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
    return LayerGroup(pattern.runtime_name.replace("{}", number), members, pattern.is_fused, pattern.keep_reason)


def _merged_group(pattern: LayerPattern, number: str, stem: str) -> LayerGroup:
    """A checkpoint that holds the members merged already."""
    if not pattern.loads_merged:
        parts = ", ".join(template.rpartition(".")[2] for template in pattern.members)
        raise CheckpointError(f"{stem}.weight: found a merged layer, expected its parts ({parts}); split it first")
    return LayerGroup(pattern.runtime_name.replace("{}", number), (stem,), pattern.is_fused, pattern.keep_reason)


def _generic_groups(widths: Mapping[str, int]) -> list[LayerGroup]:
    """The generic rule; see the module."""
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


def _encoder_layer_count(config: Mapping[str, object]) -> int:
    nested = config.get("text_config")
    source = nested if isinstance(nested, Mapping) else config
    count = source.get("num_hidden_layers")
    if type(count) is not int or not 0 < count <= MAX_ENCODER_LAYERS:
        raise CheckpointError(
            f"text_encoder/config.json: found num_hidden_layers {count!r:.40}, expected 1 to {MAX_ENCODER_LAYERS}; "
            f"the runtime builds these layers with the transformer's method"
        )
    return count
