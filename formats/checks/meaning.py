"""Whether the meaning of a file is certain: whether what it declares and holds leaves one value for every tensor.

`doubts` gives the reasons why not. Who reads values (`convert`, `dequantize`, `load_pipeline`) raises the first of
them, `verify` reports them all as errors, and `inspect` shows them. Few rows are read to tell what names cannot.

Weights cast to FP8, without scales, are the numbers that they are; but codes that have lost their scale are not. Codes
reach the top of the element's range, which weights do not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path

from omni_convert.formats.checks.completeness import without_weight
from omni_convert.formats.checks.undeclared import UndeclaredCodes, undeclared_codes
from omni_convert.formats.checks.values import has_ordered_scales, order_findings
from omni_convert.formats.containers.checkpoint import Checkpoint
from omni_convert.formats.containers.names import CODES, COMPANIONS, LOW_BIT, WEIGHT
from omni_convert.formats.containers.reader import TensorFile
from omni_convert.formats.containers.tensor_spec import DTYPE_NAMES
from omni_convert.formats.dialects.base import LayerError
from omni_convert.formats.dialects.found import Found, describe
from omni_convert.formats.dialects.table import DIALECTS
from omni_convert.formats.dialects.verdict import OURS
from omni_convert.formats.errors import CheckpointError
from omni_convert.formats.finding import Finding
from omni_convert.formats.rows import tile_ranges
from omni_convert.formats.views.base import FLOAT8
from omni_convert.formats.views.opened import QuantizedCheckpoint, Reading, read_layers

__all__ = ["doubts", "lost_scale", "open_quantized", "refuse_doubts", "strays"]

# Companions that scale inputs or only mark the layer: without them, the weight is the same.
HARMLESS = ("input_scale", "input_global_scale", "activation_scale", "scale_input", "comfy_quant", "weight_shape")
# The same for tensors that no format has and some tools store: scales of the cache and of outputs, and LLM.int8's mark.
UNRELATED = (
    "bias", "k_scale", "v_scale", "q_scale", "prob_scale", "output_scale", "kv_cache_scale", "kv_cache_offset",
    "weight_format",
)  # fmt: skip
AGAIN = "convert the model again"
# The dialect whose marks may stand in a file of another.
MARKS = "comfyui"
# Layers of which the order of scales is looked at: what is wrong in them is wrong everywhere.
SAMPLED = 8
# Rows of a cast weight that are looked at.
FEW_ROWS = 64
# RMS of matrices: that of trained weights is below 1, that of codes of any scale above 50.
LARGEST_CAST_RMS = 16.0


def open_quantized(
    path: Path, elsewhere: Mapping[str, Callable[[], TensorFile]] | None = None, *, values: bool = False
) -> QuantizedCheckpoint:
    """Opens a component folder or a single file in any dialect, if its meaning is certain.

    Args:
        elsewhere: name to opener of files that are not in the folder, see `Checkpoint.open`
        values: whether to read some rows; otherwise headers, configs and tiny markers are read, and no weight

    Raises:
        CheckpointError: a file is damaged; or the first of the `doubts`.
    """
    reading = read_layers(describe(Checkpoint.open(path, elsewhere), path if path.is_dir() else path.parent))
    refuse_doubts(reading, values=values)
    return reading.quantized


def refuse_doubts(reading: Reading, *, values: bool = False) -> None:
    """Raises CheckpointError with the first of the `doubts`."""
    if reading.errors:
        raise reading.errors[0]
    for doubt in doubts(reading, values=values):
        place = f"layer '{doubt.layer}': " if doubt.layer else ""
        raise CheckpointError(
            f"{reading.found.checkpoint.path}: {place}{doubt.what}; {doubt.remedy}; `omni-convert verify` tells more"
        )


def doubts(reading: Reading, *, values: bool = False) -> Iterator[Finding]:
    """Why the meaning of a checkpoint is not certain; nothing if it is.

    Args:
        values: whether to read some rows, too
    """
    consumer = reading.dialect.consumers if reading.dialect is not None else "every runtime"
    yield from (_as_finding(reading.found, error, consumer) for error in reading.errors)
    yield from _other_marks(reading)
    yield from (finding for finding, is_doubt in _strays(reading) if is_doubt)
    if values:
        yield from _doubtful_values(reading.quantized)


def strays(reading: Reading) -> Iterator[Finding]:
    """Findings about tensors that belong to no layer and leave the meaning of all others certain."""
    return (finding for finding, is_doubt in _strays(reading) if not is_doubt)


def lost_scale(checkpoint: Checkpoint, name: str) -> Finding | None:
    """The finding about an FP8 matrix whose numbers are codes rather than weights; None for all others."""
    spec = checkpoint[name]
    if spec.dtype not in FLOAT8 or len(spec.shape) < 2 or not spec.elements:
        return None
    _, stop = next(iter(tile_ranges(spec.shape)))
    rms = float(checkpoint.read_rows(name, 0, min(stop, FEW_ROWS)).float().square_().mean().sqrt())
    if not LARGEST_CAST_RMS < rms < math.inf:  # NaN and Inf are found by whoever reads all of it
        return None
    return Finding(
        "error", "missing-companion", name.removesuffix(WEIGHT),
        f"found {DTYPE_NAMES[spec.dtype]} numbers with an RMS of {rms:.3g}, as codes have, and no scale",
        "every runtime: takes the codes for weights", "restore the scales, or convert the model again",
    )  # fmt: skip


def _doubtful_values(quantized: QuantizedCheckpoint) -> Iterator[Finding]:
    """The order of block scales, and scales that are lost, in some of the layers."""
    if quantized.dialect is not None and DIALECTS[quantized.dialect].declared_by != "container":
        layers = [layer for layer in quantized.layers.values() if has_ordered_scales(layer)]
        for layer in layers[:: max(1, len(layers) // SAMPLED)]:
            yield from order_findings(layer, quantized.dialect)
    for name in quantized.kept.values():  # one layer may have lost its scale, and no other
        found = lost_scale(quantized.checkpoint, name)
        if found is not None:
            yield found


def _other_marks(reading: Reading) -> Iterator[Finding]:
    """ComfyUI's marks in a file that another dialect describes, where they say something else."""
    marks = DIALECTS[MARKS]
    is_described = reading.dialect is not None and reading.dialect.declared_by == "block"
    if not is_described or reading.is_unreadable or not marks.recognises(reading.found):
        return
    try:
        marked = list(marks.stored_layers(reading.found))
    except CheckpointError as error:
        yield _as_finding(reading.found, error, marks.consumers)
        return
    for stored in marked:
        name = stored.layer if isinstance(stored, LayerError) else stored.stem
        layer = reading.layers.get(name)
        if isinstance(stored, LayerError) or (layer is not None and layer.format.encoding != stored.format.encoding):
            what = stored.what if isinstance(stored, LayerError) else stored.format.label
            read = "another" if layer is None else layer.format.label
            yield Finding(
                "error", "bad-mark", name, f"found marks of ComfyUI for {what}, but the config block says {read}",
                "readers that obey the other one", "remove the one that is wrong",
            )  # fmt: skip


def _as_finding(found: Found, error: CheckpointError, consumers: str) -> Finding:
    if not isinstance(error, LayerError):
        what = str(error).removeprefix(f"{found.checkpoint.path}: ")
        return Finding("error", "unreadable-layer", "", what, consumers, AGAIN)
    hurts = f"{consumers}: {error.effect}" if error.effect else consumers
    return Finding("error", error.check, error.layer, error.what, hurts, AGAIN)


def _strays(reading: Reading) -> Iterator[tuple[Finding, bool]]:
    """Tensors that only look like parts of quantized layers, and whether values depend on them."""
    if not all(isinstance(error, LayerError) for error in reading.errors):
        return  # the component as a whole cannot be read
    found, checkpoint = reading.found, reading.found.checkpoint
    consumer = reading.dialect.consumers if reading.dialect is not None else ""
    unread = {error.layer for error in reading.errors if isinstance(error, LayerError)}
    used = {name for name in checkpoint if _parents(name) & unread}
    used |= {name for layer in (*reading.layers.values(), *reading.damaged) for name in layer.sources}
    layers = {name.rpartition(".")[0] for name in used}
    is_container = reading.dialect is not None and reading.dialect.declared_by == "container"
    weights = (layer.stored.name_of("weight").rpartition(".") for layer in reading.layers.values() if not is_container)
    own = {stem for stem, _, leaf in weights if leaf in CODES}
    codes = {each.name: each for each in undeclared_codes(checkpoint)}
    bare: dict[str, str | None] = {}
    for name in checkpoint:
        stem, _, leaf = name.rpartition(".")
        if name in used or bare.get(stem) is not None:
            continue
        if name in codes:
            if not _is_cast(reading, codes[name]):
                yield _without_scale(found, codes[name], consumer), True
        elif stem in own and leaf not in (*COMPANIONS, *UNRELATED):
            yield _unknown_part(name, consumer), True
        elif leaf in COMPANIONS and not _has_codes(found, stem, layers):
            bare[stem] = None if stem in layers else without_weight(checkpoint, stem)
            if (what := bare[stem]) is not None:
                yield _bare(stem, what, consumer), False
            else:
                is_quantized = stem in layers
                finding = _extra(found, name, stem, is_quantized=is_quantized, consumer=consumer)
                yield finding, leaf not in HARMLESS


def _parents(name: str) -> set[str]:
    parts = name.split(".")
    return {".".join(parts[:count]) for count in range(1, len(parts))}


def _is_cast(reading: Reading, codes: UndeclaredCodes) -> bool:
    """Whether FP8 numbers are the weights themselves: they have no scale, and nothing declares the layer quantized."""
    if codes.companions or codes.spec.dtype not in FLOAT8:
        return False
    dialect = reading.dialect
    if dialect is None:
        return not reading.found.block
    if dialect.declared_by != "block":
        return dialect.declared_by == "marks"
    return dialect.is_ignored(codes.stem, dialect.ignored_entries(reading.found.block))


def _has_codes(found: Found, stem: str, layers: Collection[str]) -> bool:
    """Whether there is a weight that would need the companions, and is reported itself."""
    weights = (found.checkpoint.get(f"{stem}.{leaf}") for leaf in CODES)
    return stem not in layers and any(spec is not None and spec.dtype in LOW_BIT for spec in weights)


def _without_scale(found: Found, codes: UndeclaredCodes, consumer: str) -> Finding:
    beside, dtype = " and ".join(codes.companions), DTYPE_NAMES[codes.spec.dtype]
    have = f"{beside}, which do not make a format with them" if beside else "no scale"
    if not consumer and beside and not found.block:
        return Finding(
            "error", "no-block", codes.stem,
            f"found {dtype} codes with {beside}, but no quantization_config that says what they are",
            "every runtime: takes codes for weights, or misses tensors", "restore config.json, or convert again",
        )  # fmt: skip
    return Finding(
        "error", "missing-companion", codes.stem, f"found {dtype} codes with {have}, expected scales",
        f"{consumer or 'every runtime'}: takes the codes for weights, or reports missing keys", AGAIN,
    )  # fmt: skip


def _extra(found: Found, name: str, stem: str, *, is_quantized: bool, consumer: str) -> Finding:
    weight = found.checkpoint.get(f"{stem}.weight")
    if is_quantized or weight is None:
        what = "found a tensor that the layer's format does not have"
    else:
        what = f"found it beside a {DTYPE_NAMES[weight.dtype]} weight, which is not quantized"
    return Finding(
        "error", "extra-companion", name, f"{what}, expected none", _hurt_by_extra(consumer),
        "remove the tensor, or convert the model again",
    )  # fmt: skip


def _unknown_part(name: str, consumer: str) -> Finding:
    what = "found a tensor beside codes that may be part of the weight, as smoothing or a low-rank branch"
    return Finding(
        "error", "extra-companion", name, f"{what}, expected none that the layer's format does not have",
        f"{consumer or 'every runtime'}: leaves it out of the weight, or refuses the model",
        "take the original model; if the tensor has no part in the weight, remove it",
    )  # fmt: skip


def _bare(stem: str, what: str, consumer: str) -> Finding:
    return Finding(
        "error", "extra-companion", stem, f"{what}, expected '{stem}{WEIGHT}' beside them", _hurt_by_extra(consumer),
        "give the weight its name, or convert the model again",
    )  # fmt: skip


def _hurt_by_extra(consumer: str) -> str:
    """The readers that suffer from a superfluous tensor, and how."""
    others = f"{consumer or 'strict loaders'}: a KeyError for some models (vLLM-Omni: Z-Image, FLUX.1), else skipped"
    return f"{OURS}: refuses the model; {others}"
