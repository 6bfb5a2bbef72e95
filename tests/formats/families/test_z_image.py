"""Z-Image against tables copied from the runtime by hand."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from omni_convert.formats.families.z_image import Z_IMAGE

CheckLayers = Callable[..., None]

QKV = ("to_q", "to_k", "to_v")
BLOCK = {
    "attention.to_qkv": QKV,
    "attention.to_out.0": (),
    "feed_forward.w13": ("w1", "w3"),
    "feed_forward.w2": (),
}


def test_layers_and_their_members(check_layers: CheckLayers) -> None:
    check_layers(
        "ZImageTransformer2DModel",
        dict.fromkeys(("layers.0", "layers.1", "noise_refiner.0", "context_refiner.0"), BLOCK),
        never=(
            "layers.0.adaLN_modulation.0",
            "t_embedder.mlp.0",
            "t_embedder.mlp.2",
            "cap_embedder.1",
            "all_x_embedder.2-1",
            "all_final_layer.2-1.linear",
            "all_final_layer.2-1.adaLN_modulation.1",
        ),
    )


def test_encoder_names_are_all_linears_of_the_causal_model(tiny_model: Callable[[str, str], nn.Module]) -> None:
    encoder = tiny_model("transformers", "Qwen3ForCausalLM")
    linears = {name for name, module in encoder.named_modules() if isinstance(module, nn.Linear)}
    names = Z_IMAGE.shared_encoder_layers(encoder.config.to_dict())
    assert set(names) == linears
    assert len(names) == len(linears)
