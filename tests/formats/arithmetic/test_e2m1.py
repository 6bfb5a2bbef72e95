from __future__ import annotations

import pytest
import torch

from omni_convert.formats.arithmetic.e2m1 import (
    E2M1_VALUES,
    NibbleOrder,
    decode_packed,
    encode_e2m1,
    holds_e2m1,
    pack_nibbles,
    round_to_e2m1,
    unpack_nibbles,
)

# Values of the codes 0 to 15.
VALUES = torch.tensor(E2M1_VALUES)


def test_codes_and_values_are_inverse() -> None:
    codes = torch.arange(16, dtype=torch.uint8)
    values = VALUES[codes.int()]
    assert values.tolist() == list(E2M1_VALUES)
    assert torch.signbit(values).tolist() == [False] * 8 + [True] * 8
    assert torch.equal(encode_e2m1(values), codes)


def test_every_value_is_exact_in_its_e4m3_container() -> None:
    container = torch.tensor(E2M1_VALUES).to(torch.float8_e4m3fn).view(torch.uint8).tolist()
    positive = [0x00, 0x30, 0x38, 0x3C, 0x40, 0x44, 0x48, 0x4C]
    assert container == positive + [byte + 0x80 for byte in positive]


def test_all_bytes_unpack_and_pack_in_both_orders() -> None:
    packed = torch.arange(256, dtype=torch.uint8).reshape(4, 64)
    for even in ("low", "high"):
        assert torch.equal(pack_nibbles(unpack_nibbles(packed, even), even), packed)


def test_nibble_order() -> None:
    codes = torch.tensor([1, 2, 3, 15], dtype=torch.uint8)
    assert pack_nibbles(codes, even="low").tolist() == [0x21, 0xF3]
    assert pack_nibbles(codes, even="high").tolist() == [0x12, 0x3F]
    assert pack_nibbles(codes).tolist() == [0x21, 0xF3]


def test_only_the_fifteen_numbers_are_e2m1() -> None:
    every_e4m3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    found = {code.item() for code in every_e4m3.split(1) if holds_e2m1(code)}
    assert found == set(E2M1_VALUES)


def test_rounding_leaves_its_input_alone() -> None:
    values = torch.tensor([0.3, -5.5])
    round_to_e2m1(values)
    round_to_e2m1(values, half_away=True)
    assert values.tolist() == torch.tensor([0.3, -5.5]).tolist()


@pytest.mark.parametrize("even", ["low", "high"])
def test_packed_bytes_are_decoded_as_their_nibbles_are(even: NibbleOrder) -> None:
    packed = torch.arange(256, dtype=torch.uint8).view(4, 64)
    expected = VALUES[unpack_nibbles(packed, even).int()]
    decoded = decode_packed(packed, even)
    assert decoded.equal(expected)
    assert torch.signbit(decoded).equal(torch.signbit(expected))  # -0 is a code of its own
