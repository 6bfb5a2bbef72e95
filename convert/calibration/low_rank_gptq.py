"""GPTQ with what every statistics file holds: a sample of input rows, and the mean square of each channel.

Second moments H of an input are estimated as D + U^T U: a diagonal, and a matrix of low rank that the sample gives.
D makes the mean squares those of all inputs. So no matrix [in, in] is stored or inverted, at any width.

After columns B are rounded, with errors e, GPTQ corrects the columns L that are left by -e H_BL (H_LL)^-1. With
H = D + U^T U this is a product of low rank. Errors are carried as S, the sum of e_i g_i over rounded columns, a number
for each row of the sample. Column j is corrected by S v_j, where

    v_j = u_j / d_j        g_i = -M u_i        M = (I + sum over j in L of u_j u_j^T / d_j)^-1

and u_j is column j of U. From the last columns to the first, M follows by the Woodbury identity. Columns are rounded in
strips, whose errors correct the columns after the strip; 12 strips instead of 192 leave 1 % more error.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from omni_convert.convert.calibration.gptq import Compensation
from omni_convert.formats.format import ElementFormat

__all__ = ["LowRankCompensation", "plan_low_rank_compensation"]

#: The part of what the sample says about products of two channels that is believed; the rest is taken for chance.
SHARE = 0.5
#: Added to the diagonal, relative to its mean, so that silent channels do not make up for others.
DAMPING = 0.01
#: Strips in which the columns of an input are rounded, if it is wide enough.
STRIPS = 64


@dataclass(frozen=True)
class LowRankCompensation(Compensation):
    """All columns, of whose inputs some rows are known.

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
    """Columns of a strip."""
    return max(1, columns // STRIPS)


def plan_low_rank_compensation(sample: Tensor, mean_square: Tensor, device: torch.device) -> LowRankCompensation:
    """Prepares the rounding of all rows of a weight.

    Args:
        sample: rows of the input as the layer's weight sees it, any float dtype [samples, in]
        mean_square: of each channel over all inputs, float32 [in]
        device: where weights will be rounded
    """
    wanted = mean_square.double().cpu()
    factors = sample.double().cpu() * (SHARE / max(1, len(sample))) ** 0.5
    diagonal = torch.maximum(wanted - factors.square().sum(0), (1 - SHARE) * wanted)
    diagonal = diagonal + DAMPING * (float(wanted.mean()) or 1.0)
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
