"""Checks that a component has the tensors of the model that its config describes: no more, no fewer.

The class is built on the meta device, where weights are shapes. What cannot be built, or has other names than the class
gives, is left alone: silence says nothing, a false alarm would say something wrong.
"""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from omni_convert.convert.component_weights import model_class
from omni_convert.formats.finding import Finding
from omni_convert.formats.leaf import COMPANIONS
from omni_convert.formats.lenient import LenientReading

__all__ = ["check_names"]

# Of layers and blocks: a config with more was not made by anybody who has such a model.
LARGEST_COUNT = 1000
COUNT = re.compile(r"layers|blocks|depth|num_.*layer")
#: Names that libraries translate while they load: of attention in old VAEs of diffusers.
TRANSLATED = re.compile(r"\.(query|key|value|proj_attn)\.(weight|bias)$")
# In whatever way a constructor fails with a config that it does not know, or on a device without numbers.
FAILURES = (TypeError, ValueError, LookupError, RuntimeError, AttributeError, ImportError, AssertionError, OSError)


@dataclass(frozen=True)
class _Expected:
    """What a class has.

    Attributes:
        parameters: that its files hold, each once
        names: of everything in its state
        optional: patterns of names that may be missing or left over
    """

    parameters: Collection[str]
    names: Collection[str]
    optional: tuple[str, ...]
    is_of_diffusers: bool


def check_names(reading: LenientReading, config: Mapping[str, Any]) -> Iterator[Finding]:
    """Tensors that are missing, and tensors that the model has no use for.

    Args:
        config: of the component; {} if there is none
    """
    kept = [name for name in reading.quantized.kept if name.rpartition(".")[2] not in COMPANIONS]
    found = {*kept, *(f"{stem}.weight" for stem in reading.shapes)}
    expected = _expected(config)
    if expected is None or 2 * len(found & {*expected.names}) < len(found):
        return
    optional = re.compile("|".join(f"(?:{pattern})" for pattern in expected.optional) or r"(?!)")
    damaged = {finding.layer for finding in reading.findings}
    missing = [
        name
        for name in expected.parameters
        if name not in found and not optional.search(name) and not _is_of(name, damaged)
    ]
    unknown = [name for name in kept if name not in expected.names and not optional.search(name)]
    if missing and _may_be_translated(unknown, expected):
        return
    yield from (_missing(name, model_class(config)) for name in missing)
    yield from (_unknown(name, model_class(config)) for name in unknown if not _is_of(name, damaged))


def _is_of(name: str, layers: Collection[str]) -> bool:
    return name in layers or name.rpartition(".")[0] in layers


def _may_be_translated(unknown: Collection[str], expected: _Expected) -> bool:
    """Whether what is missing may be there under a name that the library translates; transformers has many such."""
    return bool(unknown) and (not expected.is_of_diffusers or any(map(TRANSLATED.search, unknown)))


def _missing(name: str, class_name: str) -> Finding:
    return Finding(
        "error", "missing-tensor", name, f"found none, expected it in {class_name} as config.json describes it",
        "every runtime: refuses the model, or leaves the tensor unset", "download or convert it again",
    )  # fmt: skip


def _unknown(name: str, class_name: str) -> Finding:
    return Finding(
        "warning", "unknown-names", name, f"found it, but {class_name} as config.json describes it has no such tensor",
        "vLLM-Omni: a KeyError for some models; diffusers, transformers: drop it", "remove it, or correct config.json",
    )  # fmt: skip


def _expected(config: Mapping[str, Any]) -> _Expected | None:
    """What the class of a config has; None if that cannot be told."""
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    if not _is_plausible(plain):
        return None
    try:
        with _quietly(), torch.device("meta"):
            model = _of_diffusers(plain) if "_class_name" in plain else _of_transformers(plain)
    except FAILURES:
        return None
    if model is None:
        return None
    patterns = (getattr(model, f"_keys_to_ignore_on_load_{kind}", None) or () for kind in ("missing", "unexpected"))
    tied = getattr(model, "_tied_weights_keys", None) or ()
    return _Expected(
        [name for name, _ in model.named_parameters()],
        model.state_dict().keys(),
        (*(pattern for group in patterns for pattern in group), *tied),
        "_class_name" in plain,
    )


def _is_plausible(settings: Any) -> bool:
    """Whether a model of these settings is built in no time."""
    if not isinstance(settings, Mapping):
        return True
    counts = (value for key, value in settings.items() if COUNT.search(str(key)) and isinstance(value, int))
    return all(count <= LARGEST_COUNT for count in counts) and all(map(_is_plausible, settings.values()))


def _of_diffusers(config: Mapping[str, Any]) -> torch.nn.Module | None:
    import diffusers

    known = getattr(diffusers, model_class(config), None)
    if not (isinstance(known, type) and issubclass(known, diffusers.ModelMixin)):
        return None
    if config.keys().isdisjoint(inspect.signature(known).parameters):
        return None  # it tells the class, and nothing of its size
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


@contextmanager
def _quietly() -> Iterator[None]:
    """Without what the libraries say about configs of other versions."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    levels = of_diffusers.get_verbosity(), of_transformers.get_verbosity()
    of_diffusers.set_verbosity_error()
    of_transformers.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of initialisations that do nothing on this device
            yield
    finally:
        of_diffusers.set_verbosity(levels[0])
        of_transformers.set_verbosity(levels[1])
