"""How strong a LoRA file is by its own account: alpha over rank, wherever it says so.

A tensor `alpha` of the layer counts first. Then come PEFT's description of the adapter, in the header or in a file
beside it, and plain keys of the header. Without any of them the strength is 1.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omni_convert.convert.source.lora_file import LayerGroup, LoraFile
from omni_convert.convert.source.lora_names import without_prefix
from omni_convert.formats.containers.json_file import read_json
from omni_convert.formats.errors import CheckpointError

__all__ = ["Strength", "strength_of"]

# PEFT's description of an adapter: beside the file, or in its header as diffusers writes it.
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_METADATA = "lora_adapter_metadata"
ADAPTER_FILE = "adapter_model.safetensors"
# Keys of headers, the first one counts. SimpleTuner, LightX2V and others write them.
ALPHA_KEYS = ("lora_alpha", "network_alpha", "alpha")
# kohya's trainers write it too, but some converters fold it into the numbers and leave the key.
TRAINER_ALPHA = "ss_network_alpha"
TRUE = ("true", "1")


@dataclass(frozen=True)
class Strength:
    """The strength that a file declares.

    Attributes:
        adapter: PEFT's description, or what stands for it in plain keys of the header
        notes: what the user should know
    """

    adapter: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def of(self, group: LayerGroup, rank: int) -> float:
        """Alpha over rank, as PEFT and the trainers compute it; 1 if no alpha is given."""
        alpha = group.tensors.get("alpha")
        if alpha is not None:
            return float(alpha) / rank
        value = self._alpha(without_prefix(group.stem))
        if value is None:
            return 1.0
        return float(value) / (rank**0.5 if self.adapter.get("use_rslora") else rank)

    def of_full(self, group: LayerGroup) -> float:
        """The strength of a product that has no rank: PEFT divides by the rank that was asked for, trainers do not."""
        rank = self.adapter.get("r")
        return (
            self.of(group, int(rank)) if "alpha" not in group.tensors and rank and "peft_type" in self.adapter else 1.0
        )

    def _alpha(self, stem: str) -> Any:
        patterns = self.adapter.get("alpha_pattern") or {}
        matching = (value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", stem))
        return next(matching, next((self.adapter[key] for key in ("lora_alpha", "alpha") if key in self.adapter), None))


def strength_of(file: LoraFile, groups: Iterable[LayerGroup], component: str | None) -> Strength:
    """Reads the strength of a file.

    Args:
        groups: its layers, to see whether a description fits
        component: the text encoder whose layers they are, or None for those of the model itself

    Raises:
        CheckpointError: the description in the header is no JSON object.
    """
    groups = list(groups)
    described = _in_header(file, component)
    if described is not None:
        return Strength(described)
    beside, note = _beside(file.path, groups)
    if beside is not None:
        return Strength(beside)
    plain = _plain_keys(file.metadata, component)
    if plain:
        return Strength(plain)
    notes = [note] if note else []
    if TRAINER_ALPHA in file.metadata and not any("alpha" in group.tensors for group in groups):
        alpha = file.metadata[TRAINER_ALPHA]
        notes.append(
            f"the header says {TRAINER_ALPHA} {alpha} and no tensor does; it is not applied, since converters that "
            "write such files fold it in; if this one did not, give FILE:SCALE with alpha / rank"
        )
    return Strength(notes=tuple(notes))


def _in_header(file: LoraFile, component: str | None) -> dict[str, Any] | None:
    """PEFT's description of the adapter of a component, as diffusers writes it."""
    if ADAPTER_METADATA not in file.metadata:
        return None
    try:
        described = json.loads(file.metadata[ADAPTER_METADATA])
    except ValueError:
        described = None
    if not isinstance(described, dict):
        raise CheckpointError(
            f"{file.path}: found {ADAPTER_METADATA} in the header that is no JSON object, expected one"
        )
    return _of_component(described, component)


def _of_component(described: Mapping[str, Any], component: str | None) -> dict[str, Any]:
    """The keys of a component without its prefix: `text_encoder.r` is not about the transformer."""
    split = [(*key.rpartition("."), value) for key, value in described.items()]
    return {
        key: value
        for prefix, _, key, value in split
        if (prefix == component if component else not prefix.startswith("text_encoder"))
    }


def _plain_keys(metadata: Mapping[str, str], component: str | None) -> dict[str, Any]:
    """The plain keys of the header, under the names of PEFT's description; {} if there are none."""
    keys = _of_component(metadata, component)
    value = next((number for key in ALPHA_KEYS if (number := _number(keys.get(key))) is not None), None)
    if value is None:
        return {}
    return {"lora_alpha": value, "use_rslora": str(keys.get("use_rslora", "")).lower() in TRUE}


def _number(text: str | None) -> float | None:
    try:
        value = float(text) if text is not None else math.nan
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _beside(path: Path, groups: list[LayerGroup]) -> tuple[dict[str, Any] | None, str | None]:
    """The description in the folder if it belongs to the file, or else a note that it does not."""
    beside = path.parent / ADAPTER_CONFIG
    if not beside.is_file():
        return None, None
    described = read_json(beside)
    if path.name == ADAPTER_FILE:
        return described, None
    if (path.parent / ADAPTER_FILE).is_file():
        return None, f"{ADAPTER_CONFIG} beside it is about {ADAPTER_FILE}, and is not applied"
    others = [file for file in path.parent.glob("*.safetensors") if file != path]
    misfit = _misfit(described, groups) or (
        "it does not say r, and other files lie there" if others and "r" not in described else None
    )
    return (described, None) if misfit is None else (None, f"{ADAPTER_CONFIG} beside it is not applied: {misfit}")


def _misfit(described: Mapping[str, Any], groups: list[LayerGroup]) -> str | None:
    """Why a description cannot be that of these layers, or None."""
    rank, targets = described.get("r"), described.get("target_modules")
    patterns = described.get("rank_pattern") or {}
    for group in groups:
        down = group.tensors.get("down")
        if down is None:
            continue
        stem = without_prefix(group.stem)
        own = next((value for each, value in patterns.items() if re.match(rf"(.*\.)?({each})$", stem)), rank)
        if own is not None and own != down.shape[0]:
            return f"it says r {own}, '{group.stem}' has rank {down.shape[0]}"
        if isinstance(targets, list) and not any(stem == each or stem.endswith(f".{each}") for each in targets):
            return f"'{group.stem}' is none of its target_modules"
    return None
