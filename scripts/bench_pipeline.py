"""How fast quantized models run over bf16, and how far their output is off: the demo pipeline, blocks of real width.

    demo    the bundled pipeline, a picture of 64x64 in 20 steps
    flux    FluxTransformer2DModel with one double block of FLUX.1's width (3072), 512 tokens of text
    wan     WanTransformer3DModel with one block of Wan2.2-A14B's width (5120, 13824), 512 tokens of text

    python scripts/bench_pipeline.py
    python scripts/bench_pipeline.py --models flux,wan --tokens 4096 --device cuda --compile

torchao takes part where it is installed (extra `interop`): dynamic INT8, on a GPU dynamic FP8, on the same layers.
Candidates take turns, so that a busy machine slows them alike; each figure is the best of several runs. Errors are
relative RMS against the unquantized model in float32; of the demo, of its pictures. Blocks have random weights.
"""

from __future__ import annotations

import argparse
import copy
import gc
import logging
import math
import time
from collections.abc import Callable, Collection, Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from diffusers import FluxTransformer2DModel, WanTransformer3DModel
from diffusers.utils import logging as diffusers_logging
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from omni_convert.convert.calibration.generation import GenerationSettings, run_pipeline
from omni_convert.convert.calibration.prompts import Prompt
from omni_convert.convert.source.location import DEMO_PIPELINE
from omni_convert.loaders import build_quant_config, kernel_report, load_pipeline
from omni_convert.loaders.loading.install import install_quantized
from omni_convert.loaders.loading.select import select_layers

METHODS = "int8,fp8,mxfp8,mxfp4,mxfp4_dualscale,nvfp4,w4a16"
BASELINE = "bf16"
PROMPT = "a large red circle in the center on a blue background"
TEXT_TOKENS = 512
PATCHES_A_ROW = 32
WEIGHT_DEVIATION = 0.03

#: Runs a model once.
Run = Callable[[], Tensor]


@torch.inference_mode()
def main() -> None:
    options = parse_options()
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    if options.threads:
        torch.set_num_threads(options.threads)
    print(f"{options.device}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{'model':<8}{'candidate':<40}{'ms':>10}{'x bf16':>9}{'error %':>9}")
    for name in options.models.split(","):
        torch.manual_seed(0)
        exact, candidates = demo(options) if name == "demo" else block(*BLOCKS[name](options), options)
        compare(name, exact, candidates, options)
        del candidates
        gc.collect()


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="demo,flux,wan")
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--tokens", type=int, default=1024, help="of the image or video, of flux and wan")
    parser.add_argument("--steps", type=int, default=20, help="of the demo")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, help="default: torch's")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true", help="flux and wan through torch.compile")
    return parser.parse_args()


def demo(options: argparse.Namespace) -> tuple[Tensor, dict[str, Run]]:
    """The picture in float32, and what draws it otherwise."""
    settings = GenerationSettings.for_pipeline(DEMO_PIPELINE, {"steps": options.steps})

    def runner(pipe: Any) -> Run:
        pipe.set_progress_bar_config(disable=True)
        return lambda: pixels(run_pipeline(pipe, [Prompt(PROMPT)], settings, 0))

    candidates = {BASELINE: runner(load_pipeline(DEMO_PIPELINE, options.device))}
    for method in options.methods.split(","):
        pipe = load_pipeline(DEMO_PIPELINE, options.device, quantization=method)
        candidates[f"{method} {' '.join(kernel_report(pipe).kernels)}"] = runner(pipe)
    if find_spec("torchao") is not None:
        pipe = load_pipeline(DEMO_PIPELINE, options.device)
        candidates[apply_torchao(pipe.transformer, select_layers(pipe.transformer, build_one("int8"))[0])] = runner(
            pipe
        )
    return runner(load_pipeline(DEMO_PIPELINE, options.device, torch.float32))(), candidates


def pixels(pictures: Any) -> Tensor:
    """Pixels of the first image, float32 [height, width, 3]."""
    return torch.from_numpy(np.asarray(pictures[0][0], dtype=np.float32))


def flux(options: argparse.Namespace) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model, and its inputs."""
    model = FluxTransformer2DModel(num_layers=1, num_single_layers=0)
    inputs = {
        "hidden_states": torch.randn(1, options.tokens, 64),
        "encoder_hidden_states": torch.randn(1, TEXT_TOKENS, 4096),
        "pooled_projections": torch.randn(1, 768),
        "timestep": torch.tensor([0.5]),
        "guidance": torch.tensor([3.5]),
        "img_ids": torch.cartesian_prod(torch.arange(1.0), *grid(options.tokens)),
        "txt_ids": torch.zeros(TEXT_TOKENS, 3),
    }
    return model, inputs if model.config.guidance_embeds else {k: v for k, v in inputs.items() if k != "guidance"}


def grid(tokens: int) -> tuple[Tensor, Tensor]:
    """Rows and columns of so many patches."""
    return torch.arange(float(tokens // PATCHES_A_ROW)), torch.arange(float(PATCHES_A_ROW))


def wan(options: argparse.Namespace) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model, and its inputs."""
    model = WanTransformer3DModel(num_layers=1)  # the defaults are those of 14B
    inputs = {
        "hidden_states": torch.randn(1, 16, 1, 2 * (options.tokens // PATCHES_A_ROW), 2 * PATCHES_A_ROW),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, TEXT_TOKENS, 4096),
    }
    return model, inputs


BLOCKS = {"flux": flux, "wan": wan}


def block(model: nn.Module, inputs: Mapping[str, Tensor], options: argparse.Namespace) -> tuple[Tensor, dict[str, Run]]:
    """The output in float32, and what computes it otherwise."""
    for parameter in model.parameters():  # some start so small that nothing that happens in a block shows
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=WEIGHT_DEVIATION)
    nn.Module.to(model, torch.bfloat16).eval()
    inputs = {
        name: value.to(options.device, torch.bfloat16) if value.is_floating_point() and "ids" not in name else value
        for name, value in inputs.items()
    }
    inputs = {name: value.to(options.device) for name, value in inputs.items()}

    def runner(candidate: nn.Module) -> Run:
        ready = nn.Module.to(candidate, options.device)
        call = torch.compile(ready) if options.compile else ready
        return lambda: call(**inputs, return_dict=False)[0]

    candidates = {BASELINE: runner(copy.deepcopy(model))}
    for method in options.methods.split(","):
        quantized = quantize(copy.deepcopy(model), method)
        run = runner(quantized)
        candidates[f"{method} {' '.join(kernel_report(quantized).kernels)}"] = run
    if find_spec("torchao") is not None:
        theirs = nn.Module.to(copy.deepcopy(model), options.device)
        name = apply_torchao(theirs, select_layers(theirs, build_one("int8"))[0])
        candidates[name] = runner(theirs)
    nn.Module.to(model, options.device, torch.float32)
    wide = {name: value.float() if value.is_floating_point() else value for name, value in inputs.items()}
    return model(**wide, return_dict=False)[0], candidates


def build_one(method: str) -> Any:
    """A configuration for one model."""
    return build_quant_config(method)


def quantize(model: nn.Module, method: str) -> nn.Module:
    """The layers that loading would quantize, in place."""
    layers, _ = select_layers(model, build_one(method))
    for name, planned in layers.items():
        install_quantized(model, name, model.get_parameter(f"{name}.weight").detach(), planned, "bench_pipeline")
    return model


def apply_torchao(model: nn.Module, names: Collection[str]) -> str:
    """Quantizes the same layers, in place; returns what to call it."""
    quantization = import_module("torchao.quantization")
    on_gpu = next(model.parameters()).is_cuda
    kind = "Float8DynamicActivationFloat8WeightConfig" if on_gpu else "Int8DynamicActivationInt8WeightConfig"
    quantization.quantize_(model, getattr(quantization, kind)(), filter_fn=lambda _module, name: name in names)
    return "torchao float8 dynamic" if on_gpu else "torchao int8 dynamic"


def compare(model: str, exact: Tensor, candidates: Mapping[str, Run], options: argparse.Namespace) -> None:
    """Prints a line for each candidate."""
    seconds = measure(candidates, options.runs, options.device)
    for name, run in candidates.items():
        error = float((run().float() - exact).norm() / exact.norm())
        figures = f"{1e3 * seconds[name]:>10.1f}{seconds[BASELINE] / seconds[name]:>9.2f}{100 * error:>9.3f}"
        print(f"{model:<8}{name:<40}{figures}", flush=True)


def measure(candidates: Mapping[str, Run], runs: int, device: str) -> dict[str, float]:
    """Best seconds of each; one round to warm up."""
    best = dict.fromkeys(candidates, math.inf)
    for turn in range(runs + 1):
        for name, run in candidates.items():
            synchronize(device)
            start = time.perf_counter()
            run()
            synchronize(device)
            if turn:
                best[name] = min(best[name], time.perf_counter() - start)
    return best


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
