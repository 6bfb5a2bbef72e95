"""vLLM-Omni's thinker of Qwen3-Omni on our files: its configs, its language model, and its loader, without a GPU.

Kernels are not run: the mixture of experts names one of a GPU, and nothing is computed with it. Run by scripts/nightly.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from omni_convert.convert import Recipe, convert_checkpoint

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]  # warnings are their own affair

ARCHITECTURE = "Qwen3OmniMoeForConditionalGeneration"
#: Operators of torchvision's compiled part, which suits one build of torch alone; they are looked up, not called.
TORCHVISION = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


@pytest.fixture(scope="module")
def load_peer() -> Callable[[str], Any]:
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            torch.library.define(f"torchvision::{name}", TORCHVISION)
    if not hasattr(torch.ops._C, "silu_and_mul"):
        torch.library.define("_C::silu_and_mul", "(Tensor! out, Tensor x) -> ()")
    registry = importlib.import_module("vllm.model_executor.models.registry")

    def inspect(model: Any) -> Any:
        """In this process, which has the operators."""
        return registry._ModelInfo.from_model_cls(model.load_model_cls())

    registry._LazyRegisteredModel.inspect_model_cls = inspect
    return importlib.import_module


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny Qwen3-Omni, and what becomes of it with static FP8."""
    path = Path(__file__).parents[2] / "scripts" / "tiny_stages.py"
    spec = importlib.util.spec_from_file_location("tiny_stages", path)
    assert spec is not None
    assert spec.loader is not None
    tiny_stages = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tiny_stages)
    folder = tmp_path_factory.mktemp("qwen-3-omni")
    tiny_stages.save_repository("qwen_3_omni", folder / "source")
    (folder / "prompts.txt").write_text("a red circle on a blue background\nHello!\n")
    convert_checkpoint(folder / "source", folder / "fp8", Recipe(calib=folder / "prompts.txt"))
    return folder / "source", folder / "fp8"


def stage_of(load_peer: Callable[[str], Any], folder: Path, stage: str) -> Any:
    """Their config of a stage, made as their engine makes it: by vLLM first."""
    config = load_peer("vllm.config").ModelConfig(
        model=str(folder),
        skip_tokenizer_init=True,
        dtype="bfloat16",
        enforce_eager=True,
        hf_overrides={"architectures": [ARCHITECTURE]},
    )
    return load_peer("vllm_omni.config.model").OmniModelConfig.from_vllm_model_config(
        config, model_stage=stage, model_arch=ARCHITECTURE, hf_config_name=f"{stage}_config"
    )


@pytest.fixture(scope="module")
def language_model(
    load_peer: Callable[[str], Any], folders: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    """The language model of their thinker, built from our config and filled from our files by their loader."""
    vllm, state = load_peer("vllm.config"), load_peer("vllm.distributed.parallel_state")
    thinker = load_peer("vllm_omni.model_executor.models.qwen3_omni.qwen3_omni_moe_thinker")
    outer = getattr(load_peer("vllm_omni.model_executor.models.qwen3_omni.qwen3_omni"), ARCHITECTURE)
    modelopt = load_peer("vllm.model_executor.layers.quantization.modelopt")
    backend = load_peer("vllm.model_executor.layers.fused_moe.oracle.fp8").Fp8MoeBackend.TRITON
    config = stage_of(load_peer, folders[1], "thinker")
    text = config.hf_config.thinker_config.text_config
    text.tie_word_embeddings = False  # a newer transformers keeps it elsewhere
    whole = vllm.VllmConfig(model_config=config, device_config=vllm.DeviceConfig(device="cpu"))
    with pytest.MonkeyPatch.context() as patch, vllm.set_current_vllm_config(whole):
        patch.setattr(modelopt, "select_fp8_moe_backend", lambda **_: (backend, None))
        rendezvous = tmp_path_factory.mktemp("group") / "file"
        state.init_distributed_environment(1, 0, f"file://{rendezvous}", 0, "gloo")
        state.initialize_model_parallel(1, 1, backend="gloo")
        whole.quant_config.apply_vllm_mapper(outer.hf_to_vllm_mapper.get_rename_mapper())
        whole.quant_config.packed_modules_mapping.update(outer.packed_modules_mapping)
        torch.set_default_dtype(torch.bfloat16)
        try:
            inner = whole.with_hf_config(text, architectures=["Qwen3MoeForCausalLM"])
            with vllm.set_current_vllm_config(inner):
                model = thinker.Qwen3MoeLLMForCausalLM(vllm_config=inner, prefix="thinker.language_model")
                model.load_weights(iter(tensors_of(folders[1]).items()))
        finally:
            torch.set_default_dtype(torch.float32)
        yield model
    torch.distributed.destroy_process_group()


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """The tensors of the thinker's language model, as its class is given them."""
    tensors = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    own = ("thinker.model.", "thinker.lm_head.")
    return {name.removeprefix("thinker."): tensor for name, tensor in tensors.items() if name.startswith(own)}


def error(found: Tensor, expected: Tensor) -> float:
    difference = found.float() - expected.float()
    return float(difference.norm() / expected.float().norm())


def test_vllm_finds_the_block_and_ignores_the_other_stages(
    load_peer: Callable[[str], Any], folders: tuple[Path, Path]
) -> None:
    vllm = load_peer("vllm.config")
    for stage in ("thinker", "talker"):
        config = stage_of(load_peer, folders[1], stage)
        assert config.quantization == "modelopt"
        found = vllm.VllmConfig._get_quantization_config(config, vllm.LoadConfig())
        assert found.is_layer_excluded(f"{stage}.language_model.model.layers.0.self_attn.qkv_proj") == (
            stage == "talker"
        )


def test_attention_and_experts_are_built_quantized_and_routers_and_the_head_are_not(language_model: Any) -> None:
    methods = {
        name: type(module.quant_method).__name__
        for name, module in language_model.named_modules()
        if getattr(module, "quant_method", None) is not None and not name.endswith(".attn")
    }
    for block in ("model.layers.0", "model.layers.1"):
        assert methods[f"{block}.self_attn.qkv_proj"] == methods[f"{block}.self_attn.o_proj"] == "ModelOptLinearMethod"
        assert methods[f"{block}.mlp.experts.routed_experts"] == "ModelOptFp8MoEMethod"
        assert methods[f"{block}.mlp.gate"] == "UnquantizedLinearMethod"
    assert methods["lm_head"] == "UnquantizedLinearMethod"


def test_every_loaded_layer_stands_for_its_original(language_model: Any, folders: tuple[Path, Path]) -> None:
    original, stored = tensors_of(folders[0]), tensors_of(folders[1])
    loaded = dict(language_model.named_parameters())
    for block in ("model.layers.0", "model.layers.1"):
        parts = [original[f"{block}.self_attn.{leaf}_proj.weight"] for leaf in "qkv"]
        merged = loaded[f"{block}.self_attn.qkv_proj.weight"].float().split([len(part) for part in parts])
        scales = loaded[f"{block}.self_attn.qkv_proj.weight_scale"]
        for codes, scale, part in zip(merged, scales, parts, strict=True):
            assert error(codes * scale, part) < 0.03
        assert torch.equal(loaded[f"{block}.mlp.gate.weight"], original[f"{block}.mlp.gate.weight"])
        experts = f"{block}.mlp.experts.routed_experts"
        for number in range(4):
            gate, up = loaded[f"{experts}.w13_weight"][number].float().chunk(2)
            down = loaded[f"{experts}.w2_weight"][number].float() * loaded[f"{experts}.w2_weight_scale"][number]
            scale = loaded[f"{experts}.w13_weight_scale"][number]
            expert = f"{block}.mlp.experts.{number}"
            assert error(gate * scale[0], original[f"{expert}.gate_proj.weight"]) < 0.03
            assert error(up * scale[1], original[f"{expert}.up_proj.weight"]) < 0.03
            assert error(down, original[f"{expert}.down_proj.weight"]) < 0.03
            for parameter, leaf in (("w13", "gate"), ("w2", "down")):
                input_scale = stored[f"{expert}.{leaf}_proj.input_scale"]
                assert torch.equal(loaded[f"{experts}.{parameter}_input_scale"][number], input_scale)
    assert torch.equal(loaded["lm_head.weight"][:160], original["lm_head.weight"])
