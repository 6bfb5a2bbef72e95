import warnings

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from omni_convert.formats.arithmetic.ggml.blocks import BLOCK, BLOCK_TYPES
from omni_convert.formats.schemes.gguf import CACHED_BLOCKS, PLAIN_TYPES, Gguf

GENERATOR = torch.Generator().manual_seed(0)
COLUMNS = 64


def normal(scale: float = 1.0, rows: int = 64) -> Tensor:
    return torch.randn(rows, COLUMNS, generator=GENERATOR) * scale


def just_below_powers_of_two() -> Tensor:
    powers = torch.tensor([2.0**exponent for exponent in range(-32, 32)])[:, None]
    weight = torch.rand(64, COLUMNS, generator=GENERATOR) * powers / 2
    weight[:, ::32] = torch.nextafter(powers, torch.zeros(()))
    return weight


WEIGHTS = {
    "normal": normal(),
    "bfloat16": normal().bfloat16().float(),
    "zeros": torch.zeros(4, COLUMNS),
    "a block of zeros": torch.cat([torch.zeros(4, 32), torch.ones(4, 32)], dim=1),
    "one number": torch.full((4, COLUMNS), 0.3),
    "negative": -torch.rand(4, COLUMNS, generator=GENERATOR),
    "ties": torch.randint(-12, 13, (256, COLUMNS), generator=GENERATOR) / 4,
    "beyond FP16 scales": normal(1e7),
    "huge": normal(1e36),
    "tiny": normal(1e-36),
    "denormal": normal(1e-40),
    "just below powers of two": just_below_powers_of_two(),
}


def upstream(weight: Tensor, kind: str) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of overflow, which is what some weights are for
        return gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType[kind])


@pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS.keys())
@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_blocks_are_bit_equal_to_those_of_the_gguf_package(kind: str, weight: Tensor) -> None:
    if kind == "MXFP4" and float(weight.abs().max()) < 2**-125 and weight.any():
        pytest.skip("the package's exponent wraps around there")
    ours = Gguf(kind, search=False).quantize(weight)["weight"]
    assert np.array_equal(ours.numpy(), upstream(weight, kind))


@pytest.mark.parametrize("kind", PLAIN_TYPES)
def test_plain_types_are_bit_equal_to_those_of_the_gguf_package(kind: str) -> None:
    ours = Gguf(kind).quantize(WEIGHTS["normal"])["weight"].view(torch.uint8)
    assert np.array_equal(ours.numpy(), upstream(WEIGHTS["normal"], kind).view(np.uint8))


@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_numbers_of_blocks_are_those_of_the_gguf_package(kind: str) -> None:
    stored = upstream(WEIGHTS["normal"], kind)
    theirs = gguf.quants.dequantize(stored, gguf.GGMLQuantizationType[kind])
    assert np.array_equal(Gguf(kind).dequantize({"weight": torch.from_numpy(stored)}).numpy(), theirs)


def test_mxfp4_of_numbers_that_have_no_exponent_is_zero_and_not_nan() -> None:
    weight = normal(1e-40)
    tensors = Gguf("MXFP4").quantize(weight)
    assert Gguf("MXFP4").flaw(tensors) is None
    assert float((Gguf("MXFP4").dequantize(tensors) - weight).abs().max()) < 2**-125


@pytest.mark.parametrize("kind", ["Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "F16"])
def test_scales_and_numbers_beyond_fp16_are_a_flaw(kind: str) -> None:
    assert "weight: found" in str(Gguf(kind).flaw(Gguf(kind).quantize(WEIGHTS["beyond FP16 scales"] * 10)))
    assert Gguf(kind).flaw(Gguf(kind).quantize(WEIGHTS["normal"])) is None


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_more_blocks_than_are_quantized_at_a_time(name: str) -> None:
    weight = torch.randn(270, 1024, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert weight.numel() // BLOCK > CACHED_BLOCKS
    stored = Gguf(name, search=False).quantize_rows(weight, None)["weight"]
    wanted = gguf.quants.quantize(weight.float().numpy(), gguf.GGMLQuantizationType[name])
    assert stored.numpy().tobytes() == wanted.tobytes()


# Errors in percent of ggml's search with an importance of ones: normal, Student-t(4); and weighted by an importance.
SEARCHED = {
    "Q5_1": (3.38, 4.09, 3.07),
    "Q5_0": (4.05, 5.64, 3.83),
    "Q4_1": (6.99, 8.45, 6.33),
    "Q4_0": (8.16, 11.26, 7.71),
}


@pytest.mark.parametrize("kind", SEARCHED)
def test_a_search_comes_closer_than_that_of_ggml(kind: str) -> None:
    draw = np.random.default_rng(0)
    drawn = draw.standard_normal((1024, 3072)), draw.standard_t(4, (1024, 3072))
    normal, student = (torch.from_numpy(numbers[:256]).float() for numbers in drawn)
    importance = torch.from_numpy(draw.lognormal(0, 1, 3072)).float()
    block = BLOCK_TYPES[kind]
    for weight, counts, bar in zip(
        (normal, student, normal), (None, None, importance.expand_as(normal)), SEARCHED[kind], strict=True
    ):
        by_number = None if counts is None else counts.reshape(-1, BLOCK)
        stored = block.quantize(weight.reshape(-1, BLOCK), by_number)
        theirs = gguf.quants.dequantize(stored.numpy().reshape(-1), gguf.GGMLQuantizationType[kind])
        assert torch.equal(block.dequantize(stored).flatten(), torch.from_numpy(theirs))
        rest = (torch.from_numpy(theirs).view_as(weight) - weight).double().square()
        counted = torch.ones_like(weight) if counts is None else counts
        assert 100 * float(((rest * counted).sum() / (weight.double().square() * counted).sum()).sqrt()) < bar
