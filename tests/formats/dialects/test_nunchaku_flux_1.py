"""FLUX.1 in Nunchaku's own files: names of its engine, layers cut in two, scales about one, and ComfyUI's config."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from omni_convert.convert import Recipe, convert_checkpoint
from omni_convert.convert.calibration.moments import Moments, MomentsRecorder
from omni_convert.convert.calibration.pipeline_recorder import recording_identity
from omni_convert.convert.inspection.verification import verify_source
from omni_convert.convert.source.location import resolve_source
from omni_convert.formats.containers.checkpoint import Checkpoint
from omni_convert.formats.dialects.base import JudgedComponent
from omni_convert.formats.dialects.nunchaku import NUNCHAKU
from omni_convert.formats.dialects.nunchaku_order import VECTOR
from omni_convert.formats.errors import CheckpointError, RecipeError
from omni_convert.formats.rows import TensorLayout
from omni_convert.formats.statistics.layer_statistics import observe
from omni_convert.formats.statistics.statistics import Statistics

WEIGHTS = "diffusion_pytorch_model.safetensors"
RANK, WIDTH = 16, 128
METHODS = ("svdquant_int4", "svdquant_nvfp4")
DOUBLE, SINGLE = "transformer_blocks.0", "single_transformer_blocks.0"

#: Layers of the file that are built in SVDQuant: out_features and in_features, in widths.
LAYERS = {
    **{f"{DOUBLE}.{name}": (3, 1) for name in ("qkv_proj", "qkv_proj_context")},
    **{f"{DOUBLE}.{name}": (1, 1) for name in ("out_proj", "out_proj_context")},
    **{f"{DOUBLE}.{name}": (4, 1) for name in ("mlp_fc1", "mlp_context_fc1")},
    **{f"{DOUBLE}.{name}": (1, 4) for name in ("mlp_fc2", "mlp_context_fc2")},
    f"{SINGLE}.qkv_proj": (3, 1),
    f"{SINGLE}.out_proj": (1, 1),
    f"{SINGLE}.mlp_fc1": (4, 1),
    f"{SINGLE}.mlp_fc2": (1, 4),
}
#: Modulations, and the chunks of each; scales are the second and the second to last.
MODULATIONS = {f"{DOUBLE}.norm1.linear": 6, f"{DOUBLE}.norm1_context.linear": 6, f"{SINGLE}.norm.linear": 3}


class Case:
    """A model, its file, and what was asked for."""

    def __init__(self, method: str, folder: Path) -> None:
        from diffusers import FluxTransformer2DModel

        self.method, self.source, self.out = method, folder / "model", folder / "out"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = FluxTransformer2DModel(
                in_channels=64, num_layers=1, num_single_layers=1, attention_head_dim=64, num_attention_heads=2,
                joint_attention_dim=64, pooled_projection_dim=64, axes_dims_rope=(16, 24, 24), guidance_embeds=True,
            )  # fmt: skip
            model.to(torch.bfloat16).save_pretrained(self.source)
        with Checkpoint.open(self.source) as source:
            self.weights = {name: source.read(name) for name in source}
        convert_checkpoint(self.source, self.out, Recipe(method=method, dialect="nunchaku", rank=RANK))
        self.tensors = load_file(self.out / WEIGHTS)
        self.has_shift = method == "svdquant_int4"


@pytest.fixture(scope="module", params=METHODS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(request.param, tmp_path_factory.mktemp("nunchaku"))


def relative(found: Tensor, exact: Tensor) -> float:
    return float((found.float() - exact.float()).norm() / exact.float().norm())


def errors(folder: Path) -> list[Any]:
    (verified,) = verify_source(resolve_source(folder))
    assert verified.dialect == "nunchaku"
    return [finding for finding in verified.findings if finding.severity == "error"]


def header_of(folder: Path) -> dict[str, str]:
    with safe_open(folder / WEIGHTS, "pt") as file:
        return dict(file.metadata())


def test_the_engine_finds_the_tensors_that_it_builds(case: Case) -> None:
    group, scale = (64, torch.bfloat16) if case.has_shift else (16, torch.float8_e4m3fn)
    expected: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for stem, (high, wide) in LAYERS.items():
        rows, columns = high * WIDTH, wide * WIDTH
        expected |= {
            f"{stem}.qweight": (torch.int8, (rows, columns // 2)),
            f"{stem}.wscales": (scale, (columns // group, rows)),
            f"{stem}.smooth": (torch.bfloat16, (columns,)),
            f"{stem}.smooth_orig": (torch.bfloat16, (columns,)),
            f"{stem}.lora_down": (torch.bfloat16, (columns, RANK)),
            f"{stem}.lora_up": (torch.bfloat16, (rows, RANK)),
            f"{stem}.bias": (torch.bfloat16, (rows,)),
        }
        if not case.has_shift:
            expected |= {f"{stem}.wcscales": (torch.bfloat16, (rows,)), f"{stem}.wtscale": (torch.bfloat16, (1,))}
    for stem, chunks in MODULATIONS.items():
        rows, numbers = chunks * WIDTH, (torch.bfloat16, (WIDTH // 64, chunks * WIDTH))
        expected |= {
            f"{stem}.qweight": (torch.int32, (rows // 4, WIDTH // 2)),
            f"{stem}.wscales": numbers,
            f"{stem}.wzeros": numbers,
            f"{stem}.bias": (torch.bfloat16, (rows,)),
        }
    norms = {f"{DOUBLE}.{name}.weight" for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k")}
    norms |= {f"{SINGLE}.{name}.weight" for name in ("norm_q", "norm_k")}
    expected |= dict.fromkeys(norms, (torch.bfloat16, (64,)))
    outside = {name: (each.dtype, tuple(each.shape)) for name, each in case.weights.items() if "blocks." not in name}
    found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in case.tensors.items()}
    assert found == expected | outside


def test_the_header_has_the_configs_of_all_readers(case: Case) -> None:
    header = header_of(case.out)
    assert header["model_class"] == "NunchakuFluxTransformer2dModel"
    assert json.loads(header["config"]) == json.loads((case.source / "config.json").read_text())
    assert json.loads(header["quantization_config"])["rank"] == RANK
    comfy = json.loads(header["comfy_config"])
    assert comfy["model_class"] == "Flux"
    assert comfy["model_config"] == {
        "image_model": "flux", "disable_unet_model_creation": True, "patch_size": 2, "in_channels": 16,
        "out_channels": 16, "hidden_size": WIDTH, "num_heads": 2, "depth": 1, "depth_single_blocks": 1,
        "context_in_dim": 64, "vec_in_dim": 64, "axes_dim": [16, 24, 24], "theta": 10000, "mlp_ratio": 4.0,
        "qkv_bias": True, "guidance_embed": True,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("blocks", "width", "outcome"), [((19, 38), 3072, "loads"), ((1, 1), 3072, "wrong"), ((19, 38), 128, "wrong")]
)
def test_other_sizes_than_the_engine_is_built_for_are_told(
    blocks: tuple[int, int], width: int, outcome: str, tmp_path: Path
) -> None:
    names = [
        f"{kind}.{i}.out_proj.lora_down"
        for kind, count in zip(("transformer_blocks", "single_transformer_blocks"), blocks, strict=True)
        for i in range(count)
    ]
    save_file({name: torch.zeros(width, 1) for name in names}, tmp_path / "model.safetensors")
    with Checkpoint.open(tmp_path) as checkpoint:
        assert NUNCHAKU.verdicts(JudgedComponent({}, checkpoint=checkpoint))[0].outcome == outcome


def test_rows_of_modulations_alternate_and_scales_are_about_one(case: Case) -> None:
    for stem, chunks in MODULATIONS.items():
        bias = case.weights[f"{stem}.bias"].float().view(chunks, -1)
        bias[[1, chunks - 2]] += 1
        assert case.tensors[f"{stem}.bias"].equal(bias.T.flatten().bfloat16())


def test_the_bias_is_with_the_second_part(case: Case) -> None:
    assert not case.tensors[f"{SINGLE}.out_proj.bias"].any()
    stored = case.tensors[f"{SINGLE}.mlp_fc2.bias"]
    bias = VECTOR.decode(stored, TensorLayout(stored.dtype, tuple(stored.shape), 0))
    assert bias.equal(case.weights[f"{SINGLE}.proj_out.bias"]) is not case.has_shift


def test_a_file_is_sound_kept_and_dequantized(case: Case, tmp_path: Path) -> None:
    assert errors(case.out) == []
    convert_checkpoint(case.out, tmp_path / "kept", Recipe(method="keep", dialect="nunchaku"))
    kept = load_file(tmp_path / "kept" / WEIGHTS)
    assert kept.keys() == case.tensors.keys()
    assert all(kept[name].view(torch.uint8).equal(each.view(torch.uint8)) for name, each in case.tensors.items())
    assert header_of(tmp_path / "kept") == header_of(case.out)
    convert_checkpoint(case.out, tmp_path / "restored", Recipe(method="dequantize"))
    restored = load_file(tmp_path / "restored" / WEIGHTS)
    assert restored.keys() == case.weights.keys()
    for name, original in case.weights.items():
        if name.endswith(".bias"):  # of modulations those about one, with int4 those behind a GELU
            assert float((restored[name].float() - original.float()).abs().max()) <= 2**-8, name
        assert relative(restored[name], original) < 0.13 or not original.any(), name


def test_columns_are_joined_and_cut_without_a_change(case: Case, tmp_path: Path) -> None:
    lite = Recipe(method="keep", dialect="nunchaku-lite", force=True)
    back = Recipe(method="keep", dialect="nunchaku", force=True)
    convert_checkpoint(case.out, tmp_path / "lite", lite)
    block = json.loads((tmp_path / "lite" / "config.json").read_text())["quantization_config"]
    assert block["svdq_w4a4"]["rank"] == 2 * RANK
    convert_checkpoint(tmp_path / "lite", tmp_path / "back", back)
    assert errors(tmp_path / "back") == []
    restored = {}
    for name, folder in {"own": case.out, "lite": tmp_path / "lite", "back": tmp_path / "back"}.items():
        convert_checkpoint(folder, tmp_path / f"{name}-restored", Recipe(method="dequantize"))
        restored[name] = load_file(tmp_path / f"{name}-restored" / WEIGHTS)
    for other in ("lite", "back"):
        assert restored[other].keys() == restored["own"].keys()
        for name, tensor in restored["own"].items():
            bound = 2**-7 if name.endswith(".bias") and other == "back" and case.has_shift else 0
            assert float((restored[other][name].float() - tensor.float()).abs().max()) <= bound, name


def test_parts_with_other_scales_above_all_are_not_joined(tmp_path: Path) -> None:
    made = Case("svdquant_nvfp4", tmp_path)
    (made.out / "omni_convert.json").unlink()
    made.tensors[f"{SINGLE}.out_proj.wtscale"] *= 2
    save_file(made.tensors, made.out / WEIGHTS, header_of(made.out))
    recipe = Recipe(method="keep", dialect="nunchaku-lite", force=True)
    with pytest.raises(CheckpointError, match=r"proj_out\.weight': .*mlp_fc2' have a weight_scale_2 each"):
        convert_checkpoint(made.out, tmp_path / "lite", recipe)


def test_modulations_that_the_engine_builds_quantized_are_not_kept(case: Case, tmp_path: Path) -> None:
    lite = Recipe(method=case.method, dialect="nunchaku-lite", rank=RANK, force=True)
    convert_checkpoint(case.source, tmp_path / "lite", lite)
    with pytest.raises(CheckpointError, match=r"found .*norm.*\.linear.* kept, expected every layer quantized"):
        convert_checkpoint(tmp_path / "lite", tmp_path / "out", Recipe(method="keep", dialect="nunchaku", force=True))


def test_biases_of_both_parts_are_added(case: Case, tmp_path: Path) -> None:
    """A file of another tool may have one with each part."""
    shutil.copytree(case.out, tmp_path / "file")
    (tmp_path / "file" / "omni_convert.json").unlink()
    tensors = load_file(tmp_path / "file" / WEIGHTS)
    tensors[f"{SINGLE}.out_proj.bias"] += 1
    save_file(tensors, tmp_path / "file" / WEIGHTS, header_of(case.out))
    found = {}
    for name, folder in {"before": case.out, "after": tmp_path / "file"}.items():
        convert_checkpoint(folder, tmp_path / name, Recipe(method="dequantize"))
        found[name] = load_file(tmp_path / name / WEIGHTS)[f"{SINGLE}.proj_out.bias"].float()
    assert float((found["after"] - found["before"] - 1).abs().max()) <= 2**-8


def as_engine(layer: Any, x: Tensor, *, is_unsigned: bool) -> Tensor:
    """A layer in int4: inputs are smoothed and rounded in groups of 64; behind a GELU they are shifted first."""
    tensors = layer.disk_tensors()
    shift, highest, lowest = (0.171875, 15, 0) if is_unsigned else (0.0, 7, -7)
    groups = ((x.float() + shift) / tensors["smooth_factor"].float()).view(len(x), -1, 64)
    scale = groups.abs().amax(2, keepdim=True) / highest
    rounded = ((groups / scale).round().clamp(lowest, highest) * scale).flatten(1)
    branch = x.float() @ tensors["lora_a"].float().T @ tensors["lora_b"].float().T
    return rounded @ layer.format.multiplied(tensors).T + branch


def test_our_loader_runs_it(case: Case) -> None:
    import diffusers

    import omni_convert.loaders  # noqa: F401  # registers the quantizers

    model, original = (
        diffusers.FluxTransformer2DModel.from_pretrained(folder, torch_dtype=torch.bfloat16)
        for folder in (case.out, case.source)
    )
    generator = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).bfloat16()

    inputs = {
        "hidden_states": numbers(1, 16, 64),
        "encoder_hidden_states": numbers(1, 8, 64),
        "pooled_projections": numbers(1, 64),
        "timestep": torch.tensor([0.5]).bfloat16(),
        "guidance": torch.tensor([3.5]).bfloat16(),
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(8, 3),
    }
    with torch.no_grad():
        assert relative(model(**inputs).sample, original(**inputs).sample) < 0.05
        layer, exact = (each.get_submodule(f"{SINGLE}.proj_out") for each in (model, original))
        x = torch.cat([numbers(4, WIDTH), torch.nn.functional.gelu(numbers(4, 4 * WIDTH))], 1)
        assert relative(layer(x), exact(x)) < 0.2
        if case.has_shift:
            halves = zip(layer.parts, x.split([WIDTH, 4 * WIDTH], 1), (False, True), strict=True)
            parts = [as_engine(part, columns, is_unsigned=unsigned) for part, columns, unsigned in halves]
            stored = case.tensors[f"{SINGLE}.mlp_fc2.bias"]
            bias = VECTOR.decode(stored, TensorLayout(torch.float32, tuple(stored.shape), 0))
            assert relative(sum(parts) + bias, layer(x)) < 2**-7


def test_an_adapter_sees_both_parts_as_one_layer(case: Case) -> None:
    import diffusers

    import omni_convert.loaders  # noqa: F401  # registers the quantizers

    peft = pytest.importorskip("peft")
    model = diffusers.FluxTransformer2DModel.from_pretrained(case.out, torch_dtype=torch.bfloat16)
    layer = model.get_submodule(f"{SINGLE}.proj_out")
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=[f"{SINGLE}.proj_out"], init_lora_weights=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model.add_adapter(config, "style")
        x = torch.randn(3, layer.in_features).bfloat16()
    wrapped = model.get_submodule(f"{SINGLE}.proj_out")
    down, up = (getattr(wrapped, f"lora_{side}")["style"].weight.float() for side in "AB")
    with torch.no_grad():
        assert relative(wrapped(x), layer(x).float() + 2 * x.float() @ down.T @ up.T) < 2**-6
    with pytest.raises(RecipeError, match="leave the adapter unfused"):
        model.fuse_lora()
    model.delete_adapters("style")
    model.unload_lora()
    assert model.get_submodule(f"{SINGLE}.proj_out") is layer


DAMAGE = {
    "no part": lambda tensors: [tensors.pop(name) for name in [*tensors] if name.startswith(f"{SINGLE}.out_proj.")],
    "no branch": lambda tensors: tensors.pop(f"{SINGLE}.out_proj.lora_down"),
    "no smoothing": lambda tensors: tensors.pop(f"{SINGLE}.mlp_fc2.smooth"),
    "a part of another height": lambda tensors: tensors.update(
        {f"{SINGLE}.out_proj.qweight": torch.ones(2 * WIDTH, WIDTH // 2, dtype=torch.int8)}
    ),
    "a modulation without chunks": lambda tensors: tensors.update(
        {f"{SINGLE}.norm.linear.qweight": torch.ones(WIDTH // 4, WIDTH // 2, dtype=torch.int32)}
    ),
    "no norm": lambda tensors: tensors.pop(f"{SINGLE}.norm_q.weight"),
}


@pytest.mark.parametrize("change", DAMAGE.values(), ids=DAMAGE.keys())
def test_damage_is_found_and_not_loaded(case: Case, tmp_path: Path, change: Any) -> None:
    import diffusers

    import omni_convert.loaders  # noqa: F401  # registers the quantizers

    shutil.copytree(case.out, tmp_path / "damaged")
    (tmp_path / "damaged" / "omni_convert.json").unlink()
    tensors = load_file(tmp_path / "damaged" / WEIGHTS)
    change(tensors)
    save_file(tensors, tmp_path / "damaged" / WEIGHTS, header_of(case.out))
    assert errors(tmp_path / "damaged")
    with pytest.raises(CheckpointError):
        diffusers.FluxTransformer2DModel.from_pretrained(tmp_path / "damaged", torch_dtype=torch.bfloat16)


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_parts_are_calibrated_with_their_own_columns(case: Case, tmp_path: Path, rounding: str) -> None:
    """Outliers of the inputs of proj_out are smoothed in the part that has their columns."""
    outliers = {f"{SINGLE}.out_proj": 7, f"{SINGLE}.mlp_fc2": 21}
    generator = torch.Generator().manual_seed(0)
    recorders = {}
    with Checkpoint.open(case.source) as source:
        for name, spec in source.items():
            if len(spec.shape) == 2:
                rows = torch.randn(256, spec.shape[1], generator=generator)
                if name == f"{SINGLE}.proj_out.weight":
                    rows[:, [7, WIDTH + 21]] *= 100
                recorders[f".{name.removesuffix('.weight')}"] = recorder = MomentsRecorder()
                for prompt, some in enumerate(rows.split(64)):
                    recorder.record(observe(some), step=0, prompt=prompt)
        identity = recording_identity([], {}, {"": source.fingerprint()})
    statistics = {key: found for key, each in recorders.items() if (found := each.statistics()) is not None}
    Statistics(identity, statistics).save(tmp_path / "statistics.safetensors")
    recipe = Recipe(
        method=case.method, dialect="nunchaku", rank=RANK, calibration=(tmp_path / "statistics.safetensors",)
    )
    if rounding == "gptq":
        moments = {key: found for key, each in recorders.items() if (found := each.moments()) is not None}
        Moments.recorded(identity, moments).save(tmp_path / "moments.safetensors")
        recipe = replace(recipe, rounding=rounding, moments=(tmp_path / "moments.safetensors",))
    convert_checkpoint(case.source, tmp_path / "out", recipe)
    assert errors(tmp_path / "out") == []
    tensors = load_file(tmp_path / "out" / WEIGHTS)
    for stem, channel in outliers.items():
        stored = tensors[f"{stem}.smooth"]
        smooth = VECTOR.decode(stored, TensorLayout(torch.float32, tuple(stored.shape), 0))
        assert int(smooth.argmax()) == channel
        assert float(smooth[channel]) > 5 * float(smooth.median())
