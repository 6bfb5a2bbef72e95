"""vLLM-Omni's thinker of Qwen3-Omni on our files: its configs, its language model, and its loader, without a GPU.

Kernels are not run: the mixture of experts names one of a GPU, and nothing is computed with it. Run by scripts/nightly.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from omni_convert.convert import Recipe, convert_checkpoint

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]  # warnings are their own affair


@pytest.fixture(scope="session", autouse=True)
def _peer_comes_first(peer: ModuleType) -> None: ...


@pytest.fixture(scope="module")
def place(peer: ModuleType) -> Any:
    return peer.STAGES["qwen_3_omni"]


@pytest.fixture(scope="module")
def folders(peer: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny Qwen3-Omni, and what becomes of it with static FP8."""
    import tiny_stages  # after `peer`

    folder = tmp_path_factory.mktemp("qwen-3-omni")
    tiny_stages.save_repository("qwen_3_omni", folder / "source")
    (folder / "prompts.txt").write_text("a red circle on a blue background\nHello!\n")
    convert_checkpoint(folder / "source", folder / "fp8", Recipe(calib=folder / "prompts.txt"))
    return folder / "source", folder / "fp8"


@pytest.fixture(scope="module")
def language_model(runtime: Any, place: Any, folders: tuple[Path, Path]) -> Any:
    """The language model of their thinker, built from our config and filled from our files by their loader."""
    return runtime.load(folders[1], place, "CUDA")


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """The tensors of the thinker's language model, as its class is given them."""
    tensors = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    own = ("thinker.model.", "thinker.lm_head.")
    return {name.removeprefix("thinker."): tensor for name, tensor in tensors.items() if name.startswith(own)}


def error(found: Tensor, expected: Tensor) -> float:
    difference = found.float() - expected.float()
    return float(difference.norm() / expected.float().norm())


def test_vllm_finds_the_block_and_ignores_the_other_stages(
    runtime: Any, place: Any, folders: tuple[Path, Path]
) -> None:
    vllm = importlib.import_module("vllm.config")
    for stage in ("thinker", "talker"):
        config = runtime.stage_config(folders[1], place, stage)
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
