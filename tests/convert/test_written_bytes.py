"""Between quantizing and the rename: values that are impossible, and bytes that are not those that were written."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from omni_convert.convert import Recipe, convert_checkpoint
from omni_convert.formats.checks.meaning import open_quantized
from omni_convert.formats.containers.safetensors_file import SafetensorsFile
from omni_convert.formats.errors import OutputError
from omni_convert.formats.table import FORMATS, build_format

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
# The size of shards, chosen so that the codes of some layer end up in one and its scales in the next.
SPLITTING_SIZE = "200KB"
STEM = "layers.0.feed_forward.w2"
# Those of SVDQuant need multiples of 128, which the tiny pipeline's widths are not.
METHODS = [method for method in FORMATS if method not in ("gguf", "fp8_storage", "svdquant_int4", "svdquant_nvfp4")]


def extents(file: Path) -> dict[str, tuple[int, int]]:
    with SafetensorsFile(file) as written:
        return {name: (written._offsets[name], spec.nbytes) for name, spec in written.specs.items()}


@pytest.mark.parametrize("method", METHODS)
def test_a_bit_that_the_disk_flips_is_seen_in_every_kind_of_tensor(
    tiny_pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """The last bit of a tensor: of codes, scales, constants, a kept tensor, the header; resuming makes all again."""
    convert_checkpoint(tiny_pipeline_folder, tmp_path / "good", Recipe(method=method))
    good = (tmp_path / "good" / WEIGHTS).read_bytes()
    places = extents(tmp_path / "good" / WEIGHTS)
    kinds = [name for name in places if name.startswith(f"{STEM}.")] + ["x_pad_token"]
    assert len(kinds) > 2
    pwrite = os.pwrite
    for name, position in [(name, sum(places[name]) - 1) for name in kinds] + [("header", 20)]:
        output = tmp_path / name

        def lying(descriptor: int, data: bytes, offset: int, position: int = position) -> int:
            count = pwrite(descriptor, data, offset)
            if offset <= position < offset + count:
                pwrite(descriptor, bytes([good[position] ^ 1]), position)
            return count

        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", lying)
            with pytest.raises(OutputError, match=r"found (other bytes|another header).*--resume") as caught:
                convert_checkpoint(tiny_pipeline_folder, output, Recipe(method=method, workers=2))
        assert "\n" not in str(caught.value)
        assert not output.exists()
        convert_checkpoint(tiny_pipeline_folder, output, Recipe(method=method, resume=True))
        assert (output / WEIGHTS).read_bytes() == good


@pytest.fixture
def split(tiny_pipeline_folder: Path, tmp_path: Path) -> dict[str, Path]:
    """A conversion in many shards, and the two that a layer lies in, by what each has of it."""
    output = tmp_path / "good"
    convert_checkpoint(tiny_pipeline_folder, output, Recipe(method="int8", max_shard_size=SPLITTING_SIZE))
    folder = output / "transformer"
    files = json.loads((folder / f"{Path(WEIGHTS).name}.index.json").read_text())["weight_map"]
    scales = [name for name in files if name.endswith(".weight_scale")]
    scale = next(name for name in scales if files[name] != files[name.removesuffix("_scale")])
    return {name: folder / files[name] for name in (scale, scale.removesuffix("_scale"))}


@pytest.mark.parametrize("half", [0, 1])
def test_both_halves_of_a_layer_that_lies_in_two_uploaded_shards_are_compared(
    tiny_pipeline_folder: Path, split: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, half: int
) -> None:
    name, shard = list(split.items())[half]
    position = sum(extents(shard)[name]) - 1
    wrong = bytes([shard.read_bytes()[position] ^ 1])
    pwrite = os.pwrite

    def lying(descriptor: int, data: bytes, offset: int) -> int:
        count = pwrite(descriptor, data, offset)
        is_shard = Path(f"/proc/self/fd/{descriptor}").readlink().name == shard.name
        if is_shard and offset <= position < offset + count:
            pwrite(descriptor, wrong, position)
        return count

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "pwrite", lying)
    with pytest.raises(OutputError, match=f"{shard.name}: found other bytes than were written"):
        convert_checkpoint(
            tiny_pipeline_folder, f"file://{tmp_path}/out", Recipe(method="int8", max_shard_size=SPLITTING_SIZE)
        )


@pytest.mark.parametrize("method", METHODS)
def test_a_reader_finds_every_tensor_of_every_layer(tiny_pipeline_folder: Path, tmp_path: Path, method: str) -> None:
    report = convert_checkpoint(tiny_pipeline_folder, tmp_path / "out", Recipe(method=method))
    with open_quantized(tmp_path / "out" / "transformer") as written:
        assert {f"transformer.{stem}" for stem in written.layers} == {layer.name for layer in report.layers}


def impossible(method: str, suffix: str, value: torch.Tensor) -> str | None:
    fmt = build_format(method, smooth=True)
    tensors = fmt.quantize(torch.randn(4, 64))
    assert fmt.flaw(tensors) is None
    tensors[suffix].view(torch.uint8 if tensors[suffix].dtype.itemsize == 1 else tensors[suffix].dtype).flatten()[
        -1
    ] = value
    return fmt.flaw(tensors)


@pytest.mark.parametrize("byte", [0x7F, 0xFF])
@pytest.mark.parametrize("method", ["fp8", "mxfp8", "mxfp4", "mxfp4_dualscale"])
def test_codes_that_are_nan_are_impossible(method: str, byte: int) -> None:
    assert (impossible(method, "weight", torch.tensor(byte)) or "").startswith("weight: found E4M3 bytes")


@pytest.mark.parametrize("method", ["mxfp4", "mxfp4_dualscale"])
def test_values_off_the_grid_are_impossible(method: str) -> None:
    assert "off the E2M1 grid" in (impossible(method, "weight", torch.tensor(1)) or "")


@pytest.mark.parametrize("method", ["mxfp8", "mxfp4", "mxfp4_dualscale"])
def test_an_exponent_that_is_nan_is_impossible(method: str) -> None:
    assert "E8M0 byte 255" in (impossible(method, "weight_scale", torch.tensor(255)) or "")


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("method", "suffix"),
    [("fp8", "weight_scale"), ("int8", "weight_scale"), ("nvfp4", "weight_scale_2"), ("mxfp4", "mul_scale"),
     ("mxfp4_dualscale", "weight_dual_scale"), ("mxfp4_dualscale", "mul_scale")],
)  # fmt: skip
def test_scales_are_positive_and_finite(method: str, suffix: str, value: float) -> None:
    assert f"{suffix}: found scales" in (impossible(method, suffix, torch.tensor(value)) or "")
