"""How fast a conversion is, over the floor that the disk sets, and how much memory it takes.

Writes a synthetic Z-Image transformer (the real class's names and shapes, random values), then for each method

    floor    seconds to read the input bytes once, write the output bytes and fsync them, with plain file I/O in one
             thread, same disk, after each run
    wall     seconds of `omni-convert`, a fresh process, imports included; the run of `--repeat` with the smallest ratio
    cores    processor time of that process over its wall time
    memory   peak of `RssAnon`, summed over all processes of the conversion

Runs and floors begin alike: the source is not in memory, and what was freed before has been idle for a few seconds
(a virtual machine may by then have handed it back, and pays for getting it again).

`--transcode` measures what becomes of quantized checkpoints instead, which are made first: METHOD:DIALECT is `-m keep`
to another spelling, METHOD:dequantize gives BF16 back, METHOD-PART leaves the layers of that name in BF16, so that most
bytes are copied.

All run with `--no-search`; NAME+search is the default search. gguf-TYPE is `--gguf-type TYPE`, int8-rotate is
`--rotate`, nf4-nested is `--double-quant`, and NAME:DIALECT is `--dialect DIALECT`.
Peers (ModelOpt, convert_to_quant) run beside fp8 where they are installed.

    python scripts/bench_convert.py --size 5 12
    python scripts/bench_convert.py --size 5 --methods mxfp4 mxfp4_dualscale+search --workers 1 2
    python scripts/bench_convert.py --size 2 8 --methods gguf-Q8_0 gguf-Q4_0
    python scripts/bench_convert.py --size 1 --methods int8-rotate:comfyui w4a8 w4a8+search nf4 mxfp4:auto-round
    python scripts/bench_convert.py --size 5 --transcode
    python scripts/bench_convert.py --size 5 --transcode fp8:modelopt mxfp4:dequantize
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import ZImageTransformer2DModel

from omni_convert.convert.workers import available_cores
from omni_convert.formats.containers.safetensors_writer import SafetensorsWriter
from omni_convert.formats.containers.shards import plan_shards
from omni_convert.formats.containers.tensor_spec import TensorSpec

BLOCK = 8 << 20
POLL_SECONDS = 0.02
SETTLE_SECONDS = 5.0
# One block of the full-size model: 181 million parameters.
BLOCK_BYTES = 362e6
METHODS = ("fp8", "int8", "mxfp8", "mxfp4", "mxfp4_dualscale", "nvfp4")
TRANSCODINGS = (
    "fp8:modelopt",
    "mxfp8:comfyui",
    "int8:compressed-tensors",
    "mxfp4:compressed-tensors",
    "mxfp8:msmodelslim",
    "fp8-feed_forward:modelopt",
    "fp8:dequantize",
    "mxfp4:dequantize",
)
DEQUANTIZE = "dequantize"
# What stands behind the hyphen in the name of a method → options.
VARIANTS = {
    "blocks": ["--weight-block-size", "128,128"],
    "rotate": ["--rotate"],
    "nested": ["--double-quant"],
}

# Each peer as a program that converts `source` (a folder or file) to FP8 in `output`; argv: source, output.
MODELOPT = """
import sys, torch
import modelopt.torch.quantization as mtq
from modelopt.torch.opt import enable_huggingface_checkpointing
from diffusers import ZImageTransformer2DModel
enable_huggingface_checkpointing()
model = ZImageTransformer2DModel.from_pretrained(sys.argv[1], torch_dtype=torch.bfloat16)
mtq.quantize(model, mtq.FP8_DEFAULT_CFG, forward_loop=None)
mtq.compress(model)
model.save_pretrained(sys.argv[2])
"""


@dataclass(frozen=True)
class Run:
    """Time and memory of one process."""

    seconds: float
    cores: float
    peak_memory: int


def write_transformer(folder: Path, gigabytes: float, shards: int, **config: int) -> None:
    """A Z-Image transformer of about this size, random bf16 values, in so many shards.

    Args:
        config: arguments of the class, so that other components fit
    """
    layers = max(1, round(gigabytes * 1e9 / BLOCK_BYTES) - 2)
    with torch.device("meta"):
        model = ZImageTransformer2DModel(n_layers=layers, n_refiner_layers=1, **config)
    specs = [TensorSpec(name, torch.bfloat16, tuple(tensor.shape)) for name, tensor in model.state_dict().items()]
    limit = sum(spec.nbytes for spec in specs) // shards + 100_000_000
    plan = plan_shards(specs, limit, "diffusion_pytorch_model.safetensors")
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1 << 24, generator=generator).to(torch.bfloat16).mul_(0.02)
    for file, members in plan.files.items():
        with SafetensorsWriter(folder / file, members) as writer:
            for spec in members:
                repeats = -(-spec.elements // len(noise))
                writer.write(spec.name, noise.repeat(repeats)[: spec.elements].view(spec.shape))
    if plan.index is not None:
        (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(plan.index))
    (folder / "config.json").write_text(json.dumps({"_class_name": "ZImageTransformer2DModel", **dict(model.config)}))


def copy_floor(source: Path, output_bytes: int, scratch: Path) -> float:
    """Seconds to read every weight byte of `source` and to write and sync so many bytes."""
    target = scratch / "floor"
    settle(source)
    started = time.perf_counter()
    block = bytearray(BLOCK)
    for file in sorted(source.glob("*.safetensors")):
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(block):
                pass
    with target.open("wb", buffering=0) as stream:
        for start in range(0, output_bytes, BLOCK):
            stream.write(memoryview(block)[: output_bytes - start])
        os.fsync(stream.fileno())
    seconds = time.perf_counter() - started
    target.unlink()
    return seconds


def settle(folder: Path) -> None:
    """Has the system forget the weights in a folder, and rest: every measurement begins like this."""
    for file in folder.glob("*.safetensors"):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    time.sleep(SETTLE_SECONDS)


def anonymous_memory_of(process: int) -> int:
    """`RssAnon` in bytes of a process and its descendants; 0 when it is gone."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    except OSError:
        return 0
    own = next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon:")), 0)
    return own + sum(anonymous_memory_of(int(child)) for child in children)


def measure(command: list[str], source: Path) -> Run:
    """Runs a command on a cold source."""
    settle(source)
    before = os.times()
    started = time.perf_counter()
    process = subprocess.Popen(command)
    peak = 0
    while process.poll() is None:
        peak = max(peak, anonymous_memory_of(process.pid))
        time.sleep(POLL_SECONDS)
    seconds = time.perf_counter() - started
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: exit status {process.returncode}")
    after = os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return Run(seconds, used / seconds, peak)


def convert_command(source: Path, output: Path, method: str, workers: int) -> list[str]:
    name, _, search = method.partition("+")
    name, _, dialect = name.partition(":")
    name, _, variant = name.partition("-")
    arguments = ["-m", name]
    if variant:
        arguments += ["--gguf-type", variant] if name == "gguf" else VARIANTS[variant]
    arguments += ["--dialect", dialect] if dialect else []
    arguments += [] if search else ["--no-search"]
    program = [sys.executable, "-m", "omni_convert.convert.cli"]
    return [*program, str(source), "-o", str(output), "--quiet", "--workers", str(workers), *arguments]


def transcode_command(source: Path, output: Path, target: str, workers: int) -> list[str]:
    program = [sys.executable, "-m", "omni_convert.convert.cli"]
    arguments = [DEQUANTIZE, str(source)] if target == DEQUANTIZE else [str(source), "-m", "keep", "--dialect", target]
    return [*program, *arguments, "-o", str(output), "--quiet", "--workers", str(workers)]


def peer_commands(source: Path, output: Path) -> Iterable[tuple[str, list[str]]]:
    """The other converters that are installed here, on the same source."""
    if importlib.util.find_spec("modelopt") is not None:
        yield "ModelOpt fp8", [sys.executable, "-c", MODELOPT, str(source), str(output)]
    single = sorted(source.glob("*.safetensors"))
    program = shutil.which("convert_to_quant") or shutil.which("ctq")
    if program is not None and len(single) == 1:
        yield "convert_to_quant", [program, "-i", str(single[0]), "-o", str(output / "out.safetensors"), "--simple"]


def weight_bytes(folder: Path) -> int:
    files = [file for pattern in ("*.safetensors", "*.gguf") for file in folder.rglob(pattern)]
    return sum(file.stat().st_size for file in files)


def best_of(repeat: int, command: list[str], source: Path, output: Path) -> tuple[Run, float]:
    """Runs several times, each followed by its floor, and returns the pair with the smallest ratio."""
    pairs = []
    for _ in range(repeat):
        output.mkdir()  # some programs expect it
        run = measure(command, source)
        written = weight_bytes(output)
        shutil.rmtree(output)
        pairs.append((run, copy_floor(source, written, source.parent)))
    return min(pairs, key=lambda pair: pair[0].seconds / pair[1])


def report(label: str, workers: int, total: int, run: Run, floor: float) -> None:
    print(
        f"{total / 1e9:>6.2f} {label:<23} {workers:>7} {floor:>8.2f} {run.seconds:>8.2f} {run.seconds / floor:>6.2f} "
        f"{total / 1e9 / run.seconds:>6.2f} {run.cores:>6.2f} {run.peak_memory / 2**20:>9.0f}",
        flush=True,
    )


def benchmark(folder: Path, arguments: argparse.Namespace) -> None:
    """All methods on one source."""
    source, output = folder / "source", folder / "output"
    total = weight_bytes(source)
    for method in arguments.methods:
        for workers in arguments.workers:
            run, floor = best_of(arguments.repeat, convert_command(source, output, method, workers), source, output)
            report(method, workers, total, run, floor)
    for label, command in peer_commands(source, output) if "fp8" in arguments.methods else ():
        run, floor = best_of(1, command, source, output)
        report(label, available_cores(), total, run, floor)


def benchmark_transcoding(folder: Path, arguments: argparse.Namespace) -> None:
    """All transcodings, each of a checkpoint that is quantized for it."""
    source, output = folder / "quantized", folder / "output"
    made = None
    for transcoding in arguments.transcode or TRANSCODINGS:
        method, _, target = transcoding.partition(":")
        if method != made:
            shutil.rmtree(source, ignore_errors=True)
            name, _, ignored = method.partition("-")
            command = convert_command(folder / "source", source, name, available_cores())
            subprocess.run([*command, *(["--ignored-layers", ignored] if ignored else [])], check=True)
            made = method
        for workers in arguments.workers:
            command = transcode_command(source, output, target, workers)
            run, floor = best_of(arguments.repeat, command, source, output)
            report(transcoding, workers, weight_bytes(source), run, floor)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=float, nargs="+", default=[5.0, 12.0], help="gigabytes of bf16 weights")
    parser.add_argument("--shards", type=int, default=3)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), metavar="METHOD")
    parser.add_argument("--transcode", nargs="*", metavar="METHOD:TARGET", help=f"instead; {', '.join(TRANSCODINGS)}")
    parser.add_argument("--workers", type=int, nargs="+", default=[available_cores()])
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument(
        "--scratch", type=Path, help="folder on the disk to measure; default: the system's temporary one"
    )
    arguments = parser.parse_args()
    print(
        f"{'GB':>6} {'method':<23} {'workers':>7} {'floor s':>8} {'wall s':>8} {'ratio':>6} {'GB/s':>6} {'cores':>6} "
        f"{'MiB anon':>9}"
    )
    for size in arguments.size:
        with tempfile.TemporaryDirectory(dir=arguments.scratch) as folder:
            (Path(folder) / "source").mkdir()
            write_transformer(Path(folder) / "source", size, arguments.shards)
            (benchmark if arguments.transcode is None else benchmark_transcoding)(Path(folder), arguments)


if __name__ == "__main__":
    main()
