"""What ComfyUI obeys beyond formats: flags of layers, the header's text, marker tensors; kept, written, and checked."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from omni_convert.convert import Recipe, convert_checkpoint
from omni_convert.convert.inspection.verification import verify_source
from omni_convert.convert.source.location import Source
from omni_convert.formats.arithmetic.rotation import hadamard
from omni_convert.formats.checks.meaning import open_quantized
from omni_convert.formats.containers.gguf_file import GgufReader
from omni_convert.formats.errors import CheckpointError
from omni_convert.formats.finding import Finding
from omni_convert.formats.schemes.fp8 import Fp8
from omni_convert.formats.schemes.int8 import Int8

STEM, MARKER = "blocks.0.proj", "__index_timestep_zero__"
HEADER = {
    "config": '{"transformer": {"x": 1}}',
    "modelspec.architecture": "ltx-2",
    "modelspec.hash_sha256": "0x1",
    "note": "of no use",
}


def mark(content: dict[str, Any]) -> Tensor:
    return torch.tensor(list(json.dumps(content).encode()), dtype=torch.uint8)


def weight() -> Tensor:
    return torch.randn(64, 256, generator=torch.Generator().manual_seed(0)) * 0.05


def fp8(content: dict[str, Any] | None) -> dict[str, Tensor]:
    made = Fp8().quantize(weight())
    if content is None:
        old = {"weight": made["weight"], "scale_weight": made["weight_scale"]}
        return {f"{STEM}.{leaf}": each for leaf, each in old.items()} | {
            "scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)
        }
    return {f"{STEM}.{leaf}": each for leaf, each in made.items()} | {f"{STEM}.comfy_quant": mark(content)}


def rotated() -> dict[str, Tensor]:
    turned = (weight().view(64, -1, 64) @ hadamard(64)).flatten(1)
    content = {"format": "int8_tensorwise", "params": {"convrot": True, "convrot_groupsize": 64}}
    made = Int8().quantize(turned)
    return {f"{STEM}.{leaf}": each for leaf, each in made.items()} | {f"{STEM}.comfy_quant": mark(content)}


def kept(tensors: dict[str, Tensor], folder: Path) -> tuple[dict[str, Tensor], dict[str, str], Path]:
    save_file(tensors, folder / "in.safetensors", HEADER)
    convert_checkpoint(folder / "in.safetensors", folder / "out", Recipe("keep", dialect="comfyui"))
    file = next((folder / "out").glob("*.safetensors"))
    with safe_open(file, "pt") as opened:
        return load_file(file), opened.metadata(), file


@pytest.mark.parametrize(
    ("tensors", "content"),
    [
        (fp8({"format": "float8_e4m3fn", "full_precision_matrix_mult": True}), {"full_precision_matrix_mult": True}),
        (fp8(None), {"full_precision_matrix_mult": True}),
        (fp8({"format": "float8_e4m3fn"}), {}),
        (rotated(), {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 64}),
    ],
    ids=["full precision", "marker of two elements", "plain", "rotated"],
)
def test_keep_keeps_what_comfyui_obeys(tensors: dict[str, Tensor], content: dict[str, Any], tmp_path: Path) -> None:
    written, metadata, file = kept(tensors, tmp_path)
    expected = {"format": "float8_e4m3fn"} | content
    assert json.loads(bytes(written[f"{STEM}.comfy_quant"].tolist())) == expected
    assert json.loads(metadata["_quantization_metadata"])["layers"] == {STEM: expected}
    assert {key: metadata[key] for key in metadata.keys() & HEADER.keys()} == {
        key: HEADER[key] for key in ("config", "modelspec.architecture")
    }
    with open_quantized(tmp_path / "in.safetensors") as before, open_quantized(file) as after:
        assert after.layers[STEM].dequantize(0, 64).equal(before.layers[STEM].dequantize(0, 64))
        assert after.layers[STEM].stored.is_full_precision == before.layers[STEM].stored.is_full_precision


def test_a_dialect_without_the_flag_says_what_becomes_of_it(tmp_path: Path) -> None:
    save_file(fp8(None), tmp_path / "in.safetensors")
    recipe = Recipe("keep", dialect="compressed-tensors")
    notes = convert_checkpoint(tmp_path / "in.safetensors", tmp_path / "out", recipe).notes
    assert any("multiplied in full precision: 1 layer; compressed-tensors cannot" in x for x in notes)


@pytest.fixture(scope="module")
def edit_2511(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen-Image-Edit-2511."""
    from diffusers import QwenImageTransformer2DModel

    folder = tmp_path_factory.mktemp("edit") / "model"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = QwenImageTransformer2DModel(
            num_layers=1, attention_head_dim=64, num_attention_heads=2, joint_attention_dim=128,
            axes_dims_rope=(16, 24, 24), zero_cond_t=True,
        )  # fmt: skip
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def names_in(output: Path) -> set[str]:
    file = next(path for path in output.rglob("*") if path.suffix in (".safetensors", ".gguf"))
    return set(GgufReader(file).specs if file.suffix == ".gguf" else load_file(file))


def findings(path: Path) -> list[Finding]:
    return [found for each in verify_source(Source(path, "model")) for found in each.findings]


@pytest.mark.parametrize(
    ("recipe", "is_marked"),
    [
        (Recipe("fp8", dialect="comfyui"), True),
        (Recipe("gguf"), True),
        (Recipe("fp8"), False),
        (Recipe("fp8", dialect="modelopt"), False),
    ],
    ids=["comfyui", "gguf", "vllm-omni", "modelopt"],
)
@pytest.mark.parametrize("source", ["folder", "file with a marker", "file without"])
def test_the_marker_of_a_variant_is_there_for_comfyui_alone(
    recipe: Recipe, is_marked: bool, source: str, edit_2511: Path, tmp_path: Path
) -> None:
    model = edit_2511
    if source != "folder":
        tensors = load_file(edit_2511 / "diffusion_pytorch_model.safetensors")
        tensors |= {MARKER: torch.zeros(0)} if source == "file with a marker" else {}
        (tmp_path / "in").mkdir()
        model = tmp_path / "in" / "edit_2511.safetensors"
        save_file(tensors, model)
        shutil.copy(edit_2511 / "config.json", tmp_path / "in")
        assert not [found for found in findings(model) if found.layer == MARKER]
    convert_checkpoint(model, tmp_path / "out", recipe)
    assert (MARKER in names_in(tmp_path / "out")) is is_marked
    assert not [found for found in findings(tmp_path / "out") if found.severity == "error"]


@pytest.mark.parametrize(("start", "end"), [("comfyui", "vllm-omni"), ("vllm-omni", "comfyui")])
def test_keep_adds_and_drops_the_marker(start: str, end: str, edit_2511: Path, tmp_path: Path) -> None:
    recipe = Recipe("fp8", dialect=start, runtime="vllm-omni") if start == "vllm-omni" else Recipe("fp8", dialect=start)
    convert_checkpoint(edit_2511, tmp_path / "start", recipe)
    convert_checkpoint(tmp_path / "start", tmp_path / "end", Recipe("keep", dialect=end, force=True))
    assert (MARKER in names_in(tmp_path / "end")) is (end == "comfyui")


def test_a_marker_that_is_missing_or_contradicts_the_config_is_found(edit_2511: Path, tmp_path: Path) -> None:
    convert_checkpoint(edit_2511, tmp_path / "out", Recipe("fp8", dialect="comfyui"))
    (tmp_path / "out" / "omni_convert.json").unlink()
    file = next((tmp_path / "out").glob("*.safetensors"))
    tensors = load_file(file)
    del tensors[MARKER]
    save_file(tensors, file, {"format": "pt"})
    assert [(found.check, found.layer) for found in findings(tmp_path / "out")] == [("bad-mark", MARKER)]
    save_file(tensors | {MARKER: torch.zeros(1)}, file, {"format": "pt"})
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    (tmp_path / "out" / "config.json").write_text(json.dumps(config | {"zero_cond_t": False}))
    assert [(found.check, found.layer) for found in findings(tmp_path / "out")] == [("bad-mark", MARKER)]
    with pytest.raises(CheckpointError, match="by which ComfyUI sets zero_cond_t"):
        convert_checkpoint(tmp_path / "out", tmp_path / "again", Recipe("int8"))
