"""Decides everything about a conversion from headers alone. No tensor is read here; every user error is raised here.

recipe ─┐
        ├─► plan_conversion ─► Plan: components, steps, output tensors, shards, config blocks
headers ┘
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import torch

from omni_convert.convert.component_weights import as_weights, bake, model_class, renamed
from omni_convert.convert.gguf_layers import architecture_of, choose_gguf, original_names
from omni_convert.convert.lora import Lora, check_requests
from omni_convert.convert.moments import Moments
from omni_convert.convert.original_names import missing_config
from omni_convert.convert.recipe import STORAGE_METHODS, Recipe, suggestion
from omni_convert.convert.respelling import replace_config, respell
from omni_convert.convert.rounding import CompensatedFormat
from omni_convert.convert.selection import choose_layers, format_for, hardware_notes, recommendation_notes
from omni_convert.convert.source import Source
from omni_convert.convert.storage import choose_stored
from omni_convert.formats.checkpoint import Checkpoint
from omni_convert.formats.component import DENOISERS
from omni_convert.formats.dialect import Dialect, Spelling
from omni_convert.formats.dialects import omni_convert, vllm_omni
from omni_convert.formats.dialects.table import DIALECTS
from omni_convert.formats.errors import CalibrationError, CheckpointError, RecipeError
from omni_convert.formats.family import Family, LayerGroup, find_family
from omni_convert.formats.format import Format, InputStatistics, TensorLayout
from omni_convert.formats.gguf import Gguf
from omni_convert.formats.json_file import read_json
from omni_convert.formats.quantization_config import ACTIVATION_SCHEMES, QuantizationConfig
from omni_convert.formats.quantized import DESCRIPTIONS, SIDECARS, QuantizedCheckpoint, read_quantized
from omni_convert.formats.safetensors_file import SafetensorsFile
from omni_convert.formats.safetensors_header import quoted
from omni_convert.formats.sharding import Shards, plan_shards
from omni_convert.formats.table import FORMATS, Calibration
from omni_convert.formats.tensor_spec import TensorSpec
from omni_convert.formats.view import CheckpointView
from omni_convert.formats.weight_files import checked_path

if TYPE_CHECKING:
    from omni_convert.convert.statistics import Identity, Statistics

__all__ = [
    "ComponentPlan",
    "CopyStep",
    "KeptLayer",
    "Plan",
    "QuantizeStep",
    "matrix_shape",
    "open_component",
    "plan_conversion",
]

WEIGHT_SUFFIXES = (".safetensors", ".index.json", ".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".h5", ".onnx")
ROOT_FILES = ("*.json", "LICENSE*", "NOTICE*")
OUR_FILES = ("omni_convert.json",)
RISKY_LAYERS_SHOWN = 3


def matrix_shape(weight: TensorSpec) -> tuple[int, int]:
    """[out, rest] of a weight: all that formats know of a convolution's."""
    return weight.shape[0], math.prod(weight.shape[1:])


@dataclass(frozen=True)
class QuantizeStep:
    """A fused group (or a single linear) that is quantized together; the unit of work and of memory."""

    group: LayerGroup
    format: Format
    inputs: InputStatistics | None
    weights: tuple[TensorSpec, ...]
    spellings: tuple[Spelling, ...]

    def spelling(self, weight: TensorSpec) -> Spelling:
        """How a weight of the group is written."""
        return self.spellings[self.weights.index(weight)]

    def layout(self, weight: TensorSpec) -> dict[str, TensorLayout]:
        """Suffix on disk to what is stored there, for a weight of the group."""
        return self.spelling(weight).layout(self.format.layout(*matrix_shape(weight)))

    def outputs(self) -> list[TensorSpec]:
        return [
            TensorSpec(f"{stem}.{suffix}", layout.dtype, layout.shape)
            for stem, weight in zip(self.group.members, self.weights, strict=True)
            for suffix, layout in self.layout(weight).items()
        ]


@dataclass(frozen=True)
class CopyStep:
    """A tensor that keeps its bytes, or (with `--dtype`) is recast."""

    tensor: TensorSpec
    dtype: torch.dtype

    def outputs(self) -> list[TensorSpec]:
        return [replace(self.tensor, dtype=self.dtype)]


@dataclass(frozen=True)
class KeptLayer:
    """A linear layer that is not quantized, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class ComponentPlan:
    """What happens to one component of the pipeline.

    Attributes:
        name: the component's folder, or "" when the model is a single component
        config: config.json as it will be written, with its `quantization_config`
        shards: output files and the tensors of each
        transcoded: layers that were quantized and are not quantized again → what they were
        sidecars: JSON files that the dialect wants beside the weights
    """

    name: str
    method: str
    checkpoint: Checkpoint
    steps: tuple[QuantizeStep | CopyStep, ...]
    kept: tuple[KeptLayer, ...]
    config: dict[str, Any]
    shards: Shards
    transcoded: Mapping[str, str] = field(default_factory=dict)
    sidecars: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    @property
    def quantize_steps(self) -> list[QuantizeStep]:
        return [step for step in self.steps if isinstance(step, QuantizeStep)]

    @property
    def quantized_stems(self) -> list[str]:
        """Layers that are quantized in the output."""
        stems = [stem for step in self.quantize_steps for stem in step.group.members]
        return stems + (list(self.transcoded) if self.method == "keep" else [])

    @property
    def bytes_before(self) -> int:
        return sum(spec.nbytes for file in self.checkpoint.files.values() for spec in file.specs.values())

    @property
    def bytes_to_do(self) -> int:
        """Of the tensors that the steps read; a quantized source is read as what it stands for."""
        return sum(spec.nbytes for spec in self.checkpoint.values())

    @property
    def bytes_after(self) -> int:
        return sum(spec.nbytes for specs in self.shards.files.values() for spec in specs)


@dataclass(frozen=True)
class Plan:
    """A whole conversion, decided.

    Attributes:
        copies: files that are taken over byte for byte: path inside the output → source path
        notes: what the user should know about how the recipe was read
        moments: identity of the second moments that rounding uses, if there are some
        loras: component → the LoRA files that are baked in, as the manifest describes them
    """

    source: Source
    recipe: Recipe
    components: tuple[ComponentPlan, ...]
    copies: dict[str, Path] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    moments: str | None = None
    loras: Mapping[str, list[dict[str, Any]]] = field(default_factory=dict)

    @property
    def bytes_before(self) -> int:
        return sum(component.bytes_before for component in self.components)

    @property
    def bytes_to_do(self) -> int:
        return sum(component.bytes_to_do for component in self.components)

    @property
    def bytes_after(self) -> int:
        return sum(component.bytes_after for component in self.components)


def plan_conversion(source: Source, recipe: Recipe, statistics: Statistics | None = None) -> Plan:
    """Decides what every tensor of the model becomes.

    Args:
        source: the model
        recipe: what was asked for
        statistics: recorded activations, where the recipe has them

    Raises:
        CheckpointError: the model is damaged, incomplete, or quantized already.
        RecipeError: the recipe cannot be carried out on this model.
        CalibrationError: static activations without statistics, or GPTQ without moments; statistics or moments of
            another model.
    """
    notes: list[str] = []
    methods = component_methods(source, recipe)
    _check_encoder(source, methods, recipe)
    opened = {name: open_component(source, name) for name in methods}
    checkpoints, loras = _weights_of(source, opened, recipe, notes)
    if recipe.is_transcoding:
        methods = {
            name: method
            for name, method in methods.items()
            if opened[name].layers or checkpoints[name] is not opened[name].checkpoint
        }
        if not methods:
            raise RecipeError(
                f"{source.name}: found nothing quantized, expected a quantized model for -m {recipe.method}"
            )
    checkpoints = {name: checkpoints[name] for name in methods}
    moments = _load_moments(recipe, notes)
    for recorded in (statistics, moments):
        if recorded is not None:
            _check_same_model(recorded.identity, checkpoints)
    plans: dict[str, ComponentPlan] = {}
    for name in sorted(
        methods, key=lambda name: name in DENOISERS
    ):  # encoders first: a shared block lists their layers
        plans[name] = _plan_component(
            source,
            name,
            opened[name],
            checkpoints[name],
            methods[name],
            recipe,
            statistics,
            moments,
            plans.get("text_encoder"),
            notes,
        )
    components = tuple(plans[name] for name in methods)
    copies = _files_to_copy(source, methods)
    moments_id = moments.fingerprint() if moments is not None else None
    return Plan(source, recipe, components, copies, tuple(dict.fromkeys(notes)), moments_id, loras)


def component_methods(source: Source, recipe: Recipe) -> dict[str, str]:
    """Component name to method, for the components that are quantized; {"": method} for a model that is no pipeline."""
    if not source.is_pipeline:
        if recipe.component:
            raise RecipeError(f"--component: found {next(iter(recipe.component))}, but {source.path} has no components")
        return {"": recipe.method}
    present = source.components()
    for name in recipe.component:
        if name not in present:
            raise RecipeError(
                f"--component: found '{name}', expected one of {', '.join(present)}{suggestion(name, present)}"
            )
    if recipe.is_transcoding:
        return _transcoded_components(source, recipe, present)
    methods = {name: recipe.method for name in DENOISERS if name in present} | recipe.component
    if not any(method != "none" for method in methods.values()):
        raise RecipeError(f"{source.name}: no component to quantize; name one with --component NAME=METHOD")
    return {name: method for name, method in methods.items() if method != "none"}


def _transcoded_components(source: Source, recipe: Recipe, present: Collection[str]) -> dict[str, str]:
    """Components that may be quantized: all whose config says so, and the denoisers, whose files may say it."""
    for name, method in recipe.component.items():
        if method != "none":
            raise RecipeError(
                f"--component {name}={method}: found with -m {recipe.method}, expected {name}=none or nothing"
            )

    def says_so(name: str) -> bool:
        config = source.path / name / "config.json"
        return config.is_file() and bool(read_json(config).get("quantization_config"))

    return {
        name: recipe.method
        for name in present
        if (source.path / name).is_dir() and (name in DENOISERS or says_so(name)) and name not in recipe.component
    }


def _check_encoder(source: Source, methods: Mapping[str, str], recipe: Recipe) -> None:
    """A serving runtime builds the text encoder from the transformer's block, or leaves it to transformers."""
    if recipe.is_transcoding:
        return
    encoder, denoiser = methods.get("text_encoder"), methods.get("transformer")
    if encoder is None or not (source.path / "transformer").is_dir():
        return
    _, config = _component_config(source, "transformer")
    is_shared = bool(_shared_encoder_layers(source, find_family(model_class(config))))
    if is_shared and encoder != denoiser:
        raise RecipeError(
            f"--component text_encoder={encoder}: the runtime builds this text encoder with the transformer's method, "
            f"found {denoiser or 'none'}; use the same one for both"
        )
    if not is_shared and recipe.runtime == "vllm-omni":
        raise RecipeError(
            f"--component text_encoder={encoder}: vllm-omni runs this text encoder unquantized; "
            "use --runtime diffusers for our loader"
        )


def open_component(source: Source, name: str) -> QuantizedCheckpoint:
    """A component of the model ("" for a model that is one), whatever it is spelled in.

    Raises:
        CheckpointError: its files are damaged, or not what they say.
    """
    path = source.path / name if name else source.path
    checkpoint = Checkpoint.open(path, _streamed_files(source, name))
    return read_quantized(checkpoint, path if path.is_dir() else path.parent)


def _weights_of(
    source: Source, opened: Mapping[str, QuantizedCheckpoint], recipe: Recipe, notes: list[str]
) -> tuple[dict[str, Checkpoint], dict[str, list[dict[str, Any]]]]:
    """Every component in plain numbers, with LoRA files baked in, and which files those are."""
    checkpoints = {name: as_weights(component) for name, component in opened.items()}
    if source.path.is_file() and not recipe.is_transcoding and not _has_config(source, ""):
        raise missing_config(checkpoints[""], source.path.parent / "config.json")
    if "" in opened and _has_config(source, "") and not (recipe.method == "keep" and opened[""].layers):
        checkpoints[""] = renamed(checkpoints[""], _component_config(source, "")[1], notes)
    loras: dict[str, list[dict[str, Any]]] = {}
    for name, requests in check_requests(recipe.lora, dict.fromkeys(opened, recipe.method)).items():
        if recipe.method == "keep" and opened[name].layers:
            raise RecipeError(
                f"--lora: found with -m keep on {_counted(opened[name])}, whose values it would change; use "
                "-m METHOD, which quantizes them again, or `omni-convert dequantize --lora`"
            )
        config = _component_config(source, name)[1] if _has_config(source, name) else {}
        checkpoints[name], baked = bake(checkpoints[name], requests, config, force=recipe.force)
        loras[name] = [lora.description for lora in baked]
        notes += [_lora_note(lora, name or source.name) for lora in baked]
    return checkpoints, loras


def _lora_note(lora: Lora, name: str) -> str:
    left_out = f"; {len(lora.left_out)} tensors that match nothing were left out" if lora.left_out else ""
    return f"{lora.request.path.name}: baked into {len(lora.added)} tensors of {name}{left_out}"


def _streamed_files(source: Source, name: str) -> dict[str, Callable[[], SafetensorsFile]]:
    """The weights of a component that are still on the Hub."""
    if source.hub_files is None:
        return {}
    from omni_convert.convert.streamed_file import StreamedFile

    streamed = [PurePosixPath(file) for file in source.hub_files.streamed]
    return {
        file.name: partial(StreamedFile, source.hub_files, str(file))
        for file in streamed
        if file.parent == PurePosixPath(name)
    }


def _has_config(source: Source, name: str) -> bool:
    folder = source.path / name if name else source.path
    return ((folder if folder.is_dir() else folder.parent) / "config.json").is_file()


def _component_config(source: Source, name: str) -> tuple[Path, dict[str, Any]]:
    folder = source.path / name if name else source.path
    path = (folder if folder.is_dir() else folder.parent) / "config.json"
    return path, read_json(path)


def _load_moments(recipe: Recipe, notes: list[str]) -> Moments | None:
    """The moments that rounding uses; their layers are read when they are rounded."""
    if recipe.effective_rounding == "nearest":
        if recipe.moments:
            notes.append("--rounding nearest: the moments were not used")
        elif recipe.rounding == "auto":
            notes.append("--rounding auto without --moments is nearest rounding")
        return None
    if not recipe.moments:
        raise CalibrationError(
            "--rounding gptq: found no moments; add --moments FILE, made by `omni-convert calibrate --moments FILE`"
        )
    first, *others = [Moments.load(path) for path in recipe.moments]
    return first.merge(others)


def _check_same_model(identity: Identity, checkpoints: Mapping[str, Checkpoint]) -> None:
    for name, checkpoint in checkpoints.items():
        recorded = identity.fingerprints.get(name)
        if recorded is not None and recorded != checkpoint.fingerprint():
            raise CalibrationError(
                f"{name or checkpoint.path}: the statistics belong to another model (recorded on {recorded[:12]}, "
                f"this is {checkpoint.fingerprint()[:12]}); calibrate this model"
            )


def _plan_component(
    source: Source,
    name: str,
    opened: QuantizedCheckpoint,
    checkpoint: Checkpoint,
    method: str,
    recipe: Recipe,
    statistics: Statistics | None,
    moments: Moments | None,
    encoder: ComponentPlan | None,
    notes: list[str],
) -> ComponentPlan:
    if recipe.is_transcoding:
        return _transcode_component(source, name, opened, checkpoint, recipe, encoder, notes)
    is_transformers = _library(source, name) == "transformers"
    config_path, config = _component_config(source, name)
    _refuse_unread(config_path, config, opened)
    notes += _requantizing_notes(name, opened, method)
    if method == Gguf.method:
        return _gguf_component(source, name, checkpoint, config_path, config, recipe, notes)
    dialect = DIALECTS[recipe.dialect]
    family = find_family(model_class(config))
    scheme = _activation_scheme(method, recipe, statistics, notes)
    calibrated = scheme == "static" or (statistics is not None and FORMATS[method].calibration is Calibration.MUL_SCALE)
    if method in STORAGE_METHODS:
        groups, kept = choose_stored(checkpoint, config_path, config, recipe, is_transformers=is_transformers)
    else:
        groups, kept = choose_layers(family, checkpoint, config_path, config, method, recipe)
    format_of = {group: format_for(method, recipe, group, checkpoint, calibrated=calibrated) for group in groups}
    if not is_transformers:  # of an encoder no family is known, nor needed
        notes += family.notes(method, recipe.runtime)
    notes += recommendation_notes(family, method, recipe)
    notes += hardware_notes(groups, checkpoint, method)
    steps = {
        group.members[0]: QuantizeStep(
            group,
            _rounded(format_of[group], group, name, None if method in STORAGE_METHODS else moments, recipe),
            _inputs_of(group, name, statistics) if calibrated else None,
            tuple(checkpoint[f"{stem}.weight"] for stem in group.members),
            _spelling(dialect, format_of[group], group, checkpoint),
        )
        for group in groups
    }
    if scheme == "static" and statistics is not None:
        notes += _risk_notes(statistics, name, {stem for group in groups for stem in group.members}, recipe)
    ordered = tuple(_ordered_steps(checkpoint, steps, recipe))
    kept_names = vllm_omni.ignored_names(group for group, _ in kept)
    if name in DENOISERS:
        kept_names += _unquantized_encoder_layers(source, family, encoder)
    quantization = QuantizationConfig(
        method,
        scheme,
        recipe.weight_block_size if method == "fp8" else None,
        tuple(sorted(set(kept_names))),
        require_smooth_scale=calibrated and method == "mxfp4",
    )
    formats = {stem: fmt for group, fmt in format_of.items() for stem in group.members}
    if recipe.dialect != vllm_omni.VLLM_OMNI.name:
        block = dialect.block(formats, {*kept_names, *_other_linears(checkpoint, formats)})
    else:
        block = omni_convert.to_block(quantization) if is_transformers else vllm_omni.to_block(quantization)
    return ComponentPlan(
        name,
        method,
        checkpoint,
        ordered,
        tuple(KeptLayer(layer, reason) for group, reason in kept for layer in group.members),
        replace_config(config, block),
        _shards(ordered, recipe, dialect.metadata(formats), is_transformers=is_transformers),
        sidecars=dialect.sidecars(formats, _output_names(ordered)),
    )


def _gguf_component(
    source: Source,
    name: str,
    checkpoint: Checkpoint,
    config_path: Path,
    config: Mapping[str, Any],
    recipe: Recipe,
    notes: list[str],
) -> ComponentPlan:
    """A component as one GGUF file: linears in blocks in the type asked for, the rest in float32, which all read."""
    from omni_convert.formats.gguf_writer import GgufFile

    if _library(source, name) == "transformers":
        raise RecipeError(f"--component {name}={Gguf.method}: found a model of transformers, expected one of diffusers")
    architecture = architecture_of(model_class(config))
    groups, kept = choose_gguf(checkpoint, config_path, architecture, recipe)
    steps: dict[str, QuantizeStep] = {}
    for group in groups:
        fmt = format_for(Gguf.method, recipe, group, checkpoint, calibrated=False)
        (stem,) = group.members
        steps[stem] = QuantizeStep(group, fmt, None, (checkpoint[f"{stem}.weight"],), (Spelling(),))
    plain = replace(recipe, dtype="float32")
    ordered = tuple(_ordered_steps(checkpoint, steps, plain))
    kind = next(iter(steps.values())).format
    assert isinstance(kind, Gguf)
    content = GgufFile(
        architecture,
        kind.type,
        {weight.name: weight.shape for step in steps.values() for weight in step.weights},
        original_names(model_class(config), checkpoint.keys()),
    )
    specs = [spec for step in ordered for spec in step.outputs()]
    shards = Shards({f"{source.short_name}-{kind.type}.gguf": specs}, None, "", {}, content)
    spelled = "its original" if content.names else "diffusers'"
    notes.append(
        f"{name or source.name}: the GGUF file has {spelled} names; load it with from_single_file(FILE, "
        "config=FOLDER OF ITS config.json, quantization_config=GGUFQuantizationConfig(...))"
    )
    return ComponentPlan(
        name,
        Gguf.method,
        checkpoint,
        ordered,
        tuple(KeptLayer(layer, reason) for group, reason in kept for layer in group.members),
        replace_config(config, None),
        shards,
    )


def _transcode_component(
    source: Source,
    name: str,
    opened: QuantizedCheckpoint,
    checkpoint: Checkpoint,
    recipe: Recipe,
    encoder: ComponentPlan | None,
    notes: list[str],
) -> ComponentPlan:
    """A component whose quantized layers are spelled anew, or dequantized; or one into which only LoRAs are baked."""
    is_transformers = _library(source, name) == "transformers"
    config_path, config = _component_config(source, name) if _has_config(source, name) else (source.path, {})
    _refuse_unread(config_path, config, opened)
    block: dict[str, Any] | None = None
    metadata: dict[str, str] = {}
    formats = {stem: layer.format for stem, layer in opened.layers.items()}
    is_respelled = recipe.method == "keep" and bool(formats)
    view = checkpoint
    if not opened.layers:
        pass
    elif recipe.method == "dequantize":
        notes.append(f"{name or source.name}: {_counted(opened)} dequantized")
    else:
        family = find_family(model_class(config)) if config else None
        others = _unquantized_encoder_layers(source, family, encoder) if family and name in DENOISERS else []
        respelling = respell(opened, family, recipe, others, is_transformers=is_transformers)
        view, block, metadata = respelling.view, respelling.block, respelling.metadata
        notes += respelling.notes
    steps = tuple(CopyStep(spec, _dtype_of_copy(spec, view, recipe)) for spec in view.values())
    return ComponentPlan(
        name,
        recipe.method,
        view,
        steps,
        (),
        replace_config(config, block),
        _shards(steps, recipe, metadata, is_transformers=is_transformers),
        {stem: layer.format.label for stem, layer in opened.layers.items()},
        DIALECTS[recipe.dialect].sidecars(formats, _output_names(steps)) if is_respelled else {},
    )


def _output_names(steps: Sequence[QuantizeStep | CopyStep]) -> list[str]:
    return [spec.name for step in steps for spec in step.outputs()]


def _shards(
    steps: Sequence[QuantizeStep | CopyStep], recipe: Recipe, metadata: Mapping[str, str], *, is_transformers: bool
) -> Shards:
    """The files of a component; one only, if the dialect wants that."""
    specs = [spec for step in steps for spec in step.outputs()]
    is_single = DIALECTS[recipe.dialect].is_single_file and recipe.method != "dequantize"
    limit = sum(spec.nbytes for spec in specs) + 1 if is_single else recipe.max_shard_size
    weights_name = "model.safetensors" if is_transformers else "diffusion_pytorch_model.safetensors"
    shards = plan_shards(specs, limit, weights_name)
    return replace(shards, metadata={**shards.metadata, **metadata})


def _spelling(dialect: Dialect, fmt: Format, group: LayerGroup, checkpoint: Checkpoint) -> tuple[Spelling, ...]:
    """How each member of a group is written: `choose_layers` has left out what cannot be."""
    spellings = []
    for stem in group.members:
        spelling = dialect.spelling(fmt, matrix_shape(checkpoint[f"{stem}.weight"]))
        assert isinstance(spelling, Spelling), spelling
        spellings.append(spelling)
    return tuple(spellings)


def _other_linears(checkpoint: Mapping[str, TensorSpec], quantized: Collection[str]) -> list[str]:
    """Matrices that stay as they are, by name."""
    return [
        name.removesuffix(".weight")
        for name, spec in checkpoint.items()
        if name.endswith(".weight") and len(spec.shape) == 2 and name.removesuffix(".weight") not in quantized
    ]


def _refuse_unread(config_path: Path, config: Mapping[str, Any], opened: QuantizedCheckpoint) -> None:
    """A model that says it is quantized, in a way that nobody here reads."""
    block = config.get("quantization_config")
    if block and not opened.layers:
        kind = block.get("quant_method") if isinstance(block, dict) else type(block).__name__
        raise CheckpointError(
            f"{config_path}: found a model quantized already ({quoted(str(kind))}) and no layer that can be read here, "
            "expected the original weights"
        )


def _requantizing_notes(name: str, opened: QuantizedCheckpoint, method: str) -> list[str]:
    """What it means to quantize what was quantized before."""
    if not opened.layers:
        return []
    return [
        f"{name or opened.checkpoint.path.name}: {_counted(opened)} dequantized in float32 and quantized again to "
        f"{method}: both errors add up, and those shown are of the second only; the originals give a better result"
    ]


def _counted(opened: QuantizedCheckpoint) -> str:
    """`24 layers (nvfp4 as modelopt spells it)`."""
    labels = dict.fromkeys(layer.format.label for layer in opened.layers.values())
    return f"{len(opened.layers)} layers ({', '.join(labels)} as {opened.dialect} spells it)"


def _library(source: Source, name: str) -> str:
    if not name:
        return "diffusers"
    return source.components()[name]


def _activation_scheme(method: str, recipe: Recipe, statistics: Statistics | None, notes: list[str]) -> str:
    """How activations are quantized; says so in `notes` where the recipe led to expect something else."""
    default = ACTIVATION_SCHEMES[method][0]
    if FORMATS[method].calibration is not Calibration.INPUT_SCALE:
        if recipe.activation_scheme == "static":
            raise RecipeError(
                f"--activation-scheme static: {method} quantizes activations at run time, expected dynamic"
            )
        if statistics is not None and FORMATS[method].calibration is Calibration.UNUSED:
            notes.append(f"{method} quantizes activations at run time: the statistics were not used")
        return default
    if method == "nvfp4":
        if recipe.activation_scheme == "dynamic":
            raise RecipeError("--activation-scheme dynamic: nvfp4 has static activations, or none without statistics")
        if statistics is None and recipe.activation_scheme is None:
            notes.append("nvfp4 without --calib is weight-only: activations stay as they are")
            return "none"
    wanted = recipe.activation_scheme or ("static" if statistics is not None else default)
    if wanted == "static" and recipe.weight_block_size is not None:
        notes.append("block-wise FP8 quantizes activations at run time: activations are dynamic, not static")
        return "dynamic"
    if wanted == "static" and statistics is None:
        raise CalibrationError(
            "--activation-scheme static: found no statistics; add --calib PROMPTS or --calibration STATISTICS"
        )
    return wanted


def _inputs_of(group: LayerGroup, component: str, statistics: Statistics | None) -> InputStatistics:
    inputs = statistics.for_group(component, group.members) if statistics is not None else None
    if inputs is None:
        raise CalibrationError(
            f"{group.members[0]}: the statistics do not cover this layer of '{component or 'the model'}'; "
            f"calibrate with --component {component or 'transformer'}=METHOD, or ignore it"
        )
    return inputs


def _rounded(fmt: Format, group: LayerGroup, component: str, moments: Moments | None, recipe: Recipe) -> Format:
    """The format of a group, with its moments if there are some."""
    if moments is None:
        return fmt
    read = moments.for_group(component, group.members)
    if read is None:
        raise CalibrationError(
            f"{group.members[0]}: the moments do not cover this layer of '{component or 'the model'}'; "
            f"calibrate with --component {component or 'transformer'}=METHOD, or use --rounding nearest"
        )
    return CompensatedFormat(fmt, read, recipe.effective_rounding)


def _risk_notes(statistics: Statistics, component: str, quantized: Collection[str], recipe: Recipe) -> list[str]:
    """What a static scale means for layers whose inputs it fits badly."""
    risky = [layer for layer in statistics.risky_layers() if layer.component == component and layer.stem in quantized]
    if not risky:
        return []
    worst = "; ".join(str(layer) for layer in risky[:RISKY_LAYERS_SHOWN])
    more = f"; and {len(risky) - RISKY_LAYERS_SHOWN} more" if len(risky) > RISKY_LAYERS_SHOWN else ""
    return [
        f"{len(risky)} of {len(quantized)} layers have inputs that one static scale fits badly; they got --input-scale "
        f"{recipe.input_scale} like the others (--activation-scheme dynamic or --ignored-layers avoids that): "
        f"{worst}{more}"
    ]


def _ordered_steps(
    checkpoint: Checkpoint, steps: Mapping[str, QuantizeStep], recipe: Recipe
) -> Iterator[QuantizeStep | CopyStep]:
    """Steps in the order in which the source holds the tensors, a group where its first member is."""
    quantized = {weight.name for step in steps.values() for weight in step.weights}
    for name, spec in checkpoint.items():
        if name in quantized:
            step = steps.get(name.removesuffix(".weight"))
            if step is not None:
                yield step
        else:
            yield CopyStep(spec, _dtype_of_copy(spec, checkpoint, recipe))


def _dtype_of_copy(spec: TensorSpec, checkpoint: Checkpoint, recipe: Recipe) -> torch.dtype:
    """What a tensor becomes that is not quantized: what it was, the recipe's dtype, or BF16 if it was quantized."""
    kept = checkpoint.storage.get(spec.name, spec.dtype) if isinstance(checkpoint, CheckpointView) else spec.dtype
    if recipe.method == "keep" or not spec.dtype.is_floating_point:
        return kept
    if recipe.dtype is not None:
        wanted: torch.dtype = getattr(torch, recipe.dtype)
        return wanted
    is_bare_code = recipe.method == "dequantize" and spec.dtype.itemsize == 1
    return torch.bfloat16 if is_bare_code else kept


def _shared_encoder_layers(source: Source, family: Family) -> list[str]:
    """Text encoder linears that the runtime builds from the transformer's block: unlisted, they load as garbage."""
    config_path = source.path / "text_encoder" / "config.json"
    return list(family.shared_encoder_layers(read_json(config_path))) if config_path.is_file() else []


def _unquantized_encoder_layers(source: Source, family: Family, encoder: ComponentPlan | None) -> list[str]:
    """The encoder's layers that the shared block must list, since they are not stored quantized."""
    stems = encoder.quantized_stems if encoder is not None else []
    # transformers' base models store `layers.0...`, the same model with its head `model.layers.0...`.
    quantized = {*stems, *(f"model.{stem}" for stem in stems)}
    return [layer for layer in _shared_encoder_layers(source, family) if layer not in quantized]


def _files_to_copy(source: Source, methods: Mapping[str, str]) -> dict[str, Path]:
    """Every file of the pipeline but the weights that are rewritten: path inside the output → source path."""
    if not source.is_pipeline:
        return {}
    root_files = [path for pattern in ROOT_FILES for path in source.path.glob(pattern)]
    folders = [source.path / name for name in source.components()]
    files = root_files + [path for folder in folders if folder.is_dir() for path in folder.rglob("*")]
    on_disk = [checked_path(path.parent, path.name) for path in files if path.is_file()]
    streamed = [source.path / name for name in (source.hub_files.streamed if source.hub_files is not None else ())]
    on_hub = [path for path in streamed if any(path.is_relative_to(folder) for folder in folders)]
    copies = {path.relative_to(source.path).as_posix(): path for path in sorted({*on_disk, *on_hub})}
    rewritten = {name for name, method in methods.items() if method != "none"}
    return {
        name: path
        for name, path in copies.items()
        if name not in OUR_FILES and not _is_rewritten(name, rewritten) and "/." not in f"/{name}"
    }


def _is_rewritten(name: str, components: Collection[str]) -> bool:
    folder, _, file = name.partition("/")
    is_said_anew = file in ("config.json", *SIDECARS) or fnmatch(file, DESCRIPTIONS)
    return folder in components and (is_said_anew or file.endswith(WEIGHT_SUFFIXES))
