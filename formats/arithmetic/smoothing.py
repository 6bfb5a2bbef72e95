"""mul_scale: moving difficulty between activations and weights, channel by channel.

The runtime multiplies activations with mul_scale, the file holds Q(W / mul_scale). With s = amax_x^a / amax_w^(1 - a)
per channel (SmoothQuant, arXiv 2211.10438) mul_scale is 1 / s. Here `a` and a bound on s are searched for each fused
group, to minimise the error of the *output* on recorded inputs with both sides quantized as at run time, and the result
is kept only if it beats mul_scale = 1 on inputs and over rows of the weight that the search did not see.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from omni_convert.formats.rows import InputStatistics, WeightRows, iterate_rows, sample_rows

__all__ = ["Quantizers", "channel_amax", "output_error", "search_mul_scale", "smoothed_input", "split_input_rows"]

EXPONENTS = tuple(step / 10 for step in range(11))
#: Bounds on how far s may lie from its geometric mean, tried at the best exponent.
SPREADS = (2.0, 4.0, 16.0)
SEARCH_WEIGHT_ROWS = 512
MAX_INPUT_ROWS = 512
# A channel that was (almost) silent in calibration may not stay so: its amax counts as this part of the median or more.
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
    """mul_scale of a fused group; all ones where nothing better is found.

    Args:
        weights: members of the group, each [out_i, in]
        inputs: statistics of their common input
        quantizers: those of the format

    Returns:
        float32 [in], positive, every value exact in bfloat16
    """
    ones = torch.ones(weights[0].shape[1])
    fitting, held_out = split_input_rows(inputs.rows())
    if len(fitting) == 0 or len(held_out) == 0:
        return ones
    sample = sample_rows(weights, SEARCH_WEIGHT_ROWS)
    input_amax, weight_amax = inputs.channel_amax().float(), channel_amax(weights)

    def error(exponent: float, spread: float) -> float:
        mul_scale = _mul_scale(input_amax, weight_amax, exponent, spread)
        return output_error([sample], fitting, mul_scale, quantizers)

    exponent = min(EXPONENTS, key=lambda exponent: error(exponent, float("inf")))
    spread = min((float("inf"), *SPREADS), key=lambda spread: error(exponent, spread))
    found = _mul_scale(input_amax, weight_amax, exponent, spread)
    before, after = (
        output_error((rows for weight in weights for _, rows in iterate_rows(weight)), held_out, mul_scale, quantizers)
        for mul_scale in (ones, found)
    )
    return found if after < before else ones


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


def output_error(
    weight_tiles: Iterator[Tensor] | Sequence[Tensor], inputs: Tensor, mul_scale: Tensor, quantizers: Quantizers
) -> float:
    """Squared error of the outputs x W^T, summed over inputs and rows of the weight.

    Args:
        weight_tiles: rows of the weight, each [rows, in]
        inputs: activations [samples, in] in the dtype of the model
        mul_scale: float32 [in]
        quantizers: those of the format
    """
    total = 0.0
    smoothed: Tensor | None = None
    for rows in weight_tiles:
        if smoothed is None:
            inputs, mul_scale = inputs.to(rows.device), mul_scale.to(rows.device)
            smoothed = quantizers.inputs(inputs * mul_scale.to(inputs.dtype))
        weight = rows.float()
        difference = smoothed @ quantizers.weight(weight / mul_scale).T
        difference.addmm_(inputs.float(), weight.T, alpha=-1)
        total += float(difference.square_().sum(dtype=torch.float64))
    return total


def _mul_scale(input_amax: Tensor, weight_amax: Tensor, exponent: float, spread: float) -> Tensor:
    """1 / s, rounded to bfloat16; s has geometric mean 1 and stays within a factor of `spread` of it."""
    log = exponent * _log2_amax(input_amax) - (1 - exponent) * _log2_amax(weight_amax)
    log = log - log.mean()
    if spread != float("inf"):
        bound = torch.log2(torch.tensor(spread)).item()
        log = log.clamp(-bound, bound)
    return torch.exp2(-log).to(torch.bfloat16).float()


def _log2_amax(amax: Tensor) -> Tensor:
    positive = amax[amax > 0]
    if len(positive) == 0:
        return torch.zeros_like(amax)
    return torch.log2(amax.clamp(min=float(positive.median()) * SMALLEST_PART))
