"""Files of single components, in any dialect and container, become part of a pipeline."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from omni_convert.convert import Recipe, convert_checkpoint
from omni_convert.convert.cli.main import main
from omni_convert.convert.inspection.verification import verify_source
from omni_convert.convert.source.location import resolve_source
from omni_convert.formats.checks.meaning import open_quantized
from omni_convert.formats.containers.checkpoint import Checkpoint
from omni_convert.formats.errors import CheckpointError, OmniConvertError
from omni_convert.formats.families.original_names import names_of
from omni_convert.formats.families.table import find_family
from omni_convert.formats.families.wan import WAN
from omni_convert.formats.views.base import dequantized_view

WEIGHTS = "diffusion_pytorch_model.safetensors"
EXPERTS = ("transformer", "transformer_2")
LAYER = "blocks.0.attn1.to_q.weight"


def expert(folder: Path, seed: int, **sizes: int) -> Path:
    torch.manual_seed(seed)
    settings = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 64, "ffn_dim": 256, "text_dim": 64}
    WanTransformer3DModel(**settings | sizes).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The high- and the low-noise expert, as diffusers saves them."""
    root = tmp_path_factory.mktemp("experts")
    return expert(root / "high", 1), expert(root / "low", 2)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A pipeline of two experts with other weights."""
    folder = tmp_path / "base"
    for seed, name in enumerate(EXPERTS, start=8):
        expert(folder / name, seed)
    entry = ["diffusers", "WanTransformer3DModel"]
    index = {"_class_name": "WanPipeline", "scheduler": ["diffusers", "UniPCMultistepScheduler"]}
    (folder / "model_index.json").write_text(json.dumps(index | dict.fromkeys(EXPERTS, entry)))
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text("{}")
    return folder


def under_original_names(folder: Path, file: Path) -> Path:
    """A single file as the model's authors name its tensors."""
    with Checkpoint.open(folder) as checkpoint:
        made = find_family("WanTransformer3DModel").original_tensors(checkpoint)
        assert made is not None
        tensors = {
            name: torch.cat([checkpoint.read(run.source) for run in tensor.runs]) for name, tensor in made.items()
        }
    file.parent.mkdir(exist_ok=True)
    save_file(tensors, file)
    return file


def quantized_file(folder: Path, file: Path, **options: object) -> Path:
    """A single file of the expert without a config beside it."""
    convert_checkpoint(folder, file.with_suffix(""), Recipe(**options))  # type: ignore[arg-type]  # as the caller says
    (written,) = file.with_suffix("").glob(f"*{file.suffix}")
    return written.rename(file)


def values(folder: Path) -> dict[str, Tensor]:
    with open_quantized(folder) as opened:
        view = dequantized_view(opened)
        return {name: view.read(name).float() for name in view}


def error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max(
        float((found[name].reshape(tensor.shape) - tensor).norm() / tensor.norm().clamp(min=1e-9))
        for name, tensor in expected.items()
    )


FILES = {
    "original names": (lambda folder, file: under_original_names(folder, file.with_suffix(".safetensors")), 0.0),
    "diffusers' names": (
        lambda folder, file: Path(shutil.copy(folder / WEIGHTS, file.with_suffix(".safetensors"))),
        0.0,
    ),
    "GGUF": (lambda folder, file: quantized_file(folder, file.with_suffix(".gguf"), method="gguf"), 0.008),
    "FP8 for ComfyUI": (
        lambda folder, file: quantized_file(
            folder, file.with_suffix(".safetensors"), method="fp8", dialect="comfyui", search=False
        ),
        0.04,
    ),
}


@pytest.mark.parametrize("kind", FILES)
def test_each_expert_gets_the_weights_of_its_file(
    kind: str, experts: tuple[Path, Path], base: Path, tmp_path: Path
) -> None:
    make, limit = FILES[kind]
    files = {name: str(make(folder, tmp_path / name)) for name, folder in zip(EXPERTS, experts, strict=True)}
    for name in EXPERTS:
        (base / name / WEIGHTS).unlink()  # nobody needs them
    convert_checkpoint(base, tmp_path / "plain", Recipe("dequantize", component=files))
    convert_checkpoint(base, tmp_path / "int8", Recipe("int8", component=files, search=False))
    for name, folder in zip(EXPERTS, experts, strict=True):
        assert error(values(tmp_path / "plain" / name), values(folder)) <= limit
        assert error(values(tmp_path / "int8" / name), values(folder)) <= limit + 0.012
    manifest = (tmp_path / "int8" / "omni_convert.json").read_text()
    assert json.loads(manifest)["recipe"]["component"] == {name: Path(file).name for name, file in files.items()}
    assert str(tmp_path) not in manifest
    assert (tmp_path / "int8" / "scheduler" / "scheduler_config.json").read_text() == "{}"


def as_msmodelslim_leaves_it(folder: Path, out: Path) -> Path:
    """A folder of an expert's shards and labels under original names, and the config of Wan's own code."""

    def original(name: str) -> str:
        stem, _, leaf = name.rpartition(".")  # of a scale, too
        weight = next(names_of(WAN.original_names, f"{stem}.weight"), None)
        companion = name if weight is None else f"{weight.removesuffix('weight')}{leaf}"
        return next(names_of(WAN.original_names, name), companion)

    written = out.with_name(f"{out.name}-diffusers")
    convert_checkpoint(folder, written, Recipe("mxfp8", dialect="msmodelslim", max_shard_size="200KB"))
    out.mkdir(parents=True)
    for file in written.glob("*.safetensors"):
        save_file({original(name): tensor for name, tensor in load_file(file).items()}, out / file.name)
    (index,), (labels,) = written.glob("*.index.json"), written.glob("quant_model_description*.json")
    for path, key in ((index, "weight_map"), (labels, None)):
        content = json.loads(path.read_text())
        named = content[key] if key else content
        named = {original(name): value for name, value in named.items()}
        (out / path.name).write_text(json.dumps({key: named} if key else named))
    (out / "config.json").write_text('{"_class_name": "WanModel"}')
    return out


def test_both_experts_of_msmodelslim_beside_a_pipeline(experts: tuple[Path, Path], base: Path, tmp_path: Path) -> None:
    subfolders = ("high_noise_model", "low_noise_model")
    made = [
        as_msmodelslim_leaves_it(folder, tmp_path / "made" / name)
        for folder, name in zip(experts, subfolders, strict=True)
    ]
    with pytest.raises(CheckpointError, match=f"-m keep --component transformer={re.escape(str(made[0]))} --comp"):
        resolve_source(tmp_path / "made")
    with pytest.raises(CheckpointError, match=f"WanModel.*--component transformer={re.escape(str(made[0]))} if"):
        convert_checkpoint(made[0], tmp_path / "alone", Recipe("keep"))
    component = {name: str(folder) for name, folder in zip(EXPERTS, made, strict=True)}
    convert_checkpoint(base, tmp_path / "out", Recipe("keep", component=component))
    for name, folder in zip(EXPERTS, experts, strict=True):
        config = json.loads((tmp_path / "out" / name / "config.json").read_text())
        assert config["_class_name"] == "WanTransformer3DModel"
        assert config["quantization_config"]["quant_method"] == "mxfp8"
        convert_checkpoint(folder, tmp_path / name, Recipe("mxfp8"))
        assert error(values(tmp_path / "out" / name), values(tmp_path / name)) == 0
    assert not [finding for each in verify_source(resolve_source(tmp_path / "out")) for finding in each.findings]


def test_one_expert_from_a_file_and_one_from_the_pipeline(
    experts: tuple[Path, Path], base: Path, tmp_path: Path
) -> None:
    """The block of the pipeline's own weights, which are not taken, does not describe those of the file."""
    convert_checkpoint(base, tmp_path / "fp8", Recipe("fp8"))
    file = under_original_names(experts[0], tmp_path / "high" / "high.safetensors")
    arguments = ["dequantize", str(tmp_path / "fp8"), "--component", f"transformer={file}", "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert "the weights of high.safetensors instead of those in fp8" in " ".join(result.stderr.split())
    assert error(values(tmp_path / "out" / "transformer"), values(experts[0])) == 0.0
    assert error(values(tmp_path / "out" / "transformer_2"), values(base / "transformer_2")) < 0.04


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"ffn_dim": 512}, r"found \[512, 128\], expected \[256, 128\]"),
        ({"num_layers": 3}, r"blocks\.2\..*does not have"),
        ({"num_layers": 1}, r"blocks\.1\..*missing"),
    ],
    ids=["wider", "deeper", "shallower"],
)
def test_weights_of_another_model_are_refused(sizes: dict[str, int], message: str, base: Path, tmp_path: Path) -> None:
    file = shutil.copy(expert(tmp_path / "other", 3, **sizes) / WEIGHTS, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=message):
        convert_checkpoint(base, tmp_path / "out", Recipe(component={"transformer": str(file)}))


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"component": {"transformer": "gone.safetensors"}}, "no such file"),
        ({"component": {"unet": "FILE"}}, "expected one of"),
        ({"component": {"transformer": "FILE"}, "calib": Path("prompts.txt")}, "--calib"),
    ],
    ids=["no file", "no component", "calibrating"],
)
def test_what_cannot_be_assembled_is_said_at_once(
    recipe: dict[str, object], message: str, base: Path, tmp_path: Path
) -> None:
    file = str(shutil.copy(base / "transformer" / WEIGHTS, tmp_path / "file.safetensors"))
    component = {name: value.replace("FILE", file) for name, value in recipe["component"].items()}  # type: ignore[attr-defined]
    with pytest.raises(OmniConvertError, match=message):
        convert_checkpoint(base, tmp_path / "out", Recipe(**{**recipe, "component": component}))  # type: ignore[arg-type]
