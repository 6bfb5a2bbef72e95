"""vLLM-Omni's own diffusion models on our files, where no other package has such a class, without a GPU.

Their configs, classes and loaders run: of HunyuanImage-3.0 and BAGEL for the language model, which is all that is
quantized, of OmniGen2, Ming-Image and LTX-2 without video for the transformer. No kernel does. Run by scripts/nightly.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from omni_convert.convert import Recipe, convert_checkpoint
from omni_convert.convert.calibration.pipeline_recorder import recording_identity
from omni_convert.formats.checks.meaning import open_quantized
from omni_convert.formats.statistics.layer_statistics import InputRecorder, LayerStatistics, observe
from omni_convert.formats.statistics.statistics import Statistics

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]  # warnings are their own affair

#: The device that each method is for, and the largest relative error of a weight.
METHODS = {
    "fp8": ("CUDA", 0.04),
    "static fp8": ("CUDA", 0.04),
    "nvfp4": ("CUDA", 0.15),
    "int8": ("NPU", 0.16),  # Ming-Image's tiny weights have rows with heavy tails: .159 at worst
    "mxfp8": ("NPU", 0.04),
    "mxfp4": ("NPU", 0.2),
}
#: Names of methods of theirs that leave a layer as it is.
PLAIN = ("UnquantizedLinearMethod", "UnquantizedFusedMoEMethod")
#: A parameter that nothing reads where activations are quantized as they come, or not at all.
UNREAD = "input_scale"
HUNYUAN = "hunyuan_image3.hunyuan_image3_transformer:HunyuanImage3Model"
BAGEL = "bagel.bagel_transformer:Qwen2MoTForCausalLM"
#: Heads of queries for each head of keys, and the width of a head, in the tiny HunyuanImage-3.0.
QUERIES, HEAD = 2, 16


@pytest.fixture(scope="session", autouse=True)
def _peer_comes_first(peer: ModuleType) -> None: ...


def hunyuan_image_3(config: Any) -> nn.Module:
    module = importlib.import_module("vllm_omni.diffusion.models.hunyuan_image3.hunyuan_image3_transformer")
    pipeline = importlib.import_module("vllm_omni.diffusion.models.hunyuan_image3.pipeline_hunyuan_image3")
    prepared(config, pipeline.HunyuanImage3Pipeline)
    described = json.loads((Path(config.model) / "config.json").read_text())
    described.pop("quantization_config")
    settings = module.HunyuanImage3Config(**described)
    model: nn.Module = module.HunyuanImage3Model(settings, quant_config=config.quantization_config)
    return model


def bagel(config: Any) -> nn.Module:
    module = importlib.import_module("vllm_omni.diffusion.models.bagel.bagel_transformer")
    pipeline = importlib.import_module("vllm_omni.diffusion.models.bagel.pipeline_bagel")
    prepared(config, pipeline.BagelPipeline)
    settings = module.Qwen2MoTConfig.from_json_file(str(Path(config.model) / "llm_config.json"))
    settings.qk_norm, settings.layer_module = True, "Qwen2MoTDecoderLayer"
    model: nn.Module = module.Qwen2MoTForCausalLM(
        settings,
        parallel_config=config.parallel_config,
        quant_config=config.quantization_config,
        prefix="bagel.language_model",
    )
    return model


def prepared(config: Any, pipeline_class: Any) -> None:
    """Binds their config of the quantization to the names of their model."""
    importlib.import_module("vllm_omni.diffusion.registry")._prepare_diffusion_quant_config(config, pipeline_class)


def ltx_2_audio(config: Any) -> nn.Module:
    """The transformer of LTX-2 without all that is for video, which reads the same file."""
    name = "vllm_omni.diffusion.models.ltx2.ltx2_audio_transformer"
    if importlib.util.find_spec(name) is None:
        pytest.skip("only vLLM-Omni 0.32.0rc1 has this class")
    components = importlib.import_module("vllm_omni.diffusion.models.ltx2.ltx2_components")
    described = json.loads((Path(config.model) / "transformer" / "config.json").read_text())
    model: nn.Module = components.create_audio_transformer_from_config(described, config.quantization_config)
    return model


@pytest.fixture(scope="module")
def places(peer: ModuleType) -> dict[str, Any]:
    """Family → where vLLM-Omni has its model."""
    repository = partial(peer.ModelPlace, component="", prefix="")
    return {
        "hidream_o1": peer.HIDREAM_O1,
        "hunyuan_image_3": repository(HUNYUAN, build=hunyuan_image_3, child="model"),
        "bagel": repository(BAGEL, build=bagel, child="language_model"),
        "ltx_2": peer.ModelPlace("ltx2.ltx2_audio_transformer:", build=ltx_2_audio),
        "omnigen_2": peer.ModelPlace("omnigen2.omnigen2_transformer:OmniGen2Transformer2DModel"),
        "ming_image": peer.ModelPlace("ming_image.transformer:MingImageTransformer2DModel"),
    }


Load = Callable[[str, Path, str], dict[str, nn.Module]]


@pytest.fixture(scope="module")
def load(runtime: Any, places: dict[str, Any]) -> Load:
    """A function of a family, a folder and a device: their modules by name, filled from our files by their loader."""

    def modules(name: str, folder: Path, device: str) -> dict[str, nn.Module]:
        place = places[name]
        return dict(runtime.load(folder, place, device).named_modules(prefix=place.child))

    return modules


def sorted_heads(rows: Tensor) -> Tensor:
    """The rows of q, k and v, which the file has in turn for each head of keys, one after the other."""
    heads = rows.unflatten(0, (-1, QUERIES + 2, HEAD))
    return torch.cat([part.flatten(0, 2) for part in heads.split((QUERIES, 1, 1), dim=1)])


def gate_first(rows: Tensor) -> Tensor:
    up, gate = rows.chunk(2)
    return torch.cat([gate, up])


def as_stored(rows: Tensor) -> Tensor:
    return rows


#: Leaf of a block in their model → leaves in the file, and the order in which theirs has their rows.
LAYERS: dict[str, dict[str, tuple[tuple[str, ...], Callable[[Tensor], Tensor]]]] = {
    "hunyuan_image_3": {
        "self_attn.qkv_proj": (("self_attn.qkv_proj",), sorted_heads),
        "self_attn.o_proj": (("self_attn.o_proj",), as_stored),
        "mlp.shared_mlp.gate_up_proj": (("mlp.shared_mlp.gate_and_up_proj",), gate_first),
        "mlp.shared_mlp.down_proj": (("mlp.shared_mlp.down_proj",), as_stored),
    },
    "ltx_2": {
        **{
            f"{attention}.{leaf}": ((f"{attention}.{leaf}",), as_stored)
            for attention in ("audio_attn1", "audio_attn2")
            for leaf in ("to_q", "to_k", "to_v", "to_out.0")
        },
        **{f"audio_ff.net.{leaf}": ((f"audio_ff.net.{leaf}",), as_stored) for leaf in ("0.proj", "2")},
    },
    "hidream_o1": {
        "self_attn.qkv_proj": (tuple(f"self_attn.{leaf}_proj" for leaf in "qkv"), as_stored),
        "self_attn.o_proj": (("self_attn.o_proj",), as_stored),
        "mlp.gate_up_proj": (("mlp.gate_proj", "mlp.up_proj"), as_stored),
        "mlp.down_proj": (("mlp.down_proj",), as_stored),
    },
    "omnigen_2": {
        "attn.to_qkv": (tuple(f"attn.to_{leaf}" for leaf in "qkv"), as_stored),
        "attn.to_out.0": (("attn.to_out.0",), as_stored),
        "feed_forward.gate_up_proj": (("feed_forward.linear_1", "feed_forward.linear_3"), as_stored),
        "feed_forward.down_proj": (("feed_forward.linear_2",), as_stored),
    },
    "ming_image": {
        "attention.to_qkv": (tuple(f"attention.to_{leaf}" for leaf in "qkv"), as_stored),
        "attention.to_out.0": (("attention.to_out.0",), as_stored),
        "feed_forward.w13": (("feed_forward.w1", "feed_forward.w3"), as_stored),
        "feed_forward.w2": (("feed_forward.w2",), as_stored),
    },
    "bagel": {
        "self_attn.qkv_proj": (tuple(f"self_attn.{leaf}_proj" for leaf in "qkv"), as_stored),
        "self_attn.qkv_proj.gen_exp": (tuple(f"self_attn.{leaf}_proj_moe_gen" for leaf in "qkv"), as_stored),
        "self_attn.o_proj": (("self_attn.o_proj",), as_stored),
        "self_attn.o_proj.gen_exp": (("self_attn.o_proj_moe_gen",), as_stored),
        **{
            f"{mlp}.{theirs}": (tuple(f"{mlp}.{leaf}" for leaf in ours), as_stored)
            for mlp in ("mlp", "mlp_moe_gen")
            for theirs, ours in {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}.items()
        },
    },
}
BLOCKS = {
    "hidream_o1": "model.language_model.layers.{}",
    "hunyuan_image_3": "model.layers.{}",
    "bagel": "language_model.model.layers.{}",
    "omnigen_2": "layers.{}",
    "ming_image": "layers.{}",
    "ltx_2": "transformer_blocks.{}",
}
REFUSED = (("bagel", "int8"), ("omnigen_2", "nvfp4"), ("omnigen_2", "static fp8"))
CASES = [(name, method) for name in BLOCKS for method in METHODS if (name, method) not in REFUSED]
#: What stands before the names of the file in their pipelines.
PLACES = {**dict.fromkeys(("omnigen_2", "ming_image", "ltx_2"), "transformer."), "hidream_o1": "model."}
#: `_class_name` of the pipelines of those that are models in diffusers' layout.
PIPELINES = {
    "omnigen_2": "OmniGen2Pipeline",
    "ming_image": "MingImageDiffusionPipeline",
    "ltx_2": "LTX2TextToAudioPipeline",
}


@pytest.fixture(scope="module")
def converted(peer: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """A function of a family and a method: its tiny repository, converted, beside `source`."""
    import tiny_models  # after `peer`
    import tiny_stages

    folder = tmp_path_factory.mktemp("repositories")

    def made(name: str, method: str) -> Path:
        source = folder / name / "source"
        if not source.exists() and name in PIPELINES:
            tiny_models.save_model(name, source / "transformer")
            index = {"_class_name": PIPELINES[name], "transformer": ["diffusers", "Transformer"]}
            (source / "model_index.json").write_text(json.dumps(index))
        elif not source.exists():
            tiny_stages.save_repository(name, source)
        if not (folder / name / method).exists():
            convert_checkpoint(source, folder / name / method, recipe_of(method, source, folder / f"{name}.statistics"))
        return folder / name / method

    return made


def recipe_of(method: str, source: Path, statistics: Path) -> Recipe:
    """The recipe of a method; static activations are as ModelOpt spells them, with statistics of random inputs."""
    if method != "static fp8":
        return Recipe(method=method)
    torch.manual_seed(0)
    component, folder = ("transformer", source / "transformer") if (source / "transformer").exists() else ("", source)
    layers: dict[str, LayerStatistics] = {}
    with open_quantized(folder) as quantized:
        for name, spec in quantized.checkpoint.items():
            recorder = InputRecorder()
            if len(spec.shape) == 2:
                recorder.record(observe(torch.randn(8, spec.shape[1])), step=0)
                layers[f"{component}.{name.removesuffix('.weight')}"] = recorder.statistics()  # type: ignore[assignment]
        identity = recording_identity([], {}, {component: quantized.checkpoint.fingerprint()})
    Statistics(identity, layers).save(statistics)
    return Recipe(dialect="modelopt", calibration=(statistics,))


def tensors_of(folder: Path) -> dict[str, Tensor]:
    files = [*folder.glob("*.safetensors"), *folder.glob("transformer/*.safetensors")]
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def same(theirs: Tensor, ours: Tensor) -> bool:
    """Whether all numbers are equal; their parameter may have a wider type than our codes."""
    return theirs.flatten().float().equal(ours.flatten().float())


@pytest.mark.parametrize(("name", "method"), CASES)
def test_every_linear_holds_what_we_wrote(
    load: Load, converted: Callable[[str, str], Path], name: str, method: str
) -> None:
    device, bound = METHODS[method]
    folder = converted(name, method)
    stored, source = tensors_of(folder), tensors_of(folder.parent / "source")
    modules = load(name, folder, device)
    for number in range(1 if name == "ltx_2" else 2):
        block = BLOCKS[name].format(number)
        for theirs, (leaves, in_order) in LAYERS[name].items():
            module = modules[f"{PLACES.get(name, '')}{block}.{theirs}"]
            assert type(module.quant_method).__name__ not in PLAIN, theirs
            for suffix, parameter in module.named_parameters(recurse=False):
                if f"{block}.{leaves[0]}.{suffix}" not in stored:
                    assert suffix == UNREAD or parameter.unique().tolist() == [1]  # mul_scale
                    continue
                parts = [stored[f"{block}.{leaf}.{suffix}"] for leaf in leaves]
                if parts[0].numel() == 1:  # a slot for each part of theirs; one of our parts may serve several
                    assert parameter.unique().equal(torch.stack([part.reshape(()) for part in parts]).unique())
                else:
                    assert same(parameter, in_order(torch.cat(parts))), f"{theirs}.{suffix}"
    with open_quantized(folder / "transformer" if name in PIPELINES else folder) as quantized:
        for stem, layer in quantized.layers.items():
            weight = source[f"{stem}.weight"].float()
            difference = layer.dequantize(0, layer.shape[0]) - weight
            assert difference.norm() < bound * weight.norm(), stem


@pytest.mark.parametrize("method", METHODS)
def test_experts_hold_what_we_wrote_and_routers_the_original(
    load: Load, converted: Callable[[str, str], Path], method: str
) -> None:
    folder = converted("hunyuan_image_3", method)
    stored = tensors_of(folder)
    modules = load("hunyuan_image_3", folder, METHODS[method][0])
    for number in range(2):
        mlp = f"model.layers.{number}.mlp"
        router, experts = modules[f"{mlp}.gate"], modules[f"{mlp}.experts.routed_experts"]
        assert same(router.weight, stored[f"{mlp}.gate.wg.weight"])
        is_plain = method in ("int8", "mxfp8", "mxfp4")
        assert (type(experts.quant_method).__name__ in PLAIN) == is_plain
        for name, parameter in experts.named_parameters(recurse=False):
            stack, _, suffix = name.partition("_")
            if suffix == UNREAD and method != "static fp8":
                continue
            leaf, in_order = ("gate_and_up_proj", gate_first) if stack == "w13" else ("down_proj", as_stored)
            for expert in range(4):
                ours = stored[f"{mlp}.experts.{expert}.{leaf}.{suffix}"]
                theirs = parameter[expert]
                if ours.numel() == 1:
                    assert theirs.unique().equal(ours.reshape(1)), name
                else:
                    assert same(theirs, in_order(ours)), name
