"""GPTQ: rounding weights so that the error of one column is made up for by the columns that are not yet rounded.

With H the second moments X^T X of the inputs, the squared error of the outputs is (q - w) H (q - w)^T for each row w of
the weight. Rounding its columns one after the other, GPTQ (Frantar et al., arXiv 2210.17323) adds to those left over
what compensates best, which the Cholesky factor of the inverse of H says. Nothing about the format changes: scales are
those of nearest rounding, elements only fall on other values of the same grid.

Columns are taken from the loudest input to the quietest, whatever their place in the file: the scales are fixed before,
so any order will do, and the loudest have the most columns left to make up for them. Where channels differ much this
takes 12 to 15 % off the error that the order of the file leaves, 2 % on the demo. The alternative, choosing a block's
scales again from its compensated weights when it is reached, allows only that order and gains 0 to 5 %.

H is that of the inputs as they are, though the runtime rounds them, too. Fitting the weights to rounded inputs (H plus
the variance of that noise) leaves less error in the outputs of each layer, up to 18 % with 4-bit activations, and more
in the images: it shrinks the weights, and all layers and denoising steps err to the same side.

Rows are independent: any tile of rows gives the rows that the whole weight gives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from omni_convert.formats.format import ElementFormat

__all__ = ["Compensation", "plan_compensation", "quantize_compensated"]

#: Added to the diagonal of the moments, relative to its mean, so that directions that were never seen stay as they are.
DAMPING = 0.01
#: Moments that rounding errors made indefinite are damped more, by this factor, until they are not.
MORE_DAMPING = 10.0
ATTEMPTS = 5
# Columns between two updates of all that follow: within, one row of the factor at a time; beyond, one matrix product.
LAZY_COLUMNS = 128


@dataclass(frozen=True)
class Compensation:
    """How to round a run of columns.

    Attributes:
        start: the first of them
        order: in which they are rounded, int64 [columns], from 0
        factor: upper Cholesky factor of the inverse moments, both axes in `order`, float32 [columns, columns]
    """

    start: int
    order: Tensor
    factor: Tensor

    @property
    def stop(self) -> int:
        return self.start + len(self.order)


def plan_compensation(moments: Sequence[Tensor]) -> list[Compensation]:
    """What to know about the inputs before rows are rounded.

    Args:
        moments: X^T X of the inputs, already multiplied with mul_scale: the blocks of its diagonal, first to last,
            each float32 [columns, columns]; one block if all of it is known
    """
    starts = accumulate((len(block) for block in moments), initial=0)
    return [_compensation(start, block) for start, block in zip(starts, moments, strict=False)]


def _compensation(start: int, moments: Tensor) -> Compensation:
    moments = moments.clone()
    diagonal = moments.diagonal()
    mean = float(diagonal.mean()) or 1.0
    diagonal[diagonal <= 0] = mean  # of a silent channel nothing is known: its weights are rounded to the nearest
    order = diagonal.argsort(descending=True, stable=True)
    damping = DAMPING
    for _ in range(ATTEMPTS):
        damped = moments.clone()
        damped.diagonal().add_(damping * mean)
        factor = _inverse_factor(damped[order][:, order])
        if factor is not None:
            return Compensation(start, order, factor)
        damping *= MORE_DAMPING
    raise AssertionError("finite moments are positive definite when their diagonal is doubled often enough")


def _inverse_factor(moments: Tensor) -> Tensor | None:
    """The upper Cholesky factor of the inverse; None if the moments have none."""
    lower, failed = torch.linalg.cholesky_ex(moments)
    if bool(failed):
        return None
    factor, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    return None if bool(failed) else factor


def quantize_compensated(
    rows: Tensor,
    compensations: Sequence[Compensation],
    fmt: ElementFormat,
    fitted: object,
    constants: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """What `fmt.quantize_rows(rows, fitted)` returns, rounded so that columns make up for each other.

    Args:
        rows: any float dtype [rows, in]
        compensations: all columns, from first to last
        fmt: says which scales and which elements
        fitted: from `fmt.fit`
        constants: from `fmt.constants(fitted)`
    """
    constants = {suffix: tensor.to(rows.device) for suffix, tensor in constants.items()}
    mul_scale = constants.get("mul_scale", torch.ones(1, device=rows.device)).float()
    values = rows.float() / mul_scale
    tensors = fmt.quantize_rows(rows, fitted)
    scale = fmt.element_scale({**tensors, **constants}).expand(values.shape)
    elements = torch.empty_like(values)
    for run in compensations:
        columns = slice(run.start, run.stop)
        ordered = _round_columns(
            values[:, columns].T[run.order], scale[:, columns].T[run.order].contiguous(), run.factor, fmt
        )
        elements[:, columns] = torch.empty_like(ordered).index_copy_(0, run.order, ordered).T
    return {**tensors, "weight": fmt.encode_elements(elements)}


def _round_columns(columns: Tensor, scale: Tensor, factor: Tensor, fmt: ElementFormat) -> Tensor:
    """Elements of columns that make up for each other, first to last.

    Args:
        columns: float32 [columns, rows]: a column is contiguous; overwritten
        scale: of each element, float32 [columns, rows]
        factor: upper Cholesky factor of the inverse moments, float32 [columns, columns]
        fmt: says which elements there are
    """
    elements = torch.empty_like(columns)
    pivots = factor.diagonal().tolist()
    for start in range(0, len(columns), LAZY_COLUMNS):
        stop = min(start + LAZY_COLUMNS, len(columns))
        errors = torch.empty_like(columns[start:stop])
        for column in range(start, stop):
            rounded = fmt.round_elements(columns[column] / scale[column])
            elements[column] = rounded
            error = errors[column - start]
            torch.addcmul(columns[column], rounded, scale[column], value=-1, out=error).div_(pivots[column])
            columns[column + 1 : stop].addr_(factor[column, column + 1 : stop], error, alpha=-1)
        columns[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    return elements
