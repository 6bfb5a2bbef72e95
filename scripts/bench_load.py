"""Measures loading of a quantized transformer: wall time over reading its bytes, anonymous memory over the model's own.

Writes a synthetic Z-Image transformer (the real class's names and shapes, random values), converts it to each method,
and loads it with `from_pretrained`, each time in a process of its own; imports are not counted

    read    seconds to read every byte of the weights, with plain file I/O into one buffer; the fastest of `--repeat`
    wall    seconds until the model is there; the fastest of `--repeat`; at most 1.3 times `read` is wanted
    touch   seconds until every byte of every weight has been read as well, for a mapped file is not read before
    memory  peak of `RssAnon` over that before loading, sampled every 2 ms; at most 1.15 times the model's own bytes
            (those of its parameters and buffers) is wanted

The files are in memory when each measurement starts (`--cold`: they are not, and the disk is read; then `read` is too).
On a CPU a model stays mapped: what takes time is looking for NaN. Weights in containers (mxfp4, mxfp4_dualscale) are
packed, which is work of its own. METHOD+online quantizes the bf16 model while loading it.

    python scripts/bench_load.py
    python scripts/bench_load.py --cold --methods fp8 int8 fp8+online
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from bench_convert import settle, weight_bytes, write_transformer  # type: ignore[import-not-found]  # beside it
from diffusers import ZImageTransformer2DModel

from omni_convert.convert import Recipe, convert_checkpoint
from omni_convert.convert.execution.memory import anonymous_memory
from omni_convert.loaders import build_quant_config
from omni_convert.loaders.loading.diffusers_quantizer import DiffusersConfig

CHUNK = 16 << 20
SAMPLE_SECONDS = 0.002
PAGE = 4096
METHODS = ("fp8", "int8", "mxfp8", "mxfp4", "mxfp4_dualscale", "nvfp4", "fp8+online")


def read_files(folder: Path, *, cold: bool) -> float:
    """Seconds to read every weight file."""
    if cold:
        settle(folder)
    buffer = bytearray(CHUNK)
    started = time.perf_counter()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - started


def load_once(folder: Path, quantization: str | None) -> dict[str, float]:
    """Seconds, peak anonymous bytes over those before, and the bytes of the model."""
    options = {}
    if quantization is not None:
        options["quantization_config"] = DiffusersConfig.of(build_quant_config(quantization))  # type: ignore[arg-type]  # of one method
    before = anonymous_memory()
    peak = [before]
    is_done = threading.Event()
    sampler = threading.Thread(target=sample, args=(peak, is_done))
    sampler.start()
    started = time.perf_counter()
    model = ZImageTransformer2DModel.from_pretrained(folder, dtype=torch.bfloat16, **options)
    loaded = time.perf_counter() - started
    for tensor in model.state_dict().values():
        tensor.contiguous().view(-1).view(torch.uint8)[::PAGE].sum()
    touched = time.perf_counter() - started
    is_done.set()
    sampler.join()
    own = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    return {"seconds": loaded, "touched": touched, "peak": max(peak[0], anonymous_memory()) - before, "own": own}


def sample(peak: list[int], is_done: threading.Event) -> None:
    while not is_done.wait(SAMPLE_SECONDS):
        peak[0] = max(peak[0], anonymous_memory())


def benchmark(source: Path, folder: Path, method: str, arguments: argparse.Namespace) -> None:
    """One method."""
    name, _, online = method.partition("+")
    if not online:
        convert_checkpoint(source, folder, Recipe(method=name, runtime="diffusers", search=False))
    read, runs = [], []
    for _ in range(arguments.repeat):
        read.append(read_files(folder if not online else source, cold=arguments.cold))
        if arguments.cold:
            settle(folder if not online else source)
        command = [sys.executable, __file__, "--once", str(source if online else folder)]
        command += ["--quantization", name] if online else []
        runs.append(json.loads(subprocess.check_output(command).splitlines()[-1]))
    wall, touched = min(run["seconds"] for run in runs), min(run["touched"] for run in runs)
    peak, own, seconds = max(run["peak"] for run in runs), runs[0]["own"], min(read)
    print(
        f"{weight_bytes(source if online else folder) / 1e9:>6.2f} {method:<16} {seconds:>8.3f} {wall:>8.3f} "
        f"{wall / seconds:>6.2f} {touched / seconds:>6.2f} {own / 2**20:>9.0f} {peak / 2**20:>9.0f} {peak / own:>6.2f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=float, default=4.0, help="gigabytes of bf16 weights")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), metavar="METHOD")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--cold", action="store_true", help="the files are not in memory")
    parser.add_argument("--scratch", type=Path, help="folder for the files; default: the system's temporary one")
    parser.add_argument("--once", type=Path, help="load this model in this process and print JSON")
    parser.add_argument("--quantization")
    arguments = parser.parse_args()
    if arguments.once:
        print(json.dumps(load_once(arguments.once, arguments.quantization)))
        return
    print(
        f"{'GB':>6} {'method':<16} {'read s':>8} {'wall s':>8} {'ratio':>6} {'touch':>6} "
        f"{'MiB own':>9} {'MiB anon':>9} {'ratio':>6}"
    )
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as folder:
        source = Path(folder) / "source"
        source.mkdir()
        write_transformer(source, arguments.size, 1)
        for method in arguments.methods:
            benchmark(source, Path(folder) / method.partition("+")[0], method, arguments)


if __name__ == "__main__":
    main()
