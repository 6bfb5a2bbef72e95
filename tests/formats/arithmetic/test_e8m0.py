from __future__ import annotations

import math

import pytest
import torch

from omni_convert.formats.arithmetic.e2m1 import E2M1
from omni_convert.formats.arithmetic.e8m0 import (
    E8M0_NAN,
    decode_e8m0,
    encode_e8m0,
    exponent_rules,
    power_of_two,
    shared_exponent,
)
from omni_convert.formats.arithmetic.element import ElementType
from omni_convert.formats.arithmetic.float8 import E4M3, E5M2

# The published table of exponents: a, floor, 8/7 with epsilon, 7.25 with epsilon, floor for E4M3.
TABLE = [
    (1.0, -2, -2, -2, -8),
    (1.5, -2, -2, -2, -8),
    (1.75, -2, -1, -2, -8),
    (1.8125, -2, -1, -1, -8),
    (2.0, -1, -1, -1, -7),
    (3.0, -1, -1, -1, -7),
    (3.5, -1, 0, -1, -7),
    (3.625, -1, 0, 0, -7),
    (4.0, 0, 0, 0, -6),
    (6.0, 0, 0, 0, -6),
    (7.0, 0, 1, 0, -6),
    (7.25, 0, 1, 1, -6),
]


def exponents(values: list[float], rule: str, element: ElementType) -> list[int]:
    found: list[int] = shared_exponent(torch.tensor(values), rule, element).tolist()
    return found


@pytest.mark.parametrize(("rule", "column"), [("floor", 1), ("msmodelslim", 2), ("msmodelslim_ceil_x", 3)])
def test_published_table_for_e2m1(rule: str, column: int) -> None:
    assert exponents([row[0] for row in TABLE], rule, E2M1) == [row[column] for row in TABLE]


@pytest.mark.parametrize("rule", ["floor", "msmodelslim"])
def test_published_table_for_e4m3(rule: str) -> None:
    assert exponents([row[0] for row in TABLE], rule, E4M3) == [row[4] for row in TABLE]


def test_zero_blocks() -> None:
    assert exponents([0.0], "msmodelslim", E2M1) == [-22]
    assert exponents([0.0], "msmodelslim_ceil_x", E2M1) == [-19]
    for rule in ("floor", "ceil", "rceil", "even", "uos"):
        assert exponents([0.0], rule, E2M1) == [-127]
    assert exponents([0.0], "auto_round", E2M1) == [-1]
    assert exponents([0.0], "auto_round", E4M3) == [-7]


def test_without_epsilon_boundaries_are_exact() -> None:
    assert exponents([7.25, 3.625, 1.8125], "uos", E2M1) == [0, -1, -2]
    assert exponents([7.0, 6.96875], "even", E2M1) == [1, 0]


EXACT_RULES = [
    (rule, element)
    for element in (E2M1, E4M3, E5M2)
    for rule in exponent_rules(element)
    if not rule.startswith("msmodelslim")
]


@pytest.mark.parametrize(
    ("rule", "element"), EXACT_RULES, ids=[f"{rule}-{element.name}" for rule, element in EXACT_RULES]
)
def test_every_positive_bfloat16_value_obeys_the_rule(rule: str, element: ElementType) -> None:
    amax = torch.arange(1, 0x7F80, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    amax = amax[amax >= 2.0**-126]
    wide, top = amax.double(), 2.0**element.max_exponent
    half_ulp_below_two = 2 - 2.0 ** -(element.mantissa_bits + 1)
    expected = {
        "floor": torch.floor(torch.log2(wide / top)),
        "auto_round": torch.floor(torch.log2(wide / top)),
        "ceil": torch.ceil(torch.log2(wide / top)),
        "rceil": torch.ceil(torch.log2(wide / element.largest)),
        "even": torch.floor(torch.log2(wide * 2 / half_ulp_below_two / top)),
        "uos": torch.ceil(torch.log2(wide / 7.25)),
    }[rule]
    assert torch.equal(shared_exponent(amax, rule, element).double(), expected.clamp(-127, 127))


def test_rceil_never_clips_and_is_the_smallest_that_does_not() -> None:
    amax = torch.rand(10_000) * 100 + 1e-3
    for element in (E2M1, E4M3, E5M2):
        scale = power_of_two(shared_exponent(amax, "rceil", element))
        assert bool((amax / scale <= element.largest).all())
        assert bool((amax / (scale / 2) > element.largest).all())


@pytest.mark.parametrize("element", [E2M1, E4M3], ids=lambda element: element.name)
def test_subnormal_and_nonfinite_blocks(element: ElementType) -> None:
    for rule in exponent_rules(element):
        codes = encode_e8m0(shared_exponent(torch.tensor([torch.nan, torch.inf, 2.0**-149]), rule, element))
        assert codes[:2].tolist() == [E8M0_NAN, E8M0_NAN]
        assert codes[2] != E8M0_NAN


def test_all_256_bytes_decode() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    decoded = decode_e8m0(codes)
    assert decoded[:255].tolist() == [math.ldexp(1.0, code - 127) for code in range(255)]
    assert decoded[255].isnan()
    assert torch.equal(encode_e8m0(torch.arange(-127, 129)), codes)
    assert torch.equal(decode_e8m0(codes.view(torch.float8_e8m0fnu))[:255], decoded[:255])


def test_largest_and_smallest_finite_amax() -> None:
    largest = torch.finfo(torch.float32).max
    assert exponents([largest], "ceil", E2M1) == [126]
    assert exponents([largest], "floor", E2M1) == [125]
    assert exponents([2.0**-126], "floor", E2M1) == [-127]
