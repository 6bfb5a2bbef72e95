"""Names packages that diffusers and transformers need for some models, and that are not installed."""

from __future__ import annotations

import re
from importlib.util import find_spec

from omni_convert.formats.errors import RecipeError

__all__ = ["missing_package"]

#: What the extra `pipelines` installs, by the name in messages.
PIPELINE_PACKAGES = ("ftfy", "sentencepiece", "soundfile", "soxr", "torchvision")


def missing_package(where: str, error: ImportError | NameError) -> RecipeError:
    """The user's error about a package that is not installed.

    Args:
        where: the pipeline or model that needs it
        error: how the library failed: it says what it needs, or uses a name that it could not import

    Raises:
        NameError: the name is no missing package's; this is a bug.
    """
    if isinstance(error, NameError) and (not error.name or find_spec(error.name) is not None):
        raise error
    message = str(error)
    words = re.findall(r"\w+", message.lower())
    named = (name for name in PIPELINE_PACKAGES if name in words)
    known = min(named, key=lambda name: find_spec(name) is not None, default=None)  # of several, one that is missing
    name = known or error.name
    if name is None:
        reason = next((line.strip() for line in message.splitlines() if line.strip()), type(error).__name__)
        return RecipeError(f"{where}: cannot run without packages that are not installed ({reason.rstrip('.')})")
    remedy = "pip install 'omni-convert[pipelines]'" if known else f"pip install {name}"
    return RecipeError(f"{where}: found no package {name}, which it needs; {remedy}")
