"""The one list of model families."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from omni_convert.formats.containers.tensor_spec import TensorSpec
from omni_convert.formats.errors import quoted
from omni_convert.formats.families.bagel import BAGEL
from omni_convert.formats.families.cosmos_3 import COSMOS_3
from omni_convert.formats.families.derived_config import Shapes
from omni_convert.formats.families.family import Family, unknown_scope
from omni_convert.formats.families.flux_1 import FLUX_1
from omni_convert.formats.families.flux_2 import FLUX_2
from omni_convert.formats.families.full_precision import (
    CHROMA,
    ERNIE_IMAGE,
    HELIOS,
    HIDREAM_I1,
    HUNYUAN_IMAGE_21,
    KANDINSKY_5,
    KANDINSKY_6,
    KANDINSKY_6_SR,
    LONGCAT_IMAGE,
    OVIS_IMAGE,
    SANA_VIDEO,
    SD_3,
    WAN_ANIMATE,
    WAN_ANIMATE_2,
    WAN_S2V,
)
from omni_convert.formats.families.glm_image import GLM_IMAGE
from omni_convert.formats.families.hidream_o1 import HIDREAM_O1
from omni_convert.formats.families.hunyuan_image_3 import HUNYUAN_IMAGE_3
from omni_convert.formats.families.hunyuan_video import HUNYUAN_VIDEO_15
from omni_convert.formats.families.krea_2 import KREA_2
from omni_convert.formats.families.ltx import LTX_2, LTX_VIDEO
from omni_convert.formats.families.not_tabulated import (
    AURA_FLOW,
    COSMOS,
    FRAMEPACK,
    HUNYUAN_VIDEO,
    LUMINA_2,
    MINIMAX_H3,
    SANA_WM,
)
from omni_convert.formats.families.omnigen_2 import OMNIGEN_2
from omni_convert.formats.families.qwen_image import QWEN_IMAGE
from omni_convert.formats.families.qwen_image_21 import QWEN_IMAGE_21
from omni_convert.formats.families.qwen_omni import QWEN_2_5_OMNI, QWEN_3_OMNI, QWEN_3_TTS
from omni_convert.formats.families.sdxl import SDXL
from omni_convert.formats.families.wan import WAN
from omni_convert.formats.families.z_image import MING_IMAGE, Z_IMAGE

__all__ = ["FAMILIES", "family_of_tensors", "find_family", "model_class", "repository_class"]

FAMILIES = (
    Z_IMAGE,
    QWEN_IMAGE,
    QWEN_IMAGE_21,
    COSMOS_3,
    FLUX_1,
    FLUX_2,
    HUNYUAN_VIDEO_15,
    HUNYUAN_VIDEO,
    FRAMEPACK,
    WAN,
    GLM_IMAGE,
    LTX_2,
    LTX_VIDEO,
    HELIOS,
    SD_3,
    SDXL,
    LONGCAT_IMAGE,
    OVIS_IMAGE,
    SANA_VIDEO,
    ERNIE_IMAGE,
    CHROMA,
    HUNYUAN_IMAGE_21,
    WAN_ANIMATE,
    WAN_ANIMATE_2,
    WAN_S2V,
    KANDINSKY_5,
    KANDINSKY_6,
    KANDINSKY_6_SR,
    HIDREAM_I1,
    KREA_2,
    MINIMAX_H3,
    SANA_WM,
    AURA_FLOW,
    COSMOS,
    LUMINA_2,
    QWEN_3_OMNI,
    QWEN_2_5_OMNI,
    QWEN_3_TTS,
    HUNYUAN_IMAGE_3,
    BAGEL,
    HIDREAM_O1,
    OMNIGEN_2,
    MING_IMAGE,
)


def find_family(model_class: str) -> Family:
    """The family of a model class (`_class_name` or `architectures` of its config); the generic rule's if unknown."""
    for family in FAMILIES:
        if model_class in family.model_classes:
            return family
    return Family(
        "generic", (model_class,), refusals=unknown_scope(quoted(model_class) if model_class else "this model")
    )


def repository_class(named: str, has_tensor: Callable[[str], bool]) -> str:
    """The class of a repository whose config names this one, which is another if a tensor says so."""
    for family in FAMILIES:
        signature = family.stage.signature if family.stage is not None else None
        if signature is not None and signature[0] == named and has_tensor(signature[1]):
            return family.model_classes[0]
    return named


def family_of_tensors(stored: Mapping[str, TensorSpec]) -> Family | None:
    """The family whose tensors these are, under diffusers' names or original ones; None if they tell none."""
    for family in FAMILIES:
        shapes = Shapes(stored, family.known_names)
        if any(all(sign in shapes for sign in rule.signs) for rule in family.config):
            return family
    return None


def model_class(config: Mapping[str, Any]) -> str:
    """The class that a config names, or "unknown"."""
    architectures = config.get("architectures")
    named = [config.get("_class_name"), *(architectures if isinstance(architectures, list) else [])]
    return next((name for name in named if isinstance(name, str) and name), "unknown")
