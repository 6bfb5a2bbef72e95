"""Text encoders that a serving runtime builds with the transformer's method, from the transformer's block."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from omni_convert.convert.recipe import Recipe
from omni_convert.convert.source.component_folder import ComponentFolder
from omni_convert.convert.source.location import Source
from omni_convert.formats.errors import RecipeError
from omni_convert.formats.families.family import Family
from omni_convert.formats.families.layers import COMFYUI, VLLM_OMNI

__all__ = ["check_encoder", "unquantized_encoder_layers"]


def check_encoder(source: Source, methods: Mapping[str, str], recipe: Recipe) -> None:
    """Refuses a method for the text encoder that the runtime would not build it with.

    Args:
        methods: component → method, for the components that are quantized

    Raises:
        RecipeError: the encoder shares the transformer's block, but the recipe gives it another method; or the runtime
            runs it with transformers, unquantized.
    """
    encoder, denoiser = methods.get("text_encoder"), methods.get("transformer")
    if recipe.is_transcoding or encoder is None or not (source.path / "transformer").is_dir():
        return
    if recipe.runtime == COMFYUI:  # it loads each component from a file of its own
        return
    family = ComponentFolder(source, "transformer").family
    is_shared = bool(unquantized_encoder_layers(source, family))
    if is_shared and encoder != denoiser:
        raise RecipeError(
            f"--component text_encoder={encoder}: the runtime builds this text encoder with the transformer's method, "
            f"found {denoiser or 'none'}; use the same one for both"
        )
    stays = family.shared_encoder.stays if family.shared_encoder is not None else None
    if is_shared and stays is not None and recipe.runtime == VLLM_OMNI:
        raise RecipeError(f"--component text_encoder={encoder}: {stays}; use --runtime diffusers for our loader")
    if not is_shared and recipe.runtime == VLLM_OMNI:
        raise RecipeError(
            f"--component text_encoder={encoder}: vllm-omni runs this text encoder unquantized; "
            "use --runtime diffusers for our loader"
        )


def unquantized_encoder_layers(source: Source, family: Family, quantized: Collection[str] = ()) -> list[str]:
    """The text encoder's layers that the transformer's block must list, since they are not stored quantized.

    Args:
        family: the family of the transformer
        quantized: stems of the encoder's layers that are stored quantized
    """
    encoder = ComponentFolder(source, "text_encoder")
    return list(family.shared_encoder_layers(encoder.config, quantized)) if encoder.has_config else []
