"""GPTQ with what every statistics file holds: a sample of input rows, and the mean square of each channel.

The second moments H of an input are estimated as D + U^T U. U [samples, in] is the sample times a constant, and the
diagonal D makes up for the rest of the mean squares. So no matrix [in, in] is stored or inverted, at any width. Where
the sample is far louder than all inputs together, as one with a rare outlier is, D still keeps half of the mean square.

Let columns B be rounded, with errors e = q - w, and let L be the columns that are left. GPTQ adds -e H_BL (H_LL)^-1 to
the latter. With this H, it is a product of low rank. The errors are carried as S, the sum of e_i g_i over all rounded
columns i: for each row of the weight, one number for each row of the sample. Then S v_j is added to column j, where

    v_j = u_j / d_j        g_i = -M u_i        M = (I + sum over j in L of u_j u_j^T / d_j)^-1

and u_j is column j of U. From the last columns to the first, M follows by the Woodbury identity. Columns are rounded in
strips: the errors of a strip correct only the columns after it. 12 strips instead of 192 leave 1 % more error.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from omni_convert.convert.calibration.gptq import Compensation
from omni_convert.formats.format import ElementFormat

__all__ = ["LowRankCompensation", "plan_low_rank_compensation"]

#: The part of the products of two channels in the sample that is believed; the rest is taken for chance.
SHARE = 0.5
#: Added to the diagonal, relative to the mean square, so that silent channels do not make up for others.
DAMPING = 0.01
#: The diagonal is at least this part of the sample's mean squares, so that float64 is exact enough for any outlier.
LEAST_PART = 1e-6
#: Strips in which the columns of an input are rounded, if it is wide enough.
STRIPS = 64


@dataclass(frozen=True)
class LowRankCompensation(Compensation):
    """All columns, rounded by a sample of their inputs.

    Attributes:
        given: g of each column in `order`, float32 [in, samples]
        taken: v of each column in `order`, float32 [in, samples]
    """

    given: Tensor
    taken: Tensor

    def round_columns(self, columns: Tensor, scale: Tensor, fmt: ElementFormat) -> Tensor:
        elements = torch.empty_like(columns)
        carried = columns.new_zeros(self.given.shape[1], columns.shape[1])
        width = strip_width(len(columns))
        for start in range(0, len(columns), width):
            strip = slice(start, start + width)
            wanted = columns[strip].addmm_(self.taken[strip], carried)
            torch.div(wanted, scale[strip], out=elements[strip])
            elements[strip] = fmt.round_elements(elements[strip])
            errors = wanted.addcmul_(elements[strip], scale[strip], value=-1).neg_()
            carried.addmm_(self.given[strip].T, errors)
        return elements


def strip_width(columns: int) -> int:
    """The number of columns that are rounded together."""
    return max(1, columns // STRIPS)


def plan_low_rank_compensation(sample: Tensor, mean_square: Tensor, device: torch.device) -> LowRankCompensation:
    """Prepares the rounding of all rows of a weight.

    Args:
        sample: recorded inputs, already multiplied by mul_scale, any float dtype [samples, in]; there may be none
        mean_square: of each channel over all inputs, likewise, float32 [in]
        device: where weights will be rounded
    """
    wanted = mean_square.double().cpu()
    factors = sample.double().cpu() * (SHARE / max(1, len(sample))) ** 0.5
    believed = factors.square().sum(0)
    diagonal = torch.maximum(wanted - believed, (1 - SHARE) * wanted)
    diagonal = torch.maximum(diagonal + DAMPING * (float(wanted.mean()) or 1.0), LEAST_PART * believed)
    order = wanted.argsort(descending=True, stable=True)
    columns, diagonal = factors[:, order].T.contiguous(), diagonal[order]  # [in, samples]
    given = torch.empty_like(columns)
    inverse = torch.eye(columns.shape[1], dtype=torch.float64)
    width = strip_width(len(columns))
    for start in reversed(range(0, len(columns), width)):
        strip = slice(start, start + width)
        given[strip] = columns[strip] @ inverse
        inner = columns[strip] @ given[strip].T
        inner.diagonal().add_(diagonal[strip])
        inverse -= given[strip].T @ torch.linalg.solve(inner, given[strip])
    taken = columns / diagonal[:, None]
    return LowRankCompensation(0, order.to(device), given.neg_().float().to(device), taken.float().to(device))
