"""The steps of a conversion: each quantizes a group of weights, or copies a tensor."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from omni_convert.convert.calibration.rounding import CompensatedFormat
from omni_convert.convert.recipe import Recipe
from omni_convert.formats.containers.checkpoint import Checkpoint
from omni_convert.formats.containers.tensor_spec import TensorSpec
from omni_convert.formats.dialects.base import WrittenSpelling
from omni_convert.formats.families.layers import LayerGroup
from omni_convert.formats.format import QuantizingFormat
from omni_convert.formats.rows import InputColumns, InputStatistics, TensorLayout
from omni_convert.formats.views.base import CheckpointView

__all__ = ["CopyStep", "KeptLayer", "QuantizeStep", "Step", "dtype_of_copy", "matrix_shape", "ordered_steps", "outputs"]


def matrix_shape(weight: TensorSpec) -> tuple[int, int]:
    """[out, rest] of a weight: formats treat a convolution's as a matrix, too."""
    return weight.shape[0], math.prod(weight.shape[1:])


@dataclass(frozen=True)
class QuantizeStep:
    """Quantizes a fused group or a single linear; the unit of work and of memory.

    Attributes:
        group: the layers that are written
        recorded: stems under which calibration recorded the inputs of these layers
        columns: the columns of these inputs that the layers have, the first and the one after the last; None for all
        biases: of those layers whose bias changes with the weight, stem to what the source has
    """

    group: LayerGroup
    recorded: tuple[str, ...]
    format: QuantizingFormat
    inputs: InputStatistics | None
    weights: tuple[TensorSpec, ...]
    spellings: tuple[WrittenSpelling, ...]
    biases: Mapping[str, TensorSpec] = field(default_factory=dict)
    columns: tuple[int, int] | None = None

    def with_inputs(self, inputs: InputStatistics | None) -> QuantizeStep:
        """The step with the statistics of the inputs that were recorded."""
        if inputs is not None and self.columns is not None:
            return replace(self, inputs=InputColumns(inputs, *self.columns))
        return replace(self, inputs=inputs)

    @property
    def is_compensated(self) -> bool:
        """Whether GPTQ may round the weights: something is known of the relations between their inputs."""
        fmt = self.format
        return isinstance(fmt, CompensatedFormat) and (fmt.moments is not None or self.inputs is not None)

    def spelling(self, weight: TensorSpec) -> WrittenSpelling:
        """How a weight of the group is written."""
        return self.spellings[self.weights.index(weight)]

    def layout(self, weight: TensorSpec) -> dict[str, TensorLayout]:
        """The suffix of each stored tensor of a weight → its layout."""
        return self.spelling(weight).layout(self.format.layout(*matrix_shape(weight)))

    def outputs(self) -> list[TensorSpec]:
        return [
            TensorSpec(f"{stem}.{suffix}", layout.dtype, layout.shape)
            for stem, weight in zip(self.group.members, self.weights, strict=True)
            for suffix, layout in self.layout(weight).items()
        ] + [replace(bias, dtype=torch.bfloat16) for bias in self.biases.values()]


@dataclass(frozen=True)
class CopyStep:
    """A tensor that keeps its bytes, or (with `--dtype`) is recast."""

    tensor: TensorSpec
    dtype: torch.dtype

    def outputs(self) -> list[TensorSpec]:
        return [replace(self.tensor, dtype=self.dtype)]


Step = QuantizeStep | CopyStep


@dataclass(frozen=True)
class KeptLayer:
    """A linear layer that is not quantized, and why."""

    name: str
    reason: str

    @staticmethod
    def of(kept: Sequence[tuple[LayerGroup, str]]) -> tuple[KeptLayer, ...]:
        """The layers of groups that are kept."""
        return tuple(KeptLayer(layer, reason) for group, reason in kept for layer in group.members)


def outputs(steps: Sequence[Step]) -> list[TensorSpec]:
    """The tensors that the steps write, in their order."""
    return [spec for step in steps for spec in step.outputs()]


def ordered_steps(
    checkpoint: Checkpoint, steps: Sequence[QuantizeStep], dtype_of_copy: Callable[[TensorSpec], torch.dtype]
) -> Iterator[Step]:
    """All steps in the order in which the source holds the tensors, a group where its first member is.

    Args:
        steps: those that quantize; all other tensors are copied
        dtype_of_copy: decides what a copied tensor becomes
    """
    first = {step.weights[0].name: step for step in steps}
    quantized = {each.name for step in steps for each in (*step.weights, *step.biases.values())}
    for name, spec in checkpoint.items():
        if name in first:
            yield first[name]
        elif name not in quantized:
            yield CopyStep(spec, dtype_of_copy(spec))


def dtype_of_copy(spec: TensorSpec, checkpoint: Checkpoint, recipe: Recipe) -> torch.dtype:
    """The dtype of a tensor that is not quantized: as before, the recipe's, or BF16 if it was quantized."""
    kept = checkpoint.storage.get(spec.name, spec.dtype) if isinstance(checkpoint, CheckpointView) else spec.dtype
    if recipe.method == "keep" or not spec.dtype.is_floating_point:
        return kept
    if recipe.dtype is not None:
        wanted: torch.dtype = getattr(torch, recipe.dtype)
        return wanted
    is_bare_code = recipe.method == "dequantize" and spec.dtype.itemsize == 1
    return torch.bfloat16 if is_bare_code else kept
