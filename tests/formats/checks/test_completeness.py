"""A block that lacks what its siblings have is noticed by names alone, and one of another kind is not."""

from __future__ import annotations

import pytest
import torch
from diffusers import MochiTransformer3DModel, SD3Transformer2DModel, UNet2DConditionModel
from torch import nn

from omni_convert.formats.checks.completeness import Gap, gaps

BLOCK = {"attn.to_q.weight": (8, 8), "attn.to_k.weight": (8, 8), "ff.weight": (32, 8), "norm.weight": (8,)}
NAME = "layers.0.attn.to_k.weight"


def blocks(number: int) -> dict[str, tuple[int, ...]]:
    return {f"layers.{each}.{name}": shape for each in range(number) for name, shape in BLOCK.items()}


def found(shapes: dict[str, tuple[int, ...]]) -> list[Gap]:
    return list(gaps(shapes, [name for name in shapes if name.endswith("to_q.weight")]))


@pytest.mark.parametrize("missing", [NAME, "layers.2.norm.weight"])
def test_a_tensor_that_all_other_blocks_have_is_missing(missing: str) -> None:
    shapes = blocks(3)
    assert found(shapes) == []
    del shapes[missing]
    assert [gap.name for gap in found(shapes)] == [missing]


def test_a_misspelled_name_is_told_with_what_it_stands_for() -> None:
    shapes = blocks(3)
    shapes["layers.0.attn.to_k.wieght"] = shapes.pop(NAME)
    assert found(shapes) == [Gap(NAME, "layers.1.attn.to_k.weight", "layers.0.attn.to_k.wieght")]


def test_a_whole_block_may_be_missing() -> None:
    shapes = {name: shape for name, shape in blocks(4).items() if not name.startswith("layers.1.")}
    assert {gap.name for gap in found(shapes)} == {f"layers.1.{name}" for name in BLOCK}


@pytest.mark.parametrize("extra", ["layers.0.experts.weight", "layers.0.ff.weight"])
def test_a_block_with_other_tensors_is_of_another_kind(extra: str) -> None:
    shapes = blocks(3) | {extra: (99, 8)}
    del shapes[NAME]
    assert found(shapes) == []


def test_of_two_blocks_nobody_knows_which_is_right() -> None:
    shapes = blocks(2)
    del shapes[NAME]
    assert found(shapes) == []


def test_a_number_without_those_before_it_lacks_nothing() -> None:
    assert found({"time_embed.mlp.2.to_q.weight": (8, 8)}) == []


def test_numbers_of_a_hostile_file_cost_nothing() -> None:
    assert found({**blocks(3), "layers.9999.attn.to_q.weight": (8, 8), f"layers.{10**30}.x": ()}) == []


@pytest.mark.parametrize("model", [SD3Transformer2DModel, MochiTransformer3DModel, UNet2DConditionModel])
def test_models_whose_blocks_differ_lack_nothing(model: type[nn.Module]) -> None:
    with torch.device("meta"):
        built = model()
    linears = [f"{name}.weight" for name, layer in built.named_modules() if isinstance(layer, nn.Linear)]
    shapes = {name: tuple(parameter.shape) for name, parameter in built.named_parameters()}
    assert list(gaps(shapes, linears)) == []
