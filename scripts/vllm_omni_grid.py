"""Holds every family and method to vLLM-Omni's own model classes and loader, of each version that is on PyPI.

A cell is a tiny model of diffusers' or transformers' class, converted by one method and loaded by one version of
vLLM-Omni. Every layer
has to stand there for the weight that was written, with nothing unloaded and nothing left over.

    python scripts/vllm_omni_grid.py run        runs the cells with the installed vLLM-Omni, and records what came out
    python scripts/vllm_omni_grid.py check      runs them, and fails where something else came out than is recorded
    python scripts/vllm_omni_grid.py print      prints the record as a table

`run` and `check` need an environment with vLLM-Omni, as scripts/nightly makes them.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from models_page import RECORD, result_lines  # type: ignore[import-not-found]  # beside it
from tiny_models import save_model  # type: ignore[import-not-found]
from tiny_stages import save_repository  # type: ignore[import-not-found]
from vllm_omni_runtime import (  # type: ignore[import-not-found]
    HIDREAM_O1,
    STAGES,
    ModelPlace,
    Place,
    Runtime,
    compare,
    installed_version,
)

from omni_convert.convert import Recipe, convert_checkpoint
from omni_convert.formats.containers.checkpoint import Checkpoint
from omni_convert.formats.errors import OmniConvertError
from omni_convert.formats.families.layers import linear_widths
from omni_convert.formats.statistics.layer_statistics import InputRecorder, LayerStatistics, observe
from omni_convert.formats.statistics.recording_header import Identity
from omni_convert.formats.statistics.statistics import Statistics

__all__ = ["CELLS", "PLACES", "Cell"]

_WAN_BUILDER = "wan2_2.pipeline_wan2_2:create_transformer_from_config"
_WAN = ModelPlace("wan2_2.wan2_2_transformer:WanTransformer3DModel", "WanPipeline", _WAN_BUILDER)
_OMNIGEN_2 = ModelPlace("omnigen2.omnigen2_transformer:OmniGen2Transformer2DModel", "OmniGen2Pipeline")
#: Tiny model → where vLLM-Omni has its class.
PLACES: dict[str, Place] = {
    "z_image": ModelPlace("z_image.z_image_transformer:ZImageTransformer2DModel", "ZImagePipeline"),
    "qwen_image": ModelPlace("qwen_image.qwen_image_transformer:QwenImageTransformer2DModel", "QwenImagePipeline"),
    "qwen_image_21": ModelPlace(
        "qwen_image_21.qwen_image_21_transformer:QwenImage21Transformer2DModel", "QwenImage21Pipeline"
    ),
    "flux_1": ModelPlace("flux.flux_transformer:FluxTransformer2DModel", "FluxPipeline"),
    "flux_2": ModelPlace("flux2.flux2_transformer:Flux2Transformer2DModel", "Flux2Pipeline"),
    "flux_2_klein": ModelPlace("flux2_klein.flux2_klein_transformer:Flux2Transformer2DModel", "Flux2KleinPipeline"),
    "glm_image": ModelPlace("glm_image.glm_image_transformer:GlmImageTransformer2DModel", "GlmImagePipeline"),
    "omnigen_2": _OMNIGEN_2,
    "omnigen_2_short": _OMNIGEN_2,
    "ming_image": ModelPlace("ming_image.transformer:MingImageTransformer2DModel", "MingImageDiffusionPipeline"),
    "krea_2": ModelPlace("krea2.krea2_transformer:Krea2Transformer2DModel", "Krea2Pipeline"),
    "wan": _WAN,
    "wan_i2v": _WAN,
    "wan_5b": _WAN,
    "wan_vace": ModelPlace(
        "wan2_2.wan2_2_vace_transformer:WanVACETransformer3DModel",
        "WanVACEPipeline",
        "wan2_2.pipeline_wan2_2_vace:create_vace_transformer_from_config",
    ),
    "hunyuan_video_15": ModelPlace(
        "hunyuan_video.hunyuan_video_15_transformer:HunyuanVideo15Transformer3DModel", "HunyuanVideo15Pipeline"
    ),
    "ltx_2": ModelPlace(
        "ltx2.ltx2_transformer:LTX2VideoTransformer3DModel",
        "LTX2Pipeline",
        "ltx2.ltx2_components:create_transformer_from_config",
    ),
    "cosmos_3": ModelPlace(
        "cosmos3.transformer_cosmos3:Cosmos3VFMTransformer",
        "Cosmos3OmniPipeline",
        renaming="cosmos3.pipeline_cosmos3:_remap_ckpt_key",
    ),
    "hidream_o1": HIDREAM_O1,
    **STAGES,
}


@dataclass(frozen=True)
class Cell:
    """A way to convert a model, and the device for which vLLM-Omni reads it."""

    device: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_calibrated(self) -> bool:
        return self.options.get("activation_scheme") == "static"


_STATIC = {"activation_scheme": "static"}
CELLS = {
    "fp8": Cell("CUDA", {"method": "fp8"}),
    "static fp8": Cell("CUDA", {"method": "fp8", **_STATIC}),
    "fp8 in blocks": Cell("CUDA", {"method": "fp8", "weight_block_size": (64, 64)}),
    "int8": Cell("NPU", {"method": "int8"}),
    "mxfp8": Cell("NPU", {"method": "mxfp8"}),
    "mxfp4": Cell("NPU", {"method": "mxfp4"}),
    "mxfp4_dualscale": Cell("NPU", {"method": "mxfp4_dualscale", "bf16_blocks": 0}),
    "nvfp4": Cell("CUDA", {"method": "nvfp4"}),
    "static nvfp4": Cell("CUDA", {"method": "nvfp4", **_STATIC}),
    "svdquant_nvfp4": Cell("CUDA", {"method": "svdquant_nvfp4"}),
    "w4a16": Cell("CUDA", {"method": "w4a16", "group_size": 32}),
    "ModelOpt's fp8": Cell("CUDA", {"method": "fp8", "dialect": "modelopt"}),
    "ModelOpt's static fp8": Cell("CUDA", {"method": "fp8", "dialect": "modelopt", **_STATIC}),
    "ModelOpt's mxfp8": Cell("CUDA", {"method": "mxfp8", "dialect": "modelopt"}),
    "AutoRound's mxfp8": Cell("CUDA", {"method": "mxfp8", "dialect": "auto-round"}),
    "AutoRound's mxfp4": Cell("CUDA", {"method": "mxfp4", "dialect": "auto-round"}),
    "AutoRound's static nvfp4": Cell("CUDA", {"method": "nvfp4", "dialect": "auto-round", **_STATIC}),
}


def made_up_statistics(model: Path, component: str) -> Statistics:
    """Statistics of a component as if its linears had been given normal values."""
    layers: dict[int, LayerStatistics] = {}
    with Checkpoint.open(model) as checkpoint:
        widths = linear_widths({name: checkpoint[name] for name in checkpoint})
    for width in {*widths.values()}:
        recorder = InputRecorder()
        recorder.record(observe(torch.randn(64, width, generator=torch.Generator().manual_seed(width))), 0)
        recorded = recorder.statistics()
        assert recorded is not None
        layers[width] = recorded
    return Statistics(Identity({}, ()), {f"{component}.{stem}": layers[width] for stem, width in widths.items()})


def saved_pipeline(name: str, folder: Path) -> Path:
    """A tiny pipeline of a transformer alone, or a repository, with its statistics beside it."""
    place = PLACES[name]
    if place.component:
        _save_pipeline(name.removesuffix("_klein"), place, folder)
    else:
        save_repository(name, folder)
    made_up_statistics(folder / place.component, place.component).save(folder.with_suffix(".safetensors"))
    return folder


def _save_pipeline(model: str, place: ModelPlace, folder: Path) -> None:
    save_model(model, folder / "transformer")
    model_class = json.loads((folder / "transformer" / "config.json").read_text())["_class_name"]
    index = {
        "_class_name": place.pipeline,
        "_diffusers_version": "0.40.0",
        "transformer": ["diffusers", model_class],
    }
    (folder / "model_index.json").write_text(json.dumps(index))


def result_of(runtime: Runtime, name: str, cell: Cell, source: Path) -> dict[str, Any]:
    """What came of a cell: `error` and `layers`, or why it was not accepted (`refused`, `missing` or `failed`)."""
    place = PLACES[name]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        statistics = (source.with_suffix(".safetensors"),) if cell.is_calibrated else ()
        try:
            convert_checkpoint(source, out, Recipe(**cell.options, calibration=statistics))
        except OmniConvertError as refusal:
            return {"refused": str(refusal).partition("config.json: ")[2] or str(refusal)}
        if not place.exists():
            return {"missing": f"no class {place.name}"}
        try:
            model = runtime.load(out, place, cell.device)
        except Exception as error:  # noqa: BLE001  # whatever their code raises is the result
            # Sets in messages come in any order.
            return {"failed": re.split(r"[{\n]", f"{type(error).__name__}: {error}")[0].strip()}
        found = compare(model, out / place.component, source / place.component, place)
    return {"layers": found.layers, "error": f"{found.error:.4f}"} if found.flaw is None else {"failed": found.flaw}


def results(only: str, method: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Runs the cells of the models whose names contain `only`, of all methods or of one."""
    with tempfile.TemporaryDirectory() as folder:
        runtime = Runtime(Path(folder) / "group")
        for name in PLACES:
            if only not in name:
                continue
            source = saved_pipeline(name, Path(folder) / name)
            for each, cell in CELLS.items():
                if method in ("", each):
                    yield name, each, result_of(runtime, name, cell, source)
    torch.distributed.destroy_process_group()


Record = dict[str, dict[str, dict[str, dict[str, Any]]]]


def recorded() -> Record:
    """Version of vLLM-Omni → tiny model → method → what came out."""
    found: Record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    return found


def run(arguments: argparse.Namespace) -> int:
    """Runs the cells, and records them or compares them with the record."""
    record, version, differences = recorded(), installed_version(), 0
    ours = record.setdefault(version, {})
    for name, method, result in results(arguments.only, arguments.method):
        before = ours.get(name, {}).get(method)
        print(f"{version} {name:17} {method:24} {shown(result)}", flush=True)
        if arguments.command == "check" and before != result:
            differences += 1
            print(f"    recorded: {before}", file=sys.stderr)
        ours.setdefault(name, {})[method] = result
    if arguments.command == "run":
        RECORD.write_text(text_of(record))
    return min(differences, 1)


def text_of(record: Record) -> str:
    """The record as JSON, with a line for each cell."""
    ordered = {version: record[version] for version in sorted(record)}
    return re.sub(r"{\n *([^{}]*?)\n *}", r"{\1}", json.dumps(ordered, indent=1)) + "\n"


def shown(result: Mapping[str, Any]) -> str:
    """A result in a few words."""
    if "error" in result:
        return f"{result['layers']} layers, error {result['error']}"
    ((what, why),) = result.items()
    return f"{what}: {why}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "check", "print"))
    parser.add_argument("--only", default="", metavar="TEXT", help="only models whose name contains this")
    parser.add_argument("--method", default="", choices=("", *CELLS), help="only this method")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")  # they are their own affair
    if arguments.command != "print":
        return run(arguments)
    print("\n".join(result_lines(recorded())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
