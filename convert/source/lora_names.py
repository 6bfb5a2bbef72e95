"""Finds what a LoRA file means by the name of a layer: rows of tensors of the model, under diffusers' names.

A file may use diffusers' names or those of the model's own code, below one of many prefixes, and with underscores for
dots. Names of the model's own code come from the one table of its family.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from omni_convert.formats.containers.tensor_spec import Run, TensorSpec
from omni_convert.formats.families.original_names import known_runs
from omni_convert.formats.families.table import find_family

__all__ = ["LayerNames", "component_of", "without_prefix"]

PREFIXES = (
    "base_model.model.",
    "model.diffusion_model.",
    "diffusion_model.",
    "transformer.",
    "unet.",
    "pipe.dit.",
    "dit.",
    "lora_unet_",
    "lora_transformer_",
    "lycoris_",
)
# Text encoders as diffusers, kohya's trainers and OneTrainer count them.
ENCODER = re.compile(r"(?:(text_encoder(?:_[23])?)\.|lora_(te[123]?)_)(?:base_model\.model\.)?")
ENCODERS = {"te": "text_encoder", "te1": "text_encoder", "te2": "text_encoder_2", "te3": "text_encoder_3"}
# diffusers once kept the layers of LoRA in attention processors.
PROCESSOR = re.compile(r"\.processor\.(to_[qkv]|to_out)_lora$")


def component_of(name: str) -> str | None:
    """The text encoder that a name in a file is about, or None if it is about the model itself."""
    found = ENCODER.match(name)
    return None if found is None else found[1] or ENCODERS[found[2]]


def without_prefix(stem: str) -> str:
    """A layer's name without the prefixes that stand for its component."""
    stem = ENCODER.sub("", stem, count=1) if ENCODER.match(stem) else stem
    while (shorter := _shortened(stem)) != stem:
        stem = shorter
    return PROCESSOR.sub(lambda found: f".{found[1]}{'.0' if found[1] == 'to_out' else ''}", stem)


def _shortened(stem: str) -> str:
    return next((stem.removeprefix(prefix) for prefix in PREFIXES if stem.startswith(prefix)), stem)


class LayerNames:
    """Names that a LoRA file may use for the tensors of a model."""

    def __init__(self, specs: Mapping[str, TensorSpec], model_class: str, stems: Iterable[str]) -> None:
        """Collects the names, and finds out whether the file uses diffusers' or the original ones.

        Args:
            specs: the model's tensors under diffusers' names
            stems: names of layers in the file
        """
        family = find_family(model_class)
        self._diffusers = {name: _whole(spec) for name, spec in specs.items()}
        # Encoders that transformers stores without their head lack its prefix.
        self._diffusers |= {
            short: runs
            for name, runs in self._diffusers.items()
            if (short := name.removeprefix("model.")) not in self._diffusers
        }
        self._original = known_runs(family.known_names, specs)
        self._in_dots = _in_dots(self._diffusers, self._original)
        bare = {_underscored(without_prefix(stem)) for stem in stems}
        ours, theirs = (_stems(names) for names in (self._diffusers, self._original))
        self._is_original = bool(bare & (theirs - ours))
        self._is_diffusers = bool(bare & (ours - theirs))

    def find(self, stem: str, leaves: Sequence[str]) -> list[Run]:
        """The rows of the first tensor that there is; none if the model lacks all, or the name means two of them.

        Args:
            stem: a layer's name in the file
            leaves: what the tensor may be called below the layer; "" for the name itself
        """
        bare = without_prefix(stem)
        for leaf in leaves:
            name = f"{bare}.{leaf}" if leaf else bare
            for known in (name, self._in_dots.get(_underscored(name), "")):
                if known in self._diffusers or known in self._original:
                    return self._runs(known)
        return []

    def _runs(self, name: str) -> list[Run]:
        """Some names of the original code are those of other layers in diffusers, such as norms of Wan."""
        ours, theirs = self._diffusers.get(name), self._original.get(name)
        if ours is None or theirs is None or ours == theirs:
            return ours or theirs or []
        if self._is_original and self._is_diffusers:
            return []
        return theirs if self._is_original else ours


def _whole(spec: TensorSpec) -> list[Run]:
    return [Run(spec.name, 0, spec.shape[0] if spec.shape else 1)]


def _underscored(name: str) -> str:
    return name.replace(".", "_")


def _stems(names: Iterable[str]) -> set[str]:
    """Names of layers and of tensors, with underscores for dots."""
    return {_underscored(part) for name in names for part in (name, name.rpartition(".")[0])}


def _in_dots(*named: Mapping[str, list[Run]]) -> dict[str, str]:
    """Name with underscores for dots → a name with dots, without those that stand for different rows."""
    found: dict[str, tuple[str, list[Run]]] = {}
    shared: set[str] = set()
    for name, runs in (item for names in named for item in names.items()):
        first, rows = found.setdefault(_underscored(name), (name, runs))
        if first != name and rows != runs:
            shared.add(_underscored(name))
    return {written: name for written, (name, _) in found.items() if written not in shared}
