"""Config blocks of every dialect that the loader runs have one reader."""

import pytest

from omni_convert.formats.dialects.config_block import read_block
from omni_convert.formats.errors import CheckpointError


@pytest.mark.parametrize("block", ["fp8", [], 7, True, ["quant_method"]], ids=str)
def test_a_block_that_is_no_object_is_refused(block: object) -> None:
    with pytest.raises(CheckpointError, match=r"found quantization_config .*, expected an object"):
        read_block(block)
