"""The error that a format causes in a layer, predicted from what calibration recorded about it.

Weights are rounded as the conversion rounds them to nearest, and recorded inputs as the runtime rounds them. What the
rounding errors do to the images, the layer's sensitivity says.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from omni_convert.formats.arithmetic.smoothing import smoothed_input
from omni_convert.formats.format import QuantizingFormat
from omni_convert.formats.rows import InputStatistics, WeightRows, tile_ranges
from omni_convert.formats.statistics.sensitivity import LayerSensitivity

__all__ = ["ReadRows", "predicted_error"]

#: Rows of a weight that are rounded; of larger weights, tiles of rows that lie evenly apart.
SAMPLED_ROWS = 1024


@dataclass(frozen=True)
class ReadRows:
    """A weight of a checkpoint, as `WeightRows`, on the device that rounds."""

    rows: WeightRows
    device: torch.device

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows.shape

    def read(self, start: int, stop: int) -> Tensor:
        return self.rows.read(start, stop).to(self.device)


def predicted_error(
    fmt: QuantizingFormat,
    weights: Sequence[WeightRows],
    sensitivities: Sequence[LayerSensitivity | None],
    inputs: InputStatistics | None,
) -> float:
    """The sum over prompts of the mean square by which a group in a format changes the images.

    Args:
        weights: members of the group
        sensitivities: of each member; None where no result depends on it
        inputs: statistics of their common input
    """
    fitted = fmt.fit(weights, inputs)
    constants = fmt.constants(fitted)
    error = 0.0
    for weight, sensitivity in zip(weights, sensitivities, strict=True):
        if sensitivity is not None:
            error += _weight_error(fmt, fitted, weight, sensitivity)
            error += _input_error(fmt, constants, sensitivity)
    return error


def _weight_error(fmt: QuantizingFormat, fitted: object, weight: WeightRows, sensitivity: LayerSensitivity) -> float:
    constants = fmt.constants(fitted)
    error, seen = 0.0, 0.0
    for start, stop in _sampled_tiles(weight.shape, fmt.row_multiple):
        tile = weight.read(start, stop)
        on_device = {suffix: tensor.to(tile.device) for suffix, tensor in constants.items()}
        restored = fmt.dequantize({**fmt.quantize_rows(tile, fitted), **on_device})
        error += sensitivity.weight_error((restored - tile.float()).square(), slice(start, stop))
        seen += float(sensitivity.by_output[start:stop].sum())
    return error * float(sensitivity.by_output.sum()) / seen if seen else 0.0


def _input_error(fmt: QuantizingFormat, constants: Mapping[str, Tensor], sensitivity: LayerSensitivity) -> float:
    if fmt.operand_bits is None:
        return 0.0  # the runtime multiplies inputs as they are
    smoothed = smoothed_input(sensitivity.rows, constants)
    difference = fmt.round_inputs(smoothed, constants) - smoothed.float()
    if "mul_scale" in constants:
        difference = difference / constants["mul_scale"].float()
    return sensitivity.input_error(difference.square(), fmt.operand_bits)


def _sampled_tiles(shape: tuple[int, int], multiple: int) -> Iterator[tuple[int, int]]:
    tiles = list(tile_ranges(shape, multiple))
    wanted = max(1, -(-SAMPLED_ROWS * len(tiles) // shape[0]))
    stride = max(1, len(tiles) // wanted)
    return iter(tiles[::stride])
