"""How vLLM-Omni spells a config block: the value of `quantization_config` in a component's `config.json`.

fp8              {"quant_method": "fp8", "activation_scheme": "dynamic"|"static", "is_checkpoint_fp8_serialized": true,
                  "weight_block_size": [N, K] (only for blocks), "ignored_layers": [...]}
int8             {"quant_method": "int8", "is_checkpoint_int8_serialized": true, "activation_scheme": "dynamic", ...}
mxfp8            {"quant_method": "mxfp8", "is_checkpoint_mxfp8_serialized": true, "ignored_layers": [...]}
mxfp4            {"quant_method": "mxfp4", "is_checkpoint_mxfp4_serialized": true, "require_smooth_scale": false, ...}
mxfp4_dualscale  {"quant_method": "mxfp4_dualscale", "is_checkpoint_serialized": true, ...}   no "mxfp4" in this flag
fp8_storage      {"quant_method": "fp8_storage", "is_checkpoint_fp8_storage_serialized": true, ...}   our loader's alone
nvfp4            ModelOpt's block, see `modelopt_config.py`; so fp8 per channel, and layers of several formats;
                 ModelOpt's "FP8", which is `fp8` with static activations, is read as well

All but ModelOpt's are keyword arguments of a constructor (0.30.0): one unknown key is a TypeError, and a flag that is
left out means *online* quantization, which takes the stored codes for weights and quantizes them again, silently.
Names are compared exactly, except by ModelOpt, which also reads an entry as a pattern or a *part* of a name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from omni_convert.formats.config import ACTIVATION_SCHEMES, QuantizationConfig
from omni_convert.formats.dialects.base import Dialect, Found, JudgedComponent, LayerError, StoredLayer, WrittenSpelling
from omni_convert.formats.dialects.block_findings import FIX_BLOCK, block_mismatch, unknown_keys
from omni_convert.formats.dialects.modelopt_config import (
    MODELOPT,
    from_modelopt,
    read_names,
    shown,
    to_modelopt,
)
from omni_convert.formats.dialects.verdict import DIFFUSERS, OURS, UNMARKED, Verdict
from omni_convert.formats.dialects.verdict import VLLM_OMNI as RUNTIME
from omni_convert.formats.errors import CheckpointError, OmniConvertError, RecipeError, did_you_mean
from omni_convert.formats.families.layers import LayerGroup
from omni_convert.formats.finding import Finding
from omni_convert.formats.format import Format, QuantizingFormat
from omni_convert.formats.options import DIALECT_OF_METHOD, DIALECTS_OF_METHOD
from omni_convert.formats.schemes.fp8 import FP8_PER_ROW, Fp8, fp8_block_size
from omni_convert.formats.table import layer_formats

__all__ = [
    "MODELOPT",
    "VLLM_OMNI",
    "WRAPPED",
    "config_of",
    "flaw_of_block",
    "from_block",
    "ignored_names",
    "meant_options",
    "missing_flag",
    "serialized_flag",
    "to_block",
    "vllm_omni_verdict",
    "wrapped",
]

CONSUMER = "vLLM-Omni"
#: `quant_method` of the block that wraps ours for components that transformers loads; see `omni_convert.py`.
WRAPPED = "omni_convert"
ASCEND_METHODS = ("mxfp8", "mxfp4", "mxfp4_dualscale")


@dataclass(frozen=True)
class _Spelling:
    """How a method's block is spelled.

    Attributes:
        flag: the key that declares that the weights are stored quantized
        keys: the other keys that carry meaning
        idle: keys of the constructor that we never write, and the values with which they mean nothing to a loader
        online: keys of `idle` that quantization while loading honours unless they are 0, and the remedy to suggest
    """

    flag: str
    keys: tuple[str, ...] = ("ignored_layers",)
    idle: Mapping[str, Callable[[Any], bool]] = field(default_factory=dict)
    online: Mapping[str, str] = field(default_factory=dict)


def _is_empty(value: Any) -> bool:
    return value is None or value == []


_SPELLINGS = {
    "fp8": _Spelling(
        "is_checkpoint_fp8_serialized",
        ("activation_scheme", "weight_block_size", "ignored_layers"),
        {"store_dtype": lambda value: value is None},
    ),
    "int8": _Spelling("is_checkpoint_int8_serialized", ("activation_scheme", "ignored_layers")),
    "mxfp8": _Spelling("is_checkpoint_mxfp8_serialized"),
    "mxfp4": _Spelling(
        "is_checkpoint_mxfp4_serialized",
        ("require_smooth_scale", "ignored_layers"),
        {
            "mxfp4_scale_alg": lambda value: type(value) is int and value == 0,
            "w4a8_fallback_steps": _is_empty,
            "w4a8_fallback_layers": _is_empty,
        },
    ),
    "mxfp4_dualscale": _Spelling(
        "is_checkpoint_serialized",
        idle={
            "num_bf16_fallback_layers": lambda value: type(value) is int,
            "w4a8_fallback_steps": _is_empty,
            "w4a8_fallback_layers": _is_empty,
        },
        online={"num_bf16_fallback_layers": "name the blocks in ignored_layers"},
    ),
    "fp8_storage": _Spelling("is_checkpoint_fp8_storage_serialized"),
}
assert {*_SPELLINGS, "nvfp4", "gguf", *DIALECT_OF_METHOD, *DIALECTS_OF_METHOD} == {*ACTIVATION_SCHEMES}


def serialized_flag(method: str) -> str | None:
    """The key that declares that weights are stored quantized; None for a method whose block has none."""
    return _SPELLINGS[method].flag if method in _SPELLINGS else None


def missing_flag(method: str) -> Finding:
    """A block of a method that has a `serialized_flag`, without it."""
    return Finding(
        "error", "no-serialized-flag", "", f"found {method} without {serialized_flag(method)}: true",
        f"{CONSUMER}: quantizes online, that is, takes the codes for weights and quantizes them again", FIX_BLOCK,
    )  # fmt: skip


def vllm_omni_verdict(methods: Collection[str], refusal: str | None) -> Verdict:
    """The verdict of vLLM-Omni on a component in a dialect that it reads.

    Args:
        methods: of its layers
        refusal: why it refuses or misreads the component, or None
    """
    if "fp8_storage" in methods:
        return Verdict(RUNTIME, "wrong", "quantizes encoders and VAEs in memory only, and takes codes for weights")
    if refusal is not None:
        return Verdict(RUNTIME, "wrong", refusal)
    ascend = sorted(set(methods) & {*ASCEND_METHODS})
    if ascend:
        return Verdict(RUNTIME, "loads", f"{', '.join(ascend)} on Ascend 950 only")
    return Verdict(RUNTIME, "loads", "nvfp4 on Blackwell" if "nvfp4" in methods else "on CUDA")


def _known_keys(method: str) -> tuple[str, ...]:
    """Every key that the runtime accepts in the block of a method that has a `serialized_flag`."""
    spelling = _SPELLINGS[method]
    return ("quant_method", spelling.flag, *spelling.keys, *spelling.idle)


def meant_options(method: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options for quantizing while loading, without those that the runtime accepts and that mean nothing here.

    Raises:
        RecipeError: one of these asks for something that our loader does not have.
    """
    meant = dict(options)
    spelling = _SPELLINGS.get(method)
    if spelling is None:
        return meant
    is_stored = meant.pop(spelling.flag, False) is True  # blocks copied from a checkpoint have it
    for key, is_idle in spelling.idle.items():
        value = meant.pop(key, None)
        counts = key in spelling.online and not is_stored
        if value is not None and not (is_idle(value) and (not counts or value == 0)):
            remedy = spelling.online.get(key, "leave it out")
            raise RecipeError(
                f"found {key} {value!r:.40}, which the runtime supports and this loader does not; {remedy}"
            )
    return meant


def ignored_names(groups: Iterable[LayerGroup]) -> list[str]:
    """Every name by which a runtime may look up these layers, sorted."""
    return sorted({name for group in groups for name in group.names})


def to_block(config: QuantizationConfig) -> dict[str, Any]:
    """The block for `config.json`: exactly the keys that the runtime knows, and always the serialized flag."""
    if config.method not in _SPELLINGS or config.per_channel:
        return to_modelopt(config)
    spelling = _SPELLINGS[config.method]
    values = {
        "activation_scheme": config.activation_scheme,
        "require_smooth_scale": config.require_smooth_scale,
        "weight_block_size": list(config.weight_block_size) if config.weight_block_size else None,
        "ignored_layers": sorted(set(config.ignored_layers)),
    }
    block: dict[str, Any] = {"quant_method": config.method, spelling.flag: True}
    return block | {key: values[key] for key in spelling.keys if values[key] is not None}


def wrapped(block: Mapping[str, Any]) -> dict[str, Any]:
    """A block as components have it that transformers loads; it has other quantizers under our methods' names."""
    rest = {key: value for key, value in block.items() if key != "quant_method"}
    return {"quant_method": WRAPPED, "method": block["quant_method"], **rest}


def from_block(block: Mapping[str, Any], where: str) -> QuantizationConfig:
    """Reads a block.

    Args:
        block: the value of `quantization_config`
        where: what to name in errors, for example the path of the config.json

    Raises:
        CheckpointError: the runtime would refuse the block, or not read stored weights by it.
    """
    if not isinstance(block, Mapping):
        raise CheckpointError(f"{where}: found quantization_config {shown(block)}, expected an object")
    method = _method_of(block, where)
    try:
        if method == MODELOPT:
            return from_modelopt(block, where)
        return _from_keywords(method, block, where)
    except RecipeError as error:
        raise CheckpointError(f"{where}: {error}") from None


def flaw_of_block(block: Mapping[str, Any]) -> str | None:
    """Why the runtime refuses a block, or does not read stored weights by it; None if it reads them."""
    try:
        from_block(block, "config.json")
    except OmniConvertError as error:
        return str(error).removeprefix("config.json: ")
    return None


def _method_of(block: Mapping[str, Any], where: str) -> str:
    named = [block[key] for key in ("quant_method", "method") if key in block]
    if len(named) != 1:
        found = "both quant_method and method" if named else "no quant_method"
        raise CheckpointError(f"{where}: found {found} in quantization_config, expected quant_method alone")
    method = named[0]
    known = [*_SPELLINGS, MODELOPT]
    if not isinstance(method, str) or method not in known:
        hint = did_you_mean(str(method), known)
        raise CheckpointError(f"{where}: found quant_method {shown(method)}, expected one of {', '.join(known)}{hint}")
    return method


def _from_keywords(method: str, block: Mapping[str, Any], where: str) -> QuantizationConfig:
    spelling = _SPELLINGS[method]
    _check_keys(method, spelling, block, where)
    if block.get(spelling.flag) is not True:
        found = f"{spelling.flag} {shown(block[spelling.flag])}" if spelling.flag in block else f"no {spelling.flag}"
        raise CheckpointError(
            f"{where}: found {found}, expected true; without it the runtime quantizes online, that is, it takes the "
            f"stored codes for weights and quantizes them again"
        )
    smooth = block.get("require_smooth_scale", False)
    if not isinstance(smooth, bool):
        raise CheckpointError(f"{where}: found require_smooth_scale {shown(smooth)}, expected true or false")
    return QuantizationConfig(
        method,
        _text(block.get("activation_scheme", ACTIVATION_SCHEMES[method][0]), "activation_scheme", where),
        _block_size(block.get("weight_block_size"), where),
        read_names(block.get("ignored_layers"), "ignored_layers", where),
        smooth,
    )


def _check_keys(method: str, spelling: _Spelling, block: Mapping[str, Any], where: str) -> None:
    known = {"method", *_known_keys(method)}
    for key in block:
        if key not in known:
            hint = did_you_mean(str(key), [spelling.flag, *spelling.keys])
            raise CheckpointError(
                f"{where}: found unknown key {shown(key)} for {method}, expected only "
                f"{', '.join((spelling.flag, *spelling.keys))}: the runtime refuses any other{hint}"
            )
    for key, is_idle in spelling.idle.items():
        if key in block and not is_idle(block[key]):
            raise CheckpointError(
                f"{where}: found {key} {shown(block[key])}, a policy of the runtime that cannot be honoured here; "
                f"remove it from the checkpoint"
            )


def _text(value: Any, key: str, where: str) -> str:
    if not isinstance(value, str):
        raise CheckpointError(f"{where}: found {key} {shown(value)}, expected a string")
    return value[:64]


def _block_size(value: Any, where: str) -> tuple[int, int] | None:
    if value is None:
        return None
    if isinstance(value, list) and len(value) == 2 and all(type(size) is int for size in value):
        return (value[0], value[1])
    raise CheckpointError(f"{where}: found weight_block_size {shown(value)}, expected two sizes as [128, 128]")


INSTRUCTIONS = """With vLLM-Omni:

```bash
vllm serve {title} --omni
```

With diffusers:

```python
from omni_convert.loaders import load_pipeline

pipe = load_pipeline("{title}", device="cuda")
image = pipe("a prompt").images[0]
```"""


class VllmOmni(Dialect):
    """The dialect whose names and layouts are those of the formats themselves."""

    name = "vllm-omni"
    consumers = CONSUMER
    usual_verdicts = (
        Verdict(DIFFUSERS, "loads", "after `import omni_convert.loaders`; else it does not know the quant_method"),
        Verdict(OURS, "loads", "its own spelling"),
        UNMARKED,
    )
    strict_runtimes = (OURS, RUNTIME, DIFFUSERS)  # in which our loader reads it
    fills_vllm_omni_parameters = True
    lists_built_layers = True
    has_storage = True
    has_exact_shapes = True
    mixed_methods = ("nvfp4", "fp8")  # as ModelOpt spells them
    instructions = INSTRUCTIONS

    def recognises(self, found: Found) -> bool:
        method = found.quant_method
        return method == WRAPPED or (method in _SPELLINGS and _SPELLINGS[method].flag in found.block)

    def stored_layers(self, found: Found) -> Iterator[StoredLayer | LayerError]:
        method = str(found.block.get("method", found.quant_method))
        for stem, fmt in layer_formats(found.checkpoint, method).items():
            rows, *others = found.checkpoint[f"{stem}.weight"].shape
            width = math.prod(others)
            # Only ModelOpt's algorithms, which an encoder's block may wrap, have a scale for each row.
            if fmt.encoding == FP8_PER_ROW and method != MODELOPT:
                fmt = Fp8(static=f"{stem}.input_scale" in found.checkpoint)
            yield StoredLayer(stem, fmt, (rows, width * fmt.elements_per_entry))

    def spelling(self, fmt: Format, shape: tuple[int, int]) -> WrittenSpelling | str:
        if fmt.encoding is not None and fmt.encoding.has_unsigned_codes:
            return "vLLM-Omni reads integers with zero points as AutoRound spells them: --dialect auto-round"
        if fmt.encoding == FP8_PER_ROW and not isinstance(fmt, QuantizingFormat):
            return "vLLM-Omni reads FP8 with a scale for each row as ModelOpt spells it: --dialect modelopt"
        is_rotated = fmt.encoding is not None and fmt.encoding.rotation is not None
        if is_rotated or fmt.is_named_by_dialect or not isinstance(fmt, QuantizingFormat):
            return f"vLLM-Omni has no method that loads {fmt.label}"
        return fmt.unsupported(*shape) or WrittenSpelling()

    def block(self, layers: Mapping[str, Format], ignored: Collection[str]) -> dict[str, Any]:
        """The block of layers that are all in one format.

        Raises:
            RecipeError: the layers have several formats, which one block cannot express.
        """
        return to_block(config_of(layers, ignored))

    def block_flaw(self, block: Mapping[str, Any]) -> str | None:
        return flaw_of_block(block)

    def encoder_block(self, layers: Mapping[str, Format], ignored: Collection[str]) -> dict[str, Any]:
        return wrapped(self.block(layers, ignored))

    def verdicts(self, component: JudgedComponent) -> list[Verdict]:
        return [vllm_omni_verdict(component.methods, component.refusal), *self.usual_verdicts]

    def check(self, found: Found, layers: Mapping[str, StoredLayer], config: Mapping[str, Any]) -> Iterator[Finding]:
        block = dict(found.block)
        if found.quant_method == WRAPPED:
            block["quant_method"] = block.pop("method", None)
        method = block.get("quant_method")
        if method == MODELOPT:
            return
        flag = serialized_flag(method) if isinstance(method, str) else None
        if not isinstance(method, str) or flag is None:
            yield _bad_block(f"found method {str(method)[:40]!r}")
            return
        known = _known_keys(method)
        yield from unknown_keys(block, known, CONSUMER, is_fatal=True)
        if block.get(flag) is not True:
            yield missing_flag(method)
            return
        try:
            declared = from_block({key: value for key, value in block.items() if key in known}, "config.json")
        except OmniConvertError as error:
            yield _bad_block(str(error).removeprefix("config.json: "))
            return
        for stem, layer in layers.items():
            if (difference := _difference(declared, layer.format)) is not None:
                yield block_mismatch(stem, difference, CONSUMER)

    def ignored_entries(self, block: Mapping[str, Any]) -> tuple[str, ...]:
        listed = block.get("ignored_layers")
        return tuple(name for name in listed if isinstance(name, str)) if isinstance(listed, list) else ()


def _bad_block(what: str) -> Finding:
    return Finding("error", "bad-block", "", what, CONSUMER, FIX_BLOCK)


def _difference(declared: QuantizationConfig, fmt: Format) -> str | None:
    """How a layer differs from what the block declares for all layers."""
    if fmt.method != declared.method:
        return f"found {fmt.label}, but the config says {declared.method}"
    if fmt.is_static != declared.is_static:
        what = "an input_scale" if fmt.is_static else "no input_scale"
        return f"found {what}, but the config says {declared.activation_scheme} activations"
    block_size = fp8_block_size(fmt)
    if block_size != declared.weight_block_size:
        found, stated = (
            "one scale" if sizes is None else f"blocks of {list(sizes)}"
            for sizes in (block_size, declared.weight_block_size)
        )
        return f"found {found}, but the config says {stated}"
    if declared.require_smooth_scale and not fmt.is_smoothed:
        return "found no mul_scale, but the config says require_smooth_scale"
    return None


def config_of(layers: Mapping[str, Format], ignored: Collection[str]) -> QuantizationConfig:
    """The configuration of layers that are all in one format.

    Raises:
        RecipeError: they are in several.
    """
    first_stem, first = next(iter(layers.items()))
    for stem, fmt in layers.items():
        if _meaning(fmt) != _meaning(first):
            raise RecipeError(
                f"layer '{stem}': found {fmt.label} beside {first.label} ('{first_stem}'), expected one format: the "
                "block of vLLM-Omni has one method; --dialect modelopt may hold both, or -m METHOD quantizes again"
            )
    method, scheme, block_size, smooth = _meaning(first)
    return QuantizationConfig(method, scheme, block_size, tuple(sorted(set(ignored))), smooth)


def _meaning(fmt: Format) -> tuple[str, str, tuple[int, int] | None, bool]:
    """Method, activation scheme, block size, and whether every layer has a mul_scale."""
    says_so = fmt.method in _SPELLINGS and "require_smooth_scale" in _SPELLINGS[fmt.method].keys
    return fmt.method, fmt.activation_scheme, fp8_block_size(fmt), says_so and fmt.is_smoothed


VLLM_OMNI = VllmOmni()
