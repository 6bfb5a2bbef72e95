"""Containers of E2M1 values take a nibble a value in memory, and come back bit for bit."""

import pytest
import torch

from omni_convert.formats.arithmetic.e2m1 import E2M1_VALUES, unpack_nibbles
from omni_convert.formats.arithmetic.e2m1_container import pack_container, unpack_container
from omni_convert.formats.errors import CheckpointError

# Values of the codes 0 to 15.
VALUES = torch.tensor(E2M1_VALUES)


@pytest.mark.parametrize("columns", [1, 2, 47, 48])
def test_packing_loses_nothing_not_even_the_sign_of_zeros(columns):
    stored = torch.tensor(E2M1_VALUES).repeat(5, 3)[:, :columns].contiguous().to(torch.float8_e4m3fn)
    packed = pack_container(stored)
    assert (packed.dtype, tuple(packed.shape)) == (torch.uint8, (5, (columns + 1) // 2))
    assert torch.equal(VALUES[unpack_nibbles(packed).int()][:, :columns], stored.float())
    assert torch.equal(unpack_container(packed, columns).view(torch.uint8), stored.view(torch.uint8))


def test_only_values_of_e2m1_are_packed():
    refused = []
    for byte in range(256):
        stored = torch.tensor([[byte]], dtype=torch.uint8).view(torch.float8_e4m3fn)
        try:
            assert VALUES[pack_container(stored).int()].item() == stored.float().item()
        except CheckpointError:
            refused.append(stored.float().item())
    assert len(refused) == 256 - 16
    assert not set(refused) & set(E2M1_VALUES)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0)])
def test_nothing_is_packed_to_nothing(shape):
    packed = pack_container(torch.zeros(shape).to(torch.float8_e4m3fn))
    assert (packed.dtype, tuple(packed.shape)) == (torch.uint8, (shape[0], shape[1] // 2))
