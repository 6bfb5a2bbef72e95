"""Decides everything about a conversion from headers alone. No tensor is read here; every user error is raised here.

recipe ─┐
        ├─► plan_conversion ─► Plan: components, steps, output tensors, shards, config blocks
headers ┘
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omni_convert.convert.calibration.moments import Moments
from omni_convert.convert.calibration.rounding import load_moments
from omni_convert.convert.plan.component_plan import ComponentPlan
from omni_convert.convert.plan.quantizing import plan_quantized, target_of
from omni_convert.convert.plan.selection import check_patterns, choose_layers
from omni_convert.convert.plan.shared_encoder import check_encoder
from omni_convert.convert.plan.transcoding import plan_transcoded
from omni_convert.convert.recipe import Recipe
from omni_convert.convert.source.component import SourceComponent, open_components
from omni_convert.convert.source.component_folder import MANIFEST
from omni_convert.convert.source.component_methods import component_methods
from omni_convert.convert.source.location import Source
from omni_convert.formats.containers.checkpoint import Checkpoint
from omni_convert.formats.containers.component import DENOISERS
from omni_convert.formats.containers.weight_files import checked_path
from omni_convert.formats.dialects.found import DESCRIPTIONS, SIDECARS
from omni_convert.formats.errors import RecipeError

if TYPE_CHECKING:
    from omni_convert.formats.containers.reader import TensorFile
    from omni_convert.formats.statistics.statistics import Statistics

__all__ = ["Plan", "plan_conversion"]

WEIGHT_SUFFIXES = (".safetensors", ".gguf", ".index.json", ".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".h5", ".onnx")
ROOT_FILES = ("*.json", "LICENSE*", "NOTICE*")
# Our own is written in its place.
MODEL_CARD = "README.md"


@dataclass(frozen=True)
class Plan:
    """A whole conversion.

    Attributes:
        copies: files that are copied byte for byte: path inside the output → source path
        notes: how the recipe was interpreted, for the user
        weights: component → its weights in plain numbers, on which statistics must have been recorded
        statistics: identity of the statistics that were attached, if there are some
        moments: identity of the second moments that rounding uses, if there are some
        loras: component → the LoRA files that are baked in, as the manifest describes them
    """

    source: Source
    recipe: Recipe
    components: tuple[ComponentPlan, ...]
    copies: dict[str, Path] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    weights: Mapping[str, Checkpoint] = field(default_factory=dict)
    statistics: str | None = None
    moments: str | None = None
    loras: Mapping[str, list[dict[str, Any]]] = field(default_factory=dict)

    @property
    def source_files(self) -> list[TensorFile]:
        """The source's files of weights."""
        return [file for component in self.components for file in component.checkpoint.files.values()]

    @property
    def bytes_before(self) -> int:
        return sum(component.bytes_before for component in self.components)

    @property
    def file_bytes(self) -> int:
        """Size of the files of weights of all components, headers included."""
        return sum(component.file_bytes for component in self.components)

    @property
    def bytes_to_do(self) -> int:
        return sum(component.bytes_to_do for component in self.components)

    @property
    def bytes_after(self) -> int:
        return sum(component.bytes_after for component in self.components)

    @property
    def rounding(self) -> str:
        """How weights are rounded: to `nearest`, by `gptq`, or `auto` if each group takes the better of these."""
        steps = (step for component in self.components for step in component.quantize_steps)
        return self.recipe.effective_rounding if any(step.is_compensated for step in steps) else "nearest"

    def with_statistics(self, statistics: Statistics) -> Plan:
        """This plan with the recorded inputs of the layers that it calibrates; formats and files stay as they are.

        Raises:
            CalibrationError: the statistics belong to another model, or a layer was not recorded.
        """
        statistics.identity.check_model(self.weights)
        rule = self.recipe.input_scale
        components = tuple(component.with_statistics(statistics, rule) for component in self.components)
        notes = dict.fromkeys([*self.notes, *(note for component in components for note in component.notes)])
        return replace(self, components=components, notes=tuple(notes), statistics=statistics.fingerprint())


def plan_conversion(source: Source, recipe: Recipe, chosen: Mapping[str, Mapping[str, str]] | None = None) -> Plan:
    """Decides what every tensor of the model becomes; the recipe's statistics are attached by `with_statistics`.

    Args:
        source: the model
        recipe: the user's request
        chosen: component to what a budget chose for its groups, see `Target.chosen`

    Raises:
        CheckpointError: the model is damaged, incomplete, or quantized in a way that nobody here reads.
        RecipeError: the recipe cannot be carried out on this model.
        CalibrationError: static activations or GPTQ without statistics; moments of another model.
    """
    methods = component_methods(source, recipe)
    check_encoder(source, methods, recipe)
    components = open_components(source, methods, recipe)
    if recipe.is_transcoding:
        components = {name: component for name, component in components.items() if component.is_changed}
        if not components:
            raise RecipeError(
                f"{source.name}: found nothing quantized, expected a quantized model for -m {recipe.method}"
            )
    notes = [note for component in components.values() for note in component.notes]
    moments, moments_notes = load_moments(recipe)
    weights = {name: component.weights for name, component in components.items()}
    if moments is not None:
        moments.identity.check_model(weights)
    plans = (
        _transcoded(components, recipe)
        if recipe.is_transcoding
        else _quantized(components, methods, recipe, moments, chosen or {})
    )
    notes += moments_notes
    notes += [note for plan in plans.values() for note in plan.notes]
    loras = {name: [lora.description for lora in found.loras] for name, found in components.items() if found.loras}
    return Plan(
        source,
        recipe,
        tuple(plans[name] for name in components),
        _files_to_copy(source, components),
        tuple(dict.fromkeys(notes)),
        weights,
        moments=moments.fingerprint() if moments is not None else None,
        loras=loras,
    )


def _quantized(
    components: Mapping[str, SourceComponent],
    methods: Mapping[str, str],
    recipe: Recipe,
    moments: Moments | None,
    chosen: Mapping[str, Mapping[str, str]],
) -> dict[str, ComponentPlan]:
    targets = {
        name: replace(target_of(component, methods[name], recipe), chosen=chosen.get(name, {}))
        for name, component in components.items()
    }
    selections = {name: choose_layers(target) for name, target in targets.items()}
    check_patterns(recipe, selections.values())
    plans: dict[str, ComponentPlan] = {}
    for name in _encoder_first(components):
        plans[name] = plan_quantized(targets[name], selections[name], moments, plans.get("text_encoder"))
    return plans


def _transcoded(components: Mapping[str, SourceComponent], recipe: Recipe) -> dict[str, ComponentPlan]:
    plans: dict[str, ComponentPlan] = {}
    for name in _encoder_first(components):
        plans[name] = plan_transcoded(components[name], recipe, plans.get("text_encoder"))
    return plans


def _encoder_first(components: Collection[str]) -> list[str]:
    """Names with the denoisers last, whose config block may list layers of the text encoder."""
    return sorted(components, key=lambda name: name in DENOISERS)


def _files_to_copy(source: Source, rewritten: Mapping[str, SourceComponent]) -> dict[str, Path]:
    """Every file that is copied unchanged: path inside the output → source path.

    A single component of diffusers has none: its result is put into a pipeline by the user.
    """
    if source.is_pipeline:
        root_files = [path for pattern in ROOT_FILES for path in source.path.glob(pattern)]
        folders = [source.path / name for name in source.components]
    elif source.path.is_dir() and rewritten[""].is_transformers:
        root_files, folders = [], [source.path]
    else:
        return {}
    files = root_files + [path for folder in folders if folder.is_dir() for path in folder.rglob("*")]
    on_disk = [checked_path(path.parent, path.name) for path in files if path.is_file()]
    streamed = [source.path / name for name in (source.hub_files.streamed if source.hub_files is not None else ())]
    on_hub = [path for path in streamed if any(path.is_relative_to(folder) for folder in folders)]
    copies = {path.relative_to(source.path).as_posix(): path for path in sorted({*on_disk, *on_hub})}
    return {
        name: path
        for name, path in copies.items()
        if name not in (MANIFEST, MODEL_CARD) and not _is_rewritten(name, rewritten) and "/." not in f"/{name}"
    }


def _is_rewritten(name: str, components: Mapping[str, SourceComponent]) -> bool:
    """Whether a file is a config or the weights of a component; a model by itself has its own in the top folder."""
    folder, _, file = name.rpartition("/") if "" in components else name.partition("/")
    is_written = file in ("config.json", *SIDECARS) or fnmatch(file, DESCRIPTIONS)
    # Qwen2.5-Omni keeps its voices, which vLLM-Omni loads, in a `.pt` file, BAGEL its VAE in safetensors.
    is_other = "" in components and (file.endswith(".pt") or file in _other_weights(components[""]))
    return folder in components and (is_written or (file.endswith(WEIGHT_SUFFIXES) and not is_other))


def _other_weights(component: SourceComponent) -> Collection[str]:
    """Files of weights that are not those of the model, and that its reader needs."""
    names = component.stage.other_weights if component.stage is not None else ()
    return [name for name in names if name not in component.opened.checkpoint.files]
