"""mul_scale: moving difficulty between activations and weights, channel by channel.

The runtime multiplies activations with mul_scale, the file holds Q(W / mul_scale). With s = rms_x^a / amax_w^(1 - a)
per channel mul_scale is 1 / s. SmoothQuant (arXiv 2211.10438) has the largest input for rms_x, which fits the rows that
it comes from: with few prompts, their errors fell by a quarter where those of other prompts rose by a fifth.

Here `a` and a bound on s are searched for each fused group, to minimise the error of the *output* on recorded inputs
with both sides quantized as at run time. The result is kept only if `evidence` proves that it beats mul_scale = 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from omni_convert.formats.arithmetic.evidence import row_groups
from omni_convert.formats.rows import InputStatistics, WeightRows, iterate_rows, recorded_mean_square, sample_rows

__all__ = ["Quantizers", "channel_amax", "output_errors", "search_mul_scale", "smoothed_input", "split_input_rows"]

EXPONENTS = tuple(step / 10 for step in range(11))
#: Bounds on how far s may lie from its geometric mean, tried at the best exponent.
SPREADS = (2.0, 4.0, 16.0)
SEARCH_WEIGHT_ROWS = 512
MAX_INPUT_ROWS = 512
# A channel that was (almost) silent in calibration may not stay so: it counts as this part of the median or more.
SMALLEST_PART = 1e-3


@dataclass(frozen=True)
class Quantizers:
    """How the format rounds weights and its runtime rounds inputs.

    Attributes:
        weight: maps rows of a weight [rows, in], already divided by mul_scale, to the stored values, float32
        inputs: maps activations [..., in], already multiplied by mul_scale, to what the GEMM receives, float32
    """

    weight: Callable[[Tensor], Tensor]
    inputs: Callable[[Tensor], Tensor]


def search_mul_scale(weights: Sequence[WeightRows], inputs: InputStatistics, quantizers: Quantizers) -> Tensor:
    """mul_scale of a fused group; all ones where nothing is proven to be better.

    Args:
        weights: members of the group, each [out_i, in]
        inputs: statistics of their common input
        quantizers: those of the format

    Returns:
        float32 [in], positive, every value exact in bfloat16
    """
    ones = torch.ones(weights[0].shape[1])
    rows = inputs.rows()
    groups = row_groups(inputs.row_runs(), len(rows))
    if groups.count < 2:
        return ones
    sample, weight_amax = sample_rows(weights, SEARCH_WEIGHT_ROWS), channel_amax(weights)
    rms = recorded_mean_square(inputs).sqrt()
    candidates, errors = [ones], [output_errors(sample, rows, ones, quantizers)]

    def best_of(choices: Iterable[tuple[float, float]]) -> tuple[float, float]:
        tried = {}
        for choice in choices:
            candidates.append(_mul_scale(rms, weight_amax, *choice))
            errors.append(output_errors(sample, rows, candidates[-1], quantizers))
            tried[choice] = float(errors[-1].sum())
        return min(tried, key=tried.__getitem__)

    exponent, _ = best_of((exponent, math.inf) for exponent in EXPONENTS)
    best_of((exponent, spread) for spread in SPREADS)
    return candidates[groups.proven_choice(torch.stack(errors))]


def smoothed_input(inputs: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """Inputs [rows, in] times the layer's mul_scale, if it has one, in the dtype of the inputs, as the runtime does."""
    return inputs * tensors["mul_scale"].to(inputs.dtype) if "mul_scale" in tensors else inputs


def split_input_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Splits recorded inputs [samples, in] into those for the search and those held out, at most 512 rows each."""
    return rows[0::2][:MAX_INPUT_ROWS], rows[1::2][:MAX_INPUT_ROWS]


def channel_amax(weights: Sequence[WeightRows]) -> Tensor:
    """Largest magnitude of each column over a group, float32 [in]."""
    largest = torch.zeros(weights[0].shape[1])
    for weight in weights:
        for _, rows in iterate_rows(weight):
            low, high = torch.aminmax(rows.float(), dim=0)
            largest = torch.maximum(largest, torch.maximum(-low, high).cpu())
    return largest


def output_errors(weight: Tensor, inputs: Tensor, mul_scale: Tensor, quantizers: Quantizers) -> Tensor:
    """Squared error of the outputs x W^T of each input, summed over rows of the weight, float64 [samples].

    Args:
        weight: rows of the weight, [rows, in]
        inputs: activations [samples, in] in the dtype of the model
        mul_scale: float32 [in]
        quantizers: those of the format
    """
    inputs, mul_scale = inputs.to(weight.device), mul_scale.to(weight.device)
    smoothed = quantizers.inputs(inputs * mul_scale.to(inputs.dtype))
    difference = smoothed @ quantizers.weight(weight.float() / mul_scale).T
    difference.addmm_(inputs.float(), weight.float().T, alpha=-1)
    return difference.square_().sum(1, dtype=torch.float64).cpu()


def _mul_scale(input_rms: Tensor, weight_amax: Tensor, exponent: float, spread: float) -> Tensor:
    """1 / s, rounded to bfloat16; s has geometric mean 1 and stays within a factor of `spread` of it."""
    log = exponent * _log2(input_rms) - (1 - exponent) * _log2(weight_amax)
    log = log - log.mean()
    if spread != math.inf:
        bound = torch.log2(torch.tensor(spread)).item()
        log = log.clamp(-bound, bound)
    return torch.exp2(-log).to(torch.bfloat16).float()


def _log2(magnitudes: Tensor) -> Tensor:
    positive = magnitudes[magnitudes > 0]
    if len(positive) == 0:
        return torch.zeros_like(magnitudes)
    return torch.log2(magnitudes.clamp(min=float(positive.median()) * SMALLEST_PART))
