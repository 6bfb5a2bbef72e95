"""How fast a quantized linear layer is over bf16, activation quantization included, and how far its output is off.

    python scripts/bench_linear.py
    python scripts/bench_linear.py --methods int8,fp8 --rows 16,1024 --shapes 3072x3072 --threads 2

torchao's dynamic INT8 takes part where it is installed (extra `interop`).
Candidates take turns, so that a busy machine slows them alike; each figure is the best of several runs. Shapes are in x
out. Errors are relative RMS against the unquantized layer in float32, on standard normal values.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omni_convert.loaders.layers.quantized_linear import quantize_linear

Layer = Callable[[Tensor], Tensor]
METHODS = "int8,int8+rotate,fp8,mxfp8,mxfp4,mxfp4_dualscale,nvfp4,w4a16"
BASELINE = "bf16"


@torch.inference_mode()
def main() -> None:
    options = parse_options()
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(f"{options.device}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{'M':>6} {'in x out':<14}{'layer':<36}{'ms':>10}{'x bf16':>9}{'error %':>9}")
    ratios: dict[str, list[float]] = {}
    for shape in options.shapes.split(","):
        in_features, out_features = map(int, shape.split("x"))
        linear = nn.Linear(in_features, out_features, bias=False).to(options.device, torch.bfloat16)
        layers = make_layers(linear, options.methods.split(","))
        for rows in map(int, options.rows.split(",")):
            x = torch.randn(rows, in_features, device=options.device, dtype=torch.bfloat16)
            for name, ratio in compare(layers, x, linear.weight, options.runs, shape).items():
                ratios.setdefault(name, []).append(ratio)
    for name, values in ratios.items():
        mean = math.exp(sum(map(math.log, values)) / len(values))
        print(f"{name:<36} geometric mean {mean:.2f} x bf16, lowest {min(values):.2f}")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--rows", default="1,16,64,256,1024,4096", help="M, the rows of the input")
    parser.add_argument("--shapes", default="3072x3072,3072x12288")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--threads", type=int, help="default: torch's")
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


def make_layers(linear: nn.Linear, methods: list[str]) -> dict[str, Layer]:
    """Layers by name, with the kernel that runs."""
    layers: dict[str, Layer] = {BASELINE: linear}
    for method in methods:
        name, _, option = method.partition("+")
        layer = quantize_linear(linear, name, rotate=option == "rotate")
        layers[f"{method} {layer.selection.kernel.name}"] = layer
    if find_spec("torchao") is not None:
        layers["torchao int8 dynamic"] = torchao_int8(linear)
    return layers


def torchao_int8(linear: nn.Linear) -> Layer:
    quantization = import_module("torchao.quantization")
    model = nn.Sequential(copy.deepcopy(linear))
    quantization.quantize_(model, quantization.Int8DynamicActivationInt8WeightConfig())
    return model


def compare(layers: Mapping[str, Layer], x: Tensor, weight: Tensor, runs: int, shape: str) -> dict[str, float]:
    """Prints a line for each layer; returns how many times as fast as bf16 each is."""
    seconds = measure(layers, x, runs)
    exact = F.linear(x.float(), weight.float())
    ratios = {}
    for name, layer in layers.items():
        ratios[name] = seconds[BASELINE] / seconds[name]
        error = float((layer(x).float() - exact).norm() / exact.norm())
        line = f"{name:<36}{1e3 * seconds[name]:>10.3f}{ratios[name]:>9.2f}{100 * error:>9.3f}"
        print(f"{len(x):>6} {shape:<14}{line}", flush=True)
    return ratios


def measure(layers: Mapping[str, Layer], x: Tensor, runs: int) -> dict[str, float]:
    """Best seconds of each layer; one round to warm up."""
    best = dict.fromkeys(layers, math.inf)
    for turn in range(runs + 1):
        for name, layer in layers.items():
            synchronize(x)
            start = time.perf_counter()
            layer(x)
            synchronize(x)
            if turn:
                best[name] = min(best[name], time.perf_counter() - start)
    return best


def synchronize(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)


if __name__ == "__main__":
    main()
