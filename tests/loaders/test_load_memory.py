"""Loading never holds a second copy of a model: peak `RssAnon` stays near the bytes of what is loaded."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, ZImageTransformer2DModel

LOAD = """
import sys, threading, torch, diffusers
from omni_convert.convert.execution.memory import anonymous_memory
from omni_convert.loaders import build_quant_config
from omni_convert.loaders.loading.diffusers_quantizer import DiffusersConfig
folder, class_name, method = sys.argv[1:]
torch.set_num_threads(1)
config = DiffusersConfig.of(build_quant_config(method))
is_over, before, peak = threading.Event(), anonymous_memory(), [0]
def watch():
    while not is_over.wait(0.001):
        peak[0] = max(peak[0], anonymous_memory())
watcher = threading.Thread(target=watch)
watcher.start()
model = getattr(diffusers, class_name).from_pretrained(folder, dtype=torch.bfloat16, quantization_config=config)
is_over.set()
watcher.join()
print(max(peak[0], anonymous_memory()) - before, sum(tensor.nbytes for tensor in model.state_dict().values()))
"""
# Skeleton, and tiles in float32.
SLACK = 32 << 20


def vae():
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(1024, 1024),
        layers_per_block=2,
        mid_block_add_attention=False,
    )


def transformer():
    return ZImageTransformer2DModel(dim=1536, n_heads=12, n_kv_heads=12, n_layers=4, n_refiner_layers=1)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="RssAnon is Linux's")
@pytest.mark.parametrize(
    ("make", "method"),
    [
        (vae, "fp8_storage"),
        (transformer, "fp8"),
        (transformer, "int8"),
        (transformer, "mxfp8"),
        (transformer, "mxfp4"),
        (transformer, "nvfp4"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_quantizing_while_loading_takes_the_quantized_model_and_one_layer(tmp_path, make, method):
    with torch.device("meta"):
        model = make().to(torch.bfloat16)
    model = model.to_empty(device="cpu")
    for tensor in model.state_dict().values():
        tensor.view(-1)[:] = 0.0
        tensor.view(-1)[:1] = 0.5
    plain = sum(tensor.nbytes for tensor in model.state_dict().values())
    largest = max(tensor.nbytes for tensor in model.state_dict().values())
    class_name = type(model).__name__
    model.save_pretrained(tmp_path)
    del model
    program = [sys.executable, "-c", LOAD, str(tmp_path), class_name, method]
    peak, own = map(int, subprocess.check_output(program).split()[-2:])
    assert own < 0.6 * plain
    assert peak < own + largest + SLACK
    assert own + largest + SLACK < 0.9 * plain  # a bf16 copy would show
