"""Hashes that see every bit, and the choice of the smallest."""

from __future__ import annotations

import pytest
import torch

from omni_convert.formats.statistics.row_sample import hash_words, pack_rows, smallest_hashes


def hashes_of(rows: torch.Tensor) -> torch.Tensor:
    return hash_words(pack_rows(rows.to(torch.bfloat16)))


@pytest.mark.parametrize("width", [1, 3, 4, 6, 64, 67])
def test_a_flip_of_any_bit_changes_the_hash(width: int) -> None:
    row = torch.randn(1, width, generator=torch.Generator().manual_seed(width)).to(torch.bfloat16).view(torch.int16)
    flipped = [row.clone() for _ in range(16 * width)]
    for position, other in enumerate(flipped):
        bit = position % 16
        other[0, position // 16] ^= -(1 << 15) if bit == 15 else 1 << bit
    hashes = hash_words(pack_rows(torch.cat([row, *flipped]).view(torch.bfloat16)))
    assert hashes.unique().numel() == 16 * width + 1


def test_rows_that_differ_only_in_signs_differ() -> None:
    signs = 1 - 2 * ((torch.arange(4096)[:, None] >> torch.arange(12)) & 1)
    assert hashes_of(signs.float()).unique().numel() == 4096


def test_hashes_are_spread_evenly() -> None:
    rows = torch.randint(-3, 4, (40_000, 16), generator=torch.Generator().manual_seed(0)).float()
    hashes = hashes_of(rows.unique(dim=0))
    shares = torch.bincount((hashes >> 60) + 8, minlength=16) / hashes.numel()
    assert float(shares.min()) > 0.9 / 16
    assert float(shares.max()) < 1.1 / 16


def test_the_hash_depends_neither_on_neighbours_nor_on_the_place_in_memory() -> None:
    rows = torch.randn(50, 6).to(torch.bfloat16)
    whole = hashes_of(rows)
    assert torch.equal(whole[7:9], hashes_of(rows[7:9]))
    assert torch.equal(whole, hashes_of(rows.t().contiguous().t()))
    assert torch.equal(hashes_of(rows.flatten()[1:13].view(2, 6)), hashes_of(rows.flatten()[1:13].view(2, 6).clone()))


def test_the_smallest_different_hashes_in_order() -> None:
    hashes = torch.tensor([5, -3, 5, 9, -3, 0])
    assert smallest_hashes(hashes, 3).tolist() == [1, 5, 0]
    assert smallest_hashes(hashes, 10).tolist() == [1, 5, 0, 3]


def hash_in_plain_integers(row: torch.Tensor) -> int:
    """The documented hash of one row, signed 64-bit, one word at a time."""
    mask = (1 << 64) - 1
    bits = [value & 0xFFFF for value in row.to(torch.bfloat16).view(torch.int16).tolist()]
    bits += [0] * (-len(bits) % 4)
    total = 0
    for index in range(len(bits) // 4):
        word = sum(value << (16 * place) for place, value in enumerate(bits[4 * index : 4 * index + 4]))
        signed = word - (1 << 64) if word >> 63 else word
        coefficient = ((index + 1) * 0x9E3779B97F4A7C15) & mask
        coefficient = ((coefficient ^ (coefficient >> 30)) * 0xBF58476D1CE4E5B9) & mask
        coefficient = ((coefficient ^ (coefficient >> 27)) * 0x94D049BB133111EB) & mask
        coefficient = (coefficient ^ (coefficient >> 31)) | 1
        total = (total + (signed ^ (signed >> 29)) * coefficient) & mask
    return total - (1 << 64) if total >> 63 else total


def test_the_hash_is_fixed_because_files_of_any_machine_must_merge() -> None:
    rows = torch.tensor([[1.0, -2.0, 0.5, 3.0, 4.0], [0.0, 0.0, 0.0, 0.0, 0.0], [-1e-3, 7.5, -0.0, 1e9, -6.0]])
    assert hashes_of(rows).tolist() == [hash_in_plain_integers(row) for row in rows]
    assert hashes_of(rows)[0].item() == -3249813443290862310
