"""Rounds the weights of a group to nearest, by GPTQ, or by whichever of the two is better.

`CompensatedFormat` wraps a format: its `fit` evaluates the moments of the group's input, and the wrapped format does
the rest. Half of the recorded rows are held out: they are removed from the moments, and mul_scale is not fitted to
them. With `auto` rounding, the outputs are compared on these, for about the first thousand rows of each weight; GPTQ is
taken if its gain is proven, see `formats.arithmetic.evidence`.

Matrices are inverted by one thread, since the last bits depend on the number of threads, and the same job must always
give the same bytes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from omni_convert.convert.calibration.gptq import Compensation, plan_compensation, quantize_compensated
from omni_convert.convert.calibration.moments import InputMoments, Moments
from omni_convert.convert.recipe import Recipe
from omni_convert.convert.workers import one_thread
from omni_convert.formats.arithmetic.encoding import Encoding
from omni_convert.formats.arithmetic.evidence import RowGroups, row_groups
from omni_convert.formats.arithmetic.smoothing import split_input_rows
from omni_convert.formats.errors import CalibrationError
from omni_convert.formats.families.layers import LayerGroup
from omni_convert.formats.format import ElementFormat, QuantizingFormat
from omni_convert.formats.rows import InputStatistics, TensorLayout, WeightRows, iterate_rows

__all__ = ["CompensatedFormat", "compensated", "load_moments"]

logger = logging.getLogger(__name__)

# Rows of a weight that are rounded together, in one pass over the columns.
ROWS_AT_A_TIME = 1024


def load_moments(recipe: Recipe) -> tuple[Moments | None, list[str]]:
    """The moments that rounding uses, and notes; the moments of a layer are read when it is rounded.

    Raises:
        CalibrationError: GPTQ is asked for without moments; a file is damaged, or belongs to another model.
    """
    if recipe.effective_rounding != "nearest":
        if not recipe.moments:
            raise CalibrationError(
                "--rounding gptq: found no moments; add --moments FILE, made by `omni-convert calibrate --moments FILE`"
            )
        return Moments.load_all(recipe.moments), []
    if recipe.moments:
        return None, ["--rounding nearest: the moments were not used"]
    return None, ["--rounding auto without --moments is nearest rounding"] if recipe.rounding == "auto" else []


def compensated(
    fmt: QuantizingFormat,
    moments: Moments | None,
    group: LayerGroup,
    component: str,
    recipe: Recipe,
    columns: tuple[int, int] | None = None,
) -> QuantizingFormat:
    """The format of a group, with error-compensating rounding if there are moments.

    Args:
        columns: the columns of the inputs that the group has, the first and the one after the last; None for all

    Raises:
        CalibrationError: the moments do not cover the group.
    """
    if moments is None or not isinstance(fmt, ElementFormat):
        return fmt
    # The parts of a joined weight read one input, whose moments must not be counted for each of them.
    read = moments.for_group(component, group.members if group.is_fused else group.members[:1])
    if read is None:
        raise CalibrationError(
            f"{group.members[0]}: the moments do not cover this layer of '{component or 'the model'}'; "
            f"calibrate with --component {component or 'transformer'}=METHOD, or use --rounding nearest"
        )
    cut = read if columns is None else partial(_columns_of, read, *columns)
    return CompensatedFormat(fmt, cut, recipe.effective_rounding)


def _columns_of(read: Callable[[], InputMoments], start: int, stop: int) -> InputMoments:
    return read().columns(start, stop)


@dataclass(frozen=True)
class _Fitted:
    """The result of the format's `fit`, and the compensations; without any, rounding is to nearest."""

    base: Any
    constants: dict[str, Tensor]
    compensations: Sequence[Compensation]


@dataclass(frozen=True)
class CompensatedFormat(QuantizingFormat):
    """A format whose weights are rounded with second moments of their inputs.

    Attributes:
        base: the wrapped format
        moments: reads the moments of the group's input
        rounding: `gptq`; or `auto`, which is GPTQ or nearest rounding, whichever leaves the smaller output error on
            held-out inputs, if that is proven
    """

    base: ElementFormat
    moments: Callable[[], InputMoments] = field(repr=False)
    rounding: str

    fits_alone = True  # a matrix [in, in]

    @property
    def method(self) -> str:  # type: ignore[override]  # a class attribute elsewhere, here it follows the format
        return self.base.method

    @property
    def row_multiple(self) -> int:  # type: ignore[override]  # likewise
        return -(-ROWS_AT_A_TIME // self.base.row_multiple) * self.base.row_multiple

    @property
    def label(self) -> str:
        return self.base.label

    @property
    def encoding(self) -> Encoding | None:
        return self.base.encoding

    @property
    def activation_scheme(self) -> str:
        return self.base.activation_scheme

    def unsupported(self, out_features: int, in_features: int) -> str | None:
        return self.base.unsupported(out_features, in_features)

    def layout(self, out_features: int, in_features: int) -> dict[str, TensorLayout]:
        return self.base.layout(out_features, in_features)

    def fit(self, weights: Sequence[WeightRows], inputs: InputStatistics | None) -> _Fitted:
        base = self.base.fit(weights, inputs)
        with one_thread():
            return self._choose(weights, base, weights[0].read(0, 1).device)

    def _choose(self, weights: Sequence[WeightRows], base: Any, device: torch.device) -> _Fitted:
        constants = self.base.constants(base)
        moments = self.moments()
        _, held_out = split_input_rows(moments.sample)
        runs = None if moments.sample_runs is None else split_input_rows(moments.sample_runs)[1]
        blocks = [block.to(device) for block in moments.without(held_out).blocks()]
        fitted = _Fitted(base, constants, plan_compensation(_scaled(blocks, self.base.input_factors(constants))))
        nearest = _Fitted(base, constants, ())
        groups = row_groups(runs, len(held_out))
        if self.rounding == "auto" and not self._is_better(fitted, nearest, weights, held_out.to(device), groups):
            return nearest
        return fitted

    def constants(self, fitted: _Fitted) -> dict[str, Tensor]:
        return fitted.constants

    def quantize_rows(self, rows: Tensor, fitted: _Fitted) -> dict[str, Tensor]:
        if not fitted.compensations:
            return self.base.quantize_rows(rows, fitted.base)
        return quantize_compensated(rows, fitted.compensations, self.base, fitted.base, fitted.constants)

    def dequantize(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return self.base.dequantize(tensors)

    def shift_product(self, tensors: Mapping[str, Tensor]) -> Tensor | None:
        return self.base.shift_product(tensors)

    def flaw(self, tensors: Mapping[str, Tensor]) -> str | None:
        return self.base.flaw(tensors)

    def _seen(self, inputs: Tensor, constants: Mapping[str, Tensor]) -> Tensor:
        """Inputs [samples, in] as the runtime's GEMM gets them: smoothed and rounded, float32."""
        on_device = {suffix: tensor.to(inputs.device) for suffix, tensor in constants.items()}
        return self.base.round_inputs(self.base.scale_inputs(inputs, on_device), on_device)

    def _is_better(
        self, fitted: _Fitted, other: _Fitted, weights: Sequence[WeightRows], held_out: Tensor, groups: RowGroups
    ) -> bool:
        """Whether inputs prove that `fitted` brings outputs closer to those of the original weights than `other`."""
        if groups.count < 2:
            return False
        seen, plain = self._seen(held_out, fitted.constants), held_out.float()
        errors = torch.zeros(2, len(held_out), dtype=torch.float64)
        for weight in weights:
            _, rows = next(iterate_rows(weight, self.row_multiple))
            wanted = plain @ rows.float().T
            for index, candidate in enumerate((fitted, other)):
                difference = self._product(seen, plain, self.quantize_rows(rows, candidate), candidate).sub_(wanted)
                errors[index] += difference.square_().sum(1, dtype=torch.float64).cpu()
        left = float(errors[0].sum() / errors[1].sum().clamp(min=1e-300))
        logger.info("gptq leaves %.4g of the squared output error of nearest rounding", left)
        after, before = groups.sums(errors)
        return groups.is_proven(before, after)

    def _product(self, seen: Tensor, plain: Tensor, tensors: Mapping[str, Tensor], fitted: _Fitted) -> Tensor:
        """Outputs [samples, rows] of some rows of the weight, for inputs as the GEMM gets them and as they are."""
        device = tensors["weight"].device
        everything = {**tensors, **{suffix: tensor.to(device) for suffix, tensor in fitted.constants.items()}}
        product = seen @ self.base.multiplied(everything).T
        side = self.base.side_product(plain, everything)
        return product if side is None else product + side


def _scaled(blocks: Sequence[Tensor], factors: Tensor | None) -> Sequence[Tensor]:
    """Moments of the inputs multiplied by a factor for each channel, if there are such, each [columns, columns]."""
    if factors is None:
        return blocks
    factors = factors.to(blocks[0].device).float()
    pieces = torch.split(factors, [len(block) for block in blocks])
    return [block * piece[:, None] * piece for block, piece in zip(blocks, pieces, strict=True)]
