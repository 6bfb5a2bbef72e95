"""The contract of a format: how one weight matrix is represented, and how to get there in bounded memory.

A format works on the rows of a weight, so that a matrix of any size passes through a tile of fixed size, and on a
*group* of weights, because a runtime that fuses linears (`to_q, to_k, to_v`) merges their scales:

    fitted = fmt.fit([rows_of_q, rows_of_k, rows_of_v], inputs)   # what the group shares; may scan the rows
    fmt.constants(fitted)                                           # tensors that do not depend on rows
    fmt.quantize_rows(tile, fitted)                                 # tensors of these rows, for each tile
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields
from enum import Enum
from types import MappingProxyType
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from omni_convert.formats.arithmetic.encoding import Encoding
from omni_convert.formats.arithmetic.smoothing import smoothed_input
from omni_convert.formats.containers.tensor_spec import TensorSpec
from omni_convert.formats.options import FormatOptions
from omni_convert.formats.rows import InputStatistics, TensorLayout, TensorRows, WeightRows, iterate_rows

__all__ = ["Calibration", "CodedFormat", "ElementFormat", "Format", "QuantizingFormat"]

# Bits of an element → `Format.largest_error`.
LARGEST_ERRORS = {8: 0.1, 6: 0.2, 4: 0.3, 2: 1.0}


def _scale_flaw(suffix: str, scale: Tensor) -> str | None:
    """The reason why a scale is impossible, or None: scales are positive and finite. Other tensors pass."""
    if "scale" not in suffix or not scale.numel():
        return None
    if scale.dtype is torch.uint8:
        return "found the E8M0 byte 255 (NaN), expected 0 to 254" if int(scale.max()) == 255 else None
    low, high = (float(bound) for bound in torch.aminmax(scale.float()))
    if low > 0 and high < float("inf"):  # false if a bound is NaN
        return None
    return f"found scales from {low:g} to {high:g}, expected positive finite ones"


def _code_flaw(codes: Tensor) -> str | None:
    """The reason why codes are impossible, or None. Only E4M3 is checked: its bytes 0x7F and 0xFF are NaN."""
    if codes.dtype is not torch.float8_e4m3fn or not codes.numel():
        return None
    if int(codes.view(torch.int8).max()) == 0x7F or int(codes.view(torch.uint8).max()) == 0xFF:
        return "found E4M3 bytes that are NaN, expected numbers"
    return None


def _number_flaw(suffix: str, tensor: Tensor) -> str | None:
    """The reason why numbers beside codes, as those of a table, are impossible, or None."""
    is_number = suffix != "weight" and tensor.is_floating_point() and tensor.dtype.itemsize > 1
    return "found NaN or Inf, expected finite numbers" if is_number and not bool(tensor.isfinite().all()) else None


class Format(ABC):
    """The meaning of the tensors of a weight, which is all that reading needs. Immutable; its fields are options."""

    method: str
    #: Row tiles start and end (but for the last) at a multiple of this.
    row_multiple: int = 1
    #: Only storage: the weight is dequantized before it is used, and may have any number of dimensions.
    is_storage: bool = False
    #: Who chooses the format asks for inputs that stay as they are, so that decoding the weight is no fallback.
    is_weight_only: bool = False
    #: Files hold it under names that only their dialect knows, so that loaders read layers through the dialect.
    is_named_by_dialect: bool = False
    #: Elements of a row that share an entry of `weight`.
    elements_per_entry: int = 1
    #: Suffix of each tensor whose entries stand for columns → the axis along which they lie; empty if layers cannot be
    #: cut between columns. The other tensors belong to all columns.
    column_axes: Mapping[str, int] = MappingProxyType({})
    #: Suffix of each tensor whose entries stand for directions of a branch of low rank → the axis along which they lie.
    rank_axes: Mapping[str, int] = MappingProxyType({})
    #: Largest input that static activations can hold, in units of `input_scale`; None if unknown.
    largest_input: float | None = None

    @property
    def encoding(self) -> Encoding | None:
        """How numbers are encoded; None where blocks hold codes and scales together, as in GGUF."""
        return None

    @property
    def activation_scheme(self) -> str:
        """How inputs are quantized: `dynamic`, `static` (the layer stores an `input_scale`) or `none`."""
        return "dynamic"

    @property
    def is_static(self) -> bool:
        """Whether the layer stores an `input_scale`."""
        return self.activation_scheme == "static"

    @property
    def is_smoothed(self) -> bool:
        """Whether the layer stores a `mul_scale`."""
        return self.encoding is not None and self.encoding.is_smoothed

    @property
    def innermost(self) -> Format:
        """The format below smoothing and rotation."""
        return self

    def with_rank(self, rank: int) -> Format:
        """This format with a branch of another rank; the same if it has no branch."""
        return self

    @property
    def unshifted(self) -> Format:
        """This format with inputs that are rounded as they are; see `shift_product`."""
        return self

    @property
    def operand_bits(self) -> int | None:
        """Bits of both operands of the runtime's matrix product; None if it multiplies in BF16."""
        encoding = self.innermost.encoding
        return None if encoding is None or self.activation_scheme == "none" else encoding.element.bits

    def with_mul_scale(self) -> Format | None:
        """This format with a `mul_scale` for its inputs, or None if it has no place for one."""
        return None

    def with_block_size(self, sizes: tuple[int, int]) -> Format:
        """This format with blocks of so many rows and columns; the same if it has no blocks of rows and columns."""
        return self

    @property
    def largest_error(self) -> float:
        """Relative error ||W - W'|| / ||W|| of a weight that no sound quantization to this format reaches."""
        encoding = self.innermost.encoding
        return LARGEST_ERRORS[8 if encoding is None else encoding.element.bits]

    @property
    def label(self) -> str:
        """The name in reports: the method and the variant."""
        return self.method

    @abstractmethod
    def layout(self, out_features: int, in_features: int) -> dict[str, TensorLayout]:
        """The tensors that hold a weight of this shape, by suffix (`weight`, `weight_scale`, ...)."""

    def weight_shape(self, out_features: int, in_features: int) -> tuple[int, ...]:
        """The shape of the weight before it became a matrix to quantize; a convolution has more dimensions."""
        return out_features, in_features

    @abstractmethod
    def dequantize(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The weight that the tensors stand for, float32 [out, in]."""

    def multiplied(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The weight that scaled inputs are multiplied by, float32 [rows, in]: without the `mul_scale` in them."""
        ones = {name: torch.ones_like(tensor) for name, tensor in tensors.items() if name == "mul_scale"}
        return self.dequantize({**tensors, **ones})

    def scale_inputs(self, inputs: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """Inputs [rows, in] before they are rounded: times `mul_scale`, in their own dtype, as the runtime does."""
        return smoothed_input(inputs, tensors)

    def input_factors(self, constants: Mapping[str, Tensor]) -> Tensor | None:
        """The factors by which `scale_inputs` multiplies channels, float32 [in]; None for ones."""
        return constants.get("mul_scale")

    def side_product(self, inputs: Tensor, tensors: Mapping[str, Tensor]) -> Tensor | None:
        """The product of a branch beside the weight, in the dtype of the inputs [rows, out]; None without a branch.

        Args:
            inputs: as the layer gets them, [rows, in]
            tensors: of the layer, or of some of its rows
        """
        return None

    def shift_product(self, tensors: Mapping[str, Tensor]) -> Tensor | None:
        """What a shift of the inputs before they are rounded adds to outputs, float32 [rows]; None without one."""
        return None

    def round_inputs(self, inputs: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """Inputs as the runtime's GEMM receives them: quantized and restored, or unchanged by default.

        Args:
            inputs: any float dtype [rows, in], scaled by `scale_inputs`
            tensors: of the layer

        Returns:
            float32 [rows, in]
        """
        return inputs.float()

    def flaw(self, tensors: Mapping[str, Tensor]) -> str | None:
        """The reason why the values of these tensors are impossible in this format, or None. Layouts are not checked.

        Args:
            tensors: those of a weight, or of some of its rows
        """
        if "weight" in tensors and (reason := _code_flaw(tensors["weight"])):
            return f"weight: {reason}"
        flaws = ((suffix, _scale_flaw(suffix, each) or _number_flaw(suffix, each)) for suffix, each in tensors.items())
        return next((f"{suffix}: {reason}" for suffix, reason in flaws if reason), None)


class Calibration(Enum):
    """The use that a method has for statistics of the activations."""

    UNUSED = "activations are quantized at run time, statistics are not needed"
    INPUT_SCALE = "static activation scales"
    MUL_SCALE = "smoothing of activations into weights"
    SMOOTHING = "smoothing of activations beside a branch of low rank"
    IMPORTANCE = "weights of the squared errors of columns"


class QuantizingFormat(Format):
    """A format that weights can be converted to."""

    def with_mul_scale(self) -> QuantizingFormat | None:
        return None

    #: The result of `fit` takes so much memory that only one may exist at a time.
    fits_alone: bool = False

    #: Schemes of activations that the method offers, the default first; see `activation_scheme`.
    activation_schemes: ClassVar[tuple[str, ...]] = ("dynamic",)
    #: The use that the method has for statistics of the activations.
    calibration: ClassVar[Calibration] = Calibration.UNUSED
    #: The user's choices that change the format: fields of `FormatChoices`, and `imatrix`. All formats honour `search`,
    #: if they search at all.
    options: ClassVar[tuple[str, ...]] = ()
    #: The fields of `QuantizationConfig`, beside the method and the scheme of activations, that a config may set.
    config_fields: ClassVar[tuple[str, ...]] = ()
    #: Whether it is a kind of file by itself, which no dialect spells otherwise.
    is_container: ClassVar[bool] = False

    @classmethod
    def build(cls, options: FormatOptions) -> QuantizingFormat:
        """The format with those options that are fields of it."""
        own = {each.name for each in fields(cls) if hasattr(options, each.name)}  # type: ignore[arg-type]  # dataclasses all
        return cls(**{name: getattr(options, name) for name in own})

    @classmethod
    def stored_in(cls, tensors: Mapping[str, TensorSpec]) -> Format | None:
        """The format of a weight that is stored in the method's own layout, or None if these tensors are not such.

        By default, the weight has the layout's dtype, and all other tensors of the layout are there. Shapes and the
        dtypes of scales are left to checks, which then say what is wrong with them.

        Args:
            tensors: suffix (`weight`, `weight_scale`, ...) to tensor
        """
        weight, fmt = tensors["weight"], cls.build(FormatOptions())
        layout = fmt.layout(weight.shape[0], weight.elements // max(1, weight.shape[0]))
        is_ours = len(layout) > 1 and weight.dtype is layout["weight"].dtype and layout.keys() <= tensors.keys()
        return fmt if is_ours else None

    @classmethod
    def notes(cls, widths: Collection[int]) -> list[str]:  # noqa: ARG003  # for formats that have some
        """Notes for the user about weights with these `in_features`."""
        return []

    def for_weight(self, shape: tuple[int, ...]) -> Self:
        """The format of a weight of this shape: the same for every matrix."""
        return self

    def unsupported(self, out_features: int, in_features: int) -> str | None:
        """Why a weight of this shape cannot be stored in this format, or None."""
        return None

    def fit(self, weights: Sequence[WeightRows], inputs: InputStatistics | None) -> Any:
        """Computes what a fused group shares; a format that shares nothing returns None.

        Args:
            weights: members of the group, each [out_i, in]
            inputs: statistics of their common input, if calibrated
        """
        return None

    def constants(self, fitted: Any) -> dict[str, Tensor]:
        """Tensors with `rows_per_entry == 0`, equal for every member of the group."""
        return {}

    @abstractmethod
    def quantize_rows(self, rows: Tensor, fitted: Any) -> dict[str, Tensor]:
        """Tensors with `rows_per_entry > 0` for a tile of rows, any float dtype [rows, in]."""

    def quantize(self, weight: Tensor, inputs: InputStatistics | None = None) -> dict[str, Tensor]:
        """All tensors of one weight [out, in] that is in memory."""
        return self.quantize_fitted(weight, self.fit([TensorRows(weight)], inputs))

    def quantize_fitted(self, weight: Tensor, fitted: Any) -> dict[str, Tensor]:
        """All tensors of one weight [out, in] that is in memory, with the result of `fit` for its group.

        Each tile is written to its place in the result, so that memory holds the result only once.
        """
        layouts = self.layout(*TensorRows(weight).shape)
        by_row = {
            suffix: torch.empty(layout.shape, dtype=layout.dtype, device=weight.device)
            for suffix, layout in layouts.items()
            if layout.rows_per_entry
        }
        for start, tile in iterate_rows(TensorRows(weight), self.row_multiple):
            for suffix, rows in self.quantize_rows(tile, fitted).items():
                first = layouts[suffix].entries_of(start, start).start
                by_row[suffix][first : first + len(rows)] = rows
        return by_row | self.constants(fitted)


class ElementFormat(QuantizingFormat):
    """Elements times scales: with the scales decided, each element can be rounded by itself, as GPTQ does."""

    @property
    def element_bits(self) -> int:
        """Bits of an element; where blocks hold codes and scales together, whole bits of both."""
        encoding = self.innermost.encoding
        assert encoding is not None, "blocks of codes and scales have no encoding: their format overrides this"
        return encoding.element.bits

    @abstractmethod
    def element_scale(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The scale of each element in `weight`, without mul_scale: float32, broadcasts to [rows, in]."""

    def element_values(self, rows: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """The numbers that elements times their scales have to approximate, float32 [rows, in], a new tensor.

        Args:
            rows: of the weight, any float dtype [rows, in]
            tensors: of these rows, and the constants
        """
        values = rows.float() / tensors.get("mul_scale", torch.ones(1, device=rows.device)).float()
        minimum = self.element_minimum(tensors)
        return values if minimum is None else values + minimum

    def element_minimum(self, tensors: Mapping[str, Tensor]) -> Tensor | None:
        """The numbers subtracted from elements times their scales, float32 [rows, in]; None if there are none."""
        return None

    @abstractmethod
    def round_elements(self, values: Tensor) -> Tensor:
        """The nearest elements to numbers that were divided by their scales, float32 to float32 of any shape."""

    @abstractmethod
    def with_elements(self, tensors: Mapping[str, Tensor], elements: Tensor) -> dict[str, Tensor]:
        """These tensors with other elements, float32 [rows, in], under the same scales."""


class CodedFormat(ElementFormat):
    """Elements in a tensor of their own, `weight`, apart from the scales."""

    @abstractmethod
    def encode_elements(self, elements: Tensor) -> Tensor:
        """The tensor `weight` that holds these elements, float32 [rows, in]."""

    def with_elements(self, tensors: Mapping[str, Tensor], elements: Tensor) -> dict[str, Tensor]:
        return {**tensors, "weight": self.encode_elements(elements)}
