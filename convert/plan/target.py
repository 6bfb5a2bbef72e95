"""The target of a conversion: the reader of the result decides names, layers, dtypes, config block and files."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar

import torch

from omni_convert.convert.budget import KEPT
from omni_convert.convert.calibration.activation_scheme import ActivationScheme, choose_activation_scheme
from omni_convert.convert.plan.component_plan import plan_files
from omni_convert.convert.plan.file_names import FileNames, names_of_readers
from omni_convert.convert.plan.shared_encoder import unquantized_encoder_layers
from omni_convert.convert.plan.steps import Step, dtype_of_copy
from omni_convert.convert.recipe import Recipe
from omni_convert.convert.source.built_model import stems_in_model
from omni_convert.convert.source.component import SourceComponent
from omni_convert.formats.checks.stage import fp8_refusal
from omni_convert.formats.containers.checkpoint import Checkpoint
from omni_convert.formats.containers.names import WEIGHT
from omni_convert.formats.containers.shards import Shards
from omni_convert.formats.containers.tensor_spec import TensorSpec
from omni_convert.formats.dialects import vllm_omni
from omni_convert.formats.dialects.auto_round import named_in_runtime
from omni_convert.formats.dialects.base import Dialect
from omni_convert.formats.dialects.found import SIDECARS
from omni_convert.formats.dialects.modelopt import MODELOPT_DIALECT
from omni_convert.formats.dialects.table import DIALECTS
from omni_convert.formats.errors import CheckpointError, RecipeError
from omni_convert.formats.families.generic_rule import generic_groups
from omni_convert.formats.families.layers import VLLM_OMNI, LayerGroup, linear_widths
from omni_convert.formats.families.stage import Stage
from omni_convert.formats.format import Format, QuantizingFormat
from omni_convert.formats.options import DIALECT_OF_METHOD
from omni_convert.formats.schemes.int8 import Int8
from omni_convert.formats.schemes.svdquant import SvdQuantNvfp4
from omni_convert.formats.table import build_format
from omni_convert.formats.views.original_names import quiet

__all__ = ["RuntimeTarget", "Scope", "StorageTarget", "Target", "linears_in_blocks", "other_linears"]

# Diffusers' names of the main stack of blocks; refiners and single-stream blocks come after it.
MAIN_STACK = re.compile(r"(?:blocks|layers|transformer_blocks)\.(\d+)\.")
CASTS_INPUTS = ".DenseReluDense.wo"
# Parts of the names of a language model's layers that look at pictures or listen.
TOWER = re.compile(r"visual|vision(_.+)?|audio(_.+)?|image_encoder")


@dataclass(frozen=True)
class Scope:
    """The layers that a target accepts quantized.

    Attributes:
        groups: layers of the source that are quantized together or not at all; those with a `keep_reason` stay
        others: names of layers that stay in any case
        patterns: further layers to keep, as `--ignored-layers` patterns
        notes: what the user should know about these layers
    """

    groups: Sequence[LayerGroup]
    others: Collection[str]
    patterns: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Target(ABC):
    """A component, the method that it is quantized with, and what the reader of the result expects."""

    component: SourceComponent
    method: str
    recipe: Recipe
    #: The runtime's name of a group → what was chosen for it under a budget: a method, a type of GGUF, or `bf16`.
    chosen: Mapping[str, str] = field(default_factory=dict)

    #: Whether what is known of the inputs may decide how weights are rounded.
    allows_gptq: ClassVar[bool] = True

    @property
    @abstractmethod
    def dialect(self) -> Dialect:
        """How the result is spelled."""

    @property
    def names(self) -> FileNames | None:
        """The names in the result, where its reader has others than diffusers."""
        return None

    @property
    def weights(self) -> Checkpoint:
        """The tensors of the component under the names that they have in the result."""
        return self.names.checkpoint if self.names is not None else self.component.weights

    @cached_property
    def scheme(self) -> ActivationScheme:
        """How activations are quantized.

        Raises:
            RecipeError: the method does not support the scheme that the recipe asks for.
            CalibrationError: the scheme needs statistics, and the recipe names none.
        """
        return choose_activation_scheme(self.method, self.recipe)

    def choices_of(self, group: LayerGroup) -> dict[str, Any]:
        """The user's choices about a group's format."""
        return self.recipe.format_choices

    def method_of(self, group: LayerGroup) -> str:
        """The method of a group: the one that was chosen for it, or that of the component."""
        return self.chosen.get(group.runtime_name, self.method)

    def is_kept_by_choice(self, group: LayerGroup) -> bool:
        """Whether a budget is best spent on leaving a group as it is."""
        return self.chosen.get(group.runtime_name) == KEPT

    def format_of(self, group: LayerGroup) -> QuantizingFormat:
        """The format of the weights of a group."""
        method = self.method_of(group)
        if method != self.method:
            return replace(self, method=method, chosen={}).format_of(group)
        recipe, is_calibrated = self.recipe, self.scheme.is_calibrated
        fmt = build_format(
            self.method,
            static=is_calibrated,
            smooth=is_calibrated,
            per_channel=not is_calibrated and self.dialect.is_dynamic_fp8_per_row,
            shared_in_group=group.is_fused and recipe.int8_fused_scales == "shared",
            **self.choices_of(group),
        )
        return fmt.for_weight(self.weights[f"{self.written_group(group).members[0]}{WEIGHT}"].shape)

    @abstractmethod
    def scope(self) -> Scope:
        """The layers to choose from.

        Raises:
            RecipeError: the reader accepts nothing of this model.
            CheckpointError: a member of a group is missing.
        """

    def without_leading_blocks(self, groups: Sequence[LayerGroup]) -> Iterator[LayerGroup]:
        """The groups; those of a denoiser's leading blocks that stay as they are have that as their reason.

        Raises:
            RecipeError: the recipe asks for leading blocks, and none of the groups is in one.
        """
        component, wanted = self.component, self.recipe.bf16_blocks
        leading = component.family.bf16_blocks(self.method) if wanted is None else wanted
        if component.name and not component.is_denoiser:
            leading = 0
        if leading and wanted and all(_block_number(group) >= leading for group in groups):
            raise RecipeError(
                f"--bf16-blocks: found {leading}, but none of the layers that can be quantized is in one of the first "
                "blocks; name layers with --ignored-layers"
            )
        for group in groups:
            is_leading = group.keep_reason is None and _block_number(group) < leading
            yield replace(group, keep_reason=f"one of the first {leading} blocks") if is_leading else group

    def written_group(self, group: LayerGroup) -> LayerGroup:
        """A group of the source as the result holds it."""
        return self.names.written(group) if self.names is not None else group

    def dtype_of_copy(self, spec: TensorSpec, *, is_layer: bool) -> torch.dtype:
        """The dtype of a tensor that is not quantized.

        Args:
            is_layer: it is the weight of a layer that could have been quantized
        """
        return dtype_of_copy(spec, self.weights, self.recipe)

    def block(
        self, formats: Mapping[str, Format], kept: Sequence[LayerGroup], encoder: Collection[str]
    ) -> dict[str, Any] | None:
        """The `quantization_config` of the component; None if the reader needs none.

        Args:
            formats: stem of each quantized layer to its format; also the runtime's names, where the dialect lists them
            kept: groups of the scope that stay
            encoder: stems of the quantized layers of the text encoder
        """
        return None

    @property
    def stage(self) -> Stage | None:
        """The stage whose block is written; None for a model of diffusers."""
        return None

    def sidecars(
        self, block: Mapping[str, Any] | None, formats: Mapping[str, Format], names: Sequence[str]
    ) -> Mapping[str, Mapping[str, Any]]:
        """JSON files to write beside the weights: name to content.

        Args:
            block: the config block
            formats: stem of each quantized layer to its format
            names: all tensors that are written
        """
        return self.dialect.sidecars(formats, names)

    @abstractmethod
    def files(self, steps: Sequence[Step], formats: Mapping[str, Format]) -> Shards:
        """The files of weights that the steps fill."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes for the user about the files."""
        return ()


@dataclass(frozen=True)
class RuntimeTarget(Target):
    """Safetensors for a runtime that builds some layers of the model's family quantized."""

    @property
    def dialect(self) -> Dialect:
        """The recipe's; ModelOpt's in place of vLLM-Omni's own for a stage that is a model of vLLM."""
        dialect = DIALECTS[self.recipe.dialect].for_family(self.component.family)
        return MODELOPT_DIALECT if self._vllm_stage is not None and dialect is vllm_omni.VLLM_OMNI else dialect

    @property
    def _vllm_stage(self) -> Stage | None:
        """The stage, if it is a model of vLLM and not one of vLLM-Omni's diffusion models."""
        stage = self.component.stage
        return stage if stage is not None and not stage.is_diffusion else None

    @cached_property
    def names(self) -> FileNames | None:
        """The names that the dialect's readers know, where these are not diffusers'.

        Raises:
            RecipeError: they are not known.
        """
        component = self.component
        if not self.dialect.renames_tensors or component.served_family is None or component.stage is not None:
            return None
        return names_of_readers(component.weights, component.config, self.recipe)

    @property
    def stage(self) -> Stage | None:
        """The stage whose block is written, and where it stands."""
        stage = self.component.stage
        return replace(stage, config_path=()) if stage is not None and self.dialect.names_quantized_blocks else stage

    def scope(self) -> Scope:
        component, recipe, family = self.component, self.recipe, self.component.family
        self._refuse()
        groups = family.layer_groups(component.weights, recipe.runtime, {self.method}, self.dialect.name)
        if not groups:
            raise RecipeError(
                f"{component.config_path}: found no layer of {family.name} that {recipe.runtime} runs quantized"
            )
        if component.stage is not None:
            refused = fp8_refusal(component.stage, map(self.format_of, groups))
            if refused is not None:
                raise RecipeError(f"{component.config_path}: {refused.reason}; {refused.remedy}")
        groups = [*groups, *self._covering(groups), *self._of_own_format(groups)]
        members = {stem for group in groups for stem in group.members}
        recommended = family.recommended_ignored(self.method)
        if component.is_transformers:
            groups = list(_without_casting_layers(without_towers(groups), self.method))
        groups = list(self.without_leading_blocks(groups))
        return Scope(
            groups if self.names is None else self.names.joined(groups),
            other_linears(component.weights, members),
            tuple(each.pattern for each in recommended) if recipe.recommended else (),
            tuple(self._notes()),
        )

    def _covering(self, groups: Sequence[LayerGroup]) -> Iterator[LayerGroup]:
        """Layers that have to be quantized as well, or readers would take others for unquantized by their names."""
        stems = [stem for group in groups if group.keep_reason is None for stem in group.members]
        for name in other_linears(self.component.weights, {stem for group in groups for stem in group.members}):
            if any(self.dialect.is_covered(stem, name) for stem in stems):
                yield LayerGroup(name, (name,), is_fused=False)

    def _of_own_format(self, groups: Sequence[LayerGroup]) -> Iterator[LayerGroup]:
        """Layers that the dialect's readers expect in one format, whatever the method."""
        for name in other_linears(self.component.weights, {stem for group in groups for stem in group.members}):
            if self.dialect.own_format(self.component.family, name) is not None:
                yield LayerGroup(name, (name,), is_fused=False)

    def format_of(self, group: LayerGroup) -> QuantizingFormat:
        own = self.dialect.own_format(self.component.family, group.members[0])
        if own is not None:
            return own
        stem = self.written_group(group).members[0]
        return self.dialect.fitted_format(super().format_of(group), self.component.family, stem)

    def _refuse(self) -> None:
        """Raises RecipeError if the runtime cannot run the result, or if it would be too bad."""
        component, family = self.component, self.component.family
        flaw = self.dialect.model_flaw(family, {self.method})
        if flaw is not None:
            raise RecipeError(f"--dialect {self.dialect.name}: {flaw}")
        if self.dialect.unproven is not None and not self.recipe.force:
            name, why = self.dialect.name, self.dialect.unproven
            raise RecipeError(f"--dialect {name}: {why}; --force writes it all the same")
        refusal = family.refusal(self.recipe.runtime, self.method, self.dialect.name)
        is_forced = self.recipe.force and not (refusal is not None and refusal.is_final)
        is_encoder = bool(component.name) and component.is_transformers
        if is_forced or is_encoder:  # what a runtime does with an encoder, the transformer's family says
            return
        if refusal is not None:
            raise RecipeError(f"{component.config_path}: {refusal.advice}")
        reason = family.refused_variant(component.config, self.method)
        if reason is not None:
            raise RecipeError(f"{component.config_path}: {reason}; choose another method, or --force")

    def _notes(self) -> Iterator[str]:
        family, recipe = self.component.family, self.recipe
        if not self.component.is_encoder:  # whose family is neither known nor needed
            yield from family.notes(self.method, recipe.runtime, self.component.weights)
        if not recipe.recommended:
            for each in family.recommended_ignored(self.method):
                yield (
                    f"recommended for {family.name}: --ignored-layers '{each.pattern}' ({each.reason}); --recommended "
                    "applies it"
                )

    def block(
        self, formats: Mapping[str, Format], kept: Sequence[LayerGroup], encoder: Collection[str]
    ) -> dict[str, Any] | None:
        component = self.component
        if self.recipe.runtime == VLLM_OMNI and not (self.dialect.takes_parts or self.recipe.force):
            self._refuse_parts(formats)
        if self._vllm_stage is not None:
            return self._stage_block(self._vllm_stage, formats, kept)
        ignored = {*vllm_omni.ignored_names(kept)}
        if component.is_denoiser and vllm_omni.VLLM_OMNI.name in self.dialect.runtimes:
            ignored |= {*unquantized_encoder_layers(component.source, component.family, encoder)}
        if not self.dialect.lists_built_layers:
            ignored |= {*other_linears(component.weights, formats)}
        if component.is_encoder and self.dialect.looks_up_model_names:
            ignored |= {*stems_in_model(component.weights, component.config, ignored)}
        block = self.dialect.encoder_block if component.is_encoder else self.dialect.block
        return block({**formats, **self._merged_names(formats)}, ignored)

    def _refuse_parts(self, quantized: Collection[str]) -> None:
        """Raises RecipeError if parts of a layer that vLLM-Omni merges are written by themselves."""
        written = {group.runtime_name: self.written_group(group).members for group in self.scope().groups}
        refused = {name: parts for name, parts in written.items() if len(parts) > 1 and parts[0] in quantized}
        if refused:
            name, parts = next(iter(refused.items()))
            leaves = dict.fromkeys(first.rpartition(".")[2] for first, *_ in refused.values())
            options = " ".join(f"--ignored-layers {leaf}" for leaf in leaves)
            raise RecipeError(
                f"{self.component.config_path}: '{parts[0]}': vLLM-Omni merges it into '{name}', and its loader raises "
                f"an error on the wtscale of a part as on the merged layer; {options} leaves such layers as they are, "
                "--runtime diffusers is for our loader, --force converts all the same"
            )

    def _merged_names(self, formats: Mapping[str, Format]) -> dict[str, Format]:
        """Format of each merged layer of a mixture, by every name that a runtime has for it, if the block has them."""
        if not self.chosen or not self.dialect.lists_runtime_names:
            return {}
        quantized = [group for group in self.scope().groups if formats.keys() >= {*group.members}]
        return {name: formats[group.members[0]] for group in quantized for name in group.names}

    def _stage_block(
        self, stage: Stage, formats: Mapping[str, Format], kept: Sequence[LayerGroup]
    ) -> dict[str, Any] | None:
        if self.dialect is not MODELOPT_DIALECT:
            block = self.dialect.block(formats, vllm_omni.ignored_names(kept))
            return None if block is None else named_in_runtime(block, stage.prefix, stage.runtime_prefix)
        return {**MODELOPT_DIALECT.block(formats, ()), "ignore": stage.patterns(kept)}

    def sidecars(
        self, block: Mapping[str, Any] | None, formats: Mapping[str, Format], names: Sequence[str]
    ) -> Mapping[str, Mapping[str, Any]]:
        """The files of the dialect; for a stage also the file from which vLLM learns that the model is quantized.

        VLLM looks for a block at the top level of config.json or in this file, before vLLM-Omni looks into the stage's
        part. Every stage gets the file's block, so that it ignores the layers of the others.
        """
        sidecars = self.dialect.sidecars(formats, names)
        if block is None or self.stage is None or not self.stage.config_path:
            return sidecars
        return {**sidecars, SIDECARS[0]: {**block, "ignore": [*block["ignore"], *self.stage.other_stages]}}

    @property
    def notes(self) -> tuple[str, ...]:
        notes = [] if self.dialect.unproven is None else [f"{self.dialect.name}: {self.dialect.unproven}"]
        if DIALECT_OF_METHOD.get(self.method) == self.dialect.name and self.method != SvdQuantNvfp4.method:
            notes.append(f"{self.method} is written in the dialect {self.dialect.name}, the only one that holds it")
        if self.names is not None:
            notes.append(f"{self.component.label}: the file has {self.names.note}")
        return tuple(notes)

    def files(self, steps: Sequence[Step], formats: Mapping[str, Format]) -> Shards:
        kept = self.dialect.kept_metadata(self.component.opened.checkpoint.metadata)
        model = self.dialect.model_metadata(self.component.config_if_any, self.component.family)
        metadata = {**kept, **self.dialect.metadata(formats), **model}
        return plan_files(steps, self.recipe, metadata, self.component)


@dataclass(frozen=True)
class StorageTarget(RuntimeTarget):
    """Safetensors whose layers our loader dequantizes before use: those of text encoders and VAEs.

    In a model of diffusers these are all linears and 2- and 3-dimensional convolutions. A checkpoint of transformers
    may call its layers otherwise than its class does; there they are the linears in its blocks.
    """

    allows_gptq = False

    def scope(self) -> Scope:
        component = self.component
        stems = linears_in_blocks(component.weights) if component.is_transformers else self._layers_of_class()
        groups = [LayerGroup(stem, (stem,), is_fused=False) for stem in stems if f"{stem}{WEIGHT}" in component.weights]
        if component.is_transformers:
            groups = list(without_towers(groups))
        if not groups:
            raise RecipeError(
                f"{component.config_path}: found no layer to store as fp8, expected a text encoder or a VAE"
            )
        return Scope(list(self.without_leading_blocks(groups)), other_linears(component.weights, {*stems}))

    def _layers_of_class(self) -> Collection[str]:
        """Asks the class, because names and shapes do not tell a convolution from a transposed one."""
        import diffusers

        from omni_convert.loaders.layers.fp8_storage import storage_layers

        where, config = self.component.config_path, self.component.config
        name = config.get("_class_name")
        model_class = getattr(diffusers, name, None) if isinstance(name, str) else None
        if not (isinstance(model_class, type) and issubclass(model_class, diffusers.ModelMixin)):
            raise RecipeError(f"{where}: found class {str(name)[:64]!r}, expected a model of diffusers for fp8_storage")
        settings = {key: value for key, value in config.items() if key != "quantization_config"}
        try:
            with torch.device("meta"), quiet("diffusers"):
                model = model_class.from_config(settings)  # type: ignore[attr-defined]  # diffusers is untyped
        except (TypeError, ValueError, KeyError, RuntimeError) as error:
            reason = str(error).strip().split("\n", 1)[0]
            raise CheckpointError(
                f"{where}: found a config that {name} refuses ({reason}), expected its own"
            ) from error
        return storage_layers(model)


def without_towers(groups: Sequence[LayerGroup]) -> Iterator[LayerGroup]:
    """The groups of a language model; those of its vision or audio tower stay, unless there is nothing else."""
    towers = [any(TOWER.fullmatch(part) for part in group.members[0].split(".")) for group in groups]
    for group, is_in_tower in zip(groups, towers, strict=True):
        stays = is_in_tower and not all(towers) and group.keep_reason is None
        yield replace(group, keep_reason="a vision or audio tower: small, and sensitive") if stays else group


def _without_casting_layers(groups: Iterable[LayerGroup], method: str) -> Iterator[LayerGroup]:
    """The groups; T5's `wo` stays, since transformers casts its inputs to the dtype of the weight, if not to INT8."""
    for group in groups:
        stays = group.members[0].endswith(CASTS_INPUTS) and method != Int8.method
        yield replace(group, keep_reason="transformers casts its inputs to the dtype of the weight") if stays else group


def linears_in_blocks(checkpoint: Checkpoint) -> dict[str, None]:
    """Stems of the linears that the generic rule finds, for readers that no family's facts are about; ordered."""
    return {stem: None for group in generic_groups(linear_widths(checkpoint)) for stem in group.members}


def other_linears(tensors: Mapping[str, TensorSpec], stems: Collection[str] = ()) -> list[str]:
    """Names of the two-dimensional weights that belong to none of the layers in `stems`."""
    return [
        name.removesuffix(WEIGHT)
        for name, spec in tensors.items()
        if name.endswith(WEIGHT) and len(spec.shape) == 2 and name.removesuffix(WEIGHT) not in stems
    ]


def _block_number(group: LayerGroup) -> float:
    """The number of a group's block in the model's main stack; infinite elsewhere."""
    match = MAIN_STACK.match(group.members[0])
    return int(match[1]) if match else math.inf
