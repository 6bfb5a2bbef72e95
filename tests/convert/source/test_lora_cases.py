"""LoRA files of every algorithm, naming and family make the weights that dense formulas, PEFT and LyCORIS make."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import lora_table
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from omni_convert.convert.cli.main import main
from omni_convert.convert.recipe import LoraRequest
from omni_convert.convert.source.lora import bake
from omni_convert.formats.containers.checkpoint import Checkpoint
from omni_convert.formats.errors import CheckpointError

PAGE = Path(__file__).parents[3] / "convert" / "source" / "README.md"
WEIGHTS = "diffusion_pytorch_model.safetensors"

AXES = (lora_table.FAMILIES, lora_table.ALGORITHMS, lora_table.NAMINGS)


def is_quick(family: int, algorithm: int, naming: int) -> bool:
    """Whether a combination, by the positions of its parts, is in the quick suite."""
    return naming == (family + algorithm) % len(lora_table.NAMINGS)


def combinations() -> Iterator[Any]:
    """Every family with every algorithm and naming; those that no pair of these needs are slow."""
    for positions in itertools.product(*(range(len(axis)) for axis in AXES)):
        parts = [list(axis)[position] for axis, position in zip(AXES, positions, strict=True)]
        yield pytest.param(*parts, marks=() if is_quick(*positions) else pytest.mark.slow)


def test_the_quick_suite_has_every_pair() -> None:
    quick = [each for each in itertools.product(*(range(len(axis)) for axis in AXES)) if is_quick(*each)]
    for first, second in itertools.combinations(range(len(AXES)), 2):
        assert len({(each[first], each[second]) for each in quick}) == len(AXES[first]) * len(AXES[second])


@pytest.fixture(scope="module")
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, Any]:
    """A family, a folder with its model, and the weights."""
    family, folder = lora_table.FAMILIES[request.param], tmp_path_factory.mktemp("model")
    return family, folder, lora_table.save_family(family, folder)


@pytest.mark.parametrize(("model", "algorithm", "naming"), list(combinations()), indirect=["model"])
def test_every_algorithm_and_naming_gives_the_dense_weights(
    model: tuple[Any, Path, Any], algorithm: str, naming: str
) -> None:
    family, folder, weights = model
    tensors, changed = lora_table.file_of(family, weights, naming, algorithm)
    assert lora_table.error_of(family, folder, weights, tensors, changed) < 1e-5


def baked(
    folder: Path, tensors: Mapping[str, Tensor], kind: str, scale: float = 1.0, metadata: dict[str, str] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the model in a folder with a LoRA file, read in pieces of rows."""
    path = folder / "adapter_model.safetensors"
    if tensors:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata=metadata)
    with Checkpoint.open(folder / WEIGHTS) as checkpoint:
        view, _ = bake(checkpoint, [LoraRequest(path, scale)], kind, parts={path: {None}}, force=False)
        for name, spec in view.items():
            pieces = [view.read_rows(name, at, min(at + 7, spec.shape[0])) for at in range(0, spec.shape[0], 7)]
            whole = view.read(name)
            assert whole.equal(torch.cat(pieces)), "rows do not depend on who computes which"
            yield name, whole


@pytest.mark.parametrize("algorithm", lora_table.ALGORITHMS)
def test_the_strength_scales_the_difference(algorithm: str, tmp_path: Path) -> None:
    family = lora_table.FAMILIES["Z-Image"]
    weights = lora_table.save_family(family, tmp_path)
    tensors, changed = lora_table.file_of(family, weights, "ai-toolkit", algorithm)
    for name, found in baked(tmp_path, tensors, family.model_class, -0.5):
        before = weights[name].double()
        wanted = before - 0.5 * (changed.get(name, before) - before)
        torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=1e-6)


PEFT: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("LoraConfig", {"r": 4, "lora_alpha": 8, "use_rslora": True}),
    "dora": ("LoraConfig", {"r": 4, "lora_alpha": 8, "use_dora": True}),
    "loha": ("LoHaConfig", {"r": 4, "alpha": 8}),
    "lokr": ("LoKrConfig", {"r": 4, "alpha": 8, "decompose_both": True}),
    "lokr-whole": ("LoKrConfig", {"r": 64, "alpha": 8}),
    "oft": ("OFTConfig", {"r": 0, "oft_block_size": 16, "module_dropout": 0.0}),
    "oft-exact": ("OFTConfig", {"r": 0, "oft_block_size": 16, "use_cayley_neumann": False}),
    "oft-shared": ("OFTConfig", {"r": 0, "oft_block_size": 16, "block_share": True}),
}


@pytest.mark.parametrize("kind", PEFT)
def test_peft_merges_to_the_same_weights(kind: str, import_peer: Callable[[str], ModuleType], tmp_path: Path) -> None:
    peft = import_peer("peft")
    name, options = PEFT[kind]
    torch.manual_seed(0)
    base = nn.ModuleDict({"to_q": nn.Linear(64, 96), "other": nn.Linear(8, 8)})
    save_file(base.state_dict(), tmp_path / WEIGHTS)
    adapted = peft.get_peft_model(base, getattr(peft, name)(target_modules=["to_q"], **options))
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter) * 0.05)
    adapted.save_pretrained(tmp_path)
    wanted = adapted.merge_and_unload().state_dict()
    for stem, found in baked(tmp_path, {}, "Anything"):
        torch.testing.assert_close(found, wanted[stem], rtol=1e-5, atol=1e-6)


LYCORIS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "loha": ("loha.LohaModule", {}, False),
    "doha": ("loha.LohaModule", {"weight_decompose": True}, False),
    "lokr": ("lokr.LokrModule", {"decompose_both": True}, False),
    "lokr-whole": ("lokr.LokrModule", {"full_matrix": True}, False),
    "dora-by-columns": ("locon.LoConModule", {"weight_decompose": True, "wd_on_out": False}, False),
    "oft": ("diag_oft.DiagOFTModule", {"constraint": 0.001, "rescaled": True}, False),
    "locon": ("locon.LoConModule", {}, True),
    "locon-tucker": ("locon.LoConModule", {"use_tucker": True}, True),
    "loha-tucker": ("loha.LohaModule", {"use_tucker": True}, True),
    "lokr-tucker": ("lokr.LokrModule", {"use_tucker": True}, True),
}


@pytest.mark.parametrize("kind", LYCORIS)
def test_a_layer_that_lycoris_trains_computes_the_same(
    import_peer: Callable[[str], ModuleType], kind: str, tmp_path: Path
) -> None:
    """Its merging applies alpha / rank twice to LoHa and LoKr; what it trains is the judge."""
    path, options, is_convolution = LYCORIS[kind]
    module, _, name = path.partition(".")
    torch.manual_seed(0)
    layer = nn.Conv2d(64, 96, 3) if is_convolution else nn.Linear(64, 96)
    save_file({f"to_q.{leaf}": tensor.detach() for leaf, tensor in layer.state_dict().items()}, tmp_path / WEIGHTS)
    adapter = getattr(import_peer(f"lycoris.modules.{module}"), name)("x", layer, 1.0, 4, 2.0, **options)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    inputs = torch.randn(2, 64, 5, 5) if is_convolution else torch.randn(8, 64)
    adapter.apply_to()
    wanted = layer(inputs).detach()
    tensors = {f"lycoris_to_q.{leaf}": tensor.detach() for leaf, tensor in adapter.state_dict().items()}
    found = dict(baked(tmp_path, tensors, "Anything"))
    compute = nn.functional.conv2d if is_convolution else nn.functional.linear
    ours = compute(inputs, found["to_q.weight"], found["to_q.bias"])
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=float(wanted.abs().max()) * 1e-5)


def test_norms_of_columns_are_refused_where_a_file_joins_layers(tmp_path: Path) -> None:
    """They are norms of all rows of the joined weight, which nobody has once it is cut."""
    family = lora_table.FAMILIES["Z-Image"]
    weights = lora_table.save_family(family, tmp_path)
    tensors, _ = lora_table.file_of(family, weights, "ai-toolkit", "LoRA")
    stem = "diffusion_model.layers.0.attention.qkv"
    tensors[f"{stem}.dora_scale"] = torch.ones(1, 192)
    with pytest.raises(CheckpointError, match=f"found '{stem}.alpha', '{stem}.dora_scale'"):
        list(baked(tmp_path, tensors, family.model_class))


@pytest.mark.parametrize(
    ("leaf", "shape"),
    [("a1.weight", (4, 4)), ("on_input", ()), ("oft_blocks", (2, 4, 16, 16)), ("set_weight", (192, 192)), ("x", (4,))],
)
def test_other_algorithms_are_named_and_refused(leaf: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    family = lora_table.FAMILIES["Z-Image"]
    weights = lora_table.save_family(family, tmp_path)
    tensors, _ = lora_table.file_of(family, weights, "diffusers", "LoRA")
    name = f"transformer.noise_refiner.0.attention.to_q.{leaf}"
    with pytest.raises(CheckpointError, match=f"found '{name}', which matches no weight"):
        list(baked(tmp_path, {**tensors, name: torch.ones(shape)}, family.model_class))


def test_differences_of_wan_go_to_norms_modulation_and_head(tmp_path: Path) -> None:
    """Wan's own code numbers norms by order, diffusers by kind; `diff_m` is of the modulation."""
    family = lora_table.FAMILIES["Wan"]
    weights = lora_table.save_family(family, tmp_path)
    targets = {
        "blocks.0.self_attn.q.diff_b": "blocks.0.attn1.to_q.bias",
        "blocks.0.norm3.diff": "blocks.0.norm2.weight",
        "blocks.0.norm3.diff_b": "blocks.0.norm2.bias",
        "blocks.0.self_attn.norm_q.diff": "blocks.0.attn1.norm_q.weight",
        "blocks.0.diff_m": "blocks.0.scale_shift_table",
        "head.head.diff": "proj_out.weight",
        "head.modulation.diff": "scale_shift_table",
        "text_embedding.0.diff": "condition_embedder.text_embedder.linear_1.weight",
    }
    tensors = {f"diffusion_model.{name}": torch.randn(weights[target].shape) for name, target in targets.items()}
    tensors["diffusion_model.blocks.0.ffn.0.diff_b"] = torch.zeros(3)  # nothing, of whatever shape
    differences = {target: tensors[f"diffusion_model.{name}"] for name, target in targets.items()}
    for name, found in baked(tmp_path, tensors, family.model_class, 0.5):
        wanted = weights[name].double() + 0.5 * differences.get(name, torch.zeros(())).double()
        torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=1e-7)


#: Other names of layers: family, stem in the file, ends of the pair, and what it stands for in diffusers.
OTHER_NAMES: dict[str, tuple[str, str, str, tuple[str, ...]]] = {
    "xlabs": (
        "FLUX.1",
        "double_blocks.0.processor.qkv_lora2",
        "",
        tuple(f"transformer_blocks.0.attn.add_{part}_proj" for part in "qkv"),
    ),
    "xlabs single": (
        "FLUX.1",
        "diffusion_model.single_blocks.0.processor.proj_lora",
        "",
        ("single_transformer_blocks.0.proj_out",),
    ),
    "comfyui qkv": (
        "FLUX.1",
        "diffusion_model.single_blocks.0.linear1_qkv",
        ".lora",
        tuple(f"single_transformer_blocks.0.attn.to_{part}" for part in "qkv"),
    ),
    "processors": (
        "SDXL",
        "unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora",
        "",
        ("mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0",),
    ),
    "dots": ("Z-Image", "diffusion_model.layers.0.attention.to.q", ".lora", ("layers.0.attention.to_q",)),
    "diffsynth": ("Wan", "pipe.dit.blocks.0.ffn.0", ".lora", ("blocks.0.ffn.net.0.proj",)),
    "hunyuan in comfyui": (
        "HunyuanVideo-1.5",
        "diffusion_model.double_blocks.0.img_attn.qkv",
        ".lora",
        tuple(f"transformer_blocks.0.attn.to_{part}" for part in "qkv"),
    ),
}


@pytest.mark.parametrize("case", OTHER_NAMES)
def test_other_names_of_layers(case: str, tmp_path: Path) -> None:
    kind, stem, end, parts = OTHER_NAMES[case]
    family = lora_table.FAMILIES[kind]
    weights = lora_table.save_family(family, tmp_path)
    sizes = [len(weights[f"{part}.weight"]) for part in parts]
    down, up = torch.randn(4, weights[f"{parts[0]}.weight"].shape[1]), torch.randn(sum(sizes), 4)
    delta = up.double() @ down.double()
    changes = {f"{part}.weight": rows for part, rows in zip(parts, delta.split(sizes), strict=True)}
    for name, found in baked(
        tmp_path, {f"{stem}{end}.down.weight": down, f"{stem}{end}.up.weight": up}, family.model_class
    ):
        wanted = weights[name].double() + changes.get(name, 0)
        torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=1e-6)


def encoder_file(folder: Path, prefix: str) -> tuple[Path, Tensor, Tensor]:
    """A file for the transformer and the text encoder: its path, and what it adds to a norm and a weight there."""
    draw = torch.Generator().manual_seed(0)
    norm = torch.randn(64, generator=draw)
    down, up = torch.randn(4, 64, generator=draw), torch.randn(64, 4, generator=draw)
    separator = "_" if prefix.endswith("_") else "."
    layer = prefix + "model.layers.0.".replace(".", separator)
    tensors = {
        "transformer.layers.0.attention.to_q.diff": torch.ones(192, 192),
        f"{layer}{'input_layernorm'}.diff": norm,
        f"{layer}{'self_attn.q_proj'.replace('.', separator)}.lora_down.weight": down,
        f"{layer}{'self_attn.q_proj'.replace('.', separator)}.lora_up.weight": up,
    }
    save_file(tensors, folder / "lora.safetensors")
    return folder / "lora.safetensors", norm, up @ down


@pytest.mark.parametrize("prefix", ["text_encoder.", "lora_te_", "lora_te1_"])
def test_tensors_for_the_text_encoder_go_into_it(tiny_pipeline_folder: Path, tmp_path: Path, prefix: str) -> None:
    lora, norm, delta = encoder_file(tmp_path, prefix)
    arguments = [str(tiny_pipeline_folder), "-m", "int8", "--component", "text_encoder=int8", "--runtime", "diffusers"]
    result = CliRunner().invoke(main, [*arguments, "--lora", str(lora), "-o", str(tmp_path / "out"), "--quiet"])
    assert result.exit_code == 0, result.output
    before = load_file(next((tiny_pipeline_folder / "text_encoder").glob("*.safetensors")))
    after = load_file(next((tmp_path / "out" / "text_encoder").glob("*.safetensors")))
    name = "model.layers.0.input_layernorm.weight"
    assert after[name].equal((before[name].double() + norm.double()).float().to(torch.bfloat16))
    stem = "model.layers.0.self_attn.q_proj"
    found = after[f"{stem}.weight"].float() * after[f"{stem}.weight_scale"].view(-1, 1)
    wanted = before[f"{stem}.weight"].float() + delta
    assert float((found - wanted).norm() / wanted.norm()) < 0.02
    manifest = json.loads((tmp_path / "out" / "omni_convert.json").read_text())
    assert {name: lora[0]["tensors"] for name, lora in manifest["loras"].items()} == {
        "transformer": 1,
        "text_encoder": 2,
    }


def test_tensors_for_a_text_encoder_that_is_not_converted_are_named(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    lora, _, _ = encoder_file(tmp_path, "text_encoder.")
    arguments = ["dequantize", str(tiny_pipeline_folder), "--lora", str(lora), "-o", str(tmp_path / "out"), "--quiet"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1
    assert "'text_encoder.model.layers.0.input_layernorm.diff'" in result.output
    assert "--component text_encoder=METHOD converts that component too" in result.output
    result = CliRunner().invoke(main, [*arguments, "--force"])
    assert result.exit_code == 0, result.output
    name = "layers.0.attention.to_q.weight"
    before, after = (
        load_file(folder / "transformer" / WEIGHTS)[name] for folder in (tiny_pipeline_folder, tmp_path / "out")
    )
    assert after.equal((before.double() + 1).float().to(torch.bfloat16))


def test_the_page_has_a_cell_for_every_family_algorithm_and_naming() -> None:
    page = PAGE.read_text()
    for columns in (lora_table.ALGORITHMS, lora_table.NAMINGS):
        assert f"| family | {' | '.join(columns)} |" in page
    assert all(page.count(f"\n| {family} | applied |") == 2 for family in lora_table.FAMILIES)
