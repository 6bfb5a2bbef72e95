"""Gives the tensors of single files and original checkpoints diffusers' names.

The table of the model's family knows the names of its own code, at any width. Names that it does not know go through
diffusers' own conversion for the model class.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from omni_convert.formats.containers.checkpoint import Checkpoint
from omni_convert.formats.containers.tensor_spec import Run, TensorSpec
from omni_convert.formats.dialects.base import Dialect
from omni_convert.formats.dialects.table import DIALECTS
from omni_convert.formats.errors import CheckpointError, counted
from omni_convert.formats.families.original_names import CutLayer
from omni_convert.formats.families.table import find_family, model_class
from omni_convert.formats.views.base import CheckpointView, dequantized_view
from omni_convert.formats.views.column_layers import cut_quantized_layers, joined_quantized_layers
from omni_convert.formats.views.columns import joined_layers
from omni_convert.formats.views.opened import QuantizedCheckpoint
from omni_convert.formats.views.renamed import renamed_view, trace_rows
from omni_convert.formats.views.renamed_layers import renamed_layers

__all__ = [
    "convert_names",
    "layers_under_diffusers_names",
    "layers_under_names_of_readers",
    "loads_single_files",
    "may_have_original_names",
    "prefixes_of",
    "quiet",
    "refuse_other_model",
    "shapes_of",
    "trace_conversion",
    "under_diffusers_names",
    "without_prefix",
]

# The prefix of files that diffusers writes; any other file may have the model's original names.
DIFFUSERS_FILES = "diffusion_pytorch_model"
# What files of a whole model, trainers and ComfyUI put before the names of the denoising model.
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "net.", "model.", "transformer.")


def may_have_original_names(
    checkpoint: Checkpoint, dialect: str | None = None, config: Mapping[str, Any] | None = None
) -> bool:
    """Whether it makes sense to look for names that are not diffusers'.

    Args:
        dialect: of its quantized layers; None if there are none
        config: the model's config in diffusers, where it is known
    """
    if not _are_of_diffusers(checkpoint.files):
        return True
    if dialect is None or not DIALECTS[dialect].renames_tensors:
        return False
    family = find_family(model_class(config or {}))
    return not family.original_names or DIALECTS[dialect].are_names_of_readers(family, checkpoint.keys())


def _are_of_diffusers(files: Iterable[str]) -> bool:
    return all(name.startswith(DIFFUSERS_FILES) for name in files)


def prefixes_of(checkpoint: Checkpoint) -> list[str]:
    """The prefixes that names of a file have, below any of which the denoising model may be."""
    return [prefix for prefix in PREFIXES if any(name.startswith(prefix) for name in checkpoint)]


def without_prefix(checkpoint: Checkpoint, prefix: str) -> dict[str, TensorSpec]:
    """The tensors whose names begin with a prefix, by the rest of their names."""
    return {name.removeprefix(prefix): spec for name, spec in checkpoint.items() if name.startswith(prefix)}


def under_diffusers_names(
    checkpoint: Checkpoint, config: Mapping[str, Any], dialect: str | None = None, *, keeps_spare: bool = False
) -> tuple[Checkpoint, list[str]]:
    """The checkpoint as diffusers would load it, and notes; the same checkpoint if there is nothing to rename.

    Args:
        config: the model's config in diffusers
        dialect: of its quantized layers; None if there are none
        keeps_spare: whether tensors that diffusers' class does without stay, under their own names

    Raises:
        CheckpointError: the conversion fails, or its result is not the model of the config.
    """
    if not may_have_original_names(checkpoint, dialect, config):
        return checkpoint, []
    renamed = convert_names(checkpoint, config, keeps_spare=keeps_spare)
    return (checkpoint, []) if renamed is None else (renamed[0], [_note(checkpoint, config, renamed[1])])


def layers_under_diffusers_names(
    quantized: QuantizedCheckpoint, config: Mapping[str, Any]
) -> tuple[QuantizedCheckpoint, list[str]]:
    """Like `under_diffusers_names`, but keeps layers quantized: codes and scales are only split and joined.

    Raises:
        CheckpointError: as there; or a layer cannot be split or joined without changing values.
    """
    checkpoint = quantized.checkpoint
    if not may_have_original_names(checkpoint, quantized.dialect, config):
        return quantized, []
    whole = joined_quantized_layers(quantized, _cuts_of(config))
    traced = _trace(dequantized_view(whole), config)
    if traced is None:
        return quantized, []
    renamed = renamed_layers(whole, traced.runs, traced.shapes)
    notes = [_note(checkpoint, config, traced.unused)]
    if whole is not quantized and whole.ranks != quantized.ranks:
        notes.append(
            f"{checkpoint.path.name}: layers with a branch for each of two parts got one of rank {max(whole.ranks)}; "
            "those of all others got zeros up to that rank"
        )
    return renamed, notes


def layers_under_names_of_readers(
    quantized: QuantizedCheckpoint, config: Mapping[str, Any], dialect: Dialect
) -> tuple[QuantizedCheckpoint, list[str]]:
    """The checkpoint under the names of a dialect's readers, with layers kept quantized; the same if it has them.

    Raises:
        CheckpointError: a layer cannot be joined or cut without changing values.
    """
    family = find_family(model_class(config))
    if quantized.dialect is not None and quantized.dialect != dialect.name:
        quantized = _without_names_of_others(quantized, config)
    quantized = cut_quantized_layers(quantized, dialect.cuts(family))
    view = dequantized_view(quantized)
    has_same = dialect.names_expected == "original" and family.has_original_names
    tensors = None if has_same else dialect.tensors_of(family, view)
    if tensors is None or tensors.keys() <= view.keys():
        return quantized, []
    runs = {name: tensor.runs for name, tensor in tensors.items()}
    renamed = renamed_layers(quantized, runs, {name: tensor.shape for name, tensor in tensors.items()})
    own, others = f"{family.name}'s own code names its", f"{dialect.consumers} name its"
    readers = own if dialect.names_expected == "original" else others
    return renamed, [f"{quantized.checkpoint.path.name}: renamed as {readers} tensors"]


def _without_names_of_others(quantized: QuantizedCheckpoint, config: Mapping[str, Any]) -> QuantizedCheckpoint:
    """The checkpoint under diffusers' names, if it has those of a tool that merges layers in a way of its own."""
    assert quantized.dialect is not None, "it has layers"
    is_of_others = DIALECTS[quantized.dialect].names_expected == "others"
    return layers_under_diffusers_names(quantized, config)[0] if is_of_others else quantized


def convert_names(
    checkpoint: Checkpoint, config: Mapping[str, Any], *, keeps_spare: bool = False
) -> tuple[CheckpointView, list[str]] | None:
    """The checkpoint under diffusers' names, and the names of tensors that are left out.

    Args:
        keeps_spare: whether tensors that diffusers' class does without stay, under their own names

    Returns:
        None if it has diffusers' names already, or nobody here knows others for the class

    Raises:
        CheckpointError: as `under_diffusers_names`.
    """
    whole = joined_layers(checkpoint, _cuts_of(config))
    traced = _trace(whole, config, keeps_spare=keeps_spare)
    return None if traced is None else (renamed_view(whole, traced.runs, traced.shapes), traced.unused)


def _cuts_of(config: Mapping[str, Any]) -> tuple[CutLayer, ...]:
    """The layers of which files may hold some columns as one layer, and some as another."""
    facts = find_family(model_class(config)).nunchaku
    return () if facts is None else facts.cuts


def _note(checkpoint: Checkpoint, config: Mapping[str, Any], unused: Sequence[str]) -> str:
    parts = Counter(name.partition(".")[0] for name in unused)
    counts = ", ".join(f"{part} ({counted(count, 'tensor')})" for part, count in parts.items())
    left_out = f"; left out what the model does not use: {counts}" if unused else ""
    return f"{checkpoint.path.name}: renamed as diffusers names the tensors of {model_class(config)}{left_out}"


@dataclass(frozen=True)
class _Traced:
    """The effect of a conversion of names.

    Attributes:
        runs: new name → the rows of old tensors that make up its tensor
        shapes: name → shape, for each of the model's tensors
        unused: names of tensors that the model does not use
    """

    runs: Mapping[str, Sequence[Run]]
    shapes: Mapping[str, tuple[int, ...]]
    unused: list[str]


def loads_single_files(kind: str) -> bool:
    """Whether diffusers loads single files of a class, and so has a conversion of original names."""
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    return kind in SINGLE_FILE_LOADABLE_CLASSES


def trace_conversion(
    specs: Mapping[str, TensorSpec],
    config: Mapping[str, Any],
    prepare: Callable[[dict[str, Tensor]], dict[str, Tensor]] = lambda tensors: tensors,
) -> dict[str, list[Run]] | None:
    """Diffusers' name → the rows of old tensors from which its single-file conversion makes the tensor.

    Args:
        prepare: applied to the tensors before the conversion

    Returns:
        None if diffusers has no conversion for the class

    Raises:
        CheckpointError: the conversion fails, or computes values instead of moving them.
    """
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    kind = model_class(config)
    known = SINGLE_FILE_LOADABLE_CLASSES.get(kind)
    if known is None:
        return None

    def convert(tensors: dict[str, Tensor]) -> Mapping[str, Tensor]:
        converted: Mapping[str, Tensor] = known["checkpoint_mapping_fn"](
            config=dict(config), checkpoint=prepare(tensors)
        )
        return converted

    try:
        return trace_rows(specs, convert)
    # Conversions raise all kinds of errors on files that they were not written for.
    except (ValueError, KeyError, IndexError, RuntimeError, AttributeError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"found names that diffusers cannot convert to those of {kind} "
            f"({type(error).__name__}: {reason}); expected that model, in its original names or diffusers'"
        ) from None


def _trace(checkpoint: Checkpoint, config: Mapping[str, Any], *, keeps_spare: bool = False) -> _Traced | None:
    import diffusers

    kind = model_class(config)
    family = find_family(kind)
    prefixes = prefixes_of(checkpoint)
    is_known = family.original_names or family.nunchaku is not None or prefixes or loads_single_files(kind)
    if not is_known or not hasattr(diffusers, kind):
        return None
    shapes = shapes_of(getattr(diffusers, kind), config)
    if shapes.keys() <= checkpoint.keys():
        return None
    if _are_of_diffusers(checkpoint.files) and checkpoint.keys() <= shapes.keys():
        return None  # a part of the model, under diffusers' names
    specs = {name: TensorSpec(name, torch.float32, shape) for name, shape in shapes.items()}
    for prefix in ("", *prefixes):
        stored = without_prefix(checkpoint, prefix)
        known = family.diffusers_runs(specs, stored)
        if known is not None:
            spare = {name: spec for name, spec in stored.items() if keeps_spare and family.is_spare(name)}
            known |= {name: [Run(name, 0, spec.shape[0] if spec.shape else 1)] for name, spec in spare.items()}
            shapes |= {name: spec.shape for name, spec in spare.items()}
            runs = {name: [replace(run, source=prefix + run.source) for run in found] for name, found in known.items()}
            used = {run.source for found in runs.values() for run in found}
            return _Traced(runs, shapes, sorted(checkpoint.keys() - used))
    try:
        converted = trace_conversion(checkpoint, config)
    except CheckpointError as error:
        if 2 * len(shapes.keys() & checkpoint.keys()) > len(shapes):  # most names are diffusers' already
            _refuse_missing(checkpoint, kind, shapes, checkpoint)
        raise CheckpointError(f"{checkpoint.path}: {error}") from None
    if converted is None:
        return None
    if not shapes.keys() <= converted.keys():
        # The conversion may have changed names that were diffusers' already: the fewer gaps tell what is missing.
        is_converted = len(shapes.keys() & converted.keys()) >= len(shapes.keys() & checkpoint.keys())
        _refuse_missing(checkpoint, kind, shapes, converted if is_converted else checkpoint)
    return _Traced(converted, shapes, sorted(converted.keys() - shapes.keys()))


def _refuse_missing(checkpoint: Checkpoint, kind: str, shapes: Collection[str], present: Container[str]) -> None:
    """Raises CheckpointError if a tensor of the model is not present.

    Args:
        kind: class of the model
        shapes: the names of all of its tensors
    """
    missing = [name for name in shapes if name not in present]
    if missing:
        raise CheckpointError(
            f"{checkpoint.path}: tensor '{missing[0]}': found neither it nor the tensors that diffusers makes it from, "
            f"expected all {len(shapes)} tensors of {kind} as config.json describes it; {len(missing)} are missing"
        )


def refuse_other_model(
    checkpoint: Checkpoint, config: Mapping[str, Any], where: Path, markers: Collection[str]
) -> None:
    """Refuses weights under diffusers' names that are not those of a config's model.

    Args:
        where: the config, for messages
        markers: names of tensors that only mark the model

    Raises:
        CheckpointError: a tensor is missing, has another shape or is one too many. Models of a class that diffusers
            does not have pass.
    """
    import diffusers

    kind = model_class(config)
    known = getattr(diffusers, kind, None)
    if not (isinstance(known, type) and issubclass(known, diffusers.ModelMixin)):
        return
    shapes = shapes_of(known, config)
    _refuse_missing(checkpoint, kind, shapes, checkpoint)
    for name, shape in shapes.items():
        if checkpoint[name].shape != shape:
            raise CheckpointError(
                f"{checkpoint.path}: tensor '{name}': found {list(checkpoint[name].shape)}, expected {list(shape)} as "
                f"{where} describes {kind}; use the pipeline to which the file belongs"
            )
    family, known_names = find_family(kind), {*shapes, *markers}
    strange = next((name for name in checkpoint if name not in known_names and not family.is_spare(name)), None)
    if strange is not None:
        raise CheckpointError(
            f"{checkpoint.path}: found '{strange}', which {kind} as {where} describes it does not have; use the "
            "pipeline to which the file belongs"
        )


def shapes_of(model: Any, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name → shape of every tensor of the model that a config describes.

    Raises:
        CheckpointError: the class refuses the config.
    """
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    try:
        with torch.device("meta"), quiet("diffusers"):
            built = model.from_config(plain)
    except Exception as error:  # noqa: BLE001  # constructors fail in any way with configs that nobody has tried
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise CheckpointError(f"found a config that {model.__name__} refuses ({reason}), expected its own") from None
    return {name: tuple(tensor.shape) for name, tensor in built.state_dict().items()}


@contextmanager
def quiet(library: Literal["diffusers", "transformers"]) -> Iterator[None]:
    """Silences warnings about configs of other versions, and about initialisations, which do nothing on "meta"."""
    logging = import_module(f"{library}.utils").logging
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
