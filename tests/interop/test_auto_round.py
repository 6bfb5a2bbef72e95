"""AutoRound's MX formats and NVFP4: its exports read by us, and our tensors equal to its own.

W4A16 is in test_torch_libraries.py.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from omni_convert.formats.checks.meaning import open_quantized
from omni_convert.formats.dialects.auto_round import AUTO_ROUND
from omni_convert.formats.errors import CheckpointError
from omni_convert.formats.schemes.mxfp4 import Mxfp4
from omni_convert.formats.schemes.mxfp8 import Mxfp8
from omni_convert.formats.schemes.nvfp4 import Nvfp4


@pytest.fixture
def export(import_peer, tiny_pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """A function that has them quantize the text encoder by a scheme of theirs, and returns the folder."""
    auto_round = import_peer("auto_round")
    from transformers import AutoTokenizer, Qwen3ForCausalLM

    monkeypatch.chdir(tmp_path)  # they leave a folder behind

    def run(scheme: str) -> Path:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # theirs
            model = Qwen3ForCausalLM.from_pretrained(tiny_pipeline_folder / "text_encoder", dtype=torch.bfloat16)
            tokenizer = AutoTokenizer.from_pretrained(tiny_pipeline_folder / "tokenizer")
            rounding = auto_round.AutoRound(
                model, tokenizer, scheme=scheme, iters=0, disable_opt_rtn=True, device_map="cpu"
            )
            rounding.quantize_and_save(str(tmp_path / "theirs"), format="auto_round")
        (config,) = (tmp_path / "theirs").rglob("config.json")
        return config.parent

    return run


def weight_by_them(import_peer, tensors: dict[str, Tensor], stem: str) -> Tensor:  # type: ignore[no-untyped-def]
    """The weight in float32, by the classes with which they run such a model."""
    modules = import_peer("auto_round.experimental.qmodules")
    scale = tensors[f"{stem}.weight_scale"]
    is_packed = f"{stem}.weight_packed" in tensors
    codes = tensors[f"{stem}.weight_packed" if is_packed else f"{stem}.weight"]
    config = import_peer("auto_round.schemes").PRESET_SCHEMES["MXFP4" if is_packed else "MXFP8"]
    shape = (codes.shape[1] * (2 if is_packed else 1), codes.shape[0])
    kind = modules.MXFP4QuantLinear if is_packed else modules.MXFP8QuantLinear
    linear = kind(*shape, config)
    linear.load_state_dict({("weight_packed" if is_packed else "weight"): codes, "weight_scale": scale})
    return linear.dequant_weight_online().float()


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["MXFP4", "MXFP8"])
def test_their_export_is_read(import_peer, export, scheme: str) -> None:  # type: ignore[no-untyped-def]
    folder = export(scheme)
    tensors = load_file(folder / "model.safetensors")
    with open_quantized(folder) as opened:
        assert opened.dialect == "auto-round"
        assert {layer.format.label for layer in opened.layers.values()} == {scheme.lower()}
        assert len(opened.layers) == 14
        for stem, layer in opened.layers.items():
            assert layer.dequantize(0, layer.shape[0]).equal(weight_by_them(import_peer, tensors, stem))


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["MXINT4", "NVFP4_E5M3"])
def test_their_export_that_looks_like_another_format_is_refused(export, scheme: str) -> None:  # type: ignore[no-untyped-def]
    folder = export(scheme)
    data_type = json.loads((folder / "config.json").read_text())["quantization_config"]["data_type"]
    with pytest.raises(CheckpointError, match=rf"found data_type '{data_type}'.*export as MXFP4"):
        open_quantized(folder)


def packed_by_them(import_peer, weight: Tensor, bits: int, data_type: str) -> dict[str, Tensor]:  # type: ignore[no-untyped-def]
    """The tensors that their export has for a weight that was rounded without tuning."""
    rounding = import_peer("auto_round.data_type")
    packing = import_peer("auto_round.export.export_to_autoround.qlinear_fp")
    rows, columns = weight.shape
    is_mx = data_type == "mx_fp"
    group, global_scale = (32, None) if is_mx else (16, rounding.nvfp.calculate_gparam(weight))
    if is_mx:
        weight, scale, _ = rounding.mxfp.quant_mx(weight, bits=bits, group_size=group, data_type=data_type)
    else:
        _, scale, _ = rounding.nvfp.nv_fp4(weight, global_scale=global_scale)
    linear = torch.nn.Linear(columns, rows, bias=False)
    linear.weight.data = weight
    theirs = packing.QuantLinear(bits, group, columns, rows, bias=False, data_type=data_type, act_bits=bits)
    theirs.pack(linear, scale, global_scale=global_scale, input_global_scale=torch.tensor(128.0))
    return dict(theirs.state_dict())


@pytest.fixture
def weight() -> Tensor:
    """float32 [192, 320], with blocks of many magnitudes; some are zero."""
    values = torch.randn(192, 320, generator=torch.Generator().manual_seed(0)) * 0.05
    values[:, :64] *= torch.logspace(-6, 1, 192)[:, None]
    return values


@pytest.mark.parametrize("bits", [4, 8])
def test_mx_without_a_search_is_their_file(import_peer, weight: Tensor, bits: int) -> None:  # type: ignore[no-untyped-def]
    weight[0] = weight[1, :64] = 0
    fmt = Mxfp8("auto_round", search=False) if bits == 8 else Mxfp4("auto_round", search=False)
    spelling = AUTO_ROUND.spelling(fmt, (192, 320))
    assert not isinstance(spelling, str)
    ours = spelling.encode(fmt.quantize(weight))
    theirs = packed_by_them(import_peer, weight, bits, "mx_fp")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].view(torch.uint8).equal(tensor.view(torch.uint8).reshape(ours[name].shape)), name


@pytest.mark.parametrize("fmt", [Mxfp4(), Mxfp8()], ids=lambda fmt: fmt.method)
def test_what_a_search_finds_is_decoded_by_their_linears(  # type: ignore[no-untyped-def]
    import_peer, weight: Tensor, fmt: Mxfp4 | Mxfp8
) -> None:
    spelling, tensors = AUTO_ROUND.spelling(fmt, (192, 320)), fmt.quantize(weight)
    assert not isinstance(spelling, str)
    stored = {f"layer.{name}": tensor for name, tensor in spelling.encode(tensors).items()}
    assert weight_by_them(import_peer, stored, "layer").equal(fmt.dequantize(tensors).bfloat16().float())
    if fmt.method == "mxfp4":
        assert (
            2 * stored["layer.weight_packed"].nbytes == tensors["weight"].nbytes
        )  # as vLLM-Omni's own spelling has it


def test_nvfp4_with_a_search_is_decoded_by_their_linear(import_peer, weight: Tensor) -> None:  # type: ignore[no-untyped-def]
    modules = import_peer("auto_round.experimental.qmodules")
    scheme = import_peer("auto_round.schemes").PRESET_SCHEMES["NVFP4"]
    tensors = Nvfp4().quantize(weight) | {"input_scale": torch.tensor(2.0**-7)}
    spelling = AUTO_ROUND.spelling(Nvfp4(static=True), (192, 320))
    assert not isinstance(spelling, str)
    linear = modules.NVFP4QuantLinear(320, 192, scheme)
    linear.load_state_dict(spelling.encode(tensors))
    assert float(linear.input_global_scale) == 128.0
    # They divide by the rounded reciprocal of our factor.
    torch.testing.assert_close(linear.dequant_weight_online(), Nvfp4().dequantize(tensors), rtol=2**-21, atol=0)


def test_nvfp4_without_a_search_has_their_scales_and_codes(import_peer, weight: Tensor) -> None:  # type: ignore[no-untyped-def]
    """All blocks here have a scale of 2^-9 or more; smaller ones have 0 there, and 2^-9 here."""
    weight = weight[:, 64:]
    ours = Nvfp4(search=False).quantize(weight)
    theirs = packed_by_them(import_peer, weight, 4, "nv_fp")
    assert ours["weight_scale"].view(torch.uint8).equal(theirs["weight_scale"].view(torch.uint8).view(192, 16))
    assert ours["weight"].equal(theirs["weight_packed"])
    # They multiply by the reciprocal of a maximum, so that the last bit may differ.
    assert float(1 / ours["weight_scale_2"]) == pytest.approx(float(theirs["weight_global_scale"]), rel=2**-23)
