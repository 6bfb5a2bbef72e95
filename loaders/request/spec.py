"""Turns a user's `quantization=` into a configuration, by the rules of vLLM-Omni's `build_quant_config`."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, fields
from os import PathLike
from typing import Any

from omni_convert.formats.config import ACTIVATION_SCHEMES, QuantizationConfig
from omni_convert.formats.dialects import auto_round, modelopt_config
from omni_convert.formats.dialects.vllm_omni import meant_options
from omni_convert.formats.errors import CheckpointError, RecipeError, did_you_mean
from omni_convert.formats.options import check_group_size
from omni_convert.formats.schemes.gguf import Gguf
from omni_convert.formats.table import LOADABLE

__all__ = [
    "CalibratedConfig",
    "ComponentQuantizationConfig",
    "GgufModel",
    "QuantConfigTypeError",
    "QuantConfigValueError",
    "QuantizationSpec",
    "build_quant_config",
    "resolve_component_quant_config",
]

METHOD_KEYS = ("method", "quant_method")
DEFAULT_COMPONENT = "default"
# transformers' word for `ignored_layers`; it counts if that is empty.
IGNORED_ALIAS = "modules_to_not_convert"
# Normalised names for which vLLM-Omni has one builder.
AUTO_ROUND_ALIASES = ("inc", *(method.replace("-", "_") for method in auto_round.AUTO_ROUND_METHODS))
# Keys of ModelOpt's blocks, which do not name components.
MODELOPT_KEYS = ("producer", "quantization", "quant_algo")


class QuantConfigValueError(RecipeError, ValueError):
    """A quantization spec has no method or an unknown one; vLLM-Omni raises ValueError."""


class QuantConfigTypeError(RecipeError, TypeError):
    """A quantization spec has a wrong type or unknown options; vLLM-Omni raises TypeError."""


@dataclass(frozen=True)
class CalibratedConfig(QuantizationConfig):
    """A request for static activations whose scales come from a statistics file.

    Attributes:
        input_scales: path of the file that `omni-convert calibrate` writes
        component: the component of the pipeline whose layers the file names
    """

    input_scales: str = ""
    component: str = "transformer"

    @property
    def stored(self) -> QuantizationConfig:
        """The configuration of the layers that result, which do not know the file."""
        return QuantizationConfig(**{option.name: getattr(self, option.name) for option in fields(QuantizationConfig)})


@dataclass(frozen=True)
class GgufModel(QuantizationConfig):
    """A component whose weights come from a GGUF file elsewhere.

    Attributes:
        gguf_model: the path of a file, or on the Hub `OWNER/NAME/PATH.gguf` or `OWNER/NAME:TYPE`
    """

    gguf_model: str = ""


@dataclass(frozen=True)
class ComponentQuantizationConfig:
    """One configuration per component.

    Attributes:
        component_configs: component name (or a prefix of it) to configuration; None leaves the component as it is
        default_config: for components that no key matches
    """

    component_configs: Mapping[str, QuantizationConfig | None]
    default_config: QuantizationConfig | None = None
    name: str = field(default="component", init=False)

    def resolve(self, prefix: str) -> QuantizationConfig | None:
        """The configuration under the longest key that `prefix` starts with, else the default.

        Keys match without regard to dots, as in vLLM-Omni: `transformer` also means `transformer_2`.
        """
        for key in sorted(self.component_configs, key=len, reverse=True):
            if prefix.startswith(key):
                return self.component_configs[key]
        return self.default_config


QuantizationSpec = str | Mapping[str, Any] | QuantizationConfig | ComponentQuantizationConfig | None


def build_quant_config(
    spec: QuantizationSpec, **kwargs: Any
) -> QuantizationConfig | ComponentQuantizationConfig | None:
    """Builds a configuration.

    Args:
        spec: None or "none"; a method's name; a dict with `method` (or `quant_method`) and options; a dict of specs by
            component, with `default` for the others; or a configuration, which is returned unchanged
        kwargs: options that override the ones in `spec`

    Raises:
        QuantConfigValueError: the spec has no method, or an unknown one.
        QuantConfigTypeError: the spec has another type, or unknown options.
    """
    if spec is None or isinstance(spec, QuantizationConfig | ComponentQuantizationConfig):
        return spec
    if isinstance(spec, str):
        return None if spec.lower() == "none" else _build_single(spec, kwargs)
    if not isinstance(spec, Mapping):
        raise QuantConfigTypeError(f"quantization: found {type(spec).__name__}, expected a string, a dict or None")
    _check_keys(spec)
    if _is_by_component(spec):
        return _build_components(spec)
    return _build_from_options(spec, kwargs)


def resolve_component_quant_config(
    config: QuantizationConfig | ComponentQuantizationConfig | None, name: str
) -> QuantizationConfig | None:
    """The configuration of one component. A configuration that is not by component is the same for all."""
    return config.resolve(name) if isinstance(config, ComponentQuantizationConfig) else config


def _check_keys(spec: Mapping[Any, Any]) -> None:
    for key, value in spec.items():
        if not isinstance(key, str):
            raise QuantConfigTypeError(f"quantization: found the key {key!r:.40}, expected names of options")
        if isinstance(value, Mapping):
            _check_keys(value)


def _is_by_component(spec: Mapping[str, Any]) -> bool:
    if any(key in spec for key in METHOD_KEYS) or not spec:
        return False
    values = list(spec.values())
    return all(value is None or isinstance(value, str | Mapping) for value in values) and any(
        value is None or (isinstance(value, Mapping) and any(key in value for key in METHOD_KEYS)) for value in values
    )


def _build_components(spec: Mapping[str, Any]) -> ComponentQuantizationConfig:
    configs = {component: _build_component(component, value) for component, value in spec.items()}
    default = configs.pop(DEFAULT_COMPONENT, None)
    return ComponentQuantizationConfig(configs, default)


def _build_component(component: str, value: Any) -> QuantizationConfig | None:
    if value is None:
        return None
    if isinstance(value, str):
        return _build_single(value, {})
    if not any(value.get(key) for key in METHOD_KEYS):
        raise QuantConfigValueError(_lacks_method(component, value))
    return _build_from_options(value, {})


def _build_from_options(spec: Mapping[str, Any], kwargs: Mapping[str, Any]) -> QuantizationConfig:
    if modelopt_config.is_export(spec):
        return _read_modelopt(spec)
    options = dict(spec)
    name = options.pop("method", None)
    if name is None:  # a `quant_method` beside a `method` is an option, and unknown
        name = options.pop("quant_method", None)
    if name is None:
        raise QuantConfigValueError(_found_no_method(spec))
    merged = {**options, **kwargs}
    named = {"quant_method": name, **merged}
    return _read_modelopt(named) if modelopt_config.is_export(named) else _build_single(str(name), merged)


def _found_no_method(spec: Mapping[str, Any]) -> str:
    """The message, which also covers a spec by component with a mistyped key, or with a method's name alone."""
    suggested = _suggested(spec, METHOD_KEYS)
    is_one = bool(suggested) or not spec.keys().isdisjoint(MODELOPT_KEYS)
    for component, value in () if is_one else spec.items():
        if isinstance(value, str) and _normalised(value) in (*LOADABLE, *AUTO_ROUND_ALIASES):
            found = f"'{value}' of '{component}'"
            return f"quantization: found {found}, expected {{'{component}': {{'method': '{value}'}}}}"
        if isinstance(value, Mapping):
            return _lacks_method(component, value)
    return f"quantization: found no 'method' in {sorted(spec)!r:.80}, expected one{suggested}"


def _lacks_method(component: str, value: Mapping[str, Any]) -> str:
    found = f"found {sorted(value)!r:.80}{_suggested(value, METHOD_KEYS)}"
    return f"quantization: component '{component}' has no 'method', {found}"


def _suggested(names: Iterable[str], known: Collection[str]) -> str:
    return next((hint for name in names if (hint := did_you_mean(name, known))), "")


def _normalised(method: str) -> str:
    return method.lower().replace("-", "_")


def _read_modelopt(spec: Mapping[str, Any]) -> QuantizationConfig:
    try:
        return modelopt_config.from_export(spec, "quantization")
    except CheckpointError as error:
        raise QuantConfigValueError(str(error)) from None


def _build_single(name: str, options: Mapping[str, Any]) -> QuantizationConfig:
    method = _normalised(name)
    if method in AUTO_ROUND_ALIASES:
        return _build_auto_round(name, options)
    if method == Gguf.method:
        return _build_gguf(options)
    if method not in LOADABLE:
        expected = (
            f"expected one of {', '.join((*LOADABLE, *AUTO_ROUND_ALIASES))}, or what ModelOpt or vLLM-Omni writes"
        )
        raise QuantConfigValueError(f"quantization: found method '{name[:64]}', {expected} into config.json")
    meant = _meant_options(method, options)
    if (input_scales := meant.pop("input_scales", None)) is not None:
        return _build_calibrated(method, meant, input_scales)
    meant = {"activation_scheme": _uncalibrated_scheme(method)} | meant
    signature = inspect.signature(QuantizationConfig)
    known = sorted(set(signature.parameters) - {"method", "layers"})
    unknown = sorted(set(meant) - {*known})
    if unknown:
        raise QuantConfigTypeError(
            f"quantization: '{method}' has no option {', '.join(unknown)}, expected {signature}"
            f"{_suggested(unknown, known)}"
        )
    try:
        check_group_size(meant.get("group_size"), "group_size")
        return QuantizationConfig(method, **meant)
    except RecipeError as error:
        raise QuantConfigValueError(f"quantization: {error}") from None
    except TypeError:
        raise QuantConfigTypeError(
            f"quantization: found {dict(options)!r:.80} of wrong types, expected {signature}"
        ) from None


def _build_calibrated(method: str, meant: Mapping[str, Any], input_scales: Any) -> CalibratedConfig:
    if not isinstance(input_scales, str | PathLike) or not str(input_scales):
        raise QuantConfigTypeError(f"quantization: found input_scales {input_scales!r:.40}, expected a statistics file")
    if "static" not in ACTIVATION_SCHEMES[method] or meant.get("activation_scheme", "static") != "static":
        found = meant.get("activation_scheme", method)
        raise QuantConfigValueError(
            f"quantization: found input_scales with {found}, expected a method with static activations, fp8 or nvfp4"
        )
    config = _build_single(method, {**meant, "activation_scheme": "static"})
    known = {option.name: getattr(config, option.name) for option in fields(QuantizationConfig)}
    return CalibratedConfig(**known, input_scales=str(input_scales))


def _build_gguf(options: Mapping[str, Any]) -> GgufModel:
    model, *others = options.get("gguf_model"), *sorted(options.keys() - {"gguf_model"})
    if others:
        raise QuantConfigTypeError(
            f"quantization: 'gguf' has no option {', '.join(others)}, expected gguf_model alone"
            f"{_suggested(others, ['gguf_model'])}"
        )
    if not isinstance(model, str | PathLike) or not str(model):
        raise QuantConfigValueError(
            f"quantization: found method 'gguf' with gguf_model {model!r:.40}, expected the path of a .gguf file, or "
            "OWNER/NAME/FILE.gguf or OWNER/NAME:TYPE on the Hub"
        )
    return GgufModel(Gguf.method, "none", gguf_model=str(model))


def _build_auto_round(name: str, options: Mapping[str, Any]) -> QuantizationConfig:
    """Accepts the options that vLLM-Omni knows and drops the others, as it does."""
    block = {"bits": options.get("weight_bits"), **options, "quant_method": auto_round.AUTO_ROUND_METHODS[0]}
    if block["bits"] is None or "group_size" not in block:
        raise QuantConfigTypeError(f"quantization: found '{name}' without bits and group_size, expected both")
    try:
        check_group_size(block["group_size"], "group_size")
    except RecipeError as error:
        raise QuantConfigValueError(f"quantization: {error}") from None
    config = auto_round.from_block(block)
    if config is None:
        raise QuantConfigValueError(
            f"quantization: found '{name}' of another kind than W4A16 in GPTQ's packing, expected bits 4 and the "
            "exceptions in 16; for others pass diffusers' AutoRoundConfig"
        )
    return config


def _meant_options(method: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options without those that only the runtime's constructors need.

    Raises:
        QuantConfigValueError: one of those asks for a feature that we do not have.
        QuantConfigTypeError: names of layers are not a list.
    """
    try:
        meant = meant_options(method, options)
    except RecipeError as error:
        raise QuantConfigValueError(f"quantization: {error}") from None
    ignored = meant.pop("ignored_layers", None) or meant.pop(IGNORED_ALIAS, None) or ()
    meant.pop(IGNORED_ALIAS, None)
    if not isinstance(ignored, list | tuple) or not all(isinstance(pattern, str) for pattern in ignored):
        raise QuantConfigTypeError(f"quantization: found ignored_layers {ignored!r:.40}, expected a list of names")
    blocks = meant.get("weight_block_size")
    return meant | {
        "ignored_layers": tuple(ignored),
        **({"weight_block_size": tuple(blocks)} if isinstance(blocks, list) else {}),
    }


def _uncalibrated_scheme(method: str) -> str:
    """The default scheme that needs no calibration, since quantizing while loading has none."""
    return next(scheme for scheme in ACTIVATION_SCHEMES[method] if scheme != "static")
