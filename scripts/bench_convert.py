"""How fast a conversion is, over the floor that the disk sets, and how much memory it takes.

Writes a synthetic Z-Image transformer (the real class's names and shapes, random values), then for each method

    floor   seconds to read the input bytes once, write the output bytes and fsync them, with plain file I/O, same disk
    wall    seconds of `omni-convert`, a fresh process, imports included
    memory  peak of `RssAnon`, summed over all processes of the conversion

    python scripts/bench_convert.py --size 3 --shards 3 --methods fp8 int8
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from diffusers import ZImageTransformer2DModel

from omni_convert.formats.safetensors_writer import SafetensorsWriter
from omni_convert.formats.sharding import plan_shards
from omni_convert.formats.tensor_spec import TensorSpec

BLOCK = 8 << 20
POLL_SECONDS = 0.02
# One block of the full-size model: 181 million parameters.
BLOCK_BYTES = 362e6
METHOD_ARGUMENTS = {"fp8-block": ["-m", "fp8", "--weight-block-size", "128,128"]}


def write_transformer(folder: Path, gigabytes: float, shards: int) -> None:
    """A Z-Image transformer of about this size, random bf16 values, in so many shards."""
    layers = max(1, round(gigabytes * 1e9 / BLOCK_BYTES) - 2)
    with torch.device("meta"):
        model = ZImageTransformer2DModel(n_layers=layers, n_refiner_layers=1)
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


def copy_floor(source: Path, output: Path, scratch: Path) -> float:
    """Seconds to read every weight byte of `source` and to write and sync as many bytes as `output` has."""
    target = scratch / "floor"
    drop_caches([source, output])
    started = time.perf_counter()
    for file in source.glob("*.safetensors"):
        with file.open("rb", buffering=0) as stream:
            while stream.read(BLOCK):
                pass
    size = sum(file.stat().st_size for file in output.glob("*.safetensors"))
    block = os.urandom(BLOCK)
    with target.open("wb", buffering=0) as stream:
        for _ in range(0, size, BLOCK):
            stream.write(block)
        os.fsync(stream.fileno())
    seconds = time.perf_counter() - started
    target.unlink()
    return seconds


def drop_caches(folders: list[Path]) -> None:
    """Asks the system to forget these files, so that every measurement reads from the disk."""
    for folder in folders:
        for file in folder.glob("*.safetensors"):
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def anonymous_memory_of(process: int) -> int:
    """`RssAnon` in bytes of a process and its descendants; 0 when it is gone."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    except OSError:
        return 0
    own = next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon:")), 0)
    return own + sum(anonymous_memory_of(int(child)) for child in children)


def convert(source: Path, output: Path, arguments: list[str]) -> tuple[float, int]:
    """Seconds and peak memory of one conversion in a fresh process."""
    drop_caches([source])
    command = [sys.executable, "-m", "omni_convert.convert.cli", str(source), "-o", str(output), "--quiet", *arguments]
    started = time.perf_counter()
    process = subprocess.Popen(command)
    peak = 0
    while process.poll() is None:
        peak = max(peak, anonymous_memory_of(process.pid))
        time.sleep(POLL_SECONDS)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: exit status {process.returncode}")
    return time.perf_counter() - started, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=float, nargs="+", default=[3.0], help="gigabytes of bf16 weights")
    parser.add_argument("--shards", type=int, default=3)
    parser.add_argument("--methods", nargs="+", default=["fp8", "fp8-block", "int8"])
    parser.add_argument(
        "--scratch", type=Path, help="folder on the disk to measure; default: the system's temporary one"
    )
    arguments = parser.parse_args()
    print(f"{'GB':>5} {'method':<16} {'floor s':>8} {'wall s':>8} {'ratio':>6} {'GB/s':>6} {'MiB anon':>9}")
    for size in arguments.size:
        with tempfile.TemporaryDirectory(dir=arguments.scratch) as folder:
            source = Path(folder) / "source"
            source.mkdir()
            write_transformer(source, size, arguments.shards)
            total = sum(file.stat().st_size for file in source.glob("*.safetensors")) / 1e9
            for method in arguments.methods:
                output = Path(folder) / "output"
                wall, peak = convert(source, output, METHOD_ARGUMENTS.get(method, ["-m", method]))
                floor = copy_floor(source, output, Path(folder))
                shutil.rmtree(output)
                print(
                    f"{total:>5.2f} {method:<16} {floor:>8.2f} {wall:>8.2f} {wall / floor:>6.2f} {total / wall:>6.2f} "
                    f"{peak / 2**20:>9.0f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
