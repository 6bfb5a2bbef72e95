from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from omni_convert.formats.tiling import CPU_TILE_ELEMENTS, quantize_in_tiles


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def double(tile: Tensor) -> dict[str, Tensor]:
    return {"weight": tile * 2, "weight_scale": tile.amax(dim=1)}


@pytest.mark.parametrize("rows", [0, 1, 7, 300, 1025])
def test_rows_come_back_in_order(two_threads: None, rows: int) -> None:
    columns = CPU_TILE_ELEMENTS // 64
    matrix = torch.arange(rows)[:, None] + torch.zeros(columns)
    joined = quantize_in_tiles(matrix, double)
    assert torch.equal(joined["weight"], matrix * 2)
    assert torch.equal(joined["weight_scale"], torch.arange(rows).float())


def test_the_work_is_shared_by_as_many_threads_as_torch_has(two_threads: None) -> None:
    both_at_work = threading.Barrier(2)

    def wait_for_the_other(tile: Tensor) -> dict[str, Tensor]:
        both_at_work.wait(timeout=60)
        assert torch.get_num_threads() == 1
        return {"weight": tile}

    quantize_in_tiles(torch.zeros(2, CPU_TILE_ELEMENTS), wait_for_the_other)


def test_torchs_own_setting_stays(two_threads: None) -> None:
    quantize_in_tiles(torch.zeros(4, CPU_TILE_ELEMENTS), lambda tile: {"weight": tile})
    assert torch.get_num_threads() == 2
    elsewhere = []
    thread = threading.Thread(target=lambda: elsewhere.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert elsewhere == [2]


def test_an_error_in_a_tile_is_raised(two_threads: None) -> None:
    def fail(tile: Tensor) -> dict[str, Tensor]:
        raise ValueError("a tile")

    with pytest.raises(ValueError, match="a tile"):
        quantize_in_tiles(torch.zeros(4, CPU_TILE_ELEMENTS), fail)
