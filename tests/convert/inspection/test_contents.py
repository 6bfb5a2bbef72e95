"""`inspect` tells what is in a model of any dialect, and what runtimes would do with it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from omni_convert.convert import Recipe, convert_checkpoint
from omni_convert.convert.cli.main import main
from omni_convert.formats.dialects.base import JudgedComponent
from omni_convert.formats.dialects.table import DIALECTS
from omni_convert.formats.errors import OmniConvertError
from omni_convert.formats.schemes.foreign import Scaled
from omni_convert.formats.schemes.fp8_storage import Fp8Storage
from omni_convert.formats.schemes.int8 import Int8
from omni_convert.formats.schemes.nvfp4 import Nvfp4
from omni_convert.formats.table import FORMATS, build_format
from omni_convert.loaders import load_pipeline

WEIGHTS = "diffusion_pytorch_model.safetensors"
LAYER = "layers.0.attention.to_q"


def inspected(path: Path) -> dict[str, dict]:  # type: ignore[type-arg]  # JSON
    result = CliRunner().invoke(main, ["inspect", str(path), "--json"])
    assert result.exit_code == 0, result.output
    return {component["name"]: component for component in json.loads(result.output)["components"]}


def outcomes(component: dict) -> dict[str, str]:  # type: ignore[type-arg]  # JSON
    return {verdict["runtime"].split()[0]: verdict["outcome"] for verdict in component["runtimes"]}


# GGUF's depend on names and types; of what nobody here reads, no layer is known.
WITHOUT_VERDICTS = ("gguf", "unread")


def test_every_dialect_has_verdicts_and_readers() -> None:
    for name, dialect in DIALECTS.items():
        assert dialect.name == name
        assert dialect.consumers
        assert dialect.verdicts(JudgedComponent({})) or name in WITHOUT_VERDICTS


@pytest.mark.parametrize("dialect", [name for name in DIALECTS if name not in WITHOUT_VERDICTS])
@pytest.mark.parametrize("method", FORMATS)
def test_every_format_of_every_dialect_has_one_verdict_of_each_runtime(dialect: str, method: str) -> None:
    found = DIALECTS[dialect].verdicts(JudgedComponent({"a": build_format(method)}))
    runtimes = [verdict.runtime for verdict in found]  # with their versions, which may differ
    assert len(runtimes) == len(set(runtimes))
    assert {"vLLM-Omni", "diffusers", "omni_convert.loaders", "ComfyUI"} <= {each.split()[0] for each in runtimes}


def test_what_only_our_loader_reads_loads_wrong_elsewhere() -> None:
    found = {
        each.runtime.split()[0]: each.outcome
        for each in DIALECTS["vllm-omni"].verdicts(JudgedComponent({"a": Fp8Storage()}))
    }
    assert found["vLLM-Omni"] == "wrong"
    assert found["omni_convert.loaders"] == "loads"


def test_diffusers_reads_only_some_formats_of_black_forest_labs() -> None:
    for fmt, outcome in ((Nvfp4(static=True), "loads"), (Scaled("fp8"), "loads"), (Int8(), "wrong")):
        (found,) = [
            each
            for each in DIALECTS["bfl"].verdicts(JudgedComponent({"a": fmt}))
            if each.runtime.startswith("diffusers")
        ]
        assert found.outcome == outcome


@pytest.mark.parametrize(
    ("dialect", "method", "expected"),
    [
        ("vllm-omni", "fp8", {"vLLM-Omni": "loads", "ComfyUI": "wrong"}),
        ("vllm-omni", "nvfp4", {"vLLM-Omni": "loads", "diffusers": "refuses", "omni_convert.loaders": "loads"}),
        ("comfyui", "nvfp4", {"vLLM-Omni": "wrong", "ComfyUI": "loads"}),
        ("compressed-tensors", "int8", {"vLLM-Omni": "refuses", "diffusers": "refuses"}),
    ],
    ids=str,
)
def test_layers_and_runtimes_of_what_we_write(
    tiny_pipeline_folder: Path, tmp_path: Path, dialect: str, method: str, expected: dict[str, str]
) -> None:
    convert_checkpoint(tiny_pipeline_folder, tmp_path / "out", Recipe(method=method, dialect=dialect))
    components = inspected(tmp_path / "out")
    assert components["vae"]["dialect"] is None
    transformer = components["transformer"]
    assert transformer["dialect"] == ("modelopt" if (dialect, method) == ("vllm-omni", "nvfp4") else dialect)
    stored = load_file(tmp_path / "out" / "transformer" / WEIGHTS)
    assert transformer["nbytes"] == sum(tensor.nbytes for tensor in stored.values())
    counted = sum(nbytes for _, nbytes in transformer["kept"].values())
    assert counted + sum(layer["nbytes"] for layer in transformer["layers"]) == transformer["nbytes"]
    name, rows = ("layers.0.attention.qkv", 576) if dialect == "comfyui" else (LAYER, 192)
    (layer,) = [layer for layer in transformer["layers"] if layer["name"] == name]
    assert (layer["format"], layer["shape"]) == (method, [rows, 192])
    assert layer["tensors"].keys() == {tensor for tensor in stored if tensor.startswith(f"{name}.")}
    assert expected.items() <= outcomes(transformer).items()


def test_a_layer_that_the_runtime_would_misread_is_named(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    recipe = Recipe(method="int8", runtime="diffusers")
    convert_checkpoint(tiny_pipeline_folder, tmp_path / "out", recipe)
    file = tmp_path / "out" / "transformer" / WEIGHTS
    tensors = load_file(file)
    for suffix in ("weight", "weight_scale"):
        tensors[f"cap_embedder.1.{suffix}"] = tensors[f"{LAYER}.{suffix}"].clone()
    save_file(tensors, file, metadata={"format": "pt"})
    result = CliRunner().invoke(main, ["inspect", str(tmp_path / "out")])
    assert "vLLM-Omni 0.30: LOADS WRONG: 'cap_embedder.1'" in result.output


def test_the_table_counts_equal_layers_of_blocks_together(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    convert_checkpoint(tiny_pipeline_folder, tmp_path / "out", Recipe(method="mxfp8"))
    lines = CliRunner().invoke(main, ["inspect", str(tmp_path / "out")]).output.splitlines()
    (line,) = [line for line in lines if "layers.*.attention.to_q" in line]
    assert "2 x 192x192" in line
    assert "weight_scale U8 [192, 6]" in line


def test_on_a_narrow_terminal_no_line_is_cut(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    convert_checkpoint(tiny_pipeline_folder, tmp_path / "out", Recipe(method="nvfp4"))
    lines = CliRunner(env={"COLUMNS": "80"}).invoke(main, ["inspect", str(tmp_path / "out")]).output.splitlines()
    assert max(map(len, lines)) <= 80
    assert "nvfp4 is stored as weight U8, weight_scale F8_E4M3, weight_scale_2 F32" in "\n".join(lines)


def test_a_single_file_is_inspected_without_a_config(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    convert_checkpoint(tiny_pipeline_folder, tmp_path / "out", Recipe(method="fp8", dialect="comfyui"))
    (tmp_path / "alone.safetensors").write_bytes((tmp_path / "out" / "transformer" / WEIGHTS).read_bytes())
    (component,) = inspected(tmp_path / "alone.safetensors").values()
    assert component["dialect"] == "comfyui"


def test_a_file_that_lies_is_shown_and_not_converted(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    convert_checkpoint(tiny_pipeline_folder, tmp_path / "out", Recipe(method="nvfp4"))
    file = tmp_path / "out" / "transformer" / WEIGHTS
    tensors = load_file(file)
    tensors[f"{LAYER}.weight_scale"] = tensors[f"{LAYER}.weight_scale"][:, :3].contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    component = inspected(tmp_path / "out")["transformer"]
    assert f"tensor '{LAYER}.weight_scale': found F8_E4M3" in component["doubt"]
    assert {verdict["outcome"] for verdict in component["runtimes"]} <= {"wrong", "refuses"}
    result = CliRunner().invoke(main, ["dequantize", str(tmp_path / "out"), "-o", str(tmp_path / "no")])
    assert result.exit_code == 1
    assert f"Error: {tmp_path / 'out' / 'transformer'}: tensor '{LAYER}.weight_scale': found F8_E4M3" in result.output


@pytest.fixture(scope="module")
def demo_fp8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of six blocks: with two, nobody could tell which is incomplete."""
    output = tmp_path_factory.mktemp("demo") / "fp8"
    result = CliRunner().invoke(main, ["-m", "fp8", "-o", str(output)])
    assert result.exit_code == 0, result.output
    return output


def changed(folder: Path, new_names: dict[str, str | None]) -> None:
    file = folder / "transformer" / WEIGHTS
    tensors = {new_names.get(name, name): tensor for name, tensor in load_file(file).items()}
    save_file({name: tensor for name, tensor in tensors.items() if name}, file, metadata={"format": "pt"})


OUT, K, LONE = "layers.0.attention.to_out.0", "layers.0.attention.to_k", "context_refiner.0.attention.to_out.0"


@pytest.mark.parametrize(
    ("new_names", "vllm_omni", "told"),
    [
        ({f"{OUT}.weight": None, f"{OUT}.weight_scale": None}, "refuses", f"found no '{OUT}.weight'"),
        ({f"{K}.weight": f"{K}.wieght"}, "wrong", f"found no '{K}.weight', but '{K}.wieght'"),
        ({f"{LONE}.weight": f"{LONE}.wieght"}, "refuses", "weight_scale, wieght without a weight"),
        ({f"{OUT}.weight_scale": None}, "wrong", f"found '{OUT}.weight' in F8_E4M3 without the scales"),
    ],
    ids=["layer deleted", "weight misspelled", "without siblings", "scale deleted"],
)
def test_an_incomplete_model_loads_nowhere_and_verify_names_what_is_missing(
    demo_fp8: Path, tmp_path: Path, new_names: dict[str, str | None], vllm_omni: str, told: str
) -> None:
    shutil.copytree(demo_fp8, tmp_path / "model")
    changed(tmp_path / "model", new_names)
    transformer = inspected(tmp_path / "model")["transformer"]
    expected = {"vLLM-Omni": vllm_omni, "diffusers": "refuses", "omni_convert.loaders": "refuses", "ComfyUI": "wrong"}
    assert outcomes(transformer) == expected
    (ours,) = [each for each in transformer["runtimes"] if each["runtime"] == "omni_convert.loaders"]
    assert told in ours["why"]
    with pytest.raises(OmniConvertError):
        load_pipeline(tmp_path / "model")
    report = " ".join(CliRunner().invoke(main, ["verify", str(tmp_path / "model")]).stdout.split())
    assert all(stem in report for stem in {name.rpartition(".")[0] for name in new_names})
    assert all(name.rpartition(".")[2] in report for name in new_names.values() if name)


def test_a_complete_model_of_many_blocks_loads(demo_fp8: Path) -> None:
    assert outcomes(inspected(demo_fp8)["transformer"])["omni_convert.loaders"] == "loads"
