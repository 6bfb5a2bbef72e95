"""A component that becomes one GGUF file, for ComfyUI-GGUF, stable-diffusion.cpp, vLLM's plugin and diffusers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor

from omni_convert.convert.budget import KEPT
from omni_convert.convert.plan.file_names import FileNames, gguf_names
from omni_convert.convert.plan.steps import QuantizeStep, Step, outputs
from omni_convert.convert.plan.target import Scope, Target, linears_in_blocks
from omni_convert.formats.arithmetic.ggml.mixtures import MIXTURES, types_of
from omni_convert.formats.containers.names import WEIGHT
from omni_convert.formats.containers.shards import Shards
from omni_convert.formats.containers.tensor_spec import TensorSpec
from omni_convert.formats.dialects.base import Dialect
from omni_convert.formats.dialects.gguf import GGUF, SMALL_ELEMENTS
from omni_convert.formats.errors import RecipeError, quoted
from omni_convert.formats.families.layers import LayerGroup
from omni_convert.formats.families.patterns import matches
from omni_convert.formats.format import Format
from omni_convert.formats.schemes.gguf import DEFAULT_TYPE, Gguf

__all__ = ["GgufTarget"]

# Names of layers in T5, CLIP and language models.
OF_TEXT_MODEL = re.compile(
    r"encoder\.block\.\d+\.layer\.0\.SelfAttention\.|(text_model\.encoder|model|language_model\.model)\.layers\.\d+\.self_attn\."
)
HOW_TO_LOAD = (
    "load it with from_single_file(FILE, config=FOLDER OF ITS config.json, "
    "quantization_config=GGUFQuantizationConfig(...))"
)


@dataclass(frozen=True)
class GgufTarget(Target):
    """One GGUF file: linears in blocks have the type asked for, the rest is float32, which every reader accepts."""

    @property
    def dialect(self) -> Dialect:
        return GGUF

    @cached_property
    def names(self) -> FileNames:
        """The names that the file has; raises RecipeError if it cannot have those that the recipe asks for."""
        return gguf_names(self.component.weights, self.component.config, self.recipe)

    def scope(self) -> Scope:
        """Layers of the file; one that joins several of diffusers' layers is a group of these."""
        component = self.component
        weights = component.weights
        is_unnamed = "_class_name" not in component.config_if_any
        if component.is_transformers or (is_unnamed and any(map(OF_TEXT_MODEL.match, weights))):
            option = f"--component {component.name}=gguf" if component.name in self.recipe.component else "-m gguf"
            raise RecipeError(
                f"{component.path}: found a text model for {option}, expected a denoising model; every reader of GGUF "
                "takes text models from llama.cpp's convert_hf_to_gguf.py, under its names"
            )
        linears = linears_in_blocks(weights)
        layers = self.names.layers
        groups = [
            LayerGroup(stem, parts, is_fused=False, keep_reason=self._reason_to_keep(parts))
            for stem, parts in layers.items()
            if linears.keys() >= {*parts}
        ]
        if not groups:
            raise RecipeError(
                f"{component.config_path}: found no layer to quantize to {self.method}, expected linears in blocks"
            )
        others = {name for stem, parts in layers.items() for name in (stem, *parts)}
        return Scope(list(self.without_leading_blocks(groups)), others)

    def _reason_to_keep(self, parts: Sequence[str]) -> str | None:
        facts = self.component.family.gguf
        if any(matches(pattern, part) for pattern in facts.kept_layers for part in parts):
            return f"kept by ComfyUI-GGUF's quantizer for {facts.architecture}"
        if any(self.component.family.is_spare(part) for part in parts):
            return "is no layer of the model in diffusers"
        if any(self.component.weights[f"{part}{WEIGHT}"].elements <= SMALL_ELEMENTS for part in parts):
            return f"has {SMALL_ELEMENTS} elements or less"
        return None

    @cached_property
    def _types(self) -> dict[str, str]:
        """Each weight of the file that may be quantized, and its type."""
        weights = [f"{group.runtime_name}{WEIGHT}" for group in self.scope().groups if group.keep_reason is None]
        chosen = {f"{name}{WEIGHT}": kind for name, kind in self.chosen.items()}
        return {name: chosen.get(name, kind) for name, kind in types_of(self._kind, weights).items()}

    def method_of(self, group: LayerGroup) -> str:
        return self.method  # the choice is one of types

    @property
    def _kind(self) -> str:
        """The type or mixture asked for; the most frequent type of one that a budget chose."""
        kinds = sorted(kind for kind in self.chosen.values() if kind != KEPT)
        return max(kinds, key=kinds.count) if kinds else self.recipe.gguf_type or DEFAULT_TYPE

    @cached_property
    def _importance(self) -> dict[str, Tensor]:
        """The importance of the columns of each weight that the recipe's file covers.

        Raises:
            CheckpointError: the file cannot be read.
            RecipeError: it is of another model.
        """
        from omni_convert.formats.containers.imatrix import read_imatrix

        if self.recipe.imatrix is None:
            return {}
        found = {name: entry for name, entry in read_imatrix(self.recipe.imatrix).items() if name in self._types}
        if not found:
            raise RecipeError(
                f"--imatrix {self.recipe.imatrix}: found none of the {len(self._types)} weights to quantize, expected "
                f"names such as {next(iter(self._types))}"
            )
        for name, entry in found.items():
            if len(entry) != (columns := self.weights[name].shape[1]):
                raise RecipeError(
                    f"--imatrix {self.recipe.imatrix}: {quoted(name)}: found {len(entry)} columns, expected {columns}"
                )
        return found

    def choices_of(self, group: LayerGroup) -> dict[str, Any]:
        name = f"{group.runtime_name}{WEIGHT}"
        importance = self._importance.get(name)
        return {**self.recipe.format_choices, "gguf_type": self._types[name], "importance": importance}

    def dtype_of_copy(self, spec: TensorSpec, *, is_layer: bool) -> torch.dtype:
        return GGUF.dtype_of_copy(spec, is_layer=is_layer)

    def files(self, steps: Sequence[Step], formats: Mapping[str, Format]) -> Shards:
        from omni_convert.formats.containers.gguf_writer import GgufFile

        quantized = {
            weight.name: (cast("Gguf", formats[stem]).type, weight.shape)
            for step in steps
            if isinstance(step, QuantizeStep)
            for stem, weight in zip(step.group.members, step.weights, strict=True)
        }
        architecture = self.component.family.gguf.architecture_of(self.component.weights)
        content = GgufFile(architecture, self._kind, quantized, self._key_values)
        name = "mixed" if self.chosen else self._kind
        return Shards({f"{self.component.source.short_name}-{name}.gguf": outputs(steps)}, None, "", content)

    @property
    def _key_values(self) -> dict[str, str | int]:
        """The key-values by which llama.cpp tells that an importance matrix was used."""
        if self.recipe.imatrix is None:
            return {}
        return {
            "quantize.imatrix.file": self.recipe.imatrix.name,
            "quantize.imatrix.entries_count": len(self._importance),
        }

    @property
    def notes(self) -> tuple[str, ...]:
        how_to_load = f"; {HOW_TO_LOAD}" if self.names.is_for_diffusers else ""
        notes = [f"{self.component.label}: the GGUF file has {self.names.note}{how_to_load}"]
        if self._kind in MIXTURES:
            notes.append(f"{self._kind} is {MIXTURES[self._kind]}{self._whose_choice}")
        recipe = self.recipe
        unused = sorted({kind for kind in self._types.values() if not Gguf(kind, recipe.search).uses_importance})
        if unused and (recipe.imatrix is not None or recipe.is_calibrated):
            notes.append(
                f"{', '.join(unused)} follows the largest numbers: the importance of columns was not used there"
            )
        if self.recipe.imatrix is not None and len(self._importance) < len(self._types):
            notes.append(
                f"--imatrix covers {len(self._importance)} of {len(self._types)} weights; in the others, all columns "
                "weigh the same"
            )
        return tuple(notes)

    @property
    def _whose_choice(self) -> str:
        family = self.component.family
        if family.gguf.has_converter:
            return ""
        return f"; this is our choice, since ComfyUI-GGUF does not convert {family.name}"
