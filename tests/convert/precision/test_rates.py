"""The rate of a format is that of the operands that its runtime multiplies."""

from __future__ import annotations

import pytest

from omni_convert.convert.precision.rates import relative_time
from omni_convert.formats.options import FormatOptions
from omni_convert.formats.table import FORMATS

#: 8 bits run twice as fast as BF16, 4 bits four times as fast.
TIMES = {
    **dict.fromkeys(("fp8", "int8", "mxfp8", "w4a8", "w6a8"), 0.5),  # w4a8 and w6a8: their levels are INT8
    **dict.fromkeys(("nvfp4", "mxfp4", "mxfp4_dualscale", "convrot_w4a4"), 0.25),
    **dict.fromkeys(("svdquant_int4", "svdquant_nvfp4"), 0.25),
    **dict.fromkeys(("w4a16", "nf4", "gguf", "fp8_storage"), 1.0),  # inputs stay BF16
}


@pytest.mark.parametrize("method", FORMATS)
def test_a_format_is_as_fast_as_its_operands(method: str) -> None:
    assert relative_time(FORMATS[method].build(FormatOptions(static=True))) == TIMES[method]


def test_nvfp4_without_static_inputs_multiplies_in_bf16() -> None:
    assert relative_time(FORMATS["nvfp4"].build(FormatOptions())) == 1.0
