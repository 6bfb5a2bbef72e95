"""SVDQuant: a weight in 4 bits beside a branch of low rank in 16 bits; inputs are smoothed, and rounded to 4 bits too.

Tensors:    NAME.weight          U8 [out, in / 2]          two codes a byte, even k in the low nibble
            NAME.weight_scale    int4: BF16 [out, in / 64]; nvfp4: F8_E4M3 [out, in / 16]
            NAME.weight_scale_2  F32 []                    nvfp4 only; a number of BF16 where it is written here
            NAME.channel_scale   BF16 [out, 1]             nvfp4 only; ones where it is written here
            NAME.smooth_factor   BF16 [in]
            NAME.lora_a          BF16 [rank, in]
            NAME.lora_b          BF16 [out, rank]
Arithmetic: y = Q(x / smooth_factor) R^T + (x lora_a^T) lora_b^T with R = code * scales
            Q: int4: per token and 64 columns, amax / 7; nvfp4: per token and 16, an E4M3 scale amax / 6
Consumers:  Nunchaku (ComfyUI, SGLang), diffusers as `nunchaku_lite`, vLLM-Omni (nvfp4)
Limits:     out % 128 == 0, in % 128 == 0, rank % 16 == 0: the tiles of Nunchaku's kernels
Choice:     The members of a fused group share smooth_factor and lora_a. Smoothing is amax_x^a / amax_w^b, searched on
            recorded inputs, with the branch in place; without inputs it is 1. The branch begins as the largest
            singular directions of the smoothed weight, and then takes those of what its rounded residual lacks, as
            long as outputs of recorded inputs, or without these the weight, come closer (Li et al., arXiv 2411.05007).
            Of either, another choice than the first counts if `evidence` proves that it is better.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor

from omni_convert.formats.arithmetic.e2m1 import (
    E2M1,
    decode_packed,
    encode_e2m1,
    pack_nibbles,
    round_to_e2m1,
    unpack_nibbles,
)
from omni_convert.formats.arithmetic.element import IntegerType
from omni_convert.formats.arithmetic.encoding import PER_ROW, Encoding
from omni_convert.formats.arithmetic.evidence import RowGroups, row_groups
from omni_convert.formats.arithmetic.input_values import quantize_nvfp4_input
from omni_convert.formats.arithmetic.low_rank import SubspacePass, first_basis, orthonormal
from omni_convert.formats.arithmetic.nvfp4_scale import NVFP4_BLOCK, NVFP4_LARGEST
from omni_convert.formats.arithmetic.smoothing import channel_amax
from omni_convert.formats.arithmetic.tiling import quantize_in_tiles
from omni_convert.formats.containers.tensor_spec import TensorSpec
from omni_convert.formats.format import Calibration, ElementFormat
from omni_convert.formats.options import FormatOptions
from omni_convert.formats.rows import InputStatistics, TensorLayout, WeightRows, iterate_rows, sample_rows, weight_amax
from omni_convert.formats.schemes.nvfp4 import nvfp4_scales

__all__ = ["DEFAULT_RANK", "INT4_GROUP", "TILE", "SvdQuant", "SvdQuantInt4", "SvdQuantNvfp4"]

DEFAULT_RANK = 32
#: Rows, and columns, that Nunchaku's kernels load together; of the rank they load 16.
TILE, RANK_TILE = 128, 16
#: Columns of a token, and of a row, that share a scale with int4.
INT4_GROUP = 64
LOWEST, HIGHEST, HIGHEST_UNSIGNED = -8, 7, 15
PLAIN_DIVISOR = 7.0
DIVISORS = (7.0, 7.5, 8.0, 8.5, 9.0, 9.75, 10.5)
SMALLEST_AMAX = 1e-10
# Passes in which the basis settles, before residuals are rounded; and rounds of rounding them, at most.
SETTLING, ROUNDS = 3, 8
# Exponents of smoothing: a, with b = 0 and with b = 1 - a.
EXPONENTS = tuple(step / 10 for step in range(11))
SEARCH_ROWS = 256
# Rounds in which rows of the branch and their residual follow each other.
TURNS = 2
# A channel that was (almost) silent counts as this part of the median.
SMALLEST_PART = 1e-3


@dataclass(frozen=True)
class _Recorded:
    """Recorded inputs, float32 [samples, in], and the groups of them that are one observation each."""

    rows: Tensor
    groups: RowGroups


@dataclass(frozen=True)
class _Fitted:
    """The values that a fused group shares.

    Attributes:
        smooth: float32 [in]
        down: lora_a
        unit: weight_scale_2, if there is one
    """

    smooth: Tensor
    down: Tensor
    unit: float


@dataclass(frozen=True, eq=False)
class _Parts:
    """Some rows of a smoothed weight.

    Attributes:
        up: lora_b
        scales: of the residual, by suffix
        elements: of the residual, float32 [rows, in]
        rounded: the residual that these stand for, float32 [rows, in]
    """

    up: Tensor
    scales: dict[str, Tensor]
    elements: Tensor
    rounded: Tensor


@dataclass(frozen=True)
class SvdQuant(ElementFormat):
    """SVDQuant; the module describes it.

    Attributes:
        rank: of the branch
        search: choose scales by error
    """

    rank: int = DEFAULT_RANK
    search: bool = True

    elements_per_entry = 2
    is_named_by_dialect = True
    fits_alone = True
    calibration = Calibration.SMOOTHING
    options = ("rank",)
    column_axes = MappingProxyType({"weight": 1, "weight_scale": 1, "smooth_factor": 0, "lora_a": 1})
    rank_axes = MappingProxyType({"lora_a": 0, "lora_b": 1})
    group: ClassVar[int]

    @classmethod
    def build(cls, options: FormatOptions) -> SvdQuant:
        return cls(options.rank or DEFAULT_RANK, options.search)

    @classmethod
    def stored_in(cls, tensors: Mapping[str, TensorSpec]) -> None:
        """Returns None: dialects know the format by the names of its tensors."""

    @property
    def label(self) -> str:
        return f"{self.method} rank {self.rank}"

    def with_rank(self, rank: int) -> SvdQuant:
        return replace(self, rank=rank)

    def unsupported(self, out_features: int, in_features: int) -> str | None:
        if out_features % TILE or in_features % TILE:
            found = f"{out_features} x {in_features}"
            return f"{self.method} needs out_features and in_features in multiples of {TILE}, found {found}"
        if self.rank % RANK_TILE or self.rank > min(out_features, in_features):
            return f"{self.method} needs a rank in multiples of {RANK_TILE} below the size, found {self.rank}"
        return None

    def layout(self, out_features: int, in_features: int) -> dict[str, TensorLayout]:
        return {
            "weight": TensorLayout(torch.uint8, (out_features, in_features // 2)),
            **self._scale_layout(out_features, in_features),
            "smooth_factor": TensorLayout(torch.bfloat16, (in_features,), 0),
            "lora_a": TensorLayout(torch.bfloat16, (self.rank, in_features), 0),
            "lora_b": TensorLayout(torch.bfloat16, (out_features, self.rank)),
        }

    def fit(self, weights: Sequence[WeightRows], inputs: InputStatistics | None) -> _Fitted:
        columns, device = weights[0].shape[1], weights[0].read(0, 1).device
        basis = first_basis(columns, self.rank, device)
        ones = torch.ones(columns, device=device)
        for _ in range(SETTLING):
            basis = _settle(weights, ones, basis).next_basis()
        recorded = None if inputs is None else _recorded(inputs, device)
        smooth = ones
        if inputs is not None and recorded is not None:
            smooth = self._search_smoothing(weights, recorded, inputs.channel_amax(), basis)
        return self._refine(weights, smooth, basis, recorded)

    def constants(self, fitted: _Fitted) -> dict[str, Tensor]:
        shared = {"smooth_factor": fitted.smooth.bfloat16(), "lora_a": fitted.down.bfloat16().contiguous()}
        return shared | self._unit_tensors(fitted.unit)

    def quantize_rows(self, rows: Tensor, fitted: _Fitted) -> dict[str, Tensor]:
        smooth, down = fitted.smooth.to(rows.device), fitted.down.to(rows.device)

        def quantize_tile(tile: Tensor) -> dict[str, Tensor]:
            parts = self._separate(tile.float() * smooth, down * smooth, fitted.unit, TURNS, self.search)
            return {
                "weight": pack_nibbles(self._codes(parts.elements)),
                **parts.scales,
                "lora_b": parts.up.bfloat16().contiguous(),
            }

        return quantize_in_tiles(rows, quantize_tile)  # dialects encode whole weights, so that they come whole

    def dequantize(self, tensors: Mapping[str, Tensor]) -> Tensor:
        smooth = tensors["smooth_factor"].float()
        residual = self.multiplied(tensors).div_(smooth)
        return residual.addmm_(tensors["lora_b"].float(), tensors["lora_a"].float())

    def multiplied(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return self._elements(tensors).mul_(self.element_scale(tensors))

    def flaw(self, tensors: Mapping[str, Tensor]) -> str | None:
        for suffix in ("smooth_factor", "lora_a", "lora_b"):
            numbers = tensors.get(suffix)
            if numbers is not None and not bool(numbers.isfinite().all()):
                return f"{suffix}: found NaN or Inf, expected finite numbers"
        if "smooth_factor" in tensors and not bool((tensors["smooth_factor"] > 0).all()):
            return "smooth_factor: found numbers that are zero or negative, expected positive ones"
        return super().flaw(tensors)

    def scale_inputs(self, inputs: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        return inputs / tensors["smooth_factor"].to(inputs.dtype)

    def input_factors(self, constants: Mapping[str, Tensor]) -> Tensor:
        return 1.0 / constants["smooth_factor"].float()

    def side_product(self, inputs: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        down, up = (tensors[name].to(inputs.dtype) for name in ("lora_a", "lora_b"))
        return inputs @ down.T @ up.T

    def element_values(self, rows: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        smooth = tensors["smooth_factor"].float()
        return (rows.float() * smooth).addmm_(tensors["lora_b"].float(), tensors["lora_a"] * smooth, alpha=-1)

    def with_elements(self, tensors: Mapping[str, Tensor], elements: Tensor) -> dict[str, Tensor]:
        return {**tensors, "weight": pack_nibbles(self._codes(elements))}

    @abstractmethod
    def _scale_layout(self, out_features: int, in_features: int) -> dict[str, TensorLayout]: ...

    @abstractmethod
    def _codes(self, elements: Tensor) -> Tensor:
        """Codes of elements, uint8 of the same shape."""

    @abstractmethod
    def _elements(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The elements, float32 [rows, in]."""

    @abstractmethod
    def _scales(self, values: Tensor, unit: float, search: bool) -> dict[str, Tensor]:
        """The scales of rows [rows, in], by suffix."""

    def _unit(self, largest: float) -> float:
        """The scale above all others, for numbers up to this one."""
        return 1.0

    def _unit_tensors(self, unit: float) -> dict[str, Tensor]:
        return {}

    def _separate(self, smoothed: Tensor, down: Tensor, unit: float, turns: int, search: bool) -> _Parts:
        """Rows as branch and residual: first the branch as if nothing were rounded, then each beside the other.

        Args:
            smoothed: rows of the smoothed weight, float32 [rows, in]
            down: lora_a for smoothed inputs, float32 [rank, in]
        """
        to_up = torch.linalg.solve(down @ down.T, down).T  # [in, rank]
        above, rounded = self._unit_tensors(unit), torch.zeros(1, device=smoothed.device)
        for turn in range(turns):
            up = ((smoothed - rounded) @ to_up).bfloat16().float()
            residual = torch.addmm(smoothed, up, down, alpha=-1)
            scales = self._scales(residual, unit, search and turn == turns - 1)
            spread = self.element_scale({**scales, **above})
            elements = self.round_elements(residual.div_(spread))
            rounded = elements * spread
        return _Parts(up, scales, elements, rounded)

    def _search_smoothing(
        self, weights: Sequence[WeightRows], recorded: _Recorded, input_amax: Tensor, basis: Tensor
    ) -> Tensor:
        """The factors with the smallest error of outputs over a sample of rows, float32 [in], numbers of bfloat16.

        They are 1 where no others are proven to be better.
        """
        inputs = recorded.rows
        rows = sample_rows(weights, SEARCH_ROWS).float()
        device = rows.device
        largest_input, largest_weight = _positive(input_amax).to(device), _positive(channel_amax(weights)).to(device)
        wanted = inputs @ rows.T

        def errors(smooth: Tensor) -> Tensor:
            turned = orthonormal(basis * smooth[:, None])
            seen, smoothed = SubspacePass(turned), rows * smooth
            seen.add(smoothed)
            down, unit = seen.largest(self.rank).T, self._unit(float(smoothed.abs().max()))
            parts = self._separate(smoothed, down, unit, 1, search=False)
            return _by_input(self._outputs(inputs / smooth, parts, down, smooth).sub_(wanted))

        candidates = [torch.ones_like(largest_input)]
        for exponent in EXPONENTS[1:]:
            others = dict.fromkeys((0.0, round(1 - exponent, 2)))
            candidates += [_factors(largest_input, largest_weight, exponent, other) for other in others]
        return candidates[recorded.groups.proven_choice(torch.stack([errors(each) for each in candidates]))]

    def _outputs(self, smoothed_inputs: Tensor, parts: _Parts, down: Tensor, smooth: Tensor) -> Tensor:
        """The outputs of a layer with these rows for smoothed inputs [samples, in], float32 [samples, rows]."""
        product = self.round_inputs(smoothed_inputs, {"smooth_factor": smooth}) @ parts.rounded.T
        return product.addmm_(smoothed_inputs @ down.T, parts.up.T)

    def _refine(
        self, weights: Sequence[WeightRows], smooth: Tensor, basis: Tensor, recorded: _Recorded | None
    ) -> _Fitted:
        """The branch that leaves the smallest error: of the outputs of recorded inputs, or else of the weight."""
        settled = _settle(weights, smooth, orthonormal(basis * smooth[:, None]))
        direction, basis = settled.largest(self.rank), settled.next_basis()
        unit = self._unit(weight_amax([_Smoothed(weight, smooth) for weight in weights]))
        inputs = None if recorded is None else recorded.rows / smooth
        found: list[_Fitted] = []
        errors: list[Tensor] = []
        for _ in range(ROUNDS):
            stored = (direction.T / smooth).bfloat16().float()
            down, step = stored * smooth, SubspacePass(basis)
            error = torch.zeros(1 if inputs is None else len(inputs), dtype=torch.float64)
            for smoothed in _smoothed_tiles(weights, smooth):
                parts = self._separate(smoothed, down, unit, 1, search=False)
                smoothed.sub_(parts.rounded)
                step.add(smoothed)  # what the branch should be
                left = smoothed.addmm_(parts.up, down, alpha=-1)
                if inputs is not None:
                    exact = left.add_(parts.rounded).addmm_(parts.up, down)
                    left = self._outputs(inputs, parts, down, smooth).sub_(inputs @ exact.T)
                error += _by_input(left) if inputs is not None else _by_input(left).sum()
            found.append(_Fitted(smooth, stored, unit))
            errors.append(error)
            if len(errors) > 1 and float(error.sum()) >= float(errors[-2].sum()):
                break
            direction, basis = step.largest(self.rank), step.next_basis()
        every = torch.stack(errors)
        return found[int(every.argmin(0)) if recorded is None else recorded.groups.proven_choice(every)]


@dataclass(frozen=True)
class _Smoothed:
    """A weight whose columns are multiplied by factors."""

    weight: WeightRows
    smooth: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape

    def read(self, start: int, stop: int) -> Tensor:
        return self.weight.read(start, stop).float() * self.smooth


def _smoothed_tiles(weights: Sequence[WeightRows], smooth: Tensor) -> Iterator[Tensor]:
    for weight in weights:
        for _, rows in iterate_rows(_Smoothed(weight, smooth)):
            yield rows


def _settle(weights: Sequence[WeightRows], smooth: Tensor, basis: Tensor) -> SubspacePass:
    step = SubspacePass(basis)
    for rows in _smoothed_tiles(weights, smooth):
        step.add(rows)
    return step


def _recorded(inputs: InputStatistics, device: torch.device) -> _Recorded | None:
    """The inputs that decide between choices; None if they are too few to prove anything."""
    rows = inputs.rows().float().to(device)
    groups = row_groups(inputs.row_runs(), len(rows))
    return _Recorded(rows, groups) if groups.count > 1 else None


def _by_input(differences: Tensor) -> Tensor:
    """Squared error of each input, float64 [samples], of differences of outputs [samples, rows], which are lost."""
    return differences.square_().sum(1, dtype=torch.float64).cpu()


def _positive(amax: Tensor) -> Tensor:
    """The magnitudes, float32 [in]; zeros and very small ones become a small part of the median."""
    positive = amax[amax > 0]
    smallest = float(positive.median()) * SMALLEST_PART if len(positive) else 1.0
    return amax.float().clamp(min=smallest)


def _factors(inputs: Tensor, weights: Tensor, exponent: float, other: float) -> Tensor:
    """Smoothing factors of geometric mean 1, numbers of bfloat16."""
    log = exponent * inputs.log2() - other * weights.log2()
    return torch.exp2(log - log.mean()).bfloat16().float()


@dataclass(frozen=True)
class SvdQuantInt4(SvdQuant):
    """SVDQuant in integers of 4 bits.

    Attributes:
        shift: what is added to inputs that are never below its negative, so that they are rounded without a sign; what
            it adds to outputs is taken away from the bias
    """

    shift: float = 0.0

    method = "svdquant_int4"
    group = INT4_GROUP

    @property
    def encoding(self) -> Encoding:
        return Encoding(IntegerType(4), block=(1, self.group), is_smoothed=False)

    def element_scale(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return tensors["weight_scale"].float().repeat_interleave(self.group, dim=1)

    def round_elements(self, values: Tensor) -> Tensor:
        return values.round().clamp_(LOWEST, HIGHEST)

    @property
    def label(self) -> str:
        return f"{super().label}, unsigned inputs" if self.shift else super().label

    @property
    def unshifted(self) -> SvdQuantInt4:
        return replace(self, shift=0.0)

    def shift_product(self, tensors: Mapping[str, Tensor]) -> Tensor | None:
        return self.multiplied(tensors) @ self._offsets(tensors) if self.shift else None

    def round_inputs(self, inputs: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        if self.shift:
            return self._round_unsigned(inputs.float(), self._offsets(tensors).to(inputs.device))
        groups = inputs.float().reshape(*inputs.shape[:-1], -1, self.group)
        scale = groups.abs().amax(dim=-1, keepdim=True).clamp_(min=SMALLEST_AMAX) / HIGHEST
        rounded = (groups / scale).round_().clamp_(-HIGHEST, HIGHEST).mul_(scale)
        return rounded.view(inputs.shape)

    def _offsets(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The shift of each smoothed input, float32 [in]."""
        return self.shift / tensors["smooth_factor"].float()

    def _round_unsigned(self, inputs: Tensor, offsets: Tensor) -> Tensor:
        groups = (inputs + offsets).reshape(*inputs.shape[:-1], -1, self.group)
        scale = groups.amax(dim=-1, keepdim=True).clamp_(min=SMALLEST_AMAX) / HIGHEST_UNSIGNED
        rounded = (groups / scale).round_().clamp_(0, HIGHEST_UNSIGNED).mul_(scale)
        return rounded.view(inputs.shape).sub_(offsets)

    def _scale_layout(self, out_features: int, in_features: int) -> dict[str, TensorLayout]:
        return {"weight_scale": TensorLayout(torch.bfloat16, (out_features, in_features // self.group))}

    def _codes(self, elements: Tensor) -> Tensor:
        return elements.to(torch.int8).view(torch.uint8).bitwise_and_(15)

    def _elements(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return (unpack_nibbles(tensors["weight"]) ^ 8).to(torch.float32) - 8

    def _scales(self, values: Tensor, unit: float, search: bool) -> dict[str, Tensor]:
        groups = values.reshape(len(values), -1, self.group)
        amax = groups.abs().amax(dim=2, keepdim=True).clamp_(min=SMALLEST_AMAX)
        best, scale = torch.full_like(amax, torch.inf), (amax / PLAIN_DIVISOR).bfloat16().float()
        for divisor in DIVISORS if search else ():
            tried = (amax / divisor).bfloat16().float()
            error = self.round_elements(groups / tried).mul_(tried).sub_(groups).square_().sum(dim=2, keepdim=True)
            scale, best = torch.where(error < best, tried, scale), torch.minimum(best, error)
        return {"weight_scale": scale.squeeze(2).bfloat16()}


class SvdQuantNvfp4(SvdQuant):
    """SVDQuant in NVFP4."""

    method = "svdquant_nvfp4"
    group = NVFP4_BLOCK

    @property
    def encoding(self) -> Encoding:
        return Encoding(E2M1, torch.float8_e4m3fn, (1, self.group), outer_block=PER_ROW)

    def element_scale(self, tensors: Mapping[str, Tensor]) -> Tensor:
        scale = tensors["weight_scale"].float() * tensors["weight_scale_2"].float()
        if "channel_scale" in tensors:
            scale *= tensors["channel_scale"].float()
        return scale.repeat_interleave(self.group, dim=1)

    def round_elements(self, values: Tensor) -> Tensor:
        return round_to_e2m1(values)

    def round_inputs(self, inputs: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        return quantize_nvfp4_input(inputs, torch.ones((), device=inputs.device))

    def _scale_layout(self, out_features: int, in_features: int) -> dict[str, TensorLayout]:
        return {
            "weight_scale": TensorLayout(torch.float8_e4m3fn, (out_features, in_features // self.group)),
            "weight_scale_2": TensorLayout(torch.float32, (), 0),
            "channel_scale": TensorLayout(torch.bfloat16, (out_features, 1)),
        }

    def _codes(self, elements: Tensor) -> Tensor:
        return encode_e2m1(elements)

    def _elements(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return decode_packed(tensors["weight"])

    def _scales(self, values: Tensor, unit: float, search: bool) -> dict[str, Tensor]:
        above = torch.tensor(unit, device=values.device)
        scale = nvfp4_scales(values.reshape(len(values), -1, self.group), above, search=search)
        ones = torch.ones(len(values), 1, dtype=torch.bfloat16, device=values.device)
        return {"weight_scale": scale.to(torch.float8_e4m3fn), "channel_scale": ones}

    def _unit(self, largest: float) -> float:
        return float(torch.tensor(largest / NVFP4_LARGEST).bfloat16()) or 1.0

    def _unit_tensors(self, unit: float) -> dict[str, Tensor]:
        return {"weight_scale_2": torch.tensor(unit)}
