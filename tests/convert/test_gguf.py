import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from diffusers import (
    FluxTransformer2DModel,
    GGUFQuantizationConfig,
    QwenImageTransformer2DModel,
    WanTransformer3DModel,
)
from diffusers.quantizers.gguf.utils import GGUFParameter, dequantize_gguf_tensor
from safetensors.torch import load_file, save_file
from torch import Tensor

from omni_convert.convert.cli.main import main
from omni_convert.convert.conversion import convert_checkpoint
from omni_convert.convert.recipe import Recipe
from omni_convert.formats.arithmetic.ggml.k_quants import K_QUANTS
from omni_convert.formats.arithmetic.ggml.mixtures import types_of
from omni_convert.formats.errors import CalibrationError, RecipeError
from omni_convert.formats.families.table import find_family
from omni_convert.formats.options import GGUF_TYPES
from omni_convert.formats.schemes import gguf as gguf_format
from omni_convert.formats.statistics.statistics import Statistics

WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
# diffusers dequantizes these; MXFP4 it does not know.
LOADED_TYPES = [kind for kind in GGUF_TYPES if kind not in ("MXFP4", "F16")]

WITH_MINIMA = ("Q5_K", "Q4_K", "Q2_K", "Q5_1", "Q4_1")


@pytest.fixture(scope="session")
def wan_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=32,
        in_channels=4,
        out_channels=4,
        text_dim=64,
        freq_dim=32,
        ffn_dim=128,
        cross_attn_norm=True,
        image_dim=32,
        added_kv_proj_dim=64,
        num_layers=1,
    )
    folder = tmp_path_factory.mktemp("models") / "wan"
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def wide_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Flux transformer whose layers in blocks have rows of super-blocks."""
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=128,
        num_attention_heads=2,
        joint_attention_dim=64,
        pooled_projection_dim=32,
        axes_dims_rope=(32, 48, 48),
    )
    folder = tmp_path_factory.mktemp("models") / "wide"
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def converted(source: Path, output: Path, kind: str, **options: Any) -> Path:
    """The file that the conversion makes of a model folder."""
    convert_checkpoint(str(source), output, Recipe(method="gguf", gguf_type=kind, device="cpu", **options))
    (file,) = output.rglob("*.gguf")
    return file


@pytest.mark.parametrize("kind", GGUF_TYPES)
def test_the_gguf_package_reads_what_was_meant_of_every_type(kind: str, wide_folder: Path, tmp_path: Path) -> None:
    file = converted(wide_folder, tmp_path / "out", kind, search=False)
    assert file.name == f"wide-{kind}.gguf"
    original = load_file(wide_folder / WEIGHTS_NAME)
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    assert found.keys() == original.keys()
    quantized = [name for name, tensor in found.items() if tensor.tensor_type.name == kind]
    assert len(quantized) == 17
    for name, tensor in found.items():
        weight = original[name].float()
        assert tuple(reversed(tensor.shape.tolist())) == weight.shape
        if kind in K_QUANTS and name in quantized:
            stored = gguf_format.Gguf(kind, search=False).quantize(weight)["weight"].numpy()
            numbers = torch.from_numpy(gguf.quants.dequantize(tensor.data.copy(), tensor.tensor_type))
            assert float((numbers - weight).norm() / weight.norm()) < 0.3
        else:
            stored = gguf.quants.quantize(weight.numpy(), tensor.tensor_type)
        assert stored.tobytes() == tensor.data.tobytes(), name
    assert {found[name].tensor_type.name for name in found.keys() - quantized} == {"F32"}


@pytest.mark.parametrize("kind", LOADED_TYPES)
def test_diffusers_loads_those_weights_and_runs_them(kind: str, wide_folder: Path, tmp_path: Path) -> None:
    file = converted(wide_folder, tmp_path / "out", kind)
    model = FluxTransformer2DModel.from_single_file(
        str(file),
        config=str(tmp_path / "out"),
        quantization_config=GGUFQuantizationConfig(compute_dtype=torch.float32),
        torch_dtype=torch.float32,
    )
    numbers = {
        tensor.name: torch.from_numpy(gguf.quants.dequantize(tensor.data.copy(), tensor.tensor_type))
        for tensor in gguf.GGUFReader(file).tensors
    }
    tolerance = 2**-8 if kind in WITH_MINIMA else 2**-10  # larger terms are rounded there, and their difference
    for name, parameter in model.named_parameters():
        if isinstance(parameter, GGUFParameter):  # which diffusers dequantizes in FP16
            rounded = dequantize_gguf_tensor(parameter).float()
            torch.testing.assert_close(
                rounded, numbers[name], rtol=0, atol=float(numbers[name].abs().max()) * tolerance
            )
            numbers[name] = rounded
    reference = FluxTransformer2DModel.from_config(FluxTransformer2DModel.load_config(wide_folder)).eval()
    reference.load_state_dict({name: numbers[name] for name in reference.state_dict()})
    inputs = {
        "hidden_states": torch.randn(1, 16, 16),
        "encoder_hidden_states": torch.randn(1, 8, 64),
        "pooled_projections": torch.randn(1, 32),
        "timestep": torch.ones(1),
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(8, 3),
    }
    assert sum(type(module).__name__ == "GGUFLinear" for module in model.modules()) == 17
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).sample, reference(**inputs).sample)


@pytest.mark.parametrize(
    ("kind", "instead"),
    [
        ("Q6_K", "Q8_0"),
        ("Q5_K", "Q5_1"),
        ("Q4_K", "Q5_0"),
        ("Q3_K", "IQ4_NL"),
        ("Q2_K", "IQ4_NL"),
        ("IQ4_XS", "IQ4_NL"),
    ],
)
def test_rows_that_are_no_super_blocks_get_the_type_that_llama_cpp_gives_them(
    kind: str, instead: str, flux_folder: Path, tmp_path: Path
) -> None:
    file = converted(flux_folder, tmp_path / "out", kind)
    kinds = [tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors]
    assert file.name == f"flux-{kind}.gguf"
    assert kinds.count(instead) == 15
    assert kinds.count(kind) == 2  # 256 columns
    assert {*kinds} == {kind, instead, "F32"}


def test_rows_that_are_no_blocks_stay_halves() -> None:
    assert gguf_format.Gguf("Q4_K").for_weight((8, 48)).type == "F16"
    assert gguf_format.Gguf("Q4_0").for_weight((8, 48)).unsupported(8, 48) == "48 columns are no multiple of 32"


@pytest.mark.parametrize("kind", ["Q5_1", "Q5_0", "Q4_1", "Q4_0"])
def test_a_search_lowers_the_error_of_simple_types(kind: str, wide_folder: Path, tmp_path: Path) -> None:
    def error(**options: Any) -> float:
        file = converted(wide_folder, tmp_path / f"out{len(options)}", kind, **options)
        (tensor,) = (each for each in gguf.GGUFReader(file).tensors if each.name.endswith("blocks.0.ff.net.2.weight"))
        numbers = torch.from_numpy(gguf.quants.dequantize(tensor.data.copy(), tensor.tensor_type))
        return float((numbers - load_file(wide_folder / WEIGHTS_NAME)[tensor.name].float()).norm())

    assert error() < 0.97 * error(search=False)


@pytest.mark.parametrize("kind", ["Q2_K", "Q4_K", "IQ4_XS"])
def test_any_number_of_workers_writes_the_same_bytes(kind: str, wide_folder: Path, tmp_path: Path) -> None:
    alone, together = (
        converted(wide_folder, tmp_path / str(workers), kind, workers=workers).read_bytes() for workers in (1, 3)
    )
    assert alone == together


def test_wan_has_its_original_names_and_tensors_of_five_dimensions_load(wan_folder: Path, tmp_path: Path) -> None:
    file = converted(wan_folder, tmp_path / "out", "Q8_0")
    model = WanTransformer3DModel.from_single_file(
        str(file),
        config=str(tmp_path / "out"),
        quantization_config=GGUFQuantizationConfig(compute_dtype=torch.float32),
        torch_dtype=torch.float32,
    )
    weight = load_file(wan_folder / WEIGHTS_NAME)["patch_embedding.weight"]
    assert weight.dim() == 5
    assert torch.equal(model.patch_embedding.weight, weight)
    names = [tensor.name for tensor in gguf.GGUFReader(file).tensors]
    assert {"blocks.0.self_attn.q.weight", "blocks.0.norm3.bias", "head.modulation", "blocks.0.ffn.2.weight"} <= {
        *names
    }
    assert not any(parameter.is_meta for parameter in model.parameters())
    with torch.no_grad():
        sample = model(torch.randn(1, 4, 2, 8, 8), torch.ones(1), torch.randn(1, 8, 64), torch.randn(1, 4, 32)).sample
    assert bool(sample.isfinite().all())


def test_a_pipeline_keeps_all_but_the_weights_of_its_transformer(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    file = converted(tiny_pipeline_folder, tmp_path / "out", "Q8_0")
    name = tiny_pipeline_folder.name
    assert file.relative_to(tmp_path / "out").as_posix() == f"transformer/{name}-Q8_0.gguf"
    configs = [
        json.loads((folder / "transformer/config.json").read_text())
        for folder in (tiny_pipeline_folder, tmp_path / "out")
    ]
    assert configs[0] == configs[1]
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors}
    refiners = {name: kind for name, kind in kinds.items() if "refiner" in name}
    assert {kind for name, kind in refiners.items() if "feed_forward" in name} == {"BF16"}  # as in the source
    assert {kind for name, kind in refiners.items() if "norm" in name} == {"F32"}
    assert kinds["layers.0.feed_forward.w1.weight"] == "Q8_0"
    assert [path.name for path in (tmp_path / "out/transformer").iterdir() if path.suffix == ".safetensors"] == []
    assert (tmp_path / "out/model_index.json").read_bytes() == (tiny_pipeline_folder / "model_index.json").read_bytes()
    manifest = (tmp_path / "out/omni_convert.json").read_text()
    assert hashlib.sha256(file.read_bytes()).hexdigest() in manifest


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K_M"])
def test_an_interrupted_conversion_goes_on_and_gives_the_same_file(
    kind: str, flux_folder: Path, tmp_path: Path
) -> None:
    finished = 0

    def interrupt(_: int) -> None:
        nonlocal finished
        finished += 1
        if finished > 20:
            raise KeyboardInterrupt

    recipe = Recipe(method="gguf", gguf_type=kind, device="cpu", workers=1)
    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(str(flux_folder), tmp_path / "out", recipe, progress=interrupt)
    with pytest.raises(ValueError, match="magic"):
        gguf.GGUFReader(tmp_path / f"out.partial/flux-{kind}.gguf")
    convert_checkpoint(str(flux_folder), tmp_path / "out", replace(recipe, resume=True))
    whole = converted(flux_folder, tmp_path / "whole", kind)
    assert (tmp_path / "out" / whole.name).read_bytes() == whole.read_bytes()


def test_ignored_layers_stay_as_they_are(flux_folder: Path, tmp_path: Path) -> None:
    recipe = Recipe(method="gguf", ignored_layers=("single_transformer_blocks",), device="cpu")
    convert_checkpoint(str(flux_folder), tmp_path / "out", recipe)
    (file,) = (tmp_path / "out").glob("*.gguf")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors}
    assert kinds["single_transformer_blocks.0.proj_mlp.weight"] == "BF16"
    assert kinds["single_transformer_blocks.0.proj_mlp.bias"] == kinds["x_embedder.weight"] == "F32"
    assert kinds["transformer_blocks.0.attn.to_q.weight"] == "Q8_0"


def kinds_of(file: Path) -> dict[str, str]:
    return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors}


@pytest.mark.parametrize(
    ("mixture", "file_type", "value", "down", "base"),
    [
        ("Q3_K_S", 11, "Q3_K", "Q3_K", "Q3_K"),
        ("Q3_K_M", 12, "Q5_K", "Q4_K", "Q3_K"),
        ("Q3_K_L", 13, "Q5_K", "Q5_K", "Q3_K"),
        ("Q4_K_S", 14, "Q5_K", "Q5_K", "Q4_K"),
        ("Q4_K_M", 15, "Q6_K", "Q6_K", "Q4_K"),
        ("Q5_K_S", 16, "Q5_K", "Q5_K", "Q5_K"),
        ("Q5_K_M", 17, "Q6_K", "Q6_K", "Q5_K"),
    ],
)
def test_mixtures_give_values_and_down_projections_more_bits(
    mixture: str, file_type: int, value: str, down: str, base: str, wide_folder: Path, tmp_path: Path
) -> None:
    file = converted(wide_folder, tmp_path / "out", mixture, search=False)
    assert file.name == f"wide-{mixture}.gguf"
    assert gguf.GGUFReader(file).get_field("general.file_type").contents() == file_type
    kinds = kinds_of(file)
    assert kinds["transformer_blocks.0.attn.to_v.weight"] == value
    assert kinds["transformer_blocks.0.ff.net.2.weight"] == down
    assert kinds["transformer_blocks.0.attn.to_q.weight"] == base


def test_only_the_first_value_projections_of_some_mixtures_get_more_bits() -> None:
    tensors = [f"blocks.{i}.self_attn.{name}.weight" for i in range(5) for name in ("q", "v")]
    assert [*types_of("Q3_K_M", tensors).values()] == ["Q3_K", "Q5_K"] * 2 + ["Q3_K", "Q4_K"] * 3
    assert [*types_of("Q4_K_S", tensors).values()] == ["Q4_K", "Q5_K"] * 4 + ["Q4_K", "Q4_K"]
    assert {*types_of("Q4_K", tensors).values()} == {"Q4_K"}


def test_a_dry_run_tells_what_a_mixture_is_and_whose_choice(wide_folder: Path) -> None:
    result = CliRunner().invoke(main, [str(wide_folder), "-m", "gguf", "--gguf-type", "Q4_K_M", "--dry-run"])
    assert result.exit_code == 0, result.output
    text = " ".join(result.output.split())
    assert "Q4_K_M is Q4_K; value projections Q6_K; joined q, k and v Q5_K; down projections Q6_K" in text
    assert "our choice" not in text
    assert find_family("FluxTransformer2DModel").gguf.has_converter
    assert not find_family("Flux2Transformer2DModel").gguf.has_converter


def test_a_dry_run_says_that_a_mixture_of_a_model_without_a_converter_is_our_choice(tmp_path: Path) -> None:
    model = QwenImageTransformer2DModel(
        num_layers=1, attention_head_dim=64, num_attention_heads=4, joint_attention_dim=128, axes_dims_rope=(16, 24, 24)
    )
    model.to(torch.bfloat16).save_pretrained(tmp_path / "model")
    arguments = [str(tmp_path / "model"), "-m", "gguf", "--gguf-type", "Q4_K_S", "--dry-run"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    text = " ".join(result.output.split())
    assert "Q4_K_S is Q4_K; " in text
    assert "this is our choice, since ComfyUI-GGUF does not convert Qwen-Image" in text


@pytest.mark.parametrize("kind", [*K_QUANTS, "Q4_K_M"])
def test_super_blocks_are_verified_and_inspected(kind: str, wide_folder: Path, tmp_path: Path) -> None:
    file = converted(wide_folder, tmp_path / "out", kind, search=False)
    result = CliRunner().invoke(main, ["verify", str(tmp_path / "out"), "--reference", str(wide_folder)])
    assert result.exit_code == 0, result.output
    assert "0 errors, 0 warnings" in result.output
    result = CliRunner().invoke(main, ["inspect", str(file)])
    assert result.exit_code == 0, result.output
    assert f"gguf {kind.removesuffix('_M')}" in result.output


IMPORTANT = "transformer_blocks.0.ff.net.2.weight"


def imatrix_file(path: Path, importance: Tensor, name: str = IMPORTANT) -> Path:
    """An importance matrix of one weight."""
    writer = gguf.GGUFWriter(path, "imatrix")
    writer.add_type("imatrix")
    writer.add_tensor(f"{name}.in_sum2", importance[None].numpy() * 8)
    writer.add_tensor(f"{name}.counts", np.full((1, 1), 8, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("search", [True, False])
@pytest.mark.parametrize("kind", ["Q4_K", "IQ4_NL"])
def test_an_importance_matrix_lowers_the_errors_that_count(
    kind: str, search: bool, wide_folder: Path, tmp_path: Path
) -> None:
    weight = load_file(wide_folder / WEIGHTS_NAME)[IMPORTANT].float()
    importance = torch.randn(weight.shape[1], generator=torch.Generator().manual_seed(0)).exp()
    imatrix = imatrix_file(tmp_path / "imatrix.gguf", importance)
    stored, errors = [], []
    for name, given in (("without", None), ("with", imatrix)):
        file = converted(wide_folder, tmp_path / name, kind, search=search, imatrix=given)
        stored.append({tensor.name: tensor.data.tobytes() for tensor in gguf.GGUFReader(file).tensors})
        (tensor,) = (each for each in gguf.GGUFReader(file).tensors if each.name == IMPORTANT)
        numbers = torch.from_numpy(gguf.quants.dequantize(tensor.data.copy(), tensor.tensor_type))
        errors.append(float(((numbers - weight).square() * importance).sum().sqrt()))
    assert errors[1] < 0.97 * errors[0]
    assert [name for name in stored[0] if stored[0][name] != stored[1][name]] == [IMPORTANT]
    manifests = [json.loads((tmp_path / name / "omni_convert.json").read_text()) for name in ("without", "with")]
    assert "imatrix" not in manifests[0]["recipe"]
    assert manifests[1]["recipe"]["imatrix"] == hashlib.sha256(imatrix.read_bytes()).hexdigest()


@pytest.fixture(scope="session")
def statistics_file(tiny_pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Statistics of the tiny pipeline over two prompts."""
    folder = tmp_path_factory.mktemp("statistics")
    (folder / "prompts.txt").write_text("a red circle\na small blue square\n")
    arguments = ["calibrate", str(tiny_pipeline_folder), "--calib", str(folder / "prompts.txt"), "--device", "cpu"]
    outputs = ["-o", str(folder / "stats.safetensors"), "--imatrix-output", str(folder / "imatrix.gguf")]
    outputs += ["--moments", str(folder / "moments.safetensors")]
    result = CliRunner().invoke(main, [*arguments, *outputs])
    assert result.exit_code == 0, result.output
    return folder / "stats.safetensors"


@pytest.mark.parametrize("kind", ["Q4_K", "Q4_1"])
def test_statistics_weight_the_errors_of_the_columns_of_joined_layers_too(
    kind: str, tiny_pipeline_folder: Path, statistics_file: Path, tmp_path: Path
) -> None:
    plain = converted(tiny_pipeline_folder, tmp_path / "plain", kind)
    options: dict[str, Any] = {"calibration": (statistics_file,), "rounding": "nearest"}
    weighted = converted(tiny_pipeline_folder, tmp_path / "weighted", kind, **options)
    files = [{tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors} for file in (plain, weighted)]
    original = load_file(tiny_pipeline_folder / "transformer" / WEIGHTS_NAME)
    recorded = Statistics.load(statistics_file)
    parts = [f"layers.0.attention.to_{part}" for part in "qkv"]
    for name, sources in (
        ("layers.0.attention.qkv", parts),
        ("layers.0.feed_forward.w2", ["layers.0.feed_forward.w2"]),
    ):
        weight = torch.cat([original[f"{source}.weight"].float() for source in sources])
        importance = recorded.layers[f"transformer.{sources[0]}"].mean_square()
        tensors = [file[f"{name}.weight"] for file in files]
        fmt = gguf_format.Gguf(tensors[1].tensor_type.name, importance=importance)
        assert fmt.quantize(weight)["weight"].numpy().tobytes() == tensors[1].data.tobytes()
        numbers = [torch.from_numpy(gguf.quants.dequantize(each.data.copy(), each.tensor_type)) for each in tensors]
        plain_error, error = (float(((each - weight).square() * importance).sum().sqrt()) for each in numbers)
        assert error < plain_error
    manifest = json.loads((tmp_path / "weighted/omni_convert.json").read_text())
    assert manifest["statistics"] == recorded.fingerprint()


def test_the_importance_matrix_that_calibration_writes_gives_the_bytes_of_the_statistics(
    tiny_pipeline_folder: Path, statistics_file: Path, tmp_path: Path
) -> None:
    imatrix = statistics_file.with_name("imatrix.gguf")
    reader = gguf.GGUFReader(imatrix)
    values = {key: reader.get_field(key).contents() for key in reader.fields if not key.startswith("GGUF.")}
    assert values.pop("general.architecture") == "imatrix"
    assert values == {
        "general.type": "imatrix",
        "imatrix.datasets": ["prompts.txt"],
        "imatrix.chunk_count": 2,
        "imatrix.chunk_size": 1,
    }
    found = {tensor.name: tensor for tensor in reader.tensors}
    recorded = Statistics.load(statistics_file).layers["transformer.layers.0.attention.to_q"]
    sums, counts = (found[f"layers.0.attention.qkv.weight.{suffix}"] for suffix in ("in_sum2", "counts"))
    assert (sums.data.shape, counts.data.tolist()) == ((1, 192), [[recorded.rows_seen]])
    torch.testing.assert_close(torch.from_numpy(sums.data[0] / counts.data[0]), recorded.mean_square())
    by_file = converted(tiny_pipeline_folder, tmp_path / "imatrix", "Q4_1", imatrix=imatrix)
    options: dict[str, Any] = {"calibration": (statistics_file,), "rounding": "nearest"}
    by_statistics = converted(tiny_pipeline_folder, tmp_path / "statistics", "Q4_1", **options)
    tensors = [{each.name: each.data for each in gguf.GGUFReader(file).tensors} for file in (by_file, by_statistics)]
    differing = sum(int((tensors[0][name] != tensors[1][name]).sum()) for name in tensors[0])
    assert differing < sum(data.nbytes for data in tensors[1].values()) / 1000  # quotients of rounded sums
    fields = gguf.GGUFReader(by_file)
    assert fields.get_field("quantize.imatrix.file").contents() == "imatrix.gguf"
    covered = [name for name in found if name.endswith("in_sum2") and name.removesuffix(".in_sum2") in tensors[0]]
    assert 0 < fields.get_field("quantize.imatrix.entries_count").contents() <= len(covered)
    assert gguf.GGUFReader(by_statistics).get_field("quantize.imatrix.file") is None


@pytest.mark.parametrize(
    ("recording", "rounding", "kind"),
    [
        ("moments", "gptq", "Q2_K"),
        ("moments", "auto", "Q4_K"),
        ("moments", "gptq", "Q6_K"),
        ("calibration", "auto", "Q3_K"),
        ("calibration", "gptq", "IQ4_XS"),
    ],
)
def test_gptq_lowers_the_output_errors_of_joined_layers_too(
    recording: str, rounding: str, kind: str, tiny_pipeline_folder: Path, statistics_file: Path, tmp_path: Path
) -> None:
    path = statistics_file if recording == "calibration" else statistics_file.with_name("moments.safetensors")
    options: dict[str, Any] = {recording: (path,), "rounding": rounding}
    files = [
        converted(tiny_pipeline_folder, tmp_path / "nearest", kind, **{**options, "rounding": "nearest"}),
        converted(tiny_pipeline_folder, tmp_path / "rounded", kind, **options),
        converted(tiny_pipeline_folder, tmp_path / "again", kind, **options, workers=3),
    ]
    assert files[1].read_bytes() == files[2].read_bytes()
    original = load_file(tiny_pipeline_folder / "transformer" / WEIGHTS_NAME)
    layers = Statistics.load(statistics_file).layers
    attention, down = "layers.0.attention", "layers.0.feed_forward.w2"
    for name, sources in ((f"{attention}.qkv", [f"{attention}.to_{part}" for part in "qkv"]), (down, [down])):
        weight = torch.cat([original[f"{source}.weight"].float() for source in sources])
        inputs, errors = layers[f"transformer.{sources[0]}"].rows().float(), []
        for file in files[:2]:
            (tensor,) = (each for each in gguf.GGUFReader(file).tensors if each.name == f"{name}.weight")
            numbers = torch.from_numpy(gguf.quants.dequantize(tensor.data.copy(), tensor.tensor_type))
            errors.append(float((inputs @ (numbers - weight).T).norm()))
        assert errors[1] < 0.9 * errors[0]


def test_an_importance_matrix_is_of_one_denoising_model(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    arguments = ["calibrate", str(tiny_pipeline_folder), "--calib", str(tmp_path / "prompts.txt")]
    arguments += ["--component", "transformer=none", "--component", "text_encoder=fp8", "--device", "cpu"]
    result = CliRunner().invoke(main, [*arguments, "--imatrix-output", str(tmp_path / "imatrix.gguf")])
    assert result.exit_code == 1
    assert "--imatrix-output: found no denoising model, expected one" in result.output


def test_statistics_that_do_not_serve_are_refused_or_noted(
    tiny_pipeline_folder: Path, statistics_file: Path, tmp_path: Path
) -> None:
    def notes(statistics: Statistics, kind: str = "Q4_1") -> str:
        statistics.save(tmp_path / "stats")
        recipe = Recipe("gguf", gguf_type=kind, calibration=(tmp_path / "stats",), device="cpu", overwrite=True)
        return " ".join(convert_checkpoint(str(tiny_pipeline_folder), tmp_path / "out", recipe).notes)

    recorded = Statistics.load(statistics_file)
    assert "importance of columns was not used" in notes(recorded, "Q8_0")
    assert "importance" not in notes(recorded)
    fewer = {name: layer for name, layer in recorded.layers.items() if not name.endswith("layers.1.feed_forward.w2")}
    assert "do not cover layers.1.feed_forward.w2, whose columns weigh the same" in notes(
        replace(recorded, layers=fewer)
    )
    with pytest.raises(CalibrationError, match="do not cover any layer"):
        notes(replace(recorded, layers={}))
    old = {name: replace(layer, squares=None) for name, layer in recorded.layers.items()}
    with pytest.raises(CalibrationError, match="found no mean squares"):
        notes(replace(recorded, layers=old))


@pytest.mark.parametrize(
    ("name", "columns", "message"),
    [
        ("blk.0.attn_q.weight", 1024, "found none of the 17 weights"),
        (IMPORTANT, 512, "found 512 columns, expected 1024"),
    ],
)
def test_an_importance_matrix_of_another_model_is_refused(
    name: str, columns: int, message: str, wide_folder: Path, tmp_path: Path
) -> None:
    imatrix = imatrix_file(tmp_path / "imatrix.gguf", torch.ones(columns), name)
    with pytest.raises(RecipeError, match=message):
        converted(wide_folder, tmp_path / "out", "Q4_K", imatrix=imatrix)


def test_types_that_the_command_line_offers_are_those_there_are() -> None:
    assert sorted(GGUF_TYPES) == sorted(gguf_format.GGUF_TYPES)


def test_architectures_are_called_as_comfyui_gguf_does() -> None:
    assert find_family("FluxTransformer2DModel").gguf.architecture == "flux"
    assert find_family("ZImageTransformer2DModel").gguf.architecture == "lumina2"
    assert find_family("SomethingElse").gguf.architecture == "diffusion"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "fp8", "gguf_type": "Q8_0"}, "--gguf-type: found with method 'fp8'"),
        ({"method": "gguf", "gguf_type": "Q7_K"}, "--gguf-type: found 'Q7_K', expected one of"),
        ({"method": "fp8", "imatrix": Path("imatrix.gguf")}, "--imatrix: found with method 'fp8'"),
        ({"method": "gguf", "dialect": "comfyui"}, "--dialect comfyui: found with method 'gguf'"),
        ({"method": "gguf", "calib": Path("prompts.txt"), "imatrix": Path("i")}, "--imatrix: found with --calib"),
        ({"method": "gguf", "calibration": (Path("stats"),), "imatrix": Path("i")}, "--imatrix: found with --calib"),
    ],
)
def test_options_that_contradict_gguf_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe(**options)  # type: ignore[arg-type]


def test_a_text_encoder_is_refused(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    recipe = Recipe(method="gguf", component={"text_encoder": "gguf"}, runtime="diffusers", device="cpu")
    with pytest.raises(RecipeError, match="text_encoder=gguf"):
        convert_checkpoint(str(tiny_pipeline_folder), tmp_path / "out", recipe)


@pytest.mark.parametrize("has_config", [True, False], ids=["folder", "single file"])
@pytest.mark.parametrize(
    "layer",
    [
        "encoder.block.{}.layer.0.SelfAttention.q",
        "text_model.encoder.layers.{}.self_attn.q_proj",
        "model.layers.{}.self_attn.q_proj",
    ],
    ids=["T5", "CLIP", "a language model"],
)
def test_text_models_are_left_to_llama_cpp(layer: str, has_config: bool, tmp_path: Path) -> None:
    names = [layer.format(number).replace(".q", part) for number in range(2) for part in (".q", ".k")]
    file = tmp_path / "text.safetensors"
    save_file({f"{name}.weight": torch.randn(64, 64).bfloat16() for name in names}, file)
    if has_config:
        (tmp_path / "config.json").write_text(json.dumps({"architectures": ["T5EncoderModel"], "model_type": "t5"}))
    with pytest.raises(RecipeError, match=r"a text model.*llama\.cpp"):
        convert_checkpoint(file, tmp_path / "out", Recipe("gguf"))
