"""A model family as data, and its facts applied to the tensors of a checkpoint.

A layer that a family does not state for a runtime must never be stored quantized for it: its weight would be read
without its scales. Stated layers match state-dict names exactly; a family without any falls under `generic_rule`.
"""

from __future__ import annotations

from collections.abc import Collection, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import product

from omni_convert.formats.containers.tensor_spec import Run, TensorSpec
from omni_convert.formats.errors import CheckpointError
from omni_convert.formats.families.derived_config import ConfigRule
from omni_convert.formats.families.generic_rule import generic_groups
from omni_convert.formats.families.layers import (
    COMFYUI,
    DIFFUSERS,
    EVERY_RUNTIME,
    VLLM_OMNI,
    LayerGroup,
    LayerPattern,
    block_numbers,
    linear_widths,
    matching_groups,
)
from omni_convert.formats.families.original_names import (
    CutLayer,
    OriginalName,
    OriginalTensor,
    diffusers_runs,
    is_of_diffusers_alone,
    original_tensors,
    same,
)
from omni_convert.formats.families.stage import Stage

__all__ = [
    "NOT_IN_DIFFUSERS",
    "EncoderLayers",
    "Family",
    "GgufFacts",
    "MethodNote",
    "NunchakuFacts",
    "Recommendation",
    "RuntimeRefusal",
    "VariantRefusal",
    "repository_refusal",
    "repository_refusals",
    "unknown_scope",
]

MAX_ENCODER_LAYERS = 1024


@dataclass(frozen=True)
class Recommendation:
    """Layers that are better left alone, as an `--ignored-layers` pattern, and why."""

    pattern: str
    reason: str
    methods: tuple[str, ...] = ()


@dataclass(frozen=True)
class MethodNote:
    """A note about a family for users of some methods.

    Attributes:
        methods: the methods that the note is about; empty for all
        layer: a layer that a model must have for the note to apply; "" for the whole family
        runtimes: the runtimes that the note is about
    """

    methods: tuple[str, ...]
    text: str
    layer: str = ""
    runtimes: tuple[str, ...] = EVERY_RUNTIME


@dataclass(frozen=True)
class RuntimeRefusal:
    """Why a runtime cannot run a family quantized.

    Attributes:
        methods: the methods that are refused; empty for all
        dialects: the dialects in which they are refused; empty for all
        is_final: no layer may be stored quantized for the runtime, so that --force cannot help
        is_loaded_here: our loader runs the model
    """

    runtime: str
    reason: str
    methods: tuple[str, ...] = ()
    dialects: tuple[str, ...] = ()
    is_final: bool = False
    is_loaded_here: bool = True

    @property
    def advice(self) -> str:
        """The reason, and what the user can do instead."""
        if not self.is_loaded_here:
            return self.reason
        others = "--runtime diffusers is for our loader"
        return (
            f"{self.reason}; {others}" if self.is_final else f"{self.reason}; {others}, --force converts all the same"
        )

    def concerns(self, runtime: str, method: str | None, dialect: str | None) -> bool:
        is_method = not self.methods or method in self.methods
        return runtime == self.runtime and is_method and (not self.dialects or dialect in self.dialects)


def unknown_scope(model: str) -> tuple[RuntimeRefusal, ...]:
    """The refusal of a model whose layers in vLLM-Omni nobody has tabulated."""
    reason = f"which layers vLLM-Omni builds quantized for {model} is not known here"
    return (RuntimeRefusal(VLLM_OMNI, reason),)


#: The refusal of our loader, and of its scope, for a model that diffusers has no class for.
NOT_IN_DIFFUSERS = RuntimeRefusal(
    DIFFUSERS, "diffusers 0.42 has no class for this model", is_final=True, is_loaded_here=False
)


#: Dialects in which vLLM-Omni was not tried with its diffusion models that are repositories of transformers.
UNTRIED = ("auto-round", "compressed-tensors", "msmodelslim", "transformers", "vllm-omni-svdquant")


def repository_refusal(reason: str, methods: tuple[str, ...] = (), dialects: tuple[str, ...] = ()) -> RuntimeRefusal:
    """A refusal of vLLM-Omni, which alone runs repositories of transformers quantized."""
    return RuntimeRefusal(VLLM_OMNI, reason, methods, dialects, is_final=True, is_loaded_here=False)


def repository_refusals(
    methods: tuple[str, ...], reason: str, dialects: tuple[str, ...] = UNTRIED
) -> tuple[RuntimeRefusal, ...]:
    """The refusals of a repository of transformers, which vLLM-Omni alone runs quantized.

    Args:
        methods: those that vLLM-Omni does not load
        reason: why it does not
        dialects: those in which it was not tried
    """
    tried = "vllm-omni or modelopt" if "auto-round" in dialects else "vllm-omni, modelopt or auto-round"
    untried = f"vLLM-Omni was not tried with this model in this dialect; expected {tried}"
    elsewhere = "this is a repository of transformers, which vLLM-Omni alone runs quantized"
    return (
        repository_refusal(reason, methods),
        repository_refusal(untried, dialects=dialects),
        *(RuntimeRefusal(runtime, elsewhere, is_final=True, is_loaded_here=False) for runtime in (DIFFUSERS, COMFYUI)),
    )


@dataclass(frozen=True)
class VariantRefusal:
    """A model of the family, recognised by a value in its config, that some methods harm too much."""

    config_key: str
    config_value: object
    methods: tuple[str, ...]
    reason: str


@dataclass(frozen=True)
class EncoderLayers:
    """Linears of a text encoder that the runtime builds from the transformer's config block.

    Attributes:
        model_types: the encoders (`model_type` of their config) for which it does so; empty for all
        layers: the linears, with the names of the encoder's checkpoint
        prefix: what the runtime puts before these names
        vision_layers: linears of the blocks of its vision tower
        stays: why the encoder cannot be stored quantized, or None
    """

    model_types: tuple[str, ...]
    layers: tuple[LayerPattern, ...]
    prefix: str = ""
    vision_layers: tuple[LayerPattern, ...] = ()
    stays: str | None = None

    def groups(self, config: Mapping[str, object]) -> Iterator[LayerGroup]:
        """Every layer of the encoder of this config; raises CheckpointError if it does not say how many there are."""
        stacks = [(self.layers, "text_config", "num_hidden_layers")]
        if self.vision_layers:
            stacks.append((self.vision_layers, "vision_config", "depth"))
        for patterns, part, key in stacks:
            count = _layer_count(config, part, key)
            for pattern in patterns:
                for index in range(count if "{}" in pattern.runtime_name else 1):
                    yield pattern.numbered((str(index),))

    def is_name(self, name: str) -> bool:
        """Whether the runtime may look up a layer of such an encoder, of whatever depth, by this name."""
        return any(
            block_numbers(template, name.removeprefix(self.prefix)) is not None
            for pattern in (*self.layers, *self.vision_layers)
            for template in (pattern.runtime_name, *pattern.members)
        )


@dataclass(frozen=True)
class GgufFacts:
    """The expectations of GGUF readers about a family.

    Attributes:
        architecture: `general.architecture`, as ComfyUI-GGUF calls it; `diffusion` where nobody has named one
        other_architectures: tensor of diffusers → the name for models of the family that lack it
        prefix: what stands before original names, where readers expect something
        kept_layers: layers in blocks, as patterns, that ComfyUI-GGUF's quantizer keeps in full precision
        has_vllm_adapter: vLLM's GGUF plugin has an adapter for the family
        has_converter: ComfyUI-GGUF's converter takes the family, and so says which types its mixtures consist of
    """

    architecture: str = "diffusion"
    other_architectures: tuple[tuple[str, str], ...] = ()
    prefix: str = ""
    kept_layers: tuple[str, ...] = ()
    has_vllm_adapter: bool = False
    has_converter: bool = False

    def architecture_of(self, names: Container[str]) -> str:
        """The name for a model with these tensors, as diffusers calls them."""
        others = (other for tensor, other in self.other_architectures if tensor not in names)
        return next(others, self.architecture)

    @property
    def every_architecture(self) -> tuple[str, ...]:
        """The names for all models of the family."""
        return self.architecture, *(other for _, other in self.other_architectures)


@dataclass(frozen=True)
class NunchakuFacts:
    """The expectations of Nunchaku's readers about a family; `{}` stands for a block's number.

    Attributes:
        model_class: their class of the model
        names: modules that they merge, or call otherwise than diffusers
        modulations: layers that they read as AWQ W4A16
        unsigned: layers in their files whose inputs they shift and round without a sign in int4
        cuts: layers that they hold as two
        uses_engine: they run the family in an engine of its own, which has other names for tensors of layers, and
            expects the scales of modulations about 1
    """

    model_class: str
    names: tuple[OriginalName, ...]
    modulations: tuple[str, ...] = ()
    unsigned: tuple[str, ...] = ()
    cuts: tuple[CutLayer, ...] = ()
    uses_engine: bool = False


@dataclass(frozen=True)
class Family:
    """Everything known about one model family. Facts about vLLM-Omni are those of version 0.30.0's model classes.

    Attributes:
        model_classes: names of the model's classes in diffusers
        layers: the linears that each runtime builds quantized; without any, the generic rule chooses
        refusals: why runtimes cannot run the family quantized
        refused_variants: models of the family that a method harms too much
        refused_layers: layers of models that vLLM-Omni misreads as soon as any layer is quantized: pattern and reason
        leading_blocks: method to the number of leading blocks that the runtime's own quantizing leaves in BF16
        original_names: what the model's own code calls its tensors; empty where that is not known
        comfyui_names: tensors that ComfyUI calls otherwise than the model's own code
        has_original_names: diffusers' names are those of the model's own code
        markers: key of the config → the tensor by which ComfyUI tells that it is true, whatever the tensor holds
        trainer_names: other names that trainers of LoRA give to modules
        nunchaku: what Nunchaku's readers expect; None if they do not know the family, or it is not known here
        config: how the config follows from shapes; one rule for each class
        stage: the stage that is quantized, in a repository of transformers; None for a model of diffusers
    """

    name: str
    model_classes: tuple[str, ...]
    layers: tuple[LayerPattern, ...] = ()
    recommendations: tuple[Recommendation, ...] = ()
    method_notes: tuple[MethodNote, ...] = ()
    shared_encoder: EncoderLayers | None = None
    refusals: tuple[RuntimeRefusal, ...] = ()
    refused_variants: tuple[VariantRefusal, ...] = ()
    refused_layers: tuple[tuple[str, str], ...] = ()
    leading_blocks: tuple[tuple[str, int], ...] = ()
    original_names: tuple[OriginalName, ...] = ()
    comfyui_names: tuple[OriginalName, ...] = ()
    has_original_names: bool = False
    markers: tuple[tuple[str, str], ...] = ()
    trainer_names: tuple[OriginalName, ...] = ()
    gguf: GgufFacts = GgufFacts()
    nunchaku: NunchakuFacts | None = None
    config: tuple[ConfigRule, ...] = ()
    stage: Stage | None = None

    def is_spare(self, name: str) -> bool:
        """Whether diffusers' class does without a tensor that the model's own code has."""
        return name.startswith(tuple(prefix for rule in self.config for prefix in rule.spare))

    def markers_of(self, config: Mapping[str, object]) -> frozenset[str]:
        """Names of the marker tensors of the model that a config describes."""
        return frozenset(tensor for key, tensor in self.markers if config.get(key))

    @property
    def every_marker(self) -> frozenset[str]:
        """Names of all marker tensors that a model of the family may have."""
        return frozenset(tensor for _, tensor in self.markers)

    @property
    def known_names(self) -> tuple[OriginalName, ...]:
        """All names other than diffusers' that a tensor may have somewhere; the most common ones come first."""
        return *self.comfyui_names, *self.original_names, *self.trainer_names

    @property
    def is_generic(self) -> bool:
        """Whether nothing is known about its layers in any serving runtime."""
        return not self.layers and not any(refusal.is_final for refusal in self.refusals)

    @cached_property
    def merged_names(self) -> tuple[OriginalName, ...]:
        """The layers that vLLM-Omni merges, and that its loader also takes merged, under its own names."""
        merged = (each for each in self.layers if each.loads_merged and VLLM_OMNI in each.runtimes)
        return tuple(OriginalName(each.runtime_name, each.members) for each in merged)

    def refusal(self, runtime: str, method: str | None = None, dialect: str | None = None) -> RuntimeRefusal | None:
        """Why the runtime cannot run this family quantized (in a method and dialect, if given), or None."""
        assert runtime in EVERY_RUNTIME, runtime
        return next((each for each in self.refusals if each.concerns(runtime, method, dialect)), None)

    def refused_variant(self, config: Mapping[str, object], method: str) -> str | None:
        """Why the model of this config should not be converted to this method, or None."""
        for refusal in self.refused_variants:
            if method in refusal.methods and config.get(refusal.config_key) == refusal.config_value:
                return refusal.reason
        return None

    def bf16_blocks(self, method: str) -> int:
        """How many leading blocks the runtime's own quantizing leaves in BF16."""
        return dict(self.leading_blocks).get(method, 0)

    def layer_groups(
        self,
        specs: Mapping[str, TensorSpec],
        runtime: str,
        methods: Collection[str] = (),
        dialect: str | None = None,
    ) -> list[LayerGroup]:
        """Groups of linears that the runtime builds quantized, in checkpoint order.

        Empty if the runtime runs nothing of this family quantized; `refusal` then says why. Groups with a
        `keep_reason` are among them, for the list of ignored layers.

        Args:
            specs: tensors of the checkpoint, by name
            runtime: one of `EVERY_RUNTIME`
            methods: those of the quantized layers; empty for any
            dialect: in which they are stored; None for the default one

        Raises:
            CheckpointError: a member of a fused group is missing or has another input width; the checkpoint holds none
                of the family's layers, or one for which the runtime misreads it.
        """
        refusal = self.refusal(runtime)
        if refusal is not None and refusal.is_final:
            return []
        widths = linear_widths(specs)
        if not self.layers:
            return generic_groups(widths)
        if runtime == VLLM_OMNI:
            self._check_layers(widths)
        patterns = [each for each in self.layers if each.is_built_quantized(runtime, methods, dialect)]
        groups = matching_groups(patterns, widths)
        if not groups:
            raise CheckpointError(
                f"{self.name}: found none of its layers among {len(specs)} tensors, expected names such as "
                f"'{patterns[0].members[0].replace('{}', '0')}.weight', as diffusers spells them"
            )
        return groups

    def _check_layers(self, stems: Iterable[str]) -> None:
        for stem, (pattern, reason) in product(stems, self.refused_layers):
            if block_numbers(pattern, stem) is not None:
                raise CheckpointError(f"{stem}.weight: {reason}")

    def recommended_ignored(self, method: str) -> tuple[Recommendation, ...]:
        """Layers that are better left alone with this method; the user decides."""
        return tuple(each for each in self.recommendations if method in each.methods or not each.methods)

    def notes(self, method: str, runtime: str, tensors: Container[str]) -> tuple[str, ...]:
        """Notes for the user about quantizing this model with this method for this runtime.

        Args:
            tensors: names of the model's tensors
        """
        return tuple(
            note.text
            for note in self.method_notes
            if (method in note.methods or not note.methods)
            and (not note.layer or f"{note.layer}.weight" in tensors)
            and runtime in note.runtimes
        )

    def shared_encoder_layers(
        self, text_encoder_config: Mapping[str, object], quantized: Collection[str] = ()
    ) -> tuple[str, ...]:
        """Linears of the text encoder that vLLM-Omni builds from the transformer's block, as it calls them.

        The block must list them as ignored, or they load as garbage.

        Args:
            text_encoder_config: `text_encoder/config.json`
            quantized: stems that the encoder stores quantized; they are left out, since they must not be listed

        Raises:
            CheckpointError: the config does not say how many layers there are.
        """
        encoder = self.shared_encoder
        if encoder is None:
            return ()
        if encoder.model_types and text_encoder_config.get("model_type") not in encoder.model_types:
            return ()
        # transformers' base models store `layers.0...`, the same model with its head `model.layers.0...`.
        stored = {*quantized, *(f"model.{stem}" for stem in quantized)}
        return tuple(
            f"{encoder.prefix}{name}"
            for group in encoder.groups(text_encoder_config)
            if not stored.issuperset(group.members)
            for name in dict.fromkeys((group.runtime_name, *group.members))
        )

    def original_tensors(self, specs: Mapping[str, TensorSpec]) -> dict[str, OriginalTensor] | None:
        """Original name → tensor, as ComfyUI and the readers of GGUF expect them.

        Args:
            specs: the tensors of the model in diffusers

        Returns:
            None if the original name of a tensor is not known; see `has_original_names`
        """
        return original_tensors((*self.comfyui_names, *self.original_names), specs) if self.original_names else None

    def nunchaku_tensors(self, specs: Mapping[str, TensorSpec]) -> dict[str, OriginalTensor] | None:
        """Name → tensor, as Nunchaku's readers expect them; None if they do not know the family.

        Args:
            specs: the tensors of the model in diffusers
        """
        return None if self.nunchaku is None else original_tensors(_with_others(self.nunchaku.names, specs), specs)

    def merged_tensors(self, specs: Mapping[str, TensorSpec]) -> dict[str, OriginalTensor] | None:
        """Name → tensor, with layers merged as in `merged_names`; None if the model lacks a part of one.

        Args:
            specs: the tensors of the model in diffusers
        """
        return original_tensors(_with_others(self.merged_names, specs), specs)

    def has_names_of_diffusers(self, names: Iterable[str]) -> bool:
        """Whether some of these names of tensors are diffusers', where the model's own code has others."""
        return any(is_of_diffusers_alone(self.original_names, name) for name in names)

    def diffusers_runs(
        self, specs: Mapping[str, TensorSpec], stored: Mapping[str, TensorSpec]
    ) -> dict[str, list[Run]] | None:
        """Diffusers' name → the rows of stored tensors of which the tensor consists.

        Args:
            specs: the tensors of the model in diffusers
            stored: tensors by their original names

        Returns:
            None if these are not the tensors of the model under names that are known, diffusers' among them
        """
        if all(name in stored and stored[name].elements == spec.elements for name, spec in specs.items()):
            return {name: [Run(name, 0, spec.shape[0] if spec.shape else 1)] for name, spec in specs.items()}
        others = (self.nunchaku.names if self.nunchaku is not None else (), self.merged_names)
        tables = (self.known_names, *(_with_others(table, specs) for table in others if table))
        return next(filter(None, (diffusers_runs(table, specs, stored) for table in tables if table)), None)


def _with_others(table: tuple[OriginalName, ...], specs: Iterable[str]) -> tuple[OriginalName, ...]:
    """A table, and diffusers' names for all tensors that it does not give."""
    return (*table, *same(*dict.fromkeys(name.partition(".")[0] for name in specs)))


def _layer_count(config: Mapping[str, object], part: str, key: str) -> int:
    """The number of layers of an encoder, from the part of its config or from a config without parts."""
    nested = config.get(part)
    source = nested if isinstance(nested, Mapping) else config
    count = source.get(key)
    if type(count) is not int or not 0 < count <= MAX_ENCODER_LAYERS:
        raise CheckpointError(
            f"text_encoder/config.json: found {key} {count!r:.40}, expected 1 to {MAX_ENCODER_LAYERS}; "
            f"the runtime builds these layers with the transformer's method"
        )
    return count
