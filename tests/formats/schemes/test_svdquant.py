"""SVDQuant: the search against outliers, the order of Nunchaku's kernels, and files that our loader runs."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from omni_convert.convert import Recipe, convert_checkpoint
from omni_convert.convert.inspection.verification import verify_source
from omni_convert.convert.source.location import resolve_source
from omni_convert.formats.arithmetic.e2m1 import pack_nibbles
from omni_convert.formats.containers.checkpoint import Checkpoint
from omni_convert.formats.dialects.nunchaku_lite import NUNCHAKU_LITE
from omni_convert.formats.dialects.nunchaku_order import VECTOR
from omni_convert.formats.dialects.svdquant import SVDQUANT
from omni_convert.formats.dialects.table import DIALECTS, WRITTEN
from omni_convert.formats.errors import CheckpointError, RecipeError
from omni_convert.formats.format import Format
from omni_convert.formats.rows import TILE_ELEMENTS, TensorLayout, TensorRows
from omni_convert.formats.schemes.int4 import Int4
from omni_convert.formats.schemes.nvfp4 import Nvfp4
from omni_convert.formats.schemes.svdquant import SvdQuant, SvdQuantInt4, SvdQuantNvfp4

WEIGHTS = "diffusion_pytorch_model.safetensors"
KINDS = (SvdQuantInt4, SvdQuantNvfp4)
#: Methods, and dialects that hold FLUX.1 under the names that it has in diffusers.
WRITTEN_AS = (
    ("svdquant_int4", "nunchaku-lite"),
    ("svdquant_nvfp4", "nunchaku-lite"),
    ("svdquant_nvfp4", "vllm-omni-svdquant"),
)


class Inputs:
    """Statistics of inputs that are all recorded."""

    def __init__(self, rows: Tensor) -> None:
        self.sample = rows.bfloat16()

    def amax(self) -> float:
        return float(self.sample.abs().max())

    def channel_amax(self) -> Tensor:
        return self.sample.abs().amax(0).float()

    def mean_square(self) -> Tensor:
        return self.sample.float().square().mean(0)

    def rows(self) -> Tensor:
        return self.sample

    def row_runs(self) -> Tensor | None:
        return None

    def clip(self, rule: str, largest: float) -> float:
        return self.amax()


def outliers(rows: int = 256, columns: int = 512) -> tuple[Tensor, Tensor, Tensor]:
    """A weight with heavy tails, recorded inputs with channels that stick out, and others of the same kind."""
    generator = torch.Generator().manual_seed(0)
    tails = torch.randn(rows, columns, generator=generator) / torch.rand(rows, columns, generator=generator).sqrt()
    channels = torch.exp(0.7 * torch.randn(columns, generator=generator))
    channels[:4] *= 20
    inputs = torch.randn(128, columns, generator=generator) * channels
    return 0.02 * tails.clamp(-8, 8), inputs[:64], inputs[64:]


def output_error(fmt: Format, tensors: dict[str, Tensor], weight: Tensor, inputs: Tensor, rounds: Format) -> float:
    """Relative error of outputs, with inputs rounded as another format has it."""
    out = rounds.round_inputs(fmt.scale_inputs(inputs, tensors), tensors) @ fmt.multiplied(tensors).T
    side = fmt.side_product(inputs, tensors)
    exact = inputs @ weight.T
    return float(((out if side is None else out + side) - exact).norm() / exact.norm())


@pytest.mark.parametrize(("fmt", "plain"), [(SvdQuantInt4(), Int4(64)), (SvdQuantNvfp4(), Nvfp4(static=True))], ids=str)
def test_outliers_cost_less_than_half(fmt: SvdQuant, plain: Any) -> None:
    weight, recorded, others = outliers()
    statistics = Inputs(recorded)
    rounds = fmt if plain.method == "w4a16" else plain
    before = output_error(plain, plain.quantize(weight, statistics), weight, others, rounds)
    after = output_error(fmt, fmt.quantize(weight, statistics), weight, others, fmt)
    unsmoothed = output_error(fmt, fmt.quantize(weight), weight, others, fmt)
    assert after < 0.5 * before
    assert after < unsmoothed < before


@pytest.mark.parametrize("kind", KINDS)
def test_the_branch_holds_what_is_of_low_rank(kind: type[SvdQuant]) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(256, 16, generator=generator) @ torch.randn(16, 256, generator=generator)
    fmt = kind(rank=16)
    restored = fmt.dequantize(fmt.quantize(weight))
    assert float((restored - weight).norm()) < 2**-8 * float(weight.norm())


@pytest.mark.parametrize("kind", KINDS)
def test_a_group_shares_smoothing_and_the_way_down(kind: type[SvdQuant]) -> None:
    weight, recorded, _ = outliers()
    fmt = kind()
    fitted = fmt.fit([TensorRows(weight[:128]), TensorRows(weight[128:])], Inputs(recorded))
    whole = fmt.quantize_fitted(weight, fitted)
    parts = [fmt.quantize_fitted(part, fitted) for part in (weight[:128], weight[128:])]
    for suffix, layout in fmt.layout(*weight.shape).items():
        joined = torch.cat([part[suffix] for part in parts]) if layout.rows_per_entry else parts[0][suffix]
        assert joined.float().equal(whole[suffix].float()), suffix
    assert fmt.flaw(whole) is None


def test_a_whole_weight_is_separated_a_tile_at_a_time() -> None:
    """Dialects encode whole weights, of which several copies in float32 would not fit."""
    sizes = []

    class Watched(SvdQuantInt4):
        def _separate(self, smoothed: Tensor, *others: Any, **options: Any) -> Any:
            sizes.append(smoothed.numel())
            return super()._separate(smoothed, *others, **options)

    weight, fmt = torch.randn(768, 2048, generator=torch.Generator().manual_seed(0)), Watched(16)
    fmt.quantize_rows(weight, fmt.fit([TensorRows(weight)], None))
    assert max(sizes) <= TILE_ELEMENTS < weight.numel()


def test_shapes_and_ranks_that_kernels_do_not_take_are_declined() -> None:
    assert SvdQuantInt4().unsupported(256, 192) == (
        "svdquant_int4 needs out_features and in_features in multiples of 128, found 256 x 192"
    )
    assert SvdQuantNvfp4(rank=24).unsupported(256, 256) == (
        "svdquant_nvfp4 needs a rank in multiples of 16 below the size, found 24"
    )


def sha(tensor: Tensor) -> str:
    return hashlib.sha256(bytes(tensor.contiguous().view(torch.uint8).flatten().tolist())).hexdigest()[:16]


def test_the_order_of_nunchakus_kernels() -> None:
    """Against what Nunchaku's own packer makes of the same numbers."""
    row, column = torch.arange(128)[:, None], torch.arange(128)[None]
    int4, nvfp4 = (NUNCHAKU_LITE.spelling(kind(16), (128, 128)) for kind in KINDS)
    assert not isinstance(int4, str)
    assert not isinstance(nvfp4, str)
    codes = pack_nibbles((((5 * row + 3 * column) % 16 - 8) & 15).to(torch.uint8))
    scales = (row + 128 * torch.arange(2)).bfloat16()
    micro = ((8 * row + torch.arange(8)) % 128).bfloat16().to(torch.float8_e4m3fn)
    down = (16 * torch.arange(16)[:, None] + torch.arange(16)).bfloat16()
    for spelling, suffix, tensor, expected in (
        (int4, "weight", codes, "2408c3123d6b4c31"),
        (int4, "weight_scale", scales, "9b9104db87bd8110"),
        (nvfp4, "weight_scale", micro, "ff3972edfb8c5688"),
    ):
        stored = spelling.codec(suffix).encode(tensor)
        assert sha(stored) == expected, suffix
        restored = spelling.codec(suffix).decode(stored, TensorLayout(tensor.dtype, tuple(tensor.shape)))
        assert restored.view(torch.uint8).equal(tensor.view(torch.uint8)), suffix
    stored = int4.codec("lora_a").encode(down).flatten().tolist()
    assert stored[:16] == [0, 1, 8, 9, 128, 129, 136, 137, 2, 3, 10, 11, 130, 131, 138, 139]
    bias = torch.arange(256).bfloat16()
    assert VECTOR.encode(bias)[:16].tolist() == [0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15]
    assert VECTOR.decode(VECTOR.encode(bias), TensorLayout(torch.bfloat16, (256,), 0)).equal(bias)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dialect", [SVDQUANT, NUNCHAKU_LITE], ids=lambda dialect: dialect.name)
def test_every_tensor_comes_back(kind: type[SvdQuant], dialect: Any) -> None:
    fmt, shape = kind(16), (256, 384)
    spelling = dialect.spelling(fmt, shape)
    if kind is SvdQuantInt4 and dialect is SVDQUANT:
        assert spelling == "vLLM-Omni reads SVDQuant in nvfp4 alone, found svdquant_int4 rank 16"
        return
    tensors = fmt.quantize(torch.randn(*shape, generator=torch.Generator().manual_seed(0)))
    layouts, stored = fmt.layout(*shape), spelling.encode(tensors)
    assert {name: (each.dtype, tuple(each.shape)) for name, each in stored.items()} == {
        name: (layout.dtype, layout.shape) for name, layout in spelling.layout(layouts).items()
    }
    for suffix, layout in layouts.items():
        restored = spelling.codec(suffix).decode(stored[spelling.name(suffix)], layout)
        assert restored.reshape(layout.shape).float().equal(tensors[suffix].float()), suffix


def test_who_holds_it() -> None:
    held = {
        kind: {name for name in WRITTEN if not isinstance(DIALECTS[name].spelling(kind(), (256, 256)), str)}
        for kind in KINDS
    }
    int4 = {"nunchaku", "nunchaku-lite"}
    assert held == {SvdQuantInt4: int4, SvdQuantNvfp4: {*int4, "vllm-omni-svdquant"}}
    assert Recipe(method="svdquant_nvfp4").dialect == "vllm-omni-svdquant"
    with pytest.raises(RecipeError, match="--rank: found with method 'fp8'"):
        Recipe(method="fp8", rank=32)


def test_names_that_would_leave_a_quantized_layer_out_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"'blocks\.0\.proj_out': found it quantized and 'proj_out' not"):
        SVDQUANT.block({"blocks.0.proj_out": SvdQuantNvfp4()}, ["proj_out"])


@pytest.mark.parametrize("method", ["svdquant_int4", "svdquant_nvfp4"])
def test_diffusers_builds_exactly_these_tensors(import_peer: Any, wide_flux: Path, tmp_path: Path, method: str) -> None:
    with pytest.raises(RecipeError, match=r"--dialect nunchaku-lite: .*was not run.*--force writes it all the same"):
        convert_checkpoint(wide_flux, tmp_path / "out", Recipe(method=method, dialect="nunchaku-lite", rank=16))
    recipe = Recipe(method=method, dialect="nunchaku-lite", rank=16, force=True)
    convert_checkpoint(wide_flux, tmp_path / "out", recipe)
    (described,) = json.loads((tmp_path / "out" / "omni_convert.json").read_text())["components"].values()
    assert "was not run, nor any value on them" in described["unproven"]
    assert "Not proven: its files are in the order" in (tmp_path / "out" / "README.md").read_text()
    block = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    from diffusers import FluxTransformer2DModel
    from diffusers.quantizers.quantization_config import NunchakuLiteQuantizationConfig

    config = NunchakuLiteQuantizationConfig.from_dict(block)
    section = config.svdq_w4a4
    assert section is not None
    with torch.device("meta"):
        model = FluxTransformer2DModel.from_config(FluxTransformer2DModel.load_config(wide_flux)).to(torch.bfloat16)
    expected = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in model.state_dict().items()}
    scale = {"int4": (torch.bfloat16, 64), "nvfp4": (torch.float8_e4m3fn, 16)}[section["precision"]]
    for stem in section["targets"]:  # as `SVDQW4A4Linear` declares them; its module needs the package `kernels`
        rows, columns = expected.pop(f"{stem}.weight")[1]
        expected[f"{stem}.qweight"] = (torch.int8, (rows, columns // 2))
        expected[f"{stem}.wscales"] = (scale[0], (columns // scale[1], rows))
        expected[f"{stem}.smooth_factor"] = (torch.bfloat16, (columns,))
        expected[f"{stem}.proj_down"] = (torch.bfloat16, (columns, 16))
        expected[f"{stem}.proj_up"] = (torch.bfloat16, (rows, 16))
        if section["precision"] == "nvfp4":
            expected |= {f"{stem}.wcscales": (torch.bfloat16, (rows,)), f"{stem}.wtscale": (torch.bfloat16, (1,))}
    stored = load_file(tmp_path / "out" / WEIGHTS)
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in stored.items()} == expected
    assert len(section["targets"]) > 10


@pytest.mark.parametrize(("method", "dialect"), WRITTEN_AS)
def test_a_file_is_sound_kept_and_restored(wide_flux: Path, tmp_path: Path, method: str, dialect: str) -> None:
    recipe = Recipe(method=method, dialect=dialect, rank=16, force=True, runtime="diffusers")
    convert_checkpoint(wide_flux, tmp_path / "out", recipe)
    (verified,) = verify_source(resolve_source(tmp_path / "out"), resolve_source(wide_flux))
    assert [finding for finding in verified.findings if finding.severity == "error"] == []
    keep = Recipe(method="keep", dialect=dialect, force=True, runtime="diffusers")
    convert_checkpoint(tmp_path / "out", tmp_path / "kept", keep)
    before, kept = load_file(tmp_path / "out" / WEIGHTS), load_file(tmp_path / "kept" / WEIGHTS)
    assert kept.keys() == before.keys()
    assert all(tensor.view(torch.uint8).equal(before[name].view(torch.uint8)) for name, tensor in kept.items())
    convert_checkpoint(tmp_path / "out", tmp_path / "restored", Recipe(method="dequantize"))
    restored = load_file(tmp_path / "restored" / WEIGHTS)
    with Checkpoint.open(wide_flux) as source:
        assert restored.keys() == {*source}
        for name in source:
            original = source.read(name)
            if name.endswith(".bias"):
                assert restored[name].equal(original), name
            error = float((restored[name].float() - original.float()).norm() / original.float().norm())
            assert error < 0.13, name


def _set(suffix: str, number: float) -> Any:
    def change(tensors: dict[str, Tensor], stem: str) -> None:
        tensors[f"{stem}.{suffix}"].view(-1)[0] = number

    return change


DAMAGE: dict[str, Any] = {
    "smoothing by zero": _set("smooth_factor", 0.0),
    "a branch that is NaN": _set("proj_up", float("nan")),
    "an infinite branch": _set("proj_down", float("inf")),
    "a scale that is zero": lambda tensors, stem: tensors[f"{stem}.wscales"].zero_(),
    "no branch": lambda tensors, stem: tensors.pop(f"{stem}.proj_down"),
    "no scales": lambda tensors, stem: tensors.pop(f"{stem}.wscales"),
    "no smoothing": lambda tensors, stem: tensors.pop(f"{stem}.smooth_factor"),
    "another rank": lambda tensors, stem: tensors.update({f"{stem}.proj_up": torch.ones(128, 32).bfloat16()}),
    "codes of another dtype": lambda tensors, stem: tensors.update({f"{stem}.qweight": torch.ones(128, 64)}),
    "codes of another shape": lambda tensors, stem: tensors.update({f"{stem}.qweight": torch.ones(64, 64).char()}),
}


@pytest.mark.parametrize("change", DAMAGE.values(), ids=DAMAGE.keys())
def test_damage_is_found_and_not_loaded(damaged_source: Path, tmp_path: Path, change: Any) -> None:
    import diffusers

    import omni_convert.loaders  # noqa: F401  # registers the quantizers

    folder, stem = tmp_path / "damaged", "transformer_blocks.0.attn.to_q"
    shutil.copytree(damaged_source, folder)
    tensors = load_file(folder / WEIGHTS)
    change(tensors, stem)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    (verified,) = verify_source(resolve_source(folder))
    assert any(stem in finding.layer for finding in verified.findings if finding.severity == "error")
    with pytest.raises(CheckpointError, match=r"transformer_blocks\.0\.attn\.to_q"):
        diffusers.FluxTransformer2DModel.from_pretrained(folder, torch_dtype=torch.bfloat16)


@pytest.fixture(scope="module", params=WRITTEN_AS, ids="-".join)
def damaged_source(request: pytest.FixtureRequest, wide_flux: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound file without a manifest."""
    folder, (method, dialect) = tmp_path_factory.mktemp("svdquant") / "out", request.param
    recipe = Recipe(method=method, dialect=dialect, rank=16, force=True, runtime="diffusers")
    convert_checkpoint(wide_flux, folder, recipe)
    (folder / "omni_convert.json").unlink()
    return folder


@pytest.mark.parametrize("method", ["svdquant_int4", "svdquant_nvfp4"])
def test_our_loader_runs_it(wide_flux: Path, tmp_path: Path, method: str) -> None:
    import diffusers

    import omni_convert.loaders  # noqa: F401  # registers the quantizers

    convert_checkpoint(wide_flux, tmp_path / "out", Recipe(method=method, dialect="nunchaku-lite", rank=16, force=True))
    model = diffusers.FluxTransformer2DModel.from_pretrained(tmp_path / "out", torch_dtype=torch.bfloat16)
    with Checkpoint.open(wide_flux) as source:
        for stem in ("transformer_blocks.0.attn.to_q", "single_transformer_blocks.0.proj_out"):
            layer = model.get_submodule(stem)
            assert isinstance(layer.format, SvdQuant)
            assert layer.bias.equal(source.read(f"{stem}.bias"))
            x = torch.randn(4, layer.in_features, generator=torch.Generator().manual_seed(0)).bfloat16()
            exact = x.float() @ source.read(f"{stem}.weight").float().T + layer.bias.float()
            assert float((layer(x).float() - exact).norm()) < 0.25 * float(exact.norm())
    model.save_pretrained(tmp_path / "saved")
    before, saved = load_file(tmp_path / "out" / WEIGHTS), load_file(tmp_path / "saved" / WEIGHTS)
    assert saved.keys() == before.keys()
    assert all(tensor.view(torch.uint8).equal(before[name].view(torch.uint8)) for name, tensor in saved.items())
