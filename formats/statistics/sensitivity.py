"""How much an error inside each linear layer changes the images: recorded from gradients, read by any format.

Let v be a random direction in the images (independent normal numbers), g the gradient of <v, images> at a layer's
output, and h the one at its input. Then E[(g . e)^2] is the squared change of the images by an error e of the output,
and likewise for h and errors of the input. Two kinds of error matter. Both are sums of small parts of random sign:

    weights  dW is the same in every step and for every token, so that its effects add up before they are squared:
             with G = sum of g x^T over the tokens and steps of a prompt, E[<G, dW>^2] = sum of E[G_ij^2] dW_ij^2.
             The expectation is kept as the product of what it is by row and by column.
    inputs   if rounding differed from token to token: the sum over tokens of h_j^2 dx_j^2. It is kept as the sum of
             h_j^2 by channel, and a sample of rows x that is drawn in proportion to |h|^2, on which a format rounds.
             But equal inputs have equal errors, such as those of a text in each step. So by channel too, effects add
             up before they are squared. How much that changes is measured on one rounding to 8 bits and one to 4.

G itself would be as large as the model. Its squared rows and columns are estimated from products with random signs.

Everything is divided by the number of values in the images, which are from 0 to 1: errors are mean squares.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from omni_convert.formats.arithmetic.input_codes import fp8_per_token
from omni_convert.formats.arithmetic.input_values import quantize_mxfp4_input
from omni_convert.formats.errors import CalibrationError
from omni_convert.formats.statistics.exact_sums import add_sums, exact_sums, sums_to_floats
from omni_convert.formats.statistics.row_sample import hash_words, pack_rows

__all__ = ["LayerSensitivity", "PipelineSensitivity", "SensitivityRecorder"]

SAMPLE_ROWS = 64
#: Random directions in which the rows and columns of G are measured.
SKETCH = 16
#: Begins the names of tensors in the statistics file.
PREFIX = "sensitivity"
ROUNDING, PROMPTS = f"{PREFIX}.rounding", f"{PREFIX}.prompts"
SUMS = ("output_sums", "column_sums", "input_sums", "repeated_sums")
#: Bits of inputs that are rounded while they are recorded.
ROUNDED_BITS = (8, 4)


@dataclass(frozen=True, eq=False)
class LayerSensitivity:
    """The effect of errors of one layer on the images, as sums over prompts; see `exact_sums`.

    Attributes:
        output_sums: of E[G^2] by row of the weight, int64 [2, out]
        column_sums: of E[G^2] by column of the weight, int64 [2, in]
        input_sums: of h^2 by input channel, int64 [2, in]
        repeated_sums: for each of `ROUNDED_BITS`, of the effect of rounding inputs to so many bits, and of what it
            would be if all tokens had different errors; int64 [2, 4]
        rows: inputs drawn in proportion to their |h|^2, the most likely first, bfloat16 [<= 64, in]
        weights: |h|^2 of each row, float32 [<= 64]
    """

    output_sums: Tensor
    column_sums: Tensor
    input_sums: Tensor
    repeated_sums: Tensor
    rows: Tensor
    weights: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of the file, by suffix."""
        return {
            **{name: getattr(self, name) for name in SUMS},
            "rows": self.rows,
            "weights": self.weights,
        }

    @cached_property
    def by_output(self) -> Tensor:
        """E[G^2] summed over columns, float64 [out]."""
        return sums_to_floats(self.output_sums)

    @cached_property
    def by_column(self) -> Tensor:
        """The part of E[G^2] that each column has, float64 [in]; their sum is 1, or all are 0."""
        sums = sums_to_floats(self.column_sums)
        return sums / sums.sum().clamp(min=torch.finfo(torch.float64).tiny)

    def weight_error(self, squared: Tensor, rows: slice) -> float:
        """The effect of errors of some rows of the weight.

        Args:
            squared: squared errors of these rows, [rows, in]
            rows: where in the weight they are
        """
        return float(self.by_output[rows] @ (squared.double().cpu() @ self.by_column))

    def input_error(self, squared: Tensor, bits: int) -> float:
        """The effect of rounding the layer's inputs.

        Args:
            squared: squared rounding errors of `rows`, [<= 64, in]
            bits: of the rounded inputs, one of `ROUNDED_BITS`
        """
        # Priority sampling: the smallest priority is the threshold below which a row's weight counts as that.
        counted = self.weights.double().clamp(min=float(_priorities(self.rows, self.weights)[-1]))
        mean = (counted @ squared.double().cpu()) / counted.sum().clamp(min=torch.finfo(torch.float64).tiny)
        return float(sums_to_floats(self.input_sums) @ mean) * self._repetition(bits)

    def _repetition(self, bits: int) -> float:
        """How many times larger the effect of rounding inputs is, since some of them have equal errors."""
        effect, apart = sums_to_floats(self.repeated_sums).view(-1, 2)[ROUNDED_BITS.index(bits)].tolist()
        return effect / apart if apart > 0 else 1.0

    @staticmethod
    def merged(parts: Iterable[LayerSensitivity]) -> LayerSensitivity:
        """Merges what was recorded on different prompts, in any order; there is at least one part."""
        everything = list(parts)
        rows, weights = _sampled(
            torch.cat([part.rows for part in everything]), torch.cat([part.weights for part in everything])
        )
        sums = {name: add_sums(getattr(part, name) for part in everything) for name in SUMS}
        return LayerSensitivity(**sums, rows=rows, weights=weights)


def _priorities(rows: Tensor, weights: Tensor) -> Tensor:
    """|h|^2 over a number in (0, 1] that looks random and depends on the row and its weight alone; float64 [rows]."""
    bits = weights.view(torch.int32).long() * 0x9E3779B97F4A7C15 % (1 << 62)
    mixed = (hash_words(pack_rows(rows)) ^ bits) * -0x61C8864680B583EB
    uniform = ((mixed >> 11) & ((1 << 52) - 1)).double().add(1).mul(2.0**-52)
    return weights.double() / uniform


def _sampled(rows: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The rows with the highest priorities, in descending order of these, and their weights."""
    order = _priorities(rows, weights).sort(descending=True, stable=True).indices[:SAMPLE_ROWS]
    return rows[order], weights[order]


def _rounded(inputs: Tensor) -> tuple[Tensor, ...]:
    """Inputs [tokens, in] as rounded to each of `ROUNDED_BITS`, float32."""
    codes, scale = fp8_per_token(inputs)
    return codes.float() * scale, quantize_mxfp4_input(inputs)


class SensitivityRecorder:
    """Accumulates gradients at one layer, prompt by prompt."""

    def __init__(self, name: str, out_features: int, in_features: int, device: torch.device) -> None:
        """Prepares for a layer.

        Args:
            name: of the layer; the random signs depend on it alone
        """
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")
        generator = torch.Generator().manual_seed(seed)
        self._left, self._right = (
            (torch.randint(0, 2, (size, SKETCH), generator=generator).float() * 2 - 1).to(device) / SKETCH**0.5
            for size in (out_features, in_features)
        )
        self._by_row = torch.zeros(out_features, SKETCH, device=device)
        self._by_column = torch.zeros(SKETCH, in_features, device=device)
        self._by_input = torch.zeros(in_features, dtype=torch.float64, device=device)
        self._effects = torch.zeros(len(ROUNDED_BITS), in_features, dtype=torch.float64, device=device)
        self._apart = torch.zeros(len(ROUNDED_BITS), dtype=torch.float64, device=device)
        self._rows: list[tuple[Tensor, Tensor]] = []
        self._prompts: list[LayerSensitivity] = []

    def record_output(self, gradient: Tensor, inputs: Tensor) -> None:
        """Adds the gradients at the output of some tokens.

        Args:
            gradient: [tokens, out]
            inputs: [tokens, in]
        """
        g, x = gradient.float(), inputs.float()
        self._by_row.addmm_(g.T, x @ self._right)
        self._by_column.addmm_((g @ self._left).T, x)

    def record_input(self, gradient: Tensor, inputs: Tensor) -> None:
        """Adds the gradients at the input of some tokens, both [tokens, in]."""
        for number, rounded in enumerate(_rounded(inputs)):
            effects = (rounded - inputs.float()).mul_(gradient.float())
            self._effects[number] += effects.sum(0, dtype=torch.float64)
            self._apart[number] += effects.square_().sum(dtype=torch.float64)
        squared = gradient.float().square()
        weights = squared.sum(1)
        self._by_input += squared.sum(0, dtype=torch.float64)
        is_seen = weights > 0  # no result depends on the others, such as padding
        if bool(is_seen.any()):
            rows, weights = inputs[is_seen].to(torch.bfloat16).cpu(), weights[is_seen].cpu()
            self._rows.append(_sampled(rows, weights))

    def finish_prompt(self, values: int) -> bool:
        """Ends a prompt, whose gradients belong to one direction in images of so many values.

        Returns:
            whether there were gradients at the layer's input

        Raises:
            CalibrationError: a gradient was NaN or infinite.
        """
        repeated = torch.stack([self._effects.square().sum(1), self._apart], 1).flatten()
        found = [self._by_row.square().sum(1), self._by_column.square().sum(0), self._by_input, repeated]
        if not all(bool(torch.isfinite(sums).all()) for sums in found):
            raise CalibrationError("found gradients that are NaN or infinite, expected finite ones; try another dtype")
        has_gradients = bool(self._rows)
        if has_gradients:
            rows, weights = (torch.cat(parts) for parts in zip(*self._rows, strict=True))
            rows, weights = _sampled(rows, weights / values)
            sums = dict(zip(SUMS, (exact_sums(each.double().cpu() / values) for each in found), strict=True))
            parts = [*self._prompts, LayerSensitivity(**sums, rows=rows, weights=weights)]
            self._prompts = [LayerSensitivity.merged(parts)]
        for buffer in (self._by_row, self._by_column, self._by_input, self._effects, self._apart):
            buffer.zero_()
        self._rows.clear()
        return has_gradients

    def sensitivity(self) -> LayerSensitivity | None:
        """The sensitivity of the layer so far; None if no result depends on the layer."""
        return self._prompts[0] if self._prompts else None


@dataclass(frozen=True, eq=False)
class PipelineSensitivity:
    """The sensitivity of a pipeline's layers.

    Attributes:
        layers: `component.stem` to what was recorded there
        rounding: the effect of computing in BF16, summed over the prompts, int64 [2, 1]
        prompts: number of prompts
    """

    layers: Mapping[str, LayerSensitivity]
    rounding: Tensor
    prompts: int

    @property
    def rounding_error(self) -> float:
        """Mean square by which BF16 changes the images, as the sum over all rounded results predicts."""
        return float(sums_to_floats(self.rounding)[0]) / self.prompts

    def merge(self, others: Iterable[PipelineSensitivity]) -> PipelineSensitivity:
        """Merges recordings of different prompts; the order does not matter."""
        everything = [self, *others]
        names = sorted({name for part in everything for name in part.layers})
        layers = {
            name: LayerSensitivity.merged(part.layers[name] for part in everything if name in part.layers)
            for name in names
        }
        return PipelineSensitivity(
            layers, add_sums(part.rounding for part in everything), sum(part.prompts for part in everything)
        )

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of the statistics file."""
        named = {
            f"{PREFIX}.{name}.{suffix}": tensor
            for name, layer in sorted(self.layers.items())
            for suffix, tensor in layer.tensors().items()
        }
        return {ROUNDING: self.rounding, PROMPTS: torch.tensor([self.prompts]), **named}

    @classmethod
    def from_tensors(cls, where: str, tensors: Mapping[str, Tensor]) -> PipelineSensitivity | None:
        """Reads what a statistics file holds; None if it holds no sensitivity.

        Args:
            where: what to name in errors

        Raises:
            CalibrationError: a tensor is missing, has another dtype or shape, or holds impossible values.
        """
        if ROUNDING not in tensors:
            return None
        first = f".{SUMS[0]}"
        names = [
            name.removeprefix(f"{PREFIX}.").removesuffix(first)
            for name in sorted(tensors)
            if name.startswith(f"{PREFIX}.") and name.endswith(first)
        ]
        prompts = tensors.get(PROMPTS)
        _check(where, ROUNDING, tensors[ROUNDING], torch.int64, (2, 1))
        _check(where, PROMPTS, prompts, torch.int64, (1,))
        if prompts is None or int(prompts[0]) < 1:
            raise CalibrationError(f"{where}: {PROMPTS}: found no prompts, expected at least one; calibrate again")
        layers = {name: _layer(where, name, tensors) for name in names}
        return cls(layers, tensors[ROUNDING], int(prompts[0]))


def _layer(where: str, name: str, tensors: Mapping[str, Tensor]) -> LayerSensitivity:
    prefix = f"{PREFIX}.{name}"
    found = {suffix: tensors.get(f"{prefix}.{suffix}") for suffix in (*SUMS, "rows", "weights")}
    rows = found["rows"]
    count, width = rows.shape if rows is not None and rows.dim() == 2 else (-1, -1)
    expected = {
        "output_sums": (torch.int64, (2, -1)),
        "column_sums": (torch.int64, (2, width)),
        "input_sums": (torch.int64, (2, width)),
        "repeated_sums": (torch.int64, (2, 2 * len(ROUNDED_BITS))),
        "rows": (torch.bfloat16, (count, width)),
        "weights": (torch.float32, (count,)),
    }
    for suffix, (dtype, shape) in expected.items():
        _check(where, f"{prefix}.{suffix}", found[suffix], dtype, shape, signed=suffix == "rows")
    if not 0 < count <= SAMPLE_ROWS:
        raise CalibrationError(f"{where}: {prefix}.rows: found {count} rows, expected 1 to {SAMPLE_ROWS}")
    return LayerSensitivity(**{suffix: tensor for suffix, tensor in found.items() if tensor is not None})


def _check(
    where: str, name: str, tensor: Tensor | None, dtype: torch.dtype, shape: tuple[int, ...], *, signed: bool = False
) -> None:
    """Raises CalibrationError unless a tensor has a dtype, a shape (-1 is any size but 0) and finite values."""
    fits = (
        tensor is not None
        and tensor.dtype == dtype
        and tensor.dim() == len(shape)
        and all(size > 0 and wanted in (-1, size) for size, wanted in zip(tensor.shape, shape, strict=True))
    )
    if tensor is None or not fits:
        found = "nothing" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
        raise CalibrationError(f"{where}: {name}: found {found}, expected {dtype}; calibrate again")
    if not bool(torch.isfinite(tensor).all()) or (not signed and bool((tensor < 0).any())):
        raise CalibrationError(f"{where}: {name}: found NaN, Inf or negative values; calibrate again")
