"""Formats are read off the names, dtypes and shapes of tensors, whatever these are."""

from __future__ import annotations

import pytest
import torch

from omni_convert.formats.containers.tensor_spec import TensorSpec
from omni_convert.formats.format import Format
from omni_convert.formats.schemes.fp8 import Fp8, Fp8Block, Fp8Channel
from omni_convert.formats.table import layer_formats


@pytest.mark.parametrize(
    ("shape", "blocks", "size"),
    [
        ((256, 512), (2, 4), (128, 128)),
        ((100, 512), (4, 16), (32, 32)),
        ((2, 64), (), (128, 128)),
        ((2, 64), (2,), (128, 128)),
        ((2, 64), (1, 1, 1), (128, 128)),
        ((0, 64), (2, 1), (1, 128)),
        ((2, 64), (0, 0), (2, 64)),
    ],
    ids=str,
)
def test_blocks_of_any_shape_have_a_size(
    shape: tuple[int, int], blocks: tuple[int, ...], size: tuple[int, int]
) -> None:
    specs = {
        "a.weight": TensorSpec("a.weight", torch.float8_e4m3fn, shape),
        "a.weight_scale_inv": TensorSpec("a.weight_scale_inv", torch.float32, blocks),
    }
    fmt = layer_formats(specs)["a"]
    assert isinstance(fmt, Fp8Block)
    assert fmt.block_size == size
    fmt.layout(*shape)


@pytest.mark.parametrize(
    ("rows", "scale", "expected"),
    [
        (4, (), Fp8()),
        (4, (1,), Fp8()),
        (4, (4,), Fp8Channel()),
        (1, (1,), Fp8()),  # both have this one
    ],
    ids=str,
)
def test_the_shape_of_the_scale_tells_fp8_per_row_from_per_tensor(
    rows: int, scale: tuple[int, ...], expected: Format
) -> None:
    specs = {
        "a.weight": TensorSpec("a.weight", torch.float8_e4m3fn, (rows, 8)),
        "a.weight_scale": TensorSpec("a.weight_scale", torch.float32, scale),
    }
    assert layer_formats(specs, "fp8") == {"a": expected}


def test_a_weight_without_a_stem_is_no_layer() -> None:
    specs = {
        "weight": TensorSpec("weight", torch.float8_e4m3fn, (16, 16)),
        ".weight_scale": TensorSpec(".weight_scale", torch.float32, ()),
    }
    assert layer_formats(specs) == {}
