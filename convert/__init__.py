"""A checkpoint becomes another: recipe → plan → execute; calibration; comparison; the command line.

    from omni_convert.convert import Recipe, convert_checkpoint
    report = convert_checkpoint("Tongyi-MAI/Z-Image-Turbo", "out", Recipe(method="fp8"))

The names below are imported when they are first used: `omni-convert --help` must not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omni_convert.convert.calibration.pipeline_recorder import calibrate
    from omni_convert.convert.comparison.comparison import compare
    from omni_convert.convert.conversion import convert_checkpoint
    from omni_convert.convert.output.upload import push_to_hub
    from omni_convert.convert.recipe import Recipe

__all__ = ["Recipe", "calibrate", "compare", "convert_checkpoint", "push_to_hub"]

# No module is called like a name here: importing it would put the module in that name's place.
_MODULES = {
    "Recipe": "recipe",
    "calibrate": "calibration.pipeline_recorder",
    "compare": "comparison.comparison",
    "convert_checkpoint": "conversion",
    "push_to_hub": "output.upload",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
