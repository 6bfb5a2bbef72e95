from __future__ import annotations

import pytest
import torch

from omni_convert.formats.rows import TensorRows
from omni_convert.formats.schemes.int8 import Int8


def test_each_row_uses_the_whole_range() -> None:
    tensors = Int8().quantize(torch.tensor([[-1.3984375, 2.796875], [0.001, -0.0005]]))
    assert tensors["weight"].tolist() == [[-64, 127], [127, -64]]
    torch.testing.assert_close(tensors["weight_scale"][0, 0], torch.tensor(2.796875 / 127), rtol=0, atol=0)


def test_a_dead_row_decodes_to_zero_with_a_positive_scale() -> None:
    tensors = Int8().quantize(torch.zeros(3, 8))
    assert torch.equal(tensors["weight_scale"], torch.ones(3, 1))
    assert not tensors["weight"].any()


def test_a_shared_scale_is_one_constant_column_over_the_group() -> None:
    first, second = torch.full((2, 4), 1.0), torch.full((3, 4), -2.54)
    fmt = Int8(shared_in_group=True)
    fitted = fmt.fit([TensorRows(first), TensorRows(second)], None)
    scales = torch.cat([fmt.quantize_rows(rows, fitted)["weight_scale"] for rows in (first, second)])
    assert scales.shape == (5, 1)
    assert torch.equal(scales, torch.full((5, 1), 2.54) / 127)


def test_more_rows_than_ascend_takes_are_refused() -> None:
    assert Int8().unsupported(65535, 8) is None
    assert "65535" in str(Int8().unsupported(65536, 8))


@pytest.mark.parametrize("magnitude", [1e-30, 1e-36, 1e-37, 1e-38, 1e-45])
@pytest.mark.parametrize("shared", [False, True])
def test_rows_that_are_almost_zero_stay_almost_zero(magnitude: float, shared: bool) -> None:
    rows = torch.linspace(-1, 1, 64).mul(magnitude).repeat(3, 1)
    tensors = Int8(shared_in_group=shared).quantize(rows)
    assert torch.isfinite(tensors["weight_scale"]).all()
    assert (Int8().dequantize(tensors) - rows).abs().max() <= max(magnitude / 127, 2.0**-126)
