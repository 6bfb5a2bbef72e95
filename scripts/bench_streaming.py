"""Measures calibration of a pipeline that streams its weights: memory, bytes read and time.

Writes a pipeline around a synthetic Z-Image transformer (the real class's names and shapes, random bf16 values; the
other components are the demo's) and records statistics over prompts, each time in a process of its own, with the files
evicted from the page cache first

    wall, cpu   seconds to load, run and record, and of them on a core; imports are not counted
    floor       the larger of the seconds to read the transformer once for each step, evicted each time, and those of
                the same run with `--memory full`; at most 1.3 times of it are wanted
    RssAnon, both
                peaks of `RssAnon` and of `RssAnon` + `RssFile`, sampled every 50 ms; at most 1.5 and 2.5 GB are wanted
    read        bytes of the transformer that the reader counts over groups x steps x its bytes; at most 1.05 is wanted
    disk        `read_bytes` of /proc/self/io, which the page cache saves
    same        the statistics have the bytes of the run with `--memory full`

    python scripts/bench_streaming.py
    python scripts/bench_streaming.py --gigabytes 1.5 --prompts 4
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench_convert import settle, write_transformer  # type: ignore[import-not-found]  # beside it

from omni_convert.convert.source.location import DEMO_PIPELINE, DEMO_PROMPTS

CHUNK = 16 << 20
SAMPLE_SECONDS = 0.05
GIGABYTE = 1e9
#: Of the transformer, so that the demo's text encoder and VAE fit.
SIZES = {"in_channels": 8, "cap_feat_dim": 256}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=8.5, help="size of the transformer")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--size", type=int, default=64, help="width and height in pixels")
    parser.add_argument("--scratch", type=Path, help="folder for the pipeline; default: the system's")
    parser.add_argument("--moments", action="store_true", help="record second moments, too")
    parser.add_argument("--memories", nargs="+", default=["full", "stream"], help="the runs; `stream` is one of them")
    parser.add_argument("--run", nargs=2, metavar=("FOLDER", "MEMORY"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run is not None:
        print(json.dumps(record(Path(options.run[0]), options.run[1], options)))
        return
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        measure(Path(scratch), options)


def measure(scratch: Path, options: argparse.Namespace) -> None:
    folder = scratch / "pipeline"
    shutil.copytree(DEMO_PIPELINE, folder, ignore=shutil.ignore_patterns("transformer"))
    (folder / "transformer").mkdir()
    write_transformer(folder / "transformer", options.gigabytes, 1, **SIZES)
    size = sum(file.stat().st_size for file in (folder / "transformer").glob("*.safetensors"))
    reading = sum(read_once(folder / "transformer") for _ in range(options.steps))
    print(f"transformer {size / GIGABYTE:.2f} GB, {options.prompts} prompts, {options.steps} steps")
    print(f"reading {reading:.1f} s", flush=True)
    runs: dict[str, dict[str, Any]] = {}
    for memory in options.memories:
        result = runs[memory] = run(folder, memory, options)
        memories = f"RssAnon {result['anonymous'] / GIGABYTE:.2f} GB, both {result['both'] / GIGABYTE:.2f} GB"
        times = f"wall {result['wall']:.1f} s, cpu {result['cpu']:.1f} s"
        print(f"{memory}: {times}, {memories}, disk {result['disk'] / GIGABYTE:.2f} GB", flush=True)
        if groups := result["groups"]:
            passes = len(groups) * options.steps
            print(f"{memory}: groups {groups}, read {result['read'] / (passes * size):.4f}", flush=True)
    floor = max(reading, *(result["wall"] for memory, result in runs.items() if memory == "full"), 0.0)
    print(f"wall / floor {runs['stream']['wall'] / floor:.3f}")
    print(f"same {len({result['statistics'] for result in runs.values()}) == 1}")


def read_once(folder: Path) -> float:
    """Seconds to read the weights in a folder from the disk."""
    settle(folder)
    buffer = bytearray(CHUNK)
    started = time.perf_counter()
    for path in folder.glob("*.safetensors"):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - started


def run(folder: Path, memory: str, options: argparse.Namespace) -> dict[str, Any]:
    """What `record` returns in a process of its own, and its peaks of memory."""
    settle(folder / "transformer")
    values = [f"--{name}={getattr(options, name)}" for name in ("prompts", "steps", "size")]
    flags = ["--moments"] if options.moments else []
    command = [sys.executable, __file__, *values, *flags, "--run", str(folder), memory]
    peaks = {"anonymous": 0, "both": 0}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            anonymous, mapped = resident(process.pid)
            peaks["anonymous"] = max(peaks["anonymous"], anonymous)
            peaks["both"] = max(peaks["both"], anonymous + mapped)
            time.sleep(SAMPLE_SECONDS)
        assert process.stdout is not None
        output = process.stdout.read()
    if process.returncode:
        raise SystemExit(f"{memory}: the run failed")
    return {**json.loads(output.splitlines()[-1]), **peaks}


def resident(process: int) -> tuple[int, int]:
    """`RssAnon` and `RssFile` of a process in bytes; 0 when it is gone."""
    try:
        status = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0, 0
    found = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in status if line.startswith("Rss")}
    return found.get("RssAnon", 0), found.get("RssFile", 0)


def record(folder: Path, memory: str, options: argparse.Namespace) -> dict[str, Any]:
    """Calibrates, and returns the time, the bytes that were read, and the hash of the statistics."""
    from omni_convert.convert.calibration.generation import GenerationSettings
    from omni_convert.convert.calibration.pipeline_recorder import PipelineRecorder
    from omni_convert.convert.calibration.prompts import read_prompts
    from omni_convert.loaders.loading.streamed import streamer_of
    from omni_convert.loaders.pipeline import load_pipeline

    prompts = read_prompts(DEMO_PROMPTS)[: options.prompts]
    settings = GenerationSettings(steps=options.steps, width=options.size, height=options.size, guidance_scale=0.0)
    started, began = time.perf_counter(), time.process_time()
    pipe = load_pipeline(folder, "cpu", memory=memory)
    recorder = PipelineRecorder(pipe, settings, with_moments=options.moments)
    statistics = recorder.record(prompts).statistics
    path = folder.parent / f"{memory}.safetensors"
    statistics.save(path)
    wall, cpu = time.perf_counter() - started, time.process_time() - began
    streamer = streamer_of(pipe)
    return {
        "wall": wall,
        "cpu": cpu,
        "read": 0 if streamer is None else streamer.read_bytes["transformer"],
        "groups": [] if streamer is None else streamer.groups,
        "disk": bytes_from_disk(),
        "statistics": hashlib.sha256(path.read_bytes()).hexdigest(),
    }


def bytes_from_disk() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes:"))


if __name__ == "__main__":
    main()
