"""Rules for every block-scaled format, whatever its options."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from omni_convert.formats.arithmetic.e2m1 import holds_e2m1
from omni_convert.formats.errors import RecipeError
from omni_convert.formats.format import Format
from omni_convert.formats.rows import InputStatistics, TensorRows
from omni_convert.formats.schemes.mxfp4 import Mxfp4
from omni_convert.formats.schemes.mxfp4_dualscale import Mxfp4DualScale
from omni_convert.formats.schemes.mxfp8 import Mxfp8
from omni_convert.formats.schemes.nvfp4 import Nvfp4

FORMATS: dict[str, Format] = {
    "mxfp8": Mxfp8(),
    "mxfp8-plain": Mxfp8(search=False),
    "mxfp8-msmodelslim": Mxfp8("msmodelslim"),
    "mxfp4": Mxfp4(),
    "mxfp4-plain": Mxfp4(search=False),
    "mxfp4-smooth": Mxfp4(smooth=True),
    "mxfp4-ceil_x": Mxfp4("msmodelslim_ceil_x"),
    "dualscale": Mxfp4DualScale(),
    "dualscale-plain": Mxfp4DualScale(search=False),
    "dualscale-msmodelslim": Mxfp4DualScale("msmodelslim"),
    "nvfp4": Nvfp4(),
    "nvfp4-plain": Nvfp4(search=False),
}
every_format = pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS.keys())


def normal(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def student(rows: int, columns: int) -> Tensor:
    """Student-t with 4 degrees of freedom."""
    generator = torch.Generator().manual_seed(1)
    chi_square = torch.randn(4, rows, columns, generator=generator).square().sum(dim=0)
    return torch.randn(rows, columns, generator=generator) / (chi_square / 4).sqrt()


def relative_error(fmt: Format, weight: Tensor) -> float:
    restored = fmt.dequantize(fmt.quantize(weight)).double()
    return float((restored - weight.double()).norm() / weight.double().norm())


EXTREME_FORMATS = {name: fmt for name, fmt in FORMATS.items() if "msmodelslim" not in name and "ceil_x" not in name}


@pytest.mark.parametrize("fmt", EXTREME_FORMATS.values(), ids=EXTREME_FORMATS.keys())
@pytest.mark.parametrize("magnitude", [2.0**-100, 2.0**-30, 2.0**30, 2.0**100], ids=lambda value: f"{value:.0e}")
def test_extreme_magnitudes_keep_their_relative_error(fmt: Format, magnitude: float) -> None:
    weight = normal(16, 512)
    assert relative_error(fmt, weight * magnitude) == pytest.approx(relative_error(fmt, weight), rel=1e-3)


@pytest.mark.parametrize("fmt", [Mxfp8(), Mxfp4(), Mxfp4(smooth=True)], ids=["mxfp8", "mxfp4", "mxfp4-smooth"])
@pytest.mark.parametrize("columns", [1, 31, 33, 100])
def test_a_short_last_block_is_a_block(fmt: Format, columns: int) -> None:
    weight = normal(3, columns)
    padded = torch.nn.functional.pad(weight, (0, -columns % 32))
    short, whole = fmt.quantize(weight), fmt.quantize(padded)
    assert short["weight"].shape == (3, columns)
    assert torch.equal(short["weight_scale"], whole["weight_scale"])
    assert torch.equal(short["weight"].float(), whole["weight"][:, :columns].float())
    assert torch.equal(fmt.dequantize(short), fmt.dequantize(whole)[:, :columns])


def test_a_short_last_coarse_group_is_a_group() -> None:
    fmt = Mxfp4DualScale()
    weight = normal(3, 3840 % 512 + 512)  # 768, as Z-Image's last
    short = fmt.quantize(weight)
    whole = fmt.quantize(torch.nn.functional.pad(weight, (0, 256)))
    assert short["weight_dual_scale"].shape == (3, 2, 1)
    assert torch.equal(short["weight_dual_scale"], whole["weight_dual_scale"])
    assert torch.equal(short["weight_scale"], whole["weight_scale"][:, :24])
    assert torch.equal(fmt.dequantize(short), fmt.dequantize(whole)[:, :768])


def test_unsupported_shapes_say_why() -> None:
    assert "in_features % 64 == 0, found 96" in str(Mxfp4DualScale().unsupported(8, 96))
    assert "in_features % 16 == 0, found 24" in str(Nvfp4().unsupported(8, 24))
    for fmt, columns in ((Mxfp4DualScale(), 3840), (Nvfp4(), 48), (Mxfp8(), 33), (Mxfp4(), 33)):
        assert fmt.unsupported(8, columns) is None


@pytest.mark.parametrize("fmt", [Mxfp4(), Mxfp4(smooth=True), Mxfp4DualScale()], ids=["mxfp4", "smooth", "dualscale"])
def test_four_bit_weights_are_numeric_e2m1_values(fmt: Format) -> None:
    tensors = fmt.quantize(normal(16, 512))
    assert holds_e2m1(tensors["weight"])


# Relative RMS error; searched scales must reach what the formats can give, closed rules what others publish for them.
BOUNDS = [
    (Mxfp8(), 0.0267, 0.0267),
    (Mxfp8(search=False), 0.0267, 0.0267),
    (Mxfp4(), 0.1117, 0.128),
    (Mxfp4(search=False), 0.1120, 0.129),
    (Mxfp4DualScale(), 0.106, 0.1175),
    (Mxfp4DualScale(search=False), 0.1120, 0.1225),
    (Nvfp4(), 0.083, 0.085),
    (Nvfp4(search=False), 0.096, 0.093),
]


@pytest.mark.parametrize(("fmt", "gauss", "heavy_tailed"), BOUNDS, ids=lambda value: getattr(value, "method", ""))
def test_error_is_within_the_bound_of_the_format(fmt: Format, gauss: float, heavy_tailed: float) -> None:
    assert relative_error(fmt, normal(4096, 4096)) <= gauss
    assert relative_error(fmt, student(4096, 4096)) <= heavy_tailed


@pytest.mark.parametrize(
    ("searched", "plain"),
    [
        (Mxfp8(), Mxfp8(search=False)),
        (Mxfp4(), Mxfp4(search=False)),
        (Mxfp4DualScale(), Mxfp4DualScale(search=False)),
        (Nvfp4(), Nvfp4(search=False)),
    ],
    ids=lambda fmt: fmt.method,
)
def test_the_search_never_loses_a_weight(searched: Format, plain: Format) -> None:
    for seed in range(5):
        weight = normal(16, 512, seed) * torch.exp(normal(1, 512, seed + 100))
        assert relative_error(searched, weight) <= relative_error(plain, weight)


def test_mse_is_the_best_of_all_rules_in_every_block() -> None:
    weight = student(64, 512)

    def block_errors(fmt: Format) -> Tensor:
        return (fmt.dequantize(fmt.quantize(weight)) - weight).view(64, -1, 32).square().sum(dim=-1)

    for build in (Mxfp8, Mxfp4):
        best = block_errors(build("mse"))
        for rule in ("floor", "rceil", "even"):
            assert bool((best <= block_errors(build(rule)) * (1 + 1e-5)).all()), rule


def test_an_unknown_scale_rule_is_the_users_error() -> None:
    with pytest.raises(RecipeError, match=r"--scale-rule: found 'best' with mxfp8, expected one of floor, .*, mse"):
        Mxfp8("best")
    with pytest.raises(RecipeError, match="found 'uos' with mxfp8"):
        Mxfp8("uos")
    for build in (Mxfp4, Mxfp4DualScale):
        with pytest.raises(RecipeError, match="found 'best' with mxfp4"):
            build("best")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@every_format
def test_cuda_gives_the_same_bytes(fmt: Format) -> None:
    weight = normal(64, 1024).bfloat16()
    fitted = fmt.fit([TensorRows(weight)], None)
    here, there = fmt.quantize_rows(weight, fitted), fmt.quantize_rows(weight.cuda(), fitted)
    restored = fmt.dequantize(there | {name: tensor.cuda() for name, tensor in fmt.constants(fitted).items()})
    for suffix, tensor in here.items():
        if fmt == Mxfp4DualScale() or suffix == "weight_dual_scale":
            continue  # sums of squares are added in another order there, which moves the coarse scale by an ulp
        assert torch.equal(tensor.view(torch.uint8), there[suffix].cpu().view(torch.uint8)), suffix
    expected = fmt.dequantize(here | fmt.constants(fitted))
    assert float((restored.cpu() - expected).norm() / expected.norm()) < 0.01


def test_nvfp4_shares_its_scalars_in_a_group_and_they_fit_every_member(
    record_inputs: Callable[[Tensor], InputStatistics],
) -> None:
    fmt = Nvfp4(static=True)
    members = [normal(16, 64), normal(16, 64) * 7, normal(16, 64) / 9]
    inputs = record_inputs(normal(32, 64).bfloat16() * 3)
    fitted = fmt.fit([TensorRows(member) for member in members], inputs)
    constants = fmt.constants(fitted)
    assert constants["input_scale"].item() == pytest.approx(inputs.amax() / 2688)
    assert constants["weight_scale_2"] >= max(float(member.abs().amax()) for member in members) / 2688 * (1 - 1e-6)
    for member in members:
        restored = fmt.dequantize(fmt.quantize_rows(member, fitted) | constants)
        assert float((restored - member).norm() / member.norm()) < 0.1


def test_nvfp4_without_statistics_stores_no_input_scale() -> None:
    assert "input_scale" not in Nvfp4().quantize(normal(4, 64))


@pytest.mark.parametrize("fmt", [Mxfp4(smooth=True), Mxfp4DualScale()], ids=["mxfp4", "dualscale"])
def test_mul_scale_is_shared_positive_and_exact_in_bfloat16(
    fmt: Format, record_inputs: Callable[[Tensor], InputStatistics]
) -> None:
    scales = torch.exp(normal(1, 512) * 2)
    members = [normal(64, 512), normal(64, 512)]
    fitted = fmt.fit(
        [TensorRows(member) for member in members], record_inputs((normal(128, 512, seed=1) * scales).bfloat16())
    )
    mul_scale = fmt.constants(fitted)["mul_scale"]
    assert not torch.equal(mul_scale, torch.ones(512))
    assert torch.equal(mul_scale, mul_scale.bfloat16().float())
    assert bool(((mul_scale > 0) & torch.isfinite(mul_scale)).all())
    smoothed = members[0] / mul_scale
    stored = fmt.dequantize(fmt.quantize_rows(members[0], fitted) | {"mul_scale": torch.ones(512)})
    assert float((stored - smoothed).norm() / smoothed.norm()) < 0.13
