"""The meaning of a checkpoint's config block, whatever the dialect in which it is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from omni_convert.formats.errors import RecipeError
from omni_convert.formats.table import FORMATS

__all__ = ["ACTIVATION_SCHEMES", "MIXED", "QuantizationConfig"]

#: Method to the ways in which its activations may be quantized, the default first. `static` means that each layer
#: stores an `input_scale`; `none`, that activations stay as they are.
ACTIVATION_SCHEMES = {method: kind.activation_schemes for method, kind in FORMATS.items()}

#: Stands in place of a method where layers have several.
MIXED = "mixed"


@dataclass(frozen=True)
class QuantizationConfig:
    """How the quantized layers of a component are stored, and which ones are not.

    Attributes:
        method: one of `ACTIVATION_SCHEMES`, or `mixed`
        activation_scheme: one of the method's
        weight_block_size: rows and columns that share a scale (fp8 only, activations dynamic)
        ignored_layers: names of layers that stay as they are, as the runtime and as the checkpoint call them
        require_smooth_scale: every layer stores a `mul_scale` (mxfp4 only)
        group_size: columns that share a scale (w4a16 only); None for the default
        per_channel: every row of a weight has its own scale (fp8 only, activations dynamic)
        layers: name of each quantized layer, and its own config (mixed only)

    Raises:
        RecipeError: the fields contradict each other.
    """

    method: str
    activation_scheme: str = "dynamic"
    weight_block_size: tuple[int, int] | None = None
    ignored_layers: tuple[str, ...] = ()
    require_smooth_scale: bool = False
    group_size: int | None = None
    per_channel: bool = False
    layers: tuple[tuple[str, QuantizationConfig], ...] = ()

    def __post_init__(self) -> None:
        if (self.method == MIXED) != bool(self.layers):
            raise RecipeError(f"layers: found {len(self.layers)} with {self.method}, expected some with {MIXED} alone")
        if self.method == MIXED:
            return
        schemes = ACTIVATION_SCHEMES.get(self.method)
        if schemes is None:
            raise RecipeError(f"method: found {self.method!r}, expected one of {', '.join(ACTIVATION_SCHEMES)}")
        if self.activation_scheme not in schemes:
            expected = " or ".join(schemes)
            raise RecipeError(
                f"activation_scheme: found {self.activation_scheme!r} with {self.method}, expected {expected}"
            )
        self._check_flags()
        if self.require_smooth_scale and self.method != "mxfp4":
            raise RecipeError(f"require_smooth_scale: found with {self.method}, expected mxfp4")
        if self.group_size is not None and (self.method != "w4a16" or self.group_size < 1):
            raise RecipeError(f"group_size: found {self.group_size!r:.20} with {self.method}, expected w4a16 alone")
        if self.weight_block_size is not None:
            self._check_blocks(self.weight_block_size)
        if self.per_channel:
            self._check_rows()

    def _check_blocks(self, block_size: tuple[int, int]) -> None:
        if self.method != "fp8" or self.activation_scheme != "dynamic":
            raise RecipeError(
                f"weight_block_size: found with {self.method} and {self.activation_scheme} activations, expected fp8 "
                f"and dynamic ones"
            )
        if len(block_size) != 2 or min(block_size) < 1:
            raise RecipeError(f"weight_block_size: found {list(block_size)!r:.40}, expected two positive sizes")

    def _check_flags(self) -> None:
        for flag in ("require_smooth_scale", "per_channel"):
            if not isinstance(getattr(self, flag), bool):
                raise RecipeError(f"{flag}: found {getattr(self, flag)!r:.40}, expected True or False")

    def _check_rows(self) -> None:
        if self.weight_block_size is not None:
            found = f"weight_block_size {list(self.weight_block_size)}"
            raise RecipeError(f"per_channel: found with {found}, expected one of the two")
        if self.method != "fp8" or self.activation_scheme != "dynamic":
            found = f"{self.method} and {self.activation_scheme} activations"
            raise RecipeError(f"per_channel: found with {found}, expected fp8 and dynamic ones")

    @property
    def is_static(self) -> bool:
        """Whether each layer stores an `input_scale`."""
        return self.activation_scheme == "static"

    def of_layer(self, name: str) -> QuantizationConfig | None:
        """The config of one layer; None if layers are listed and it is not among them."""
        return self._by_layer.get(name) if self.layers else self

    @cached_property
    def _by_layer(self) -> Mapping[str, QuantizationConfig]:
        return dict(self.layers)
