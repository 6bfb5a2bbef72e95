"""What loading a pipeline takes, over reading its files: wall time, and anonymous memory over the model's own bytes.

    python scripts/bench_load.py FOLDER
    python scripts/bench_load.py FOLDER --quantization fp8      quantize while loading

Linux. Each run is a process of its own; imports are not counted. The files are read once first, so that both times are
those of a warm page cache; reading means copying every byte of the weights into one buffer. The model's own bytes are
those of its parameters and buffers; peak anonymous memory is sampled every 2 ms, less what was there before.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

from torch import nn

from omni_convert.loaders import load_pipeline

CHUNK = 16 << 20
SAMPLE_SECONDS = 0.002


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--quantization")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--once", action="store_true", help="one run in this process; prints JSON")
    options = parser.parse_args()
    if options.once:
        print(json.dumps(load_once(options.folder, options.quantization)))
        return
    read_seconds = min(read_files(options.folder) for _ in range(options.runs + 1))
    command = [sys.executable, __file__, str(options.folder), "--once"]
    command += ["--quantization", options.quantization] if options.quantization else []
    runs = [json.loads(subprocess.check_output(command).splitlines()[-1]) for _ in range(options.runs)]
    seconds = min(run["seconds"] for run in runs)
    peak, own = max(run["peak_bytes"] for run in runs), runs[0]["own_bytes"]
    print(f"wall {seconds:.3f} s, reading {read_seconds:.3f} s: {seconds / read_seconds:.2f} (at most 1.3 wanted)")
    print(f"peak RssAnon {peak / 1e6:.0f} MB, model {own / 1e6:.0f} MB: {peak / own:.2f} (at most 1.15 wanted)")


def read_files(folder: Path) -> float:
    """Seconds to read every weight file."""
    buffer = bytearray(CHUNK)
    start = time.perf_counter()
    for path in sorted(folder.glob("*/*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - start


def load_once(folder: Path, quantization: str | None) -> dict[str, float]:
    """Seconds, peak anonymous bytes over those before, and the bytes of the model."""
    before = anonymous_bytes()
    peak = [before]
    is_done = threading.Event()
    sampler = threading.Thread(target=sample, args=(peak, is_done))
    sampler.start()
    start = time.perf_counter()
    try:
        pipeline = load_pipeline(folder, quantization=quantization)
        seconds = time.perf_counter() - start
    finally:
        is_done.set()
        sampler.join()
    modules = [module for module in pipeline.components.values() if isinstance(module, nn.Module)]
    tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    own = sum(tensor.nbytes for tensor in tensors)
    return {"seconds": seconds, "peak_bytes": peak[0] - before, "own_bytes": own}


def sample(peak: list[int], is_done: threading.Event) -> None:
    while not is_done.wait(SAMPLE_SECONDS):
        peak[0] = max(peak[0], anonymous_bytes())


def anonymous_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("RssAnon:")[1].split()[0])


if __name__ == "__main__":
    main()
