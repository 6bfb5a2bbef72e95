"""bitsandbytes' own code on our files: its bytes without a search, and its numbers for what we store."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from omni_convert.convert import Recipe, convert_checkpoint
from omni_convert.formats.checks.meaning import open_quantized
from omni_convert.formats.containers.checkpoint import Checkpoint

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize("search", [False, True], ids=["nearest", "search"])
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_its_linear_takes_our_tensors(  # type: ignore[no-untyped-def]
    import_peer, tiny_pipeline_folder: Path, tmp_path: Path, nested: bool, search: bool
) -> None:
    bitsandbytes = import_peer("bitsandbytes")
    convert_checkpoint(tiny_pipeline_folder, tmp_path / "out", Recipe(method="nf4", double_quant=nested, search=search))
    tensors = load_file(tmp_path / "out" / "transformer" / WEIGHTS)
    with (
        open_quantized(tmp_path / "out" / "transformer") as ours,
        Checkpoint.open(tiny_pipeline_folder / "transformer") as source,
    ):
        assert ours.layers
        for stem, layer in ours.layers.items():
            name = f"{stem}.weight"
            stats = {key: tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")}
            weight = bitsandbytes.nn.Params4bit.from_prequantized(tensors[name], {**stats}, device="cpu")
            restored = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state).float()
            torch.testing.assert_close(layer.dequantize(0, layer.shape[0]), restored, rtol=2**-8, atol=0)
            if not search:
                theirs, state = bitsandbytes.functional.quantize_4bit(
                    source.read(name), quant_type="nf4", blocksize=64, compress_statistics=nested
                )
                assert tensors[name].equal(theirs), stem
                packed = state.as_dict(packed=True)
                assert stats.keys() == {f"{name}.{key}" for key in packed}
                if not nested:  # nested codes differ from its own at a few boundaries
                    assert all(stats[f"{name}.{key}"].equal(tensor) for key, tensor in packed.items()), stem
