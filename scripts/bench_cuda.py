"""Measures the kernels on one GPU: activation quantization, linear layers, a FLUX-sized and a Wan-sized block.

    python scripts/bench_cuda.py
    python scripts/bench_cuda.py --parts linear,blocks --runs 50
    python scripts/bench_cuda.py --device cpu --tiny    whether it runs at all; its figures mean nothing

torchao's dynamic float8 takes part where it is installed (extra `interop`) and the GPU has FP8.

Times are medians between CUDA events, after warming up, with the second-level cache emptied before each; candidates
take turns, so that a GPU that grows hot slows them alike. Errors are relative RMS: of linear layers against the
unquantized weight in float32, of blocks against the bf16 block. `asked` is what is wanted at least; `<` marks a figure
that is below.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omni_convert.formats.errors import OmniConvertError
from omni_convert.formats.schemes.fp8 import E4M3_MAX, Fp8, Fp8Block
from omni_convert.loaders.kernels import fused_activation
from omni_convert.loaders.kernels.table import OVERRIDE
from omni_convert.loaders.layers.quantized_linear import QuantizedLinear, quantize_linear

Call = Callable[[], object]
BASELINE = "bf16"
TORCHAO, TORCHAO_CAPABILITY = "torchao float8 dynamic", (8, 9)
PARTS = ("activations", "linear", "blocks")
WARM_UP = 3
ASKED_BANDWIDTH = 0.8  # of that of a copy
ASKED_SHAPE = (4096, 3072, 12288)
ASKED_LINEAR = {"fp8": 1.5, "fp8 static": 1.65, "int8": 1.3}
DECODED = ("mxfp8", "mxfp4", "mxfp4_dualscale", "nvfp4")
# M, K, N
SHAPES = (ASKED_SHAPE, (4096, 3072, 3072), (4096, 12288, 3072), (512, 3072, 12288), (16, 3072, 12288), (1, 3072, 18432))
TINY_SHAPES = ((32, 128, 256), (1, 128, 128))
# FLUX.1 at 1024 x 1024, and Wan 14B at 480p for 81 frames: heads of 128, hidden, tokens, tokens of text, of the MLP.
FLUX, TINY_FLUX = (24, 3072, 4096, 512), (2, 256, 64, 16)
WAN, TINY_WAN = (40, 5120, 32760, 512, 13824), (2, 256, 64, 16, 512)


def main(arguments: list[str] | None = None) -> int:
    options = parse_options(arguments)
    if options.device.type == "cuda" and not torch.cuda.is_available():
        print("bench_cuda: found no CUDA device, nothing is measured; --device cpu --tiny only tries the script")
        return 1
    torch.manual_seed(0)
    name = torch.cuda.get_device_name(options.device) if options.device.type == "cuda" else "cpu"
    print(f"{name}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    with torch.inference_mode():
        for part in options.parts:
            {"activations": bench_activations, "linear": bench_linear, "blocks": bench_blocks}[part](options)
    return 0


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=lambda text: text.split(","), default=list(PARTS), help=",".join(PARTS))
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--tiny", action="store_true", help="small shapes, to try the script")
    parser.add_argument("--no-compile", action="store_true", help="blocks only as they are")
    options = parser.parse_args(arguments)
    for part in options.parts:
        if part not in PARTS:
            parser.error(f"--parts: found {part!r}, expected some of {','.join(PARTS)}")
    return options


def bench_activations(options: argparse.Namespace) -> None:
    print(f"\n{'activation quantization':<28}{'M x K':<16}{'ms':>9}{'GB/s':>9}{'% of copy':>11}{'asked':>8}")
    for rows, columns in ((32, 128),) if options.tiny else ((4096, 3072), (4096, 12288), (32760, 5120)):
        x = torch.randn(rows, columns, device=options.device, dtype=torch.bfloat16)
        scale, target = (x.abs().amax().float() / E4M3_MAX).reshape(()), torch.empty_like(x)
        calls: dict[str, Callable[[], Tensor | tuple[Tensor, ...]]] = {
            "copy": partial(target.copy_, x),
            "fp8 static": partial(fused_activation.fp8_static, x, scale),
            "fp8 per token": partial(fused_activation.fp8_per_token, x),
            "fp8 per token and 128": partial(fused_activation.fp8_per_group, x, 128),
            "int8 per token": partial(fused_activation.int8_per_token, x),
            "mxfp8": partial(fused_activation.mxfp8_swizzled, x),
            "nvfp4": partial(fused_activation.nvfp4_swizzled, x, scale),
        }
        seconds = measure(calls, options)
        speed = {name: (x.nbytes + size(call())) / seconds[name] for name, call in calls.items()}
        for name in calls:
            share = speed[name] / speed["copy"]
            asked = "" if name == "copy" else verdict(share, ASKED_BANDWIDTH, "{:.0%}")
            figures = f"{1e3 * seconds[name]:>9.3f}{speed[name] / 1e9:>9.0f}{share:>11.0%}{asked:>8}"
            print(f"{name:<28}{f'{rows} x {columns}':<16}{figures}", flush=True)


def size(result: Tensor | tuple[Tensor, ...]) -> int:
    return sum(tensor.nbytes for tensor in (result if isinstance(result, tuple) else (result,)))


def bench_linear(options: argparse.Namespace) -> None:
    print(f"\n{'linear':<40}{'M x K x N':<22}{'ms':>9}{'x bf16':>9}{'asked':>8}{'error %':>9}")
    for rows, columns, outputs in TINY_SHAPES if options.tiny else SHAPES:
        linear = nn.Linear(columns, outputs, bias=False).to(options.device, torch.bfloat16)
        x = torch.randn(rows, columns, device=options.device, dtype=torch.bfloat16)
        layers = make_layers(linear, x)
        seconds = measure({name: partial(layer, x) for name, layer in layers.items()}, options)
        exact = F.linear(x.float(), linear.weight.float())
        for name, layer in layers.items():
            ratio = seconds[BASELINE] / seconds[name]
            method = name.partition(":")[0]
            is_asked = (rows, columns, outputs) == ASKED_SHAPE and method in ASKED_LINEAR
            asked = verdict(ratio, ASKED_LINEAR[method], "{:.2f}") if is_asked else ""
            figures = f"{1e3 * seconds[name]:>9.3f}{ratio:>9.2f}{asked:>8}{error(layer(x), exact):>9.3f}"
            print(f"{name:<40}{f'{rows} x {columns} x {outputs}':<22}{figures}", flush=True)


def make_layers(linear: nn.Linear, x: Tensor) -> dict[str, nn.Module]:
    """Layers by method and kernel."""
    layers: dict[str, nn.Module] = {BASELINE: linear}
    quantized = {"fp8 static": quantize_static(linear, x.abs().amax())}
    quantized |= {method: quantize_linear(linear, method) for method in ("fp8", "int8", *DECODED)}
    quantized["fp8 128x128"] = quantize_linear(linear, Fp8Block())
    for method, layer in quantized.items():
        layers[f"{method}: {layer.selection.kernel.name}"] = layer
    for method in DECODED:
        with forced("triton_decode_mm"):
            try:
                layer = quantize_linear(linear, method)
            except OmniConvertError as problem:
                print(f"{method}: not measured in Triton: {problem}")
                continue
            layers[f"{method}: {layer.selection.kernel.name}"] = layer
    if can_run_torchao(x.device):
        layers[TORCHAO] = quantize_torchao(nn.Sequential(linear))
    return layers


@contextmanager
def forced(kernel: str) -> Iterator[None]:
    before = os.environ.get(OVERRIDE)
    os.environ[OVERRIDE] = kernel
    try:
        yield
    finally:
        del os.environ[OVERRIDE]
        if before is not None:
            os.environ[OVERRIDE] = before


def quantize_static(linear: nn.Linear, amax: Tensor) -> QuantizedLinear:
    tensors = Fp8().quantize(linear.weight.detach())
    tensors = {suffix: tensor.to(linear.weight.device) for suffix, tensor in tensors.items()}
    tensors["input_scale"] = (amax.float() / E4M3_MAX).to(linear.weight.device)
    return QuantizedLinear(Fp8(static=True), tensors, linear.bias)


def quantize_recorded(amax: Mapping[str, Tensor], linear: nn.Linear, name: str) -> QuantizedLinear:
    return quantize_static(linear, amax[name])


def bench_blocks(options: argparse.Namespace) -> None:
    compilations = (False,) if options.no_compile else (False, True)
    print(f"\n{'block':<36}{'compiled':<10}{'ms':>9}{'x bf16':>9}{'x torchao':>11}{'asked':>8}{'error %':>9}")
    for title, (block, inputs) in (("FLUX double", make_flux(options)), ("Wan", make_wan(options))):
        amax = record_amax(block, inputs)
        blocks: dict[str, nn.Module] = {BASELINE: block}
        blocks["fp8"] = replace_linears(block, lambda linear, _: quantize_linear(linear, "fp8"))
        blocks["fp8 static"] = replace_linears(block, partial(quantize_recorded, amax))
        blocks["int8"] = replace_linears(block, lambda linear, _: quantize_linear(linear, "int8"))
        if can_run_torchao(options.device):
            blocks[TORCHAO] = quantize_torchao(block)
        for is_compiled in compilations:
            bench_block(title, blocks, inputs, is_compiled, options)


def bench_block(
    title: str,
    blocks: Mapping[str, nn.Module],
    inputs: tuple[object, ...],
    is_compiled: bool,
    options: argparse.Namespace,
) -> None:
    torch.compiler.reset()
    runs = {name: torch.compile(block, fullgraph=True) if is_compiled else block for name, block in blocks.items()}
    seconds = measure({name: partial(run, *inputs) for name, run in runs.items()}, options)
    exact = image_tokens(runs[BASELINE](*inputs)).float()
    for name, run in runs.items():
        over_peer = seconds[TORCHAO] / seconds[name] if TORCHAO in seconds else None
        peer = "-" if over_peer is None else f"{over_peer:.2f}"
        asked = "" if over_peer is None or name in (BASELINE, TORCHAO) else verdict(over_peer, 1.0, "{:.2f}")
        off = error(image_tokens(run(*inputs)), exact)
        figures = f"{1e3 * seconds[name]:>9.3f}{seconds[BASELINE] / seconds[name]:>9.2f}{peer:>11}{asked:>8}{off:>9.3f}"
        print(f"{f'{title}: {name}':<36}{'yes' if is_compiled else 'no':<10}{figures}", flush=True)


def make_flux(options: argparse.Namespace) -> tuple[nn.Module, tuple[object, ...]]:
    from diffusers.models.transformers.transformer_flux import FluxTransformerBlock

    heads, hidden, tokens, text = TINY_FLUX if options.tiny else FLUX
    place = {"device": options.device, "dtype": torch.bfloat16}
    block = FluxTransformerBlock(hidden, heads, hidden // heads).to(**place)
    angles = torch.rand(tokens + text, hidden // heads, device=options.device)
    inputs = (torch.randn(1, tokens, hidden, **place), torch.randn(1, text, hidden, **place))
    return block, (*inputs, torch.randn(1, hidden, **place), (angles.cos(), angles.sin()))


def make_wan(options: argparse.Namespace) -> tuple[nn.Module, tuple[object, ...]]:
    from diffusers.models.transformers.transformer_wan import WanTransformerBlock

    heads, hidden, tokens, text, inner = TINY_WAN if options.tiny else WAN
    place = {"device": options.device, "dtype": torch.bfloat16}
    block = WanTransformerBlock(hidden, inner, heads, cross_attn_norm=True).to(**place)
    angles = torch.rand(1, tokens, 1, hidden // heads, device=options.device)
    inputs = (torch.randn(1, tokens, hidden, **place), torch.randn(1, text, hidden, **place))
    return block, (*inputs, torch.randn(1, 6, hidden, **place), (angles.cos(), angles.sin()))


def quantized_linears(block: nn.Module) -> dict[str, nn.Linear]:
    """Every linear but the modulation, which is kept in bf16 in all of these comparisons."""
    return {
        name: module
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear) and not name.startswith("norm")
    }


def record_amax(block: nn.Module, inputs: tuple[object, ...]) -> dict[str, Tensor]:
    """Largest magnitude of the input of each linear."""
    amax: dict[str, Tensor] = {}
    hooks = [
        linear.register_forward_pre_hook(lambda _, given, name=name: amax.update({name: given[0].abs().amax()}))
        for name, linear in quantized_linears(block).items()
    ]
    block(*inputs)
    for hook in hooks:
        hook.remove()
    return amax


def replace_linears(block: nn.Module, quantize: Callable[[nn.Linear, str], nn.Module]) -> nn.Module:
    quantized = copy.deepcopy(block)
    for name, linear in quantized_linears(quantized).items():
        quantized.set_submodule(name, quantize(linear, name))
    return quantized


def can_run_torchao(device: torch.device) -> bool:
    has_fp8 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= TORCHAO_CAPABILITY
    return has_fp8 and find_spec("torchao") is not None


def quantize_torchao(model: nn.Module) -> nn.Module:
    quantization = import_module("torchao.quantization")
    config = quantization.Float8DynamicActivationFloat8WeightConfig(granularity=quantization.PerRow())
    quantized = copy.deepcopy(model)
    names = set(quantized_linears(quantized))
    quantization.quantize_(quantized, config, filter_fn=lambda _module, name: name in names)
    return quantized


def image_tokens(result: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    return result[1] if isinstance(result, tuple) else result


def error(found: Tensor, exact: Tensor) -> float:
    return 100 * float((found.float() - exact).norm() / exact.norm())


def verdict(found: float, asked: float, form: str) -> str:
    return f"{'<' if found < asked else ''}{form.format(asked)}"


def measure(calls: Mapping[str, Call], options: argparse.Namespace) -> dict[str, float]:
    """Median seconds of each."""
    for call in calls.values():
        for _ in range(WARM_UP):
            call()
    timer = time_on_cuda if options.device.type == "cuda" else time_on_cpu
    cache = torch.empty(flush_bytes(options.device), dtype=torch.uint8, device=options.device)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(options.runs):
        for name, call in calls.items():
            times[name].append(timer(call, cache))
    return {name: statistics.median(values) for name, values in times.items()}


def flush_bytes(device: torch.device) -> int:
    """Several times the second-level cache, so that also the launch of what is timed is hidden."""
    return 4 * torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 1


def time_on_cuda(call: Call, cache: Tensor) -> float:
    start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    cache.zero_()
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def time_on_cpu(call: Call, _cache: Tensor) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


if __name__ == "__main__":
    sys.exit(main())
