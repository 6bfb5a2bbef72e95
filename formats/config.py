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

# Fields that only some methods have, and the one scheme of activations with which they have them; None for any.
NEEDED_SCHEMES = {
    "require_smooth_scale": None,
    "group_size": None,
    "weight_block_size": "dynamic",
    "per_channel": "dynamic",
}

#: Stands in place of a method where layers have several.
MIXED = "mixed"


@dataclass(frozen=True)
class QuantizationConfig:
    """How the quantized layers of a component are stored, and which ones are not.

    Attributes:
        method: one of `ACTIVATION_SCHEMES`, or `mixed`
        activation_scheme: one of the method's
        weight_block_size: rows and columns that share a scale (activations dynamic)
        ignored_layers: names of layers that stay as they are, as the runtime and as the checkpoint call them
        require_smooth_scale: every layer stores a `mul_scale`
        group_size: columns that share a scale; None for the default
        per_channel: every row of a weight has its own scale (activations dynamic)
        layers: name of each quantized layer, and its own config (mixed only)

    `QuantizingFormat.config_fields` says which methods have the fields of `NEEDED_SCHEMES`.

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
        for name, needed_scheme in NEEDED_SCHEMES.items():
            if getattr(self, name) not in (None, False):
                self._check_method_has(name, needed_scheme)
        if self.group_size is not None and self.group_size < 1:
            raise RecipeError(f"group_size: found {self.group_size!r:.20}, expected a positive size")
        if self.weight_block_size is not None:
            self._check_blocks(self.weight_block_size)

    def _check_method_has(self, name: str, scheme: str | None) -> None:
        """Refuses a field that the method does not have, or has with another scheme of activations alone."""
        methods = [method for method, kind in FORMATS.items() if name in kind.config_fields]
        if self.method in methods and scheme in (None, self.activation_scheme):
            return
        found, expected = self.method, " or ".join(methods)
        if scheme is not None:
            found, expected = f"{found} and {self.activation_scheme} activations", f"{expected} and {scheme} ones"
        raise RecipeError(f"{name}: found with {found}, expected {expected}")

    def _check_blocks(self, block_size: tuple[int, int]) -> None:
        if len(block_size) != 2 or min(block_size) < 1:
            raise RecipeError(f"weight_block_size: found {list(block_size)!r:.40}, expected two positive sizes")
        if self.per_channel:
            raise RecipeError(f"per_channel: found with weight_block_size {[*block_size]}, expected one of the two")

    def _check_flags(self) -> None:
        for flag in ("require_smooth_scale", "per_channel"):
            if not isinstance(getattr(self, flag), bool):
                raise RecipeError(f"{flag}: found {getattr(self, flag)!r:.40}, expected True or False")

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
