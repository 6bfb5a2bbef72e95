"""FLUX.2 against tables copied from the runtime by hand."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from transformers import Mistral3Config

from omni_convert.formats.families.flux_2 import FLUX_2

CheckLayers = Callable[..., None]

QKV = ("to_q", "to_k", "to_v")
ADDED = ("add_q_proj", "add_k_proj", "add_v_proj")
DOUBLE_STREAM = {"attn.to_qkv": QKV, "attn.add_kv_proj": ADDED, "attn.to_out.0": (), "attn.to_add_out": ()}
SINGLE: dict[str, tuple[str, ...]] = {"attn.to_qkv_mlp_proj": (), "attn.to_out": ()}


def test_layers_and_their_members(check_layers: CheckLayers) -> None:
    double = DOUBLE_STREAM | {f"{ff}.{leaf}": () for ff in ("ff", "ff_context") for leaf in ("linear_in", "linear_out")}
    check_layers(
        "Flux2Transformer2DModel",
        {
            **{f"transformer_blocks.{number}": double for number in range(2)},
            **{f"single_transformer_blocks.{number}": SINGLE for number in range(2)},
        },
        never=(
            "double_stream_modulation_img.linear",
            "double_stream_modulation_txt.linear",
            "single_stream_modulation.linear",
            "x_embedder",
            "context_embedder",
            "time_guidance_embed.timestep_embedder.linear_1",
            "norm_out.linear",
            "proj_out",
        ),
    )


def test_encoder_names_of_dev_come_from_the_nested_text_config() -> None:
    config = Mistral3Config().to_dict()
    count = config["text_config"]["num_hidden_layers"]
    names = set(FLUX_2.shared_encoder_layers(config))
    layers = "text_encoder.language_model.model.layers"
    # The runtime asks for 4 merged layers each; the parts are listed besides.
    assert {
        f"{layers}.{number}.{leaf}"
        for number in range(count)
        for leaf in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    } <= names
    assert len(names) == 9 * count


def test_layers_that_the_encoder_stores_quantized_are_not_listed() -> None:
    config = Mistral3Config(text_config={"model_type": "mistral", "num_hidden_layers": 1}).to_dict()
    layer = "language_model.model.layers.0"
    attention = {f"{layer}.self_attn.{part}_proj" for part in "qkvo"}
    mlp = {f"{layer}.mlp.{part}_proj" for part in ("gate", "up", "down")}
    assert FLUX_2.shared_encoder_layers(config, attention | mlp) == ()
    # A merged layer that is not stored quantized as a whole is not stored quantized at all.
    assert set(FLUX_2.shared_encoder_layers(config, (attention | mlp) - {f"{layer}.mlp.up_proj"})) == {
        f"text_encoder.{layer}.mlp.{part}_proj" for part in ("gate_up", "gate", "up")
    }


def test_the_encoder_of_klein_shares_nothing(tiny_model: Callable[[str, str], nn.Module]) -> None:
    klein = tiny_model("transformers", "Qwen3ForCausalLM").config.to_dict()
    assert FLUX_2.shared_encoder_layers(klein) == ()
