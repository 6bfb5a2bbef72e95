"""GGUF's types keep the contract of a format: what planning promises is what quantizing delivers."""

import pytest
import torch
from torch import Tensor

from omni_convert.formats.arithmetic.ggml.mixtures import MIXTURES
from omni_convert.formats.rows import TensorRows, iterate_rows
from omni_convert.formats.schemes.gguf import BLOCK_TYPES, GGUF_TYPES, Gguf

# The largest relative RMS error of each type on normal numbers, in percent.
BOUNDS = {
    "Q8_0": 0.6, "Q6_K": 1.8, "Q5_K": 3.6, "Q4_K": 7.2, "Q3_K": 15.5, "Q2_K": 27, "IQ4_XS": 7.7, "IQ4_NL": 7.7,
    "Q5_1": 3.9, "Q5_0": 4.4, "Q4_1": 8, "Q4_0": 9, "MXFP4": 12, "BF16": 0.3, "F16": 0.1,
}  # fmt: skip
KINDS = pytest.mark.parametrize("kind", GGUF_TYPES)
SEARCHES = pytest.mark.parametrize("search", [False, True], ids=["nearest", "search"])


def normal(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


@KINDS
@SEARCHES
def test_tensors_have_the_layout_that_was_promised(kind: str, search: bool) -> None:
    fmt, weight = Gguf(kind, search), normal(64, 768).bfloat16()
    assert fmt.unsupported(64, 768) is None
    tensors, layouts = fmt.quantize(weight), fmt.layout(64, 768)
    assert {name: (each.dtype, tuple(each.shape)) for name, each in tensors.items()} == {
        name: (layout.dtype, layout.shape) for name, layout in layouts.items()
    }
    assert fmt.flaw(tensors) is None
    rest = fmt.dequantize(tensors) - weight.float()
    assert 100 * float(rest.norm() / weight.float().norm()) < BOUNDS[kind]


@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_rows_give_the_same_bytes_in_any_tile(kind: str) -> None:
    weight = normal(700, 1536)
    importance = normal(1, 1536)[0].exp()
    fmt = Gguf(kind, importance=importance)
    whole = fmt.quantize(weight)["weight"]
    fitted = fmt.fit([TensorRows(weight)], None)
    tiles = [fmt.quantize_rows(tile, fitted)["weight"] for _, tile in iterate_rows(TensorRows(weight))]
    assert len(tiles) > 1
    assert torch.equal(torch.cat(tiles), whole)
    assert torch.equal(fmt.quantize_rows(weight[333:335], fitted)["weight"], whole[333:335])


@KINDS
@SEARCHES
@pytest.mark.parametrize("importance", [None, torch.ones(768)], ids=["unweighted", "weighted"])
def test_tensors_are_where_the_weight_is(kind: str, search: bool, importance: Tensor | None) -> None:
    """Torch mixes no numbers of the meta device with those of a CPU, as it would mix none with those of a GPU."""
    weight = torch.empty(64, 768, dtype=torch.bfloat16, device="meta")
    assert Gguf(kind, search).quantize_rows(weight, importance)["weight"].device.type == "meta"


@pytest.mark.parametrize("kind", [kind for kind in BLOCK_TYPES if kind not in ("Q8_0", "MXFP4")])
def test_importance_of_the_columns_lowers_the_error_that_it_weights(kind: str) -> None:
    weight, importance = normal(16, 768), (normal(1, 768)[0] * 1.5).exp()
    errors = []
    for fmt in (Gguf(kind), Gguf(kind, importance=importance)):
        rest = fmt.dequantize(fmt.quantize(weight)) - weight
        errors.append(float((rest.square() * importance).sum()))
    assert errors[1] < 0.95 * errors[0]


@pytest.mark.parametrize("kind", ["Q4_K", "IQ4_NL", "Q4_0"])
def test_columns_without_importance_come_near_all_the_same(kind: str) -> None:
    weight = normal(16, 768)
    fmt = Gguf(kind, importance=torch.ones(768) * (torch.arange(768) >= 256))
    rest = (fmt.dequantize(fmt.quantize(weight)) - weight)[:, :256]
    assert float(rest.norm() / weight[:, :256].norm()) < 0.1


@pytest.mark.parametrize("name", MIXTURES)
def test_mixtures_consist_of_types_there_are(name: str) -> None:
    mixture = MIXTURES[name]
    used = {
        mixture.base,
        *(rule.type for rule in mixture.rules),
        *(rule.rest or mixture.base for rule in mixture.rules),
    }
    assert used <= {*GGUF_TYPES}
    assert name.startswith(mixture.base)
    assert name not in GGUF_TYPES


@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_elements_on_the_grid_of_a_weight_are_stored_as_they_are(kind: str) -> None:
    weight = normal(24, 512)
    weight[3, 256:] = 0
    fmt = Gguf(kind)
    tensors = fmt.quantize(weight)
    scale, minimum = fmt.element_scale(tensors), fmt.element_minimum(tensors)
    shifted = weight if minimum is None else weight + minimum
    elements = fmt.round_elements(shifted / scale)
    stored = fmt.with_elements(tensors, elements)
    numbers = elements * scale if minimum is None else elements * scale - minimum
    assert torch.equal(fmt.dequantize(stored), numbers)
    torch.testing.assert_close(numbers, fmt.dequantize(tensors), rtol=0, atol=float(scale.abs().max()) * 1.001)
    differing = float((numbers - fmt.dequantize(tensors)).ne(0).float().mean())
    assert differing < (0.02 if kind == "Q8_0" else 0.001)  # which is rounded with a scale that is not yet FP16
    step = 12.0 if kind.startswith("IQ4") else 0.7  # of a table from -127 to 113
    other = fmt.with_elements(tensors, fmt.round_elements(shifted / scale + step))
    assert float((fmt.dequantize(other) - numbers).ne(0).float().mean()) > 0.5
