"""Fixtures that tests of several packages share."""

from __future__ import annotations

import importlib
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

if not Path("/dev/nvidiactl").exists():
    # Triton reads it when it is imported, which torch does: without a GPU, kernels run in its interpreter on the CPU.
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Processes that share the tests are given a width of 80, which would wrap and shorten what is tested.
os.environ.pop("COLUMNS", None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts modelopt's tests first: once msmodelslim is imported, pydantic refuses modelopt's own presets."""
    items.sort(key=lambda item: item.path.name != "test_modelopt.py")


@pytest.fixture(scope="session")
def import_peer() -> Callable[[str], ModuleType]:
    """A function of a name: a module of another project. Without it the test is skipped, or fails in scripts/check."""
    give_up = pytest.fail if os.environ.get("OMNI_CONVERT_REQUIRE_PEERS") else pytest.skip

    def load(name: str) -> ModuleType:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they are its own affair
            try:
                return importlib.import_module(name)
            except ImportError as error:
                give_up(f"{name} is not installed ({error}); scripts/install interop")

    return load


@pytest.fixture(scope="session")
def tiny_pipeline_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved `ZImagePipeline` in bfloat16 with random weights (7 MB): real classes, real names, tiny sizes.

    Read-only: copy it before changing anything. Widths are 192 and 512 in the transformer, 64 and 128 in the text
    encoder, so that every format takes every layer.
    """
    import torch

    folder = tmp_path_factory.mktemp("models") / "tiny-z-image"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipeline = _build_pipeline().to(torch.bfloat16)
    pipeline.save_pretrained(folder)
    defaults = {"height": 32, "width": 32, "num_inference_steps": 2, "guidance_scale": 2.0}
    (folder / "generation_defaults.json").write_text(json.dumps(defaults))
    return folder


@pytest.fixture(scope="session")
def wide_flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A FLUX.1 transformer with random weights and biases, whose layers are multiples of 128 wide; read-only."""
    import torch
    from diffusers import FluxTransformer2DModel

    folder = tmp_path_factory.mktemp("models") / "transformer"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = FluxTransformer2DModel(
            in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=64, num_attention_heads=2,
            joint_attention_dim=64, pooled_projection_dim=32, axes_dims_rope=(16, 24, 24),
        )  # fmt: skip
        model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def _build_pipeline():  # type: ignore[no-untyped-def]  # diffusers is imported only by tests that use it
    import torch
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer = _build_tokenizer()
    text_encoder = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=32,
            max_position_embeddings=512,
            tie_word_embeddings=False,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
    )
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=192,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=3,
        n_kv_heads=3,
        cap_feat_dim=64,
        axes_dims=[16, 24, 24],
        axes_lens=[640, 32, 32],
    )
    for pad_token in (
        transformer.x_pad_token,
        transformer.cap_pad_token,
    ):  # they start at zero; trained ones do not stay there
        torch.nn.init.normal_(pad_token, std=0.02)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(16, 32),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=32,
        mid_block_add_attention=False,
        scaling_factor=0.5,
        shift_factor=0.0,
    )
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=transformer,
    )


def _build_tokenizer():  # type: ignore[no-untyped-def]  # as above
    """Byte-level without merges: one token a byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(special + alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.add_special_tokens(special)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        padding_side="right",
        model_max_length=512,
        chat_template="{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}",
    )
