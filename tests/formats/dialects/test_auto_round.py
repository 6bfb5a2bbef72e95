"""The config block of AutoRound."""

from __future__ import annotations

from omni_convert.formats.dialects.auto_round import to_block


def test_an_exception_never_ends_as_a_quantized_layer_does() -> None:
    layers = ("single_transformer_blocks.0.proj_out", "single_transformer_blocks.0.proj_mlp")
    block = to_block(64, layers, ("proj_out", "x_embedder", "transformer_blocks.0.ff.net.2"))
    assert set(block["extra_config"]) == {"x_embedder", "transformer_blocks.0.ff.net.2"}
    assert block["block_name_to_quantize"] == "single_transformer_blocks"
