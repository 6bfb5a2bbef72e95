"""`scale_rule="msmodelslim"` gives that tool's bytes, proven by running it.

`scripts/install` brings what of it is needed; without it these tests are skipped.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor

from omni_convert.formats.format import Format
from omni_convert.formats.schemes.mxfp4 import Mxfp4
from omni_convert.formats.schemes.mxfp4_dualscale import Mxfp4DualScale
from omni_convert.formats.schemes.mxfp8 import Mxfp8

# The tool indexes with a list, which torch is about to read differently.
pytestmark = pytest.mark.filterwarnings("ignore:Using a non-tuple sequence for multidimensional indexing:UserWarning")

RunTool = Callable[[str, str, Tensor], dict[str, Tensor]]


@pytest.fixture(scope="module")
def run_tool(import_peer: Callable[[str], ModuleType]) -> RunTool:
    """Runs the tool: scheme, method and weight to its tensors by suffix."""
    import_peer("msmodelslim.core.quantizer.impl")  # registers the quantizers
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the tool and what it imports
        import msmodelslim.ir as representation
        from msmodelslim.core.quantizer.base import AutoWeightQuantizer, QConfig
        from msmodelslim.ir.qal import QDType, QStorage

    schemes = {
        "mxfp8": representation.mxfp8_per_block_sym,
        "mxfp4": representation.mxfp4_per_block_sym,
        "dualscale": representation.mxfp4_dual_scale_sym,
    }

    def run(name: str, method: str, weight: Tensor) -> dict[str, Tensor]:
        scheme = schemes[name]
        ext = {"axes": -1} | ({"dual_block_size": 512} if name == "dualscale" else {})
        config = QConfig(dtype=scheme.dtype, scope=scheme.scope, symmetric=scheme.symmetric, method=method, ext=ext)
        quantizer = AutoWeightQuantizer.from_config(config)
        quantizer.init_weight(QStorage(QDType.FLOAT, weight.clone()), None)
        elements = quantizer.get_q_storage().value.float()
        scales = quantizer.get_q_param().ext
        blocks = -(-weight.shape[1] // 32)  # the tool stores its padding too
        found = {
            "weight": elements.view(len(weight), -1)[:, : weight.shape[1]],
            "weight_scale": (scales["scale"].float().squeeze(-1) + 127).to(torch.uint8)[:, :blocks],
        }
        if "dual_scale" in scales:
            found["weight_dual_scale"] = scales["dual_scale"].float()
        return found

    return run


def weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(64, 2048, generator=generator)
    codes = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    moderate = codes[(codes.abs() > 2.0**-20) & (codes.abs() < 2.0**20)]
    return {
        "normal": normal,
        "short_last_group": normal[:, :1088].contiguous(),
        "small": normal * 0.02,
        "heavy_tailed": normal * torch.exp(torch.randn(64, 2048, generator=generator)),
        "every_bfloat16": moderate[: len(moderate) // 512 * 512].view(-1, 512),
    }


CASES = [
    ("mxfp8", "minmax", Mxfp8("msmodelslim")),
    ("mxfp4", "minmax", Mxfp4("msmodelslim")),
    ("mxfp4", "ceil_x", Mxfp4("msmodelslim_ceil_x")),
    ("dualscale", "dualscale", Mxfp4DualScale("msmodelslim")),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["normal", "short_last_group", "small", "heavy_tailed", "every_bfloat16"])
@pytest.mark.parametrize(("scheme", "method", "fmt"), CASES, ids=[f"{case[0]}-{case[1]}" for case in CASES])
def test_bytes_are_the_tools(
    run_tool: RunTool, scheme: str, method: str, fmt: Format, kind: str, dtype: torch.dtype
) -> None:
    weight = weights()[kind].to(dtype)
    theirs, ours = run_tool(scheme, method, weight), fmt.quantize(weight)
    assert torch.equal(ours["weight_scale"], theirs["weight_scale"])
    if "weight_dual_scale" in theirs:
        assert torch.equal(ours["weight_dual_scale"], theirs["weight_dual_scale"])
    container = theirs["weight"].to(torch.float8_e4m3fn)
    assert torch.equal(ours["weight"].view(torch.uint8), container.view(torch.uint8))
