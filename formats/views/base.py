"""A checkpoint whose tensors are computed from those of another, rows at a time, when somebody reads them.

What converts plain checkpoints converts quantized ones through such a view: dequantized, every layer is one float
weight; respelled, the tensors of another dialect are there to be copied.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from omni_convert.formats.arithmetic.e8m0 import E8M0_NAN
from omni_convert.formats.containers.checkpoint import Checkpoint
from omni_convert.formats.containers.reader import TensorFile
from omni_convert.formats.containers.tensor_spec import TensorSpec
from omni_convert.formats.dialects.base import Spelling, WrittenSpelling
from omni_convert.formats.dialects.codec import WritableCodec
from omni_convert.formats.errors import CheckpointError
from omni_convert.formats.rows import TensorLayout, WeightRows
from omni_convert.formats.views.opened import QuantizedCheckpoint, QuantizedLayer

__all__ = [
    "FLOAT8",
    "CheckpointView",
    "KeptTensor",
    "ViewedTensor",
    "Zeros",
    "dequantized_view",
    "finite_part",
    "marked_view",
    "respelled_view",
    "with_biases",
]


#: Elements of weights that were cast, without a scale.
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)

PLAIN_SPELLING = Spelling()
BYTES = (torch.uint8, torch.float8_e8m0fnu)
# The largest finite code, without its sign.
LARGEST_CODE = {torch.float8_e4m3fn: 0x7E, torch.float8_e5m2: 0x7B}


class ViewedTensor(ABC):
    """A tensor of a view.

    Attributes:
        spec: what it is
        sources: names of the tensors that it is made of
    """

    spec: TensorSpec
    sources: tuple[str, ...]

    @abstractmethod
    def read(self, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop`; all of a tensor without dimensions."""


@dataclass(frozen=True)
class KeptTensor(ViewedTensor):
    """A tensor under another name, perhaps."""

    spec: TensorSpec
    checkpoint: Checkpoint
    stored: str

    @property
    def sources(self) -> tuple[str, ...]:  # type: ignore[override]  # follows from the name
        return (self.stored,)

    def read(self, start: int, stop: int) -> Tensor:
        return self.checkpoint.read_rows(self.stored, start, stop) if self.spec.shape else self.whole()

    def whole(self) -> Tensor:
        return self.checkpoint.read(self.stored)


@dataclass(frozen=True)
class _Bias(ViewedTensor):
    """A bias of a quantized layer in another order.

    Attributes:
        kept: the bias as it is stored
        read_as, written_as: how it is laid out there, and here; None for its natural order
        shifted: the layer, if the shift of its inputs is taken away on one side alone
        sign: 1 if that is there, -1 if it is here
    """

    spec: TensorSpec
    kept: ViewedTensor
    read_as: WritableCodec | None
    written_as: WritableCodec | None
    shifted: QuantizedLayer | None = None
    sign: int = 1

    @property
    def sources(self) -> tuple[str, ...]:  # type: ignore[override]  # follows from the tensor
        return self.kept.sources

    def read(self, start: int, stop: int) -> Tensor:
        bias = self.kept.read(0, self.spec.shape[0])
        if self.read_as is not None:
            bias = self.read_as.decode(bias, TensorLayout(bias.dtype, self.spec.shape, 0))
        if self.shifted is not None:
            added = self.shifted.format.shift_product(self.shifted.read(0, self.spec.shape[0]))
            bias = (bias.float() + self.sign * added).to(bias.dtype) if added is not None else bias
        return (bias if self.written_as is None else self.written_as.encode(bias))[start:stop]


def with_biases(checkpoint: Checkpoint, codecs: Mapping[str, WritableCodec | None]) -> Checkpoint:
    """A checkpoint with the biases of layers in another order.

    Args:
        codecs: stem of each layer to the codec of its bias; None leaves the natural order
    """
    if not any(codecs.values()):
        return checkpoint
    names = {f"{stem}.bias": codec for stem, codec in codecs.items()}
    kept = [KeptTensor(spec, checkpoint, name) for name, spec in checkpoint.items()]
    tensors = [_spelled_bias(each, None, names.get(each.spec.name)) for each in kept]
    return CheckpointView(checkpoint, tensors, checkpoint.storage if isinstance(checkpoint, CheckpointView) else None)


def _spelled_bias(
    kept: KeptTensor,
    read_as: WritableCodec | None,
    written_as: WritableCodec | None,
    shifted: QuantizedLayer | None = None,
    sign: int = 1,
) -> ViewedTensor:
    """A bias in another order, in the dtype that the codec stores, and with another shift; see `_Bias`."""
    if read_as == written_as and shifted is None:
        return kept
    stored = TensorLayout(kept.spec.dtype, kept.spec.shape)
    dtype = stored.dtype if written_as is None else written_as.stored(stored).dtype
    return _Bias(replace(kept.spec, dtype=dtype), kept, read_as, written_as, shifted, sign)


@dataclass(frozen=True)
class _Dequantized(ViewedTensor):
    """The weight that a layer stands for, float32."""

    spec: TensorSpec
    layer: QuantizedLayer

    @property
    def sources(self) -> tuple[str, ...]:  # type: ignore[override]  # follows from the layer
        return self.layer.sources

    def read(self, start: int, stop: int) -> Tensor:
        rows = self.layer.dequantize(start, stop).view(stop - start, *self.spec.shape[1:])
        if rows.numel() and not all(math.isfinite(bound) for bound in torch.aminmax(rows)):  # NaN comes through
            raise CheckpointError(
                f"{self.layer.checkpoint.path}: layer '{self.layer.stem}': found NaN or Inf in rows {start} to "
                f"{stop - 1} of the dequantized weight, expected finite numbers; a scale or a code is damaged"
            )
        return rows


@dataclass(frozen=True)
class _Widened(ViewedTensor):
    """Numbers that were cast to FP8, in BF16, which holds each of them."""

    spec: TensorSpec
    kept: KeptTensor

    @property
    def sources(self) -> tuple[str, ...]:  # type: ignore[override]  # follows from the tensor
        return self.kept.sources

    def read(self, start: int, stop: int) -> Tensor:
        numbers = self.kept.read(start, stop).to(torch.bfloat16)
        if not bool(torch.isfinite(numbers).all()):
            raise CheckpointError(
                f"{self.kept.checkpoint.path}: tensor '{self.kept.stored}': found NaN or Inf in it, expected finite "
                "numbers; cast the model to FP8 again"
            )
        return numbers


@dataclass(frozen=True)
class _Respelled(ViewedTensor):
    """A tensor of a layer as another spelling stores it."""

    spec: TensorSpec
    sources: tuple[str, ...]
    layer: QuantizedLayer
    suffix: str
    spelling: WrittenSpelling

    def read(self, start: int, stop: int) -> Tensor:
        return finite_part(self._read(start, stop), self.layer, self.suffix)

    def _read(self, start: int, stop: int) -> Tensor:
        codec, layout = self.spelling.codec(self.suffix), self.layer.tensors[self.suffix]
        if not layout.rows_per_entry:
            whole = self._encode(self.layer.read_tensor(self.suffix, 0, 0))
            return whole[start:stop] if self.spec.shape else whole
        if codec.is_turned:
            return self._encode(self.layer.read_tensor(self.suffix, 0, layout.shape[0]))[start:stop]
        multiple = codec.row_multiple
        first = start // multiple * multiple
        last = min(-(-stop // multiple) * multiple, layout.shape[0])
        return self._encode(self.layer.read_tensor(self.suffix, first, last))[start - first : stop - first]

    def _encode(self, tensor: Tensor) -> Tensor:
        try:
            return self.spelling.codec(self.suffix).encode(tensor)
        except CheckpointError as error:
            raise CheckpointError(f"{self.layer.checkpoint.path}: layer '{self.layer.stem}': {error}") from None


@dataclass(frozen=True)
class _Unchanged(KeptTensor):
    """A tensor of a layer whose bytes serve as they are."""

    layer: QuantizedLayer
    suffix: str

    def read(self, start: int, stop: int) -> Tensor:
        return finite_part(super().read(start, stop), self.layer, self.suffix)


def finite_part(tensor: Tensor, layer: QuantizedLayer, suffix: str) -> Tensor:
    """The codes or scales of a layer as they are stored.

    Raises:
        CheckpointError: there are NaN or Inf among them.
    """
    if suffix == "weight_scale" and tensor.dtype in BYTES:  # E8M0
        is_sound = not bool((tensor.view(torch.uint8) == E8M0_NAN).any())
    elif tensor.dtype in LARGEST_CODE:
        is_sound = not bool(((tensor.view(torch.uint8) & 0x7F) > LARGEST_CODE[tensor.dtype]).any())
    else:
        is_sound = not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())
    if not is_sound:
        raise CheckpointError(
            f"{layer.checkpoint.path}: tensor '{layer.stored.name_of(suffix)}': found NaN or Inf, expected finite "
            "numbers; download the file or convert the model again"
        )
    return tensor


@dataclass(frozen=True)
class _Mark(ViewedTensor):
    """A tensor that only marks a layer."""

    spec: TensorSpec
    text: bytes
    sources: tuple[str, ...] = ()

    def read(self, start: int, stop: int) -> Tensor:
        return torch.tensor(list(self.text[start:stop]), dtype=torch.uint8)


@dataclass(frozen=True)
class Zeros(ViewedTensor):
    """A tensor of zeros, where a dialect wants an offset."""

    spec: TensorSpec
    sources: tuple[str, ...] = ()

    def read(self, start: int, stop: int) -> Tensor:
        return torch.zeros(stop - start, *self.spec.shape[1:], dtype=self.spec.dtype)


@dataclass(frozen=True)
class ViewedRows:
    """A matrix of a view, as `WeightRows`."""

    tensor: ViewedTensor

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.tensor.spec.shape
        return rows, columns

    def read(self, start: int, stop: int) -> Tensor:
        return self.tensor.read(start, stop)


class CheckpointView(Checkpoint):
    """See the module; the files are those of the source.

    Attributes:
        storage: name to the dtype in which a tensor that was computed in another is best kept
    """

    def __init__(
        self, source: Checkpoint, tensors: Sequence[ViewedTensor], storage: Mapping[str, torch.dtype] | None = None
    ) -> None:
        self.path = source.path
        self.files: dict[str, TensorFile] = source.files
        self.storage = dict(storage or {})
        self._source = source
        self._tensors = {tensor.spec.name: tensor for tensor in tensors}
        self._specs = {name: tensor.spec for name, tensor in self._tensors.items()}
        self._unfinished = {name: spec.nbytes for name, spec in self._specs.items()}
        self._users = Counter(name for tensor in tensors for name in tensor.sources)
        first_file = next(iter(source.files))
        self.weight_map = {
            name: source.weight_map[tensor.sources[0]] if tensor.sources else first_file
            for name, tensor in self._tensors.items()
        }

    def tensor(self, name: str) -> ViewedTensor:
        """One of its tensors, for another view."""
        return self._tensors[name]

    def read(self, name: str) -> Tensor:
        spec = self._specs[name]
        return self._tensors[name].read(0, spec.shape[0] if spec.shape else 1)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        return self._tensors[name].read(start, stop)

    def rows(self, name: str) -> WeightRows:
        return ViewedRows(self._tensors[name])

    def prefetch(self, name: str, limit: int) -> None:
        for source in self._tensors[name].sources:
            self._source.prefetch(source, limit)

    def finished(self, name: str, nbytes: int) -> None:
        self._unfinished[name] -= nbytes
        if self._unfinished[name] <= 0:
            for source in self._tensors[name].sources:
                self._users[source] -= 1
                if not self._users[source]:
                    self._source.finished(source, self._source[source].nbytes)

    def fingerprint(self) -> str:
        return self._source.fingerprint()


def marked_view(checkpoint: Checkpoint, without: Collection[str], markers: Collection[str]) -> CheckpointView:
    """A checkpoint without some tensors, and with others of one zero that only mark it."""
    tensors: list[ViewedTensor] = [
        KeptTensor(spec, checkpoint, name) for name, spec in checkpoint.items() if name not in without
    ]
    tensors += [Zeros(TensorSpec(name, torch.float32, (1,))) for name in sorted(markers)]
    return CheckpointView(checkpoint, tensors, checkpoint.storage if isinstance(checkpoint, CheckpointView) else None)


def dequantized_view(quantized: QuantizedCheckpoint) -> CheckpointView:
    """Every layer as one weight in float32, numbers that were cast to FP8 in BF16, everything else as it is."""

    def weight_of(layer: QuantizedLayer) -> list[ViewedTensor]:
        shape = layer.format.weight_shape(*layer.shape)
        return [_Dequantized(TensorSpec(layer.stored.weight_name, torch.float32, shape), layer)]

    storage = {layer.stored.weight_name: torch.bfloat16 for layer in quantized.layers.values()}
    layers = {stem: weight_of(layer) for stem, layer in quantized.layers.items()}
    return _view(quantized, layers, storage, widens=True)


def respelled_view(quantized: QuantizedCheckpoint, spellings: Mapping[str, WrittenSpelling]) -> CheckpointView:
    """Every layer in the tensors of another spelling, everything else as it is.

    Args:
        spellings: stem to spelling, of every layer
    """
    layers = {stem: _respelled(layer, spellings[stem]) for stem, layer in quantized.layers.items()}
    return _view(quantized, layers, spellings=spellings)


def _respelled(layer: QuantizedLayer, spelling: WrittenSpelling) -> list[ViewedTensor]:
    def spec(suffix: str, stored: TensorLayout) -> TensorSpec:
        return TensorSpec(f"{layer.stem}.{suffix}", stored.dtype, stored.shape)

    def tensor(suffix: str, layout: TensorLayout) -> ViewedTensor:
        new = spec(spelling.name(suffix), spelling.codec(suffix).stored(layout))
        if _is_spelled_so(layer, suffix, spelling.codec(suffix), new):
            return _Unchanged(new, layer.checkpoint, layer.stored.name_of(suffix), layer, suffix)
        sources = (*filter(None, [layer.source_of(suffix)]), *(layer.stored.unused if suffix == "weight" else ()))
        return _Respelled(new, sources, layer, suffix, spelling)

    tensors = [tensor(suffix, layout) for suffix, layout in layer.tensors.items()]
    copied = {tensor.spec.name: tensor for tensor in tensors}
    tensors += [
        replace(copy, spec=replace(copy.spec, name=f"{layer.stem}.{name}"))  # type: ignore[type-var]  # dataclasses all
        for name, like in spelling.copies.items()
        for copy in (copied[f"{layer.stem}.{spelling.name(like)}"],)
    ]
    tensors += [Zeros(spec(name, layer.tensors[like])) for name, like in spelling.zeros.items()]
    marks = spelling.layout({})
    return tensors + [_Mark(spec(name, marks[name]), text) for name, text in spelling.extras.items()]


def _is_spelled_so(layer: QuantizedLayer, suffix: str, codec: WritableCodec, new: TensorSpec) -> bool:
    """Whether a tensor that is made as a whole lies on the disk as it should already, so that its bytes serve."""
    stored = layer.checkpoint.get(layer.stored.name_of(suffix))
    return (
        codec.is_turned
        and codec.on_disk == layer.stored.spelling.codec(suffix).on_disk
        and stored is not None
        and (stored.dtype, stored.shape) == (new.dtype, new.shape)
    )


def _view(
    quantized: QuantizedCheckpoint,
    layers: Mapping[str, Sequence[ViewedTensor]],
    storage: Mapping[str, torch.dtype] | None = None,
    *,
    widens: bool = False,
    spellings: Mapping[str, Spelling] | None = None,
) -> CheckpointView:
    """The view with these tensors for the layers, in the order in which the source holds them.

    Args:
        widens: whether numbers that were cast to FP8 are shown in BF16
        spellings: stem to spelling, which lays out biases in the view; None for biases as the model has them
    """
    checkpoint = quantized.checkpoint
    biases = {f"{stem}.bias": layer for stem, layer in quantized.layers.items()}
    stem_of = {name: stem for stem, layer in quantized.layers.items() for name in layer.sources}
    new_names = {stored: name for name, stored in quantized.kept.items()}
    tensors: dict[str, ViewedTensor] = {}
    for stored, spec in checkpoint.items():
        if stored in stem_of:
            tensors |= {tensor.spec.name: tensor for tensor in layers[stem_of[stored]]}
        elif stored in new_names:
            name = new_names[stored]
            kept = KeptTensor(replace(spec, name=name), checkpoint, stored)
            if name in biases:
                tensors[name] = _bias_between(
                    kept, biases[name], (spellings or {}).get(biases[name].stem, PLAIN_SPELLING)
                )
            elif widens and spec.dtype in FLOAT8:
                tensors[name] = _Widened(replace(kept.spec, dtype=torch.bfloat16), kept)
            else:
                tensors[name] = kept
    return CheckpointView(checkpoint, list(tensors.values()), storage)


def _bias_between(kept: KeptTensor, layer: QuantizedLayer, written: Spelling) -> ViewedTensor:
    """The bias of a layer in another spelling."""
    stored = layer.stored.spelling
    shifted = layer if stored.lacks_shift is not written.lacks_shift else None
    return _spelled_bias(kept, stored.bias, written.bias, shifted, 1 if stored.lacks_shift else -1)
