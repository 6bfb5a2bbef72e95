"""How fast weights are quantized, in GB/s of bf16 input, how close they come, and what peers do on the same machine.

    python scripts/bench_formats.py                        every format, without and with search
    python scripts/bench_formats.py --rows 1024 --threads 1
    python scripts/bench_formats.py --peers     also what is installed of comfy-kitchen, torchao (extra `interop`), gguf

Each figure is the best of several runs over a standard normal matrix, scans of the weight (`fit`) included; errors are
relative RMS on standard normal / Student-t(4) values. The last are those of normal columns beside others that are 30
times as large: every 512th.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from omni_convert.convert.workers import keep_freed_memory
from omni_convert.formats.format import QuantizingFormat
from omni_convert.formats.schemes.convrot_w4a4 import ConvrotW4A4
from omni_convert.formats.schemes.fp8 import Fp8, Fp8Block
from omni_convert.formats.schemes.int8 import Int8, RotatedInt8
from omni_convert.formats.schemes.mxfp4 import Mxfp4
from omni_convert.formats.schemes.mxfp4_dualscale import Mxfp4DualScale
from omni_convert.formats.schemes.mxfp8 import Mxfp8
from omni_convert.formats.schemes.nf4 import Nf4
from omni_convert.formats.schemes.nvfp4 import Nvfp4
from omni_convert.formats.schemes.rotated_grid import W4a8, W6a8
from omni_convert.formats.schemes.svdquant import SvdQuantInt4, SvdQuantNvfp4

Quantize = Callable[[Tensor], object]

FORMATS: dict[str, QuantizingFormat] = {
    "fp8": Fp8(),
    "fp8 block 128x128": Fp8Block(),
    "int8": Int8(),
    "int8 rotated": RotatedInt8(),
    "w6a8": W6a8(),
    "w4a8, nearest": W4a8(search=False),
    "w4a8": W4a8(),
    "convrot_w4a4, nearest": ConvrotW4A4(search=False),
    "convrot_w4a4": ConvrotW4A4(),
    "mxfp8, nearest": Mxfp8(search=False),
    "mxfp8": Mxfp8(),
    "mxfp4, nearest": Mxfp4(search=False),
    "mxfp4": Mxfp4(),
    "mxfp4_dualscale, nearest": Mxfp4DualScale(search=False),
    "mxfp4_dualscale": Mxfp4DualScale(),
    "nvfp4, nearest": Nvfp4(search=False),
    "nvfp4": Nvfp4(),
    "nf4, nearest": Nf4(search=False),
    "nf4": Nf4(),
    "nf4 nested": Nf4(nested=True),
    "svdquant_int4": SvdQuantInt4(),
    "svdquant_nvfp4": SvdQuantNvfp4(),
}


def main() -> None:
    options = parse_options()
    if options.threads:
        torch.set_num_threads(options.threads)
    keep_freed_memory()  # as every conversion does; the peers gain by it as well
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(options.rows, 4096, generator=generator)
    chi_square = torch.zeros_like(normal)
    for _ in range(4):
        chi_square += torch.randn(options.rows, 4096, generator=generator).square()
    student = torch.randn(options.rows, 4096, generator=generator) / (chi_square / 4).sqrt()
    weights = [weight.to(options.device, torch.bfloat16) for weight in (normal, student)]
    print(
        f"{options.rows} x 4096 bf16 on {options.device}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    outlying = torch.arange(weights[0].shape[1], device=weights[0].device) % 512 == 0
    spoiled = torch.where(outlying, 30 * weights[0], weights[0])
    print(f"{'':<36}{'GB/s':>8}{'normal %':>12}{'t(4) %':>10}{'beside outliers %':>20}")
    for name, fmt in FORMATS.items() if not options.only else [(name, FORMATS[name]) for name in options.only]:
        speed = measure(fmt.quantize, weights[0], options.runs)
        errors = [relative_error(weight, fmt.dequantize(fmt.quantize(weight))) for weight in weights]
        restored = fmt.dequantize(fmt.quantize(spoiled))
        errors.append(relative_error(spoiled[:, ~outlying], restored[:, ~outlying]))
        shown = f"{100 * errors[0]:>12.3f}{100 * errors[1]:>10.3f}{100 * errors[2]:>20.3f}"
        print(f"{name:<36}{speed:>8.3f}{shown}", flush=True)
    for name, quantize in peers() if options.peers else ():
        print(f"{name:<36}{measure(quantize, weights[0], options.runs):>8.3f}", flush=True)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, help="default: torch's")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", nargs="+", choices=FORMATS, metavar="NAME", help="only these formats")
    parser.add_argument("--peers", action="store_true", help="also measure the peers that are installed")
    return parser.parse_args()


def measure(quantize: Quantize, weight: Tensor, runs: int) -> float:
    """Best GB/s of input over the runs, after one to warm up."""
    best = 0.0
    for _ in range(runs + 1):
        synchronize(weight)
        start = time.perf_counter()
        quantize(weight)
        synchronize(weight)
        best = max(best, weight.nbytes / (time.perf_counter() - start) / 1e9)
    return best


def synchronize(weight: Tensor) -> None:
    if weight.is_cuda:
        torch.cuda.synchronize(weight.device)


def relative_error(weight: Tensor, restored: Tensor) -> float:
    return float((restored - weight.float()).norm() / weight.float().norm())


def peers() -> Iterator[tuple[str, Quantize]]:
    """Peers that import, each as (name, function of a weight)."""
    warnings.simplefilter("ignore")
    for module, functions in (
        ("comfy_kitchen", comfy_kitchen),
        ("torchao.prototype.mx_formats.mx_tensor", torchao),
        ("gguf", gguf),
    ):
        with suppress(ImportError):
            yield from functions(import_module(module)).items()


def comfy_kitchen(kitchen: Any) -> dict[str, Quantize]:
    kitchen.disable_backend("triton")

    def scale(weight: Tensor, largest: float) -> Tensor:
        return weight.abs().amax().float() / largest

    return {
        "comfy-kitchen fp8": lambda weight: kitchen.quantize_per_tensor_fp8(weight, scale(weight, 448.0)),
        "comfy-kitchen int8 rows": kitchen.quantize_int8_rowwise,
        "comfy-kitchen mxfp8": kitchen.quantize_mxfp8,
        "comfy-kitchen nvfp4": lambda weight: kitchen.quantize_nvfp4(weight, scale(weight, 2688.0)),
    }


def torchao(mx_tensor: Any) -> dict[str, Quantize]:
    elements = {"mxfp8": torch.float8_e4m3fn, "mxfp4": torch.float4_e2m1fn_x2}
    return {
        f"torchao to_mx {name} {mode.name.lower()}": partial(
            mx_tensor.to_mx, elem_dtype=dtype, block_size=32, scaling_mode=mode
        )
        for name, dtype in elements.items()
        for mode in (mx_tensor.ScaleCalculationMode.FLOOR, mx_tensor.ScaleCalculationMode.RCEIL)
    }


def gguf(package: Any) -> dict[str, Quantize]:
    kind = package.GGMLQuantizationType.MXFP4
    return {"gguf-py MXFP4": lambda weight: package.quants.quantize(weight.float().numpy(), kind)}


if __name__ == "__main__":
    main()
