import json
from functools import cache
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from omni_convert.formats.arithmetic.ggml.k_quants import K_QUANTS

# Bytes that ggml 0.13.1 makes of 512 numbers, without and with importance, and their errors in percent.
GOLDEN = json.loads((Path(__file__).parent / "k_quants_golden.json").read_text())
NUMBERS = torch.tensor([np.sin(0.37 * i) * (1 + i % 7) for i in range(512)], dtype=torch.float64).float()
IMPORTANCE = torch.tensor([1 + i * i % 11 for i in range(512)], dtype=torch.float32)
# Errors in percent on 1024 x 3072 numbers: normal, Student-t(4), and weighted. The search's have to be below.
BARS = {
    "Q2_K": (26.0, 28.9, 22.6),
    "Q3_K": (14.4, 17.6, 13.3),
    "Q4_K": (6.97, 8.43, 6.32),
    "Q5_K": (3.43, 4.16, 3.11),
    "Q6_K": (1.71, 2.20, 1.57),
    "IQ4_XS": (7.50, 9.18, 7.0),
    "IQ4_NL": (7.49, 9.16, 7.0),
}
SAMPLED = 1.01  # fewer rows have an error that differs by so much
KINDS = pytest.mark.parametrize("kind", K_QUANTS)


def quantize(kind: str, weight: Tensor, importance: Tensor | None = None, *, search: bool = True) -> Tensor:
    block = K_QUANTS[kind]
    by_number = None if importance is None else importance.expand_as(weight).reshape(-1, block.numbers)
    return block.quantize(weight.reshape(-1, block.numbers), by_number, search=search)


def dequantize(kind: str, stored: Tensor) -> Tensor:
    return K_QUANTS[kind].dequantize(stored).flatten()


def upstream(kind: str, stored: Tensor) -> Tensor:
    numbers = gguf.quants.dequantize(stored.flatten().numpy(), gguf.GGMLQuantizationType[kind])
    return torch.from_numpy(numbers)


def error(kind: str, stored: Tensor, weight: Tensor, importance: Tensor | None = None) -> float:
    """In percent of the weight."""
    weight = weight.flatten().double()
    counts = torch.ones_like(weight) if importance is None else importance.repeat(len(weight) // len(importance))
    rest = dequantize(kind, stored).double() - weight
    return 100 * float(((rest.square() * counts).sum() / (weight.square() * counts).sum()).sqrt())


@cache
def weights(rows: int = 128) -> tuple[Tensor, Tensor, Tensor]:
    """Normal and Student-t(4) numbers, and an importance for each column: the first rows of those of the bars."""
    draw = np.random.default_rng(0)
    normal, student = draw.standard_normal((1024, 3072))[:rows], draw.standard_t(4, (1024, 3072))[:rows]
    importance = draw.lognormal(0, 1, 3072)
    return tuple(torch.from_numpy(numbers).float() for numbers in (normal * 0.02, student * 0.02, importance))  # type: ignore[return-value]


@KINDS
def test_sizes_are_those_of_the_gguf_package(kind: str) -> None:
    block = K_QUANTS[kind]
    assert (block.numbers, block.size) == gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]


@KINDS
@pytest.mark.parametrize("made_with", ["plain", "weighted"])
def test_golden_bytes_are_read_as_the_gguf_package_reads_them(kind: str, made_with: str) -> None:
    golden = GOLDEN[kind][made_with]
    stored = torch.frombuffer(bytearray.fromhex(golden["bytes"]), dtype=torch.uint8).view(-1, K_QUANTS[kind].size)
    assert torch.equal(dequantize(kind, stored), upstream(kind, stored))
    assert error(kind, stored, NUMBERS) == pytest.approx(golden["error"], abs=0.001)
    assert error(kind, stored, NUMBERS, IMPORTANCE) == pytest.approx(golden["weighted_error"], abs=0.001)


@KINDS
def test_golden_numbers_come_closer_than_ggml_brings_them(kind: str) -> None:
    golden = GOLDEN[kind]
    assert error(kind, quantize(kind, NUMBERS), NUMBERS) < golden["plain"]["error"]
    weighted = error(kind, quantize(kind, NUMBERS, IMPORTANCE), NUMBERS, IMPORTANCE)
    assert weighted < golden["weighted"]["weighted_error"]


@KINDS
def test_any_bytes_are_read_as_the_gguf_package_reads_them(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    stored = torch.randint(0, 256, (64, K_QUANTS[kind].size), dtype=torch.uint8, generator=generator)
    with np.errstate(all="ignore"):
        theirs = upstream(kind, stored)
    assert torch.equal(dequantize(kind, stored).nan_to_num(7.0), theirs.nan_to_num(7.0))


@KINDS
@pytest.mark.parametrize("search", [False, True], ids=["nearest", "search"])
def test_what_is_written_is_read_as_the_gguf_package_reads_it(kind: str, search: bool) -> None:
    normal, _, importance = weights()
    stored = quantize(kind, normal[:8], importance, search=search)
    assert torch.equal(dequantize(kind, stored), upstream(kind, stored))


@KINDS
@pytest.mark.parametrize(("rows", "sampled"), [(128, SAMPLED), pytest.param(1024, 1.0, marks=pytest.mark.slow)])
def test_errors_of_the_search_are_below_the_bars(kind: str, rows: int, sampled: float) -> None:
    normal, student, importance = weights(rows)
    bars = [bar * sampled for bar in BARS[kind]]
    assert error(kind, quantize(kind, normal), normal) < bars[0]
    assert error(kind, quantize(kind, student), student) < bars[1]
    assert error(kind, quantize(kind, normal, importance), normal, importance) < bars[2]


@KINDS
def test_searching_and_importance_lower_the_error(kind: str) -> None:
    normal, _, importance = weights()
    nearest = error(kind, quantize(kind, normal, importance, search=False), normal, importance)
    unweighted = error(kind, quantize(kind, normal), normal, importance)
    assert error(kind, quantize(kind, normal, importance), normal, importance) < min(nearest, unweighted)


@KINDS
@pytest.mark.parametrize("search", [False, True], ids=["nearest", "search"])
def test_bytes_of_a_block_do_not_depend_on_its_neighbours_or_on_threads(kind: str, search: bool) -> None:
    normal, _, importance = weights()
    whole = quantize(kind, normal, importance, search=search)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(quantize(kind, normal, importance, search=search), whole)
    finally:
        torch.set_num_threads(threads)
    per_row = len(whole) // len(normal)
    for row in (0, 5, 127):
        alone = quantize(kind, normal[row : row + 1], importance, search=search)
        assert torch.equal(alone, whole[row * per_row : (row + 1) * per_row])
    numbers = K_QUANTS[kind].numbers
    last = quantize(kind, normal[5, -numbers:], importance[-numbers:], search=search)
    assert torch.equal(last[0], whole[6 * per_row - 1])


def zeros_and_ones() -> Tensor:
    return torch.cat([torch.zeros(32), torch.ones(224)])


@KINDS
@pytest.mark.parametrize("search", [False, True], ids=["nearest", "search"])
@pytest.mark.parametrize(
    ("weight", "bound"),
    [
        (torch.zeros(256), 0.0),
        (torch.full((256,), 0.5), 0.05),
        (torch.full((256,), -0.5), 0.05),
        (zeros_and_ones(), 0.05),
        (-zeros_and_ones(), 0.05),
        (torch.linspace(1, 2, 256), 7.0),
        (torch.linspace(-2, -1, 256), 7.0),
        (torch.eye(256)[3], 5.0),
        (NUMBERS[:256] * 1e4, 30.0),
    ],
    ids=[
        "zeros",
        "constant",
        "negative constant",
        "zeros and ones",
        "their negatives",
        "positive",
        "negative",
        "one",
        "large",
    ],
)
def test_unusual_blocks(kind: str, search: bool, weight: Tensor, bound: float) -> None:
    # With importance, equally good guesses differ by rounding, and the groups' scales then fit no common factor.
    for importance, factor in ((None, 1), (IMPORTANCE[:256] * 0.37, 6)):
        stored = quantize(kind, weight, importance, search=search)
        assert K_QUANTS[kind].is_finite(stored)
        rest = dequantize(kind, stored) - weight
        assert 100 * float(rest.norm()) <= factor * bound * float(weight.norm())


@pytest.mark.parametrize("kind", ["Q2_K", "Q4_K", "Q5_K"])
def test_zeros_are_bytes_of_zeros(kind: str) -> None:
    assert not quantize(kind, torch.zeros(256)).any()


@KINDS
def test_numbers_too_small_for_fp16_scales_become_zeros(kind: str) -> None:
    stored = quantize(kind, NUMBERS * 1e-30)
    assert K_QUANTS[kind].is_finite(stored)
    assert not dequantize(kind, stored).any()


@KINDS
def test_scales_beyond_fp16_are_told(kind: str) -> None:
    assert not K_QUANTS[kind].is_finite(quantize(kind, NUMBERS * 1e30))
    assert K_QUANTS[kind].is_finite(quantize(kind, NUMBERS))


@KINDS
def test_channels_without_importance_may_become_anything_but_not_infinite(kind: str) -> None:
    importance = IMPORTANCE * (torch.arange(512) % 64 >= 32)
    stored = quantize(kind, NUMBERS, importance)
    assert K_QUANTS[kind].is_finite(stored)
    assert error(kind, stored, NUMBERS, importance) < GOLDEN[kind]["weighted"]["weighted_error"] * 1.2
