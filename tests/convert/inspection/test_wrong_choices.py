"""`verify` finds files whose tensors are all in order, and that vLLM-Omni loads wrong: the choice of layers is wrong.

The files are what a converter makes that takes the linears in blocks of any model for quantized, writes its block at
the top level, and compares names without their prefixes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_models
from safetensors.torch import save_file

from omni_convert.convert import Recipe, convert_checkpoint
from omni_convert.convert.inspection.verification import verify_source
from omni_convert.convert.source.location import resolve_source
from omni_convert.formats.containers.checkpoint import Checkpoint
from omni_convert.formats.dialects.table import DIALECTS
from omni_convert.formats.families.flux_2 import FLUX_2
from omni_convert.formats.families.generic_rule import generic_groups
from omni_convert.formats.families.layers import linear_widths
from omni_convert.formats.format import Format
from omni_convert.formats.table import build_format

DIALECT_OF = {"fp8": "vllm-omni", "int8": "vllm-omni", "w4a16": "auto-round"}


def quantized_by_the_generic_rule(source: Path, out: Path, method: str) -> Path:
    """A repository with all linears in blocks quantized, whatever their stage, and a block that ignores none."""
    dialect, fmt = DIALECTS[DIALECT_OF[method]], build_format(method, group_size=32)
    shutil.copytree(source, out, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
    with Checkpoint.open(source) as checkpoint:
        tensors = {name: checkpoint.read(name) for name in checkpoint}
        stems = [stem for group in generic_groups(linear_widths(checkpoint)) for stem in group.members]
    formats: dict[str, Format] = {}
    for stem in stems:
        rows, columns = tensors[f"{stem}.weight"].shape
        spelling = dialect.spelling(fmt, (rows, columns))
        if isinstance(spelling, str) or fmt.unsupported(rows, columns):
            continue
        stored = spelling.encode(fmt.quantize(tensors.pop(f"{stem}.weight")))
        tensors |= {f"{stem}.{suffix}": tensor.contiguous() for suffix, tensor in stored.items()}
        formats[stem] = fmt
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"] = dialect.block(formats, ())
    (out / "config.json").write_text(json.dumps(config))
    return out


def errors_of(folder: Path) -> dict[str, set[str]]:
    """Check to the layers of its errors, of all components."""
    found: dict[str, set[str]] = {}
    for component in verify_source(resolve_source(folder)):
        for finding in component.findings:
            if finding.severity == "error":
                found.setdefault(finding.check, set()).add(finding.layer)
    return found


def change_config(folder: Path, change: Callable[[dict[str, object]], None]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("method", ["fp8", "w4a16"])
@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("qwen_3_omni", ("thinker.audio_tower.layers.0.fc1", "thinker.visual.blocks.0.mlp.linear_fc1", "code2wav.")),
        ("qwen_2_5_omni", ("thinker.audio_tower.layers.0.fc1", "talker.model.layers.0.mlp.down_proj", "token2wav.")),
    ],
)
def test_towers_and_other_stages_that_are_quantized_are_errors(
    repository: Callable[[str], Path], tmp_path: Path, name: str, layers: tuple[str, ...], method: str
) -> None:
    errors = errors_of(quantized_by_the_generic_rule(repository(name), tmp_path / "out", method))
    for layer in layers:
        assert any(each.startswith(layer) for each in errors["not-built-quantized"]), layer
    # AutoRound's block stands at the top level, where its list of blocks keeps the other stages away.
    assert ("misplaced-block" in errors) == (method == "fp8")


@pytest.mark.parametrize("name", ["qwen_3_omni", "qwen_2_5_omni", "qwen_3_tts", "bagel"])
def test_a_method_that_no_stage_loads_is_an_error(repository: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    assert "unsupported-family" in errors_of(quantized_by_the_generic_rule(repository(name), tmp_path / "out", "int8"))


def test_a_router_that_is_built_quantized_and_stored_otherwise_is_an_error(
    repository: Callable[[str], Path], tmp_path: Path
) -> None:
    for name, router in (("qwen_3_omni", "thinker.model.layers.0.mlp.gate"), ("hunyuan_image_3", "layers.0.mlp.gate")):
        errors = errors_of(quantized_by_the_generic_rule(repository(name), tmp_path / name, "fp8"))
        assert any(router in layer for layer in errors["not-ignored"]), name


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("qwen_3_tts", "talker.code_predictor.model.layers.0.mlp.down_proj"),
        ("hunyuan_image_3", "vision_model.encoder.layers.0.mlp.fc1"),
        ("bagel", "vit_model."),
    ],
)
def test_what_is_a_plain_linear_there_is_an_error(
    repository: Callable[[str], Path], tmp_path: Path, name: str, layer: str
) -> None:
    errors = errors_of(quantized_by_the_generic_rule(repository(name), tmp_path / "out", "fp8"))
    assert any(each.startswith(layer) for each in errors["not-built-quantized"])


def test_an_encoder_that_is_quantized_and_listed_as_ignored_is_an_error(tmp_path: Path) -> None:
    tiny_models.save_pipeline("flux_2_pipeline", tmp_path / "source")
    convert_checkpoint(tmp_path / "source", tmp_path / "out", Recipe(component={"text_encoder": "fp8"}))
    assert not errors_of(tmp_path / "out")
    encoder = json.loads((tmp_path / "out" / "text_encoder" / "config.json").read_text())
    names = FLUX_2.shared_encoder_layers(encoder)
    change_config(
        tmp_path / "out" / "transformer", lambda block: block.update(ignored_layers=[*block["ignored_layers"], *names])
    )
    (layer,) = errors_of(tmp_path / "out")["ignored-but-quantized"]
    assert layer.startswith("text_encoder.language_model")


def test_an_exception_whose_name_is_the_end_of_a_layers_name_is_an_error(flux_folder: Path, tmp_path: Path) -> None:
    convert_checkpoint(flux_folder, tmp_path / "out", Recipe(method="w4a16", group_size=32))
    assert not errors_of(tmp_path / "out")
    change_config(tmp_path / "out", lambda block: block["extra_config"].update(proj_out={"bits": 16}))
    assert errors_of(tmp_path / "out")["ignored-but-quantized"] == {"single_transformer_blocks.0.proj_out"}


@pytest.mark.parametrize("method", ["fp8", "mxfp8", "nvfp4"])
def test_a_block_of_modelopt_for_wan_is_an_error_in_both_experts(tmp_path: Path, method: str) -> None:
    tiny_models.save_pipeline("wan_pipeline", tmp_path / "source")
    recipe = Recipe(method=method, dialect="modelopt", force=True)
    convert_checkpoint(tmp_path / "source", tmp_path / "out", recipe)
    wrong = [component for component in verify_source(resolve_source(tmp_path / "out")) if component.findings]
    assert {component.name for component in wrong} == {"transformer", "transformer_2"}
    assert errors_of(tmp_path / "out") == {"unsupported-family": {""}}
