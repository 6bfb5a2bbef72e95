"""msModelSlim's own linears and saver on our files, both ways. It has no loader: MindIE and vLLM-Ascend read its files.

Its linears multiply like the runtime, so that one over the identity is the weight that they stand for.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from omni_convert.convert import Recipe, convert_checkpoint
from omni_convert.formats.checks.meaning import open_quantized
from omni_convert.formats.views.opened import QuantizedLayer

# The tool indexes with a list, which torch is about to read differently.
pytestmark = pytest.mark.filterwarnings("ignore:Using a non-tuple sequence for multidimensional indexing:UserWarning")

STEM = "blocks.0.to_q"
WEIGHTS = "diffusion_pytorch_model.safetensors"
SCHEMES = {
    "int8": ("int8_per_token_sym", "int8_per_channel_sym"),
    "fp8 per row": ("fp8_e4m3_per_token_sym", "fp8_e4m3_per_channel_sym"),
    "mxfp8": ("mxfp8_per_block_sym", "mxfp8_per_block_sym"),
    "mxfp4": ("mxfp4_per_block_sym", "mxfp4_per_block_sym"),
    "mxfp4_dualscale": ("mxfp4_dual_scale_sym", "mxfp4_dual_scale_sym"),
}
BY_MINDIE = ("int8", "mxfp8", "mxfp4")


@pytest.fixture(scope="module")
def tool(import_peer: Callable[[str], ModuleType]) -> SimpleNamespace:
    """Its modules that are needed."""
    import_peer("msmodelslim.core.quantizer.impl")  # registers the quantizers
    import_peer("msmodelslim.core.quant_service.modelslim_v1.save")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the tool and what it imports
        from msmodelslim import ir
        from msmodelslim.core.base.protocol import BatchProcessRequest
        from msmodelslim.core.quant_service.modelslim_v1.save import ascendv1, mindie_format
        from msmodelslim.core.quantizer.base import AutoWeightQuantizer, QConfig
        from msmodelslim.ir import qal
        from msmodelslim.model import IModel
    return SimpleNamespace(
        ir=ir,
        qal=qal,
        ascendv1=ascendv1,
        mindie_format=mindie_format,
        request=BatchProcessRequest,
        config=QConfig,
        quantizer=AutoWeightQuantizer,
        model=IModel,
    )


@pytest.fixture
def quantized_by_them(tool: SimpleNamespace) -> Callable[[str, Tensor], nn.Module]:
    """A function of a format's label and a weight: their linear, quantized by them."""

    def quantize(label: str, weight: Tensor) -> nn.Module:
        inputs, scheme = (getattr(tool.ir, name) for name in SCHEMES[label])
        dual = {"dual_block_size": 512} if label == "mxfp4_dualscale" else {}
        config = tool.config(
            dtype=scheme.dtype,
            scope=scheme.scope,
            symmetric=scheme.symmetric,
            method="dualscale" if dual else "minmax",
            ext={"axes": -1} | dual if label.startswith("mx") else {},
        )
        quantizer = tool.quantizer.from_config(config)
        quantizer.init_weight(tool.qal.QStorage(tool.qal.QDType.FLOAT, weight.clone()), None)
        parameters = quantizer.get_q_param()
        ext = {name: parameters.ext[name] for name in ("axes", "dual_block_size") if name in parameters.ext}
        linear: nn.Module = tool.ir.AutoFakeQuantLinear.create(
            tool.qal.QParam(scheme=inputs, ext=ext), parameters, quantizer.get_q_storage(), None
        )
        return linear

    return quantize


@pytest.fixture
def saved_by_them(tool: SimpleNamespace, tmp_path: Path) -> Callable[[nn.Module, str], Path]:
    """A function that has one of their savers write a model, and returns the folder."""

    class Adapter(tool.model):  # type: ignore[misc, name-defined]
        model_type, trust_remote_code = "tiny", False
        model_path = tmp_path / "empty"

    def save(model: nn.Module, saver: str) -> Path:
        folder = tmp_path / saver
        folder.mkdir(mode=0o750)
        Adapter.model_path.mkdir(exist_ok=True)
        module, name = {
            "ascendv1": (tool.ascendv1, "AscendV1"),
            "mindie": (tool.mindie_format, "MindIEFormat"),
        }[saver]
        config = getattr(module, f"{name}Config")(save_directory=str(folder), part_file_size=0)
        running = getattr(module, f"{name}Saver")(model, config, Adapter())
        running.pre_run()
        running.postprocess(tool.request(name="", module=model))
        running.post_run()
        return folder

    return save


def weight_of(linear: nn.Module, columns: int) -> Tensor:
    """The weight that it multiplies with, float32 [out, in]."""
    if "FP8Dynamic" in type(linear).__name__:  # their saver rounds, after this
        linear.weight.data = linear.weight.to(torch.float8_e4m3fn).float()
    # Two-level scales of zeros would be 0 / 0. What is added here is rounded away, but under zeros.
    inputs = torch.eye(columns).clamp(min=2.0**-60) if "DualScale" in type(linear).__name__ else torch.eye(columns)
    with torch.no_grad():
        product: Tensor = linear(inputs)
    return torch.where(product.abs() < 2.0**-50, 0, product).T


def random_weight() -> Tensor:
    return torch.randn(64, 1024, generator=torch.Generator().manual_seed(0)) * 0.05


def model_of(linear: nn.Module) -> nn.Module:
    return nn.ModuleDict({"blocks": nn.ModuleList([nn.ModuleDict({"to_q": linear, "norm": nn.LayerNorm(8)})])})


@pytest.mark.parametrize(
    ("label", "saver"), [(label, "ascendv1") for label in SCHEMES] + [(label, "mindie") for label in BY_MINDIE]
)
def test_their_file_is_read(quantized_by_them, saved_by_them, label: str, saver: str) -> None:  # type: ignore[no-untyped-def]
    linear = quantized_by_them(label, random_weight())
    expected = weight_of(linear, 1024)
    with open_quantized(saved_by_them(model_of(linear), saver)) as opened:
        assert opened.dialect == "msmodelslim"
        assert list(opened.layers) == [STEM]
        assert opened.layers[STEM].format.label == label
        assert opened.layers[STEM].dequantize(0, 64).equal(expected)
        assert set(opened.kept) == {"blocks.0.norm.weight", "blocks.0.norm.bias"}


@pytest.mark.parametrize("label", ["mxfp8", "mxfp4", "mxfp4_dualscale"])
def test_their_smoothed_layer_is_read(  # type: ignore[no-untyped-def]
    tool: SimpleNamespace, quantized_by_them, saved_by_them, label: str
) -> None:
    factors = 2.0 ** torch.randint(-3, 4, (1024,), generator=torch.Generator().manual_seed(1))
    linear = quantized_by_them(label, random_weight() * factors)
    inner = weight_of(linear, 1024)
    smoothed = tool.ir.NonFusionSmoothQuantWrapper(factors, linear)
    with open_quantized(saved_by_them(model_of(smoothed), "ascendv1")) as opened:
        layer = opened.layers[STEM]
        assert "mul_scale" in layer.tensors
        assert layer.dequantize(0, 64).equal(inner / factors)
        if label != "mxfp4_dualscale":
            assert layer.dequantize(0, 64).equal(weight_of(smoothed, 1024))


@pytest.fixture
def linear_of_theirs(tool: SimpleNamespace) -> Callable[[QuantizedLayer], nn.Module]:
    """A function of a layer of ours: their linear, with its codes and scales."""

    def build(layer: QuantizedLayer) -> nn.Module:
        label = layer.format.label
        inputs, scheme = (getattr(tool.ir, name) for name in SCHEMES[label])
        parts = layer.read(0, layer.shape[0])
        if label == "int8":
            codes, ext = parts["weight"], {"scale": parts["weight_scale"][:, 0]}
        else:
            exponents = parts["weight_scale"].float() - 127
            codes, ext = parts["weight"].float(), {"scale": exponents[..., None], "offset": torch.zeros(1), "axes": -1}
        linear: nn.Module = tool.ir.AutoFakeQuantLinear.create(
            tool.qal.QParam(scheme=inputs, ext={"axes": -1}),
            tool.qal.QParam(scheme=scheme, ext=ext),
            tool.qal.QStorage(scheme.dtype, codes),
            None,
        )
        return linear

    return build


@pytest.mark.parametrize("method", BY_MINDIE)
def test_their_linears_multiply_with_our_weights_and_their_saver_writes_our_file(  # type: ignore[no-untyped-def]
    linear_of_theirs, saved_by_them, tiny_pipeline_folder: Path, tmp_path: Path, method: str
) -> None:
    from diffusers import ZImageTransformer2DModel

    convert_checkpoint(tiny_pipeline_folder, tmp_path / "ours", Recipe(method=method, dialect="msmodelslim"))
    folder = tmp_path / "ours" / "transformer"
    model = ZImageTransformer2DModel.from_pretrained(tiny_pipeline_folder / "transformer", torch_dtype=torch.bfloat16)
    with open_quantized(folder) as opened:
        assert opened.layers
        for stem, layer in opened.layers.items():
            linear = linear_of_theirs(layer)
            assert weight_of(linear, layer.shape[1]).equal(layer.dequantize(0, layer.shape[0])), stem
            model.set_submodule(stem, linear)
    theirs = saved_by_them(model, "ascendv1")
    ours, written = load_file(folder / WEIGHTS), load_file(theirs / "quant_model_weights.safetensors")
    assert ours.keys() == written.keys()
    for name, tensor in ours.items():
        assert tensor.dtype is written[name].dtype, name
        assert tensor.equal(written[name]), name
    description = "quant_model_description.json"
    assert json.loads((folder / description).read_text()) == json.loads((theirs / description).read_text())
