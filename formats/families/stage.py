"""Repositories of transformers, of which vLLM-Omni builds one stage or one model quantized."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from omni_convert.formats.families.layers import LayerGroup

__all__ = ["BLOCK", "Fp8Refusal", "Stage", "without_block"]

#: The key of a config block.
BLOCK = "quantization_config"


@dataclass(frozen=True)
class Fp8Refusal:
    """Why a stage does not load FP8 with a scale for each row, or for each block, of the weight.

    Attributes:
        scales: what the scales are for
        remedy: what the user can do instead
    """

    scales: tuple[Literal["row", "block"], ...]
    reason: str
    remedy: str


@dataclass(frozen=True)
class Stage:
    """The stage that is quantized. All others stay in full precision, and so do the encoders of this one.

    Attributes:
        prefix: what the names of its layers begin with in the checkpoint
        runtime_prefix: what they begin with in the runtime
        is_diffusion: it is one of vLLM-Omni's diffusion models, with their methods; others are models of vLLM
        config_path: keys of config.json that lead to the part with the stage's config block; () for the top level
        ignored: patterns of layers that the runtime would build quantized, and that always stay
        other_stages: patterns of the layers of stages that get the block of `hf_quant_config.json` as well
        fp8_refusals: kinds of FP8 that it does not load
        transformers_class: transformers' class of the stage, which calibrating runs; "" if there is none
        signature: the class that config.json names although other models have it, too, and a tensor that this one alone
            has, which vLLM-Omni looks for in the index; None if the class tells
        other_weights: files of weights beside those of the model, which are copied; vLLM-Omni would leave them out if
            an index listed the model's alone, so that these are one file
    """

    prefix: str = ""
    runtime_prefix: str = ""
    is_diffusion: bool = False
    config_path: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    other_stages: tuple[str, ...] = ()
    fp8_refusals: tuple[Fp8Refusal, ...] = ()
    transformers_class: str = ""
    signature: tuple[str, str] | None = None
    other_weights: tuple[str, ...] = ()

    def block_of(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """The stage's config block; {} if there is none where the runtime looks for it."""
        part: Any = config
        for key in (*self.config_path, BLOCK):
            part = part.get(key) if isinstance(part, Mapping) else None
        return part if isinstance(part, Mapping) else {}

    def with_block(self, config: Mapping[str, Any], block: Mapping[str, Any]) -> dict[str, Any]:
        """A config.json whose stage has this block; parts on the way are made where they are missing."""
        return _with(without_block(config), (*self.config_path, BLOCK), dict(block))

    def patterns(self, groups: Iterable[LayerGroup]) -> list[str]:
        """Patterns for a list of ignored layers: those that always stay, and one for each name of these groups.

        The runtime puts other prefixes before its names than the checkpoint does, so that a pattern begins with `*`.
        """
        others = [group for group in groups if not any(map(self._is_covered, group.names))]
        return [
            *self.ignored,
            *sorted({f"*{name.removeprefix(self.prefix)}" for group in others for name in group.names}),
        ]

    def _is_covered(self, name: str) -> bool:
        return any(name.endswith(pattern.removeprefix("*")) for pattern in self.ignored)


def without_block(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json without config blocks, at the top level and in its parts."""
    return {
        key: without_block(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if key != BLOCK
    }


def _with(config: Mapping[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    key, *rest = path
    if not rest:
        return {**config, key: value}
    part = config.get(key)
    return {**config, key: _with(part if isinstance(part, Mapping) else {}, tuple(rest), value)}
