"""The model that a config describes, on the meta device, where weights are only shapes; and its tensors' names."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch.nn.modules.module import register_module_module_registration_hook

from omni_convert.formats.containers.checkpoint import Checkpoint
from omni_convert.formats.containers.names import WEIGHT
from omni_convert.formats.families.stage import without_block
from omni_convert.formats.families.table import model_class
from omni_convert.formats.views.original_names import quiet

__all__ = ["built_model", "names_in_model", "stems_in_model"]

# A config with more layers or blocks is not believed; no real model has more.
LARGEST_COUNT = 1000
# Ten times those of the largest model; so many are built within seconds, whatever a config asks for.
MOST_MODULES = 50_000
COUNT = re.compile(r"layers|blocks|depth|num_.*layer")


def built_model(config: Mapping[str, Any]) -> torch.nn.Module | None:
    """The model of a config of diffusers or transformers, without weights; None if it cannot be built."""
    return _built(json.dumps(without_block(config), sort_keys=True))


def names_in_model(checkpoint: Checkpoint, config: Mapping[str, Any]) -> dict[str, str]:
    """A tensor's name in the file → its name in the model of transformers; {} for all other models."""
    if "_class_name" in config or "model_type" not in config:
        return {}
    model = built_model(config)
    if model is None:
        return {}
    from omni_convert.loaders.loading.transformers_quantizer import names_in_model as names_of

    return {spec.name: name for name, spec in names_of(dict(checkpoint), model).items()}


def stems_in_model(checkpoint: Checkpoint, config: Mapping[str, Any], stems: Iterable[str]) -> list[str]:
    """The names in the model of transformers of some layers of a file."""
    names = names_in_model(checkpoint, config)
    weights = (f"{stem}{WEIGHT}" for stem in stems)
    return [names[weight].removesuffix(WEIGHT) for weight in weights if weight in names]


@lru_cache(maxsize=1)
def _built(config: str) -> torch.nn.Module | None:
    """The model of a config without blocks, as JSON."""
    settings = json.loads(config)
    is_of_diffusers = "_class_name" in settings
    if not (is_of_diffusers or "model_type" in settings):
        return None
    try:
        if not _is_plausible(settings):
            return None
        with quiet("diffusers" if is_of_diffusers else "transformers"), _bounded(), torch.device("meta"):
            return _of_diffusers(settings) if is_of_diffusers else _of_transformers(settings)
    except Exception:  # noqa: BLE001  # constructors fail in any way with configs that nobody has tried
        return None


def _is_plausible(settings: Any, key: str = "") -> bool:
    """Whether every count of layers is one that a real model may have."""
    if isinstance(settings, Mapping):
        return all(_is_plausible(value, str(inner)) for inner, value in settings.items())
    if isinstance(settings, list):
        return all(_is_plausible(value, key) for value in settings)
    return not (isinstance(settings, int) and settings > LARGEST_COUNT and COUNT.search(key))


@contextmanager
def _bounded() -> Iterator[None]:
    """Raises once more modules are built than any model has: counts that are plausible alone may multiply."""
    built = 0

    def count(*_: object) -> None:
        nonlocal built
        built += 1
        if built > MOST_MODULES:
            raise RuntimeError(f"found more than {MOST_MODULES} modules, expected a model")

    hook = register_module_module_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


def _of_diffusers(config: Mapping[str, Any]) -> torch.nn.Module | None:
    import diffusers

    known = getattr(diffusers, model_class(config), None)
    if not (isinstance(known, type) and issubclass(known, diffusers.ModelMixin)):
        return None
    if config.keys().isdisjoint(inspect.signature(known).parameters):
        return None  # the config names the class, but no size
    built: torch.nn.Module = known.from_config(dict(config))  # type: ignore[attr-defined]  # diffusers is untyped
    return built


def _of_transformers(config: Mapping[str, Any]) -> torch.nn.Module | None:
    import transformers

    known = getattr(transformers, model_class(config), None)
    if not (isinstance(known, type) and issubclass(known, transformers.PreTrainedModel)) or "model_type" not in config:
        return None
    settings: Any = known.config_class  # type: ignore[attr-defined]  # mypy keeps `type`, for the class is not typed
    built: torch.nn.Module = known(settings.from_dict(dict(config)))
    return built
