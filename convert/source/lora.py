"""Matches LoRA files with a component; each of their tensors is used or named, nothing is left out silently.

file ─► layers and roles ─► changes of weights ─► rows of the component's tensors ─► a view with the changes
        `lora_file`         `lora_algorithms`,    `lora_names`                       `formats.views.lora`
                            `lora_strength`
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omni_convert.convert.recipe import LoraRequest
from omni_convert.convert.source.file_hash import file_sha256
from omni_convert.convert.source.lora_algorithms import WEIGHT_LEAVES, LayerChange, changes_of
from omni_convert.convert.source.lora_file import LayerGroup, LoraFile, file_at, grouped, open_lora
from omni_convert.convert.source.lora_names import LayerNames, component_of
from omni_convert.convert.source.lora_strength import Strength, strength_of
from omni_convert.formats.containers.checkpoint import Checkpoint
from omni_convert.formats.containers.component import DENOISERS
from omni_convert.formats.containers.tensor_spec import Run, TensorSpec
from omni_convert.formats.errors import CheckpointError, RecipeError, listed
from omni_convert.formats.views.lora import PlacedChange, baked_view

__all__ = ["Lora", "bake", "check_requests", "read_lora"]

NAMES_SHOWN = 3


@dataclass(frozen=True)
class Lora:
    """A LoRA file that is matched with a component.

    Attributes:
        changes: name of a tensor of the component → its changes
        left_out: names in the file that match nothing, which are accepted only with --force
        notes: what the user should know about its strength
        sha256: SHA-256 of the file
    """

    request: LoraRequest
    changes: dict[str, list[PlacedChange]]
    left_out: tuple[str, ...]
    notes: tuple[str, ...]
    sha256: str

    @property
    def description(self) -> dict[str, Any]:
        """The entry in the manifest, without paths."""
        return {
            "name": self.request.path.name,
            "sha256": self.sha256,
            "scale": self.request.scale,
            "tensors": len(self.changes),
            **({"left_out": list(self.left_out)} if self.left_out else {}),
        }


def bake(
    checkpoint: Checkpoint,
    requests: Sequence[LoraRequest],
    model_class: str,
    *,
    parts: Mapping[Path, Collection[str | None]],
    force: bool,
) -> tuple[Checkpoint, list[Lora]]:
    """Bakes LoRA files into a checkpoint in their order; returns the result and the files.

    Args:
        parts: path → the parts of the file that are baked somewhere, as `check_requests` says

    Raises:
        CheckpointError: a file is damaged, or does not belong to this model.
    """
    loras = [
        read_lora(request, checkpoint, model_class, parts=parts[request.path], force=force) for request in requests
    ]
    changes: dict[str, list[PlacedChange]] = {}
    for lora in loras:
        for name, placed in lora.changes.items():
            changes.setdefault(name, []).extend(placed)
    return (baked_view(checkpoint, changes) if changes else checkpoint), loras


def read_lora(
    request: LoraRequest,
    checkpoint: Mapping[str, TensorSpec],
    model_class: str,
    *,
    parts: Collection[str | None] = (None,),
    force: bool = False,
) -> Lora:
    """Matches a file with the tensors of a component.

    Args:
        request: names a file, or a folder with one
        checkpoint: the component's tensors under diffusers' names
        model_class: the component's class, which selects the table of original names
        parts: what is baked of the file, here or elsewhere: text encoders, and None for the model itself
        force: leave out tensors that match nothing

    Raises:
        CheckpointError: the file is damaged or is no LoRA, or tensors of it match nothing.
    """
    request = replace(request, path=file_at(request.path))
    file = open_lora(request.path)
    component, names = _own_names(file, request.component)
    groups, unmatched = grouped({name: file.tensors[name] for name in names})
    strength = strength_of(file, groups.values(), component)
    matched = _Matching(checkpoint, LayerNames(checkpoint, model_class, groups), strength, request.scale)
    for group in groups.values():
        unmatched += matched.add(group)
    unmatched += [name for name in file.tensors if name not in names and component_of(name) not in parts]
    if (unmatched and not force) or not matched.changes:
        raise CheckpointError(f"{request.path}: {_refusal(unmatched, model_class, bool(matched.changes))}")
    notes = tuple(f"{request.path.name}: {note}" for note in strength.notes)
    return Lora(request, matched.changes, tuple(sorted(unmatched)), notes, file_sha256(request.path))


def _own_names(file: LoraFile, component: str | None) -> tuple[str | None, set[str]]:
    """The text encoder, if the component is one, and the tensors in the file that are about the component.

    A file whose names tell no text encoder is about the component that the user names.
    """
    encoders = {component_of(name) for name in file.tensors} - {None}
    own = component if component in encoders else None
    return own, {name for name in file.tensors if component_of(name) == own}


class _Matching:
    """Collects the changes of a component's tensors.

    Attributes:
        changes: name of a tensor → its changes
    """

    def __init__(
        self, checkpoint: Mapping[str, TensorSpec], names: LayerNames, strength: Strength, scale: float
    ) -> None:
        self.changes: dict[str, list[PlacedChange]] = {}
        self._checkpoint = checkpoint
        self._names = names
        self._strength = strength
        self._scale = scale

    def add(self, group: LayerGroup) -> list[str]:
        """Adds the changes of a layer; returns the names of its tensors that match nothing."""
        shape = self._shape(self._names.find(group.stem, WEIGHT_LEAVES))
        used: set[str] = set()
        for found in changes_of(group, self._strength, self._scale, shape):
            if self._place(found, self._names.find(group.stem, found.leaves)):
                used |= set(found.roles)
        return [name for role, name in group.names.items() if role not in used]

    def _shape(self, runs: Sequence[Run]) -> tuple[int, int] | None:
        """The shape of a weight that consists of these rows, [out, in]; None if it is no weight."""
        columns = {_columns(self._checkpoint[run.source]) for run in runs}
        return (sum(run.count for run in runs), columns.pop()) if len(columns) == 1 else None

    def _place(self, found: LayerChange, runs: Sequence[Run]) -> bool:
        """Adds a change to the tensors that these rows are of, if it fits them."""
        change, start, placed = found.change, 0, []
        if self._shape(runs) != change.shape or (change.needs_all_rows and len(runs) > 1):
            return False
        for run in runs:
            if start % change.height or run.count % change.height:
                return False
            placed.append((run.source, PlacedChange(change, run.start, start, run.count)))
            start += run.count
        for name, each in placed:
            self.changes.setdefault(name, []).append(each)
        return True


def _columns(spec: TensorSpec) -> int:
    return math.prod(spec.shape[1:])


def _refusal(unmatched: Collection[str], model_class: str, has_matches: bool) -> str:
    shown = listed([f"'{name}'" for name in sorted(unmatched)], NAMES_SHOWN)
    match, them = ("matches", "it") if len(unmatched) == 1 else ("match", "them")
    encoder = next((encoder for name in sorted(unmatched) if (encoder := component_of(name))), None)
    remedies = [
        *([f"--component {encoder}=METHOD converts that component too"] if encoder and has_matches else []),
        *([f"--force leaves {them} out"] if has_matches else []),
    ]
    if not unmatched:
        return "found no tensor that changes anything, expected a LoRA"
    return (
        f"found {shown}, which {match} no weight of {model_class} by name, algorithm and shape, expected a LoRA of "
        f"this model{'; ' if remedies else ''}{', '.join(remedies)}"
    )


def check_requests(
    requests: Sequence[LoraRequest], components: Collection[str]
) -> tuple[dict[str, list[LoraRequest]], dict[Path, set[str | None]]]:
    """Assigns LoRA files to components.

    A file for a denoiser is also one for each text encoder that it names and that is converted.

    Returns:
        component name → its files; and path → the parts of the file that are baked: text encoders, and None for the
        model itself

    Raises:
        RecipeError: a file names no component although there are several, or one that is not converted.
        CheckpointError: a file is missing or damaged.
    """
    assigned = [replace(request, component=_component_for(request, components)) for request in requests]
    taken = {(request.path, request.component) for request in assigned}
    sorted_out: dict[str, list[LoraRequest]] = {}
    parts: dict[Path, set[str | None]] = {}
    for request in assigned:
        # Of several denoisers that get a file, the first one brings it to the encoders.
        first = next(each.component for each in assigned if each.path == request.path)
        encoders = _encoders_in(request, components) if request.component == first else []
        named = [each for each in encoders if (request.path, each) not in taken]
        for each in (request, *(replace(request, component=encoder) for encoder in named)):
            assert each.component is not None, "just assigned"
            sorted_out.setdefault(each.component, []).append(each)
            parts.setdefault(request.path, set()).add(each.component if _is_encoder(each.component) else None)
    return sorted_out, parts


def _is_encoder(component: str) -> bool:
    return component_of(f"{component}.") == component


def _component_for(request: LoraRequest, components: Collection[str]) -> str:
    name = request.component
    if name is None and len(components) == 1:
        name = next(iter(components))
    if name is None:
        denoisers = [each for each in components if each in DENOISERS]
        if len(denoisers) != 1:
            raise RecipeError(
                f"--lora {request.path}: found {', '.join(components)} to bake it into, expected a choice: "
                f"--lora {next(iter(components))}={request.path}"
            )
        name = denoisers[0]
    if name not in components:
        raise RecipeError(
            f"--lora {name}={request.path}: found no component '{name}' that is converted, expected one of "
            f"{', '.join(components) or 'none'}"
        )
    return name


def _encoders_in(request: LoraRequest, components: Iterable[str]) -> list[str]:
    """The text encoders beside a denoiser that its file names and that are converted."""
    encoders = [each for each in components if _is_encoder(each)]
    if request.component not in DENOISERS or not encoders:
        return []
    with Checkpoint.open(file_at(request.path)) as file:
        named = {component_of(tensor) for tensor in file}
    return [each for each in encoders if each in named]
