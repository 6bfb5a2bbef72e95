from __future__ import annotations

import pytest
import torch
from torch import Tensor

from omni_convert.formats.arithmetic.e2m1 import E2M1, E2M1_VALUES, round_to_e2m1
from omni_convert.formats.arithmetic.element import ElementType
from omni_convert.formats.arithmetic.float8 import E4M3, E5M2, round_to_e4m3, round_to_e5m2


def all_bfloat16() -> Tensor:
    """All 65,536 bfloat16 values, as float32."""
    return torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()


def magnitudes(element: ElementType) -> Tensor:
    """Every magnitude of a type, ascending; the parity of a position is that of the last mantissa bit."""
    subnormals = torch.arange(2**element.mantissa_bits) * 2.0 ** (element.min_exponent - element.mantissa_bits)
    significands = 1 + torch.arange(2**element.mantissa_bits) / 2**element.mantissa_bits
    exponents = torch.arange(element.min_exponent, element.max_exponent + 1)
    normals = (2.0**exponents)[:, None] * significands
    values = torch.cat([subnormals, normals.flatten()]).double()
    return values[values <= element.largest]


def nearest(values: Tensor, element: ElementType, half_away: bool) -> Tensor:
    """The reference: search among all magnitudes, ties to the even position or away from zero."""
    table = magnitudes(element)
    magnitude = values.double().abs().clamp(max=element.largest)
    above = torch.searchsorted(table, magnitude).clamp(max=len(table) - 1)
    below = (above - 1).clamp(min=0)
    middle = (table[above] + table[below]) / 2
    goes_up = magnitude > middle
    at_tie = magnitude == middle
    goes_up |= at_tie & (torch.tensor(half_away) | (above % 2 == 0))
    rounded = torch.where(goes_up, table[above], table[below])
    return torch.copysign(rounded, values.double()).float()


ROUNDERS = {"E2M1": round_to_e2m1, "E4M3": round_to_e4m3, "E5M2": round_to_e5m2}


@pytest.mark.parametrize("half_away", [False, True], ids=["half_even", "half_away"])
@pytest.mark.parametrize("element", [E2M1, E4M3, E5M2], ids=lambda element: element.name)
def test_every_bfloat16_value_rounds_to_the_nearest_element(element: ElementType, half_away: bool) -> None:
    values = all_bfloat16()
    rounded = ROUNDERS[element.name](values, half_away).float()
    assert torch.equal(rounded.isnan(), values.isnan())
    numbers = ~values.isnan()
    expected = nearest(values[numbers], element, half_away)
    assert torch.equal(rounded[numbers].view(torch.int32), expected.view(torch.int32))  # signs of zeros too


@pytest.mark.parametrize("element", [E2M1, E4M3, E5M2], ids=lambda element: element.name)
def test_rounding_in_float32_agrees_but_for_the_sign_of_zero(element: ElementType) -> None:
    values = all_bfloat16()
    values = values[~values.isnan()]
    assert torch.equal(element.round(values, out=values.clone()), nearest(values, element, half_away=False))


@pytest.mark.parametrize("half_away", [False, True], ids=["half_even", "half_away"])
def test_e2m1_ties(half_away: bool) -> None:
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    expected = [0.5, 1, 1.5, 2, 3, 4, 6] if half_away else [0, 1, 1, 2, 2, 4, 4]
    assert round_to_e2m1(ties, half_away).tolist() == expected
    assert round_to_e2m1(-ties, half_away).tolist() == [-value for value in expected]


def test_infinities_saturate() -> None:
    infinities = torch.tensor([torch.inf, -torch.inf])
    for element in (E2M1, E4M3, E5M2):
        for half_away in (False, True):
            rounded = ROUNDERS[element.name](infinities, half_away).float()
            assert rounded.tolist() == [element.largest, -element.largest]


def test_e2m1_magnitudes_are_the_definition() -> None:
    assert magnitudes(E2M1).tolist() == list(E2M1_VALUES[:8])
