"""How close GGUF's searched types come to a weight, and how fast, beside libggml on the same core in the same run.

    python scripts/bench_k_quants.py                     every type, with libggml where pywhispercpp brings it
    python scripts/bench_k_quants.py --kinds Q4_K Q6_K --rows 256
    python scripts/bench_k_quants.py --workers 2         also two threads beside each other, as in a conversion
    python scripts/bench_k_quants.py --device cuda

Errors are relative RMS in percent on 1024 x 3072 numbers: normal, Student-t(4), and normal ones with an importance for
each column, weighted by it. Speeds are million weights a second of CPU time (of wall time on a GPU), without / with
importance; the best of some runs.
"""

from __future__ import annotations

import argparse
import ctypes
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor

from omni_convert.convert.workers import Workers, keep_freed_memory
from omni_convert.formats.arithmetic.ggml.blocks import BLOCK_TYPES
from omni_convert.formats.arithmetic.ggml.k_quants import K_QUANTS

TYPES = {**K_QUANTS, **{kind: BLOCK_TYPES[kind] for kind in ("Q5_1", "Q5_0", "Q4_1", "Q4_0")}}
COLUMNS = 3072
#: Weights that are quantized at a time, as in a conversion.
CACHED = 2**18

Quantize = Callable[[Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class Weights:
    """The weight that is quantized.

    Attributes:
        normal, student: float32 [rows, columns]
        importance: float32 [columns]
    """

    normal: Tensor
    student: Tensor
    importance: Tensor

    @classmethod
    def draw(cls, rows: int = 1024, device: str = "cpu") -> Weights:
        draw = np.random.default_rng(0)
        drawn = (draw.standard_normal((1024, COLUMNS)) * 0.02, draw.standard_t(4, (1024, COLUMNS)) * 0.02)
        normal, student = (torch.from_numpy(numbers[:rows]).float().to(device) for numbers in drawn)
        return cls(normal, student, torch.from_numpy(draw.lognormal(0, 1, COLUMNS)).float().to(device))


def libggml() -> Callable[[str], Quantize] | None:
    """A function of a type's name: libggml's `ggml_quantize_chunk`; None if pywhispercpp is not installed."""
    try:
        files = metadata.distribution("pywhispercpp").files or []
    except metadata.PackageNotFoundError:
        return None
    paths = [Path(str(file.locate())) for file in files if file.name.startswith("libggml-base") and file.size]
    quantize_chunk = ctypes.CDLL(str(max(paths, key=lambda path: path.stat().st_size))).ggml_quantize_chunk
    quantize_chunk.restype = ctypes.c_size_t
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, count, count, count, pointer]

    def of_type(kind: str) -> Quantize:
        number = gguf.GGMLQuantizationType[kind]
        numbers, size = gguf.GGML_QUANT_SIZES[number]

        def quantize(weight: Tensor, importance: Tensor | None) -> Tensor:
            stored = torch.empty(len(weight), weight.shape[1] // numbers * size, dtype=torch.uint8)
            counts = None if importance is None else importance.data_ptr()
            quantize_chunk(int(number), weight.data_ptr(), stored.data_ptr(), 0, *weight.shape, counts)
            return stored

        return quantize

    return of_type


def ours(kind: str, *, search: bool) -> Quantize:
    """Our encoder, a tile of rows at a time."""
    block = TYPES[kind]

    def quantize(weight: Tensor, importance: Tensor | None) -> Tensor:
        rows = max(1, CACHED // weight.shape[1])
        tiles = []
        for tile in torch.split(weight, rows):
            counts = None if importance is None else importance.expand_as(tile).reshape(-1, block.numbers)
            tiles.append(block.quantize(tile.reshape(-1, block.numbers), counts, search=search).view(len(tile), -1))
        return torch.cat(tiles)

    return quantize


def errors(kind: str, quantize: Quantize, weights: Weights) -> list[float]:
    """Relative RMS in percent: normal, Student-t(4), and weighted."""
    cases: Sequence[tuple[Tensor, Tensor | None]] = (
        (weights.normal, None),
        (weights.student, None),
        (weights.normal, weights.importance),
    )
    return [relative_error(kind, weight, quantize(weight, counts), counts) for weight, counts in cases]


def relative_error(kind: str, weight: Tensor, stored: Tensor, importance: Tensor | None) -> float:
    numbers = gguf.quants.dequantize(stored.cpu().numpy(), gguf.GGMLQuantizationType[kind])
    weight = weight.cpu().double()
    counts = torch.ones(weight.shape[1]) if importance is None else importance.cpu()
    squares = (torch.from_numpy(numbers) - weight).square() * counts
    return 100 * float((squares.sum() / (weight.square() * counts).sum()).sqrt())


def speed(quantize: Quantize, weight: Tensor, importance: Tensor | None, runs: int) -> float:
    """Million weights a second, the best of some runs."""
    clock, best = time.perf_counter if weight.is_cuda else time.process_time, 0.0
    for _ in range(runs):
        start = clock()
        quantize(weight, importance)
        if weight.is_cuda:
            torch.cuda.synchronize(weight.device)
        best = max(best, weight.numel() / (clock() - start) / 1e6)
    return best


def report(name: str, found: Sequence[float], speeds: Sequence[float], more: str = "") -> None:
    shown = "".join(f"{error:>10.3f}" for error in found)
    print(f"{name:<20}{shown}{speeds[0]:>12.1f} /{speeds[1]:>6.1f}{more}", flush=True)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=TYPES, default=list(TYPES))
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    torch.set_num_threads(1)
    keep_freed_memory()  # as every conversion does
    weights, judge = Weights.draw(options.rows, options.device), libggml()
    print(f"{options.rows} x {COLUMNS} float32 on {options.device}, one thread, torch {torch.__version__}")
    print(f"{'':<20}{'normal':>10}{'t(4)':>10}{'weighted':>10}{'Mw/s':>20}")
    for kind in options.kinds:
        if judge is not None and options.device == "cpu":
            measure(f"{kind} libggml", kind, judge(kind), weights, options.runs)
        for search in (False, True):
            quantize = ours(kind, search=search)
            speeds = ""
            if options.workers > 1:
                counts = (1, options.workers)
                found = [workers_speed(quantize, weights.normal, options.runs, count) for count in counts]
                speeds = f"   wall: {found[0]:.1f} with 1 worker, {found[1]:.1f} with {options.workers}"
            measure(kind if search else f"{kind} no search", kind, quantize, weights, options.runs, speeds)


def measure(label: str, kind: str, quantize: Quantize, weights: Weights, runs: int, more: str = "") -> None:
    speeds = [speed(quantize, weights.normal, counts, runs) for counts in (None, weights.importance)]
    report(label, errors(kind, quantize, weights), speeds, more)


def workers_speed(quantize: Quantize, weight: Tensor, runs: int, count: int) -> float:
    """Million weights a second of wall time, of threads that have a weight each."""
    with Workers(count) as workers:
        best = 0.0
        for _ in range(runs):
            start = time.perf_counter()
            for done in [workers.submit(quantize, weight, None) for _ in range(count)]:
                done.result()
            best = max(best, count * weight.numel() / (time.perf_counter() - start) / 1e6)
    return best


if __name__ == "__main__":
    main()
