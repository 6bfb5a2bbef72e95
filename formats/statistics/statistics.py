"""The statistics file: recorded statistics of every linear input, and the runs that they come from.

It is one safetensors file. For each layer NAME (`component.stem`) it holds

    NAME.step_amax        F32  [steps]      largest magnitude by denoising step, 0 where the layer did not run
    NAME.channel_amax     F32  [in]         largest magnitude by input channel
    NAME.histogram        I64  [1027]       number of values by magnitude, on the bins of `histogram`
    NAME.rows             BF16 [<= 64, in]  rows with the smallest hashes, in the order of these
    NAME.channel_squares  I64  [2, in]      sums of squares by input channel, as in `square_sums`; not in older files
    NAME.row_runs         I64  [<= 64, 2]   prompt (a number of 60 bits) and denoising step of each row; likewise
    sensitivity.*         see `sensitivity`; only where it was recorded

The metadata holds, under `omni_convert_statistics`, a JSON object with the identity and, as `layers`, the name under
which each layer's tensors are stored: layers that read the same input (q, k and v) are stored once.

Files of one model merge exactly, in any order. Equal statistics are equal bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from omni_convert.formats.containers.component import DENOISERS
from omni_convert.formats.errors import CalibrationError, OutputError, listed
from omni_convert.formats.statistics.histogram import BINS
from omni_convert.formats.statistics.layer_statistics import SAMPLE_ROWS, LayerStatistics
from omni_convert.formats.statistics.recording_header import Identity, RecordingHeader, RecordingKind, read_header
from omni_convert.formats.statistics.sensitivity import PipelineSensitivity

__all__ = ["MORE_STEPS", "LayerStatistics", "RiskyLayer", "Statistics"]

#: What helps if one of several denoisers never ran.
MORE_STEPS = "calibrate with more steps (--calib-steps)"

METADATA_KEY = "omni_convert_statistics"
KIND = RecordingKind(METADATA_KEY, "statistics", "`omni-convert calibrate`")

# Earlier versions did not record these.
SQUARES, RUNS = "channel_squares", "row_runs"

RISK_PERCENTILE = 99.99
RISK_OUTLIER_RATIO = 4.0
RISK_STEP_RATIO = 8.0
RISKY_LAYERS_SHOWN = 3


@dataclass(frozen=True)
class RiskyLayer:
    """A layer for which one static scale is a bad fit.

    Attributes:
        amax: largest magnitude
        typical: the 99.99th percentile of the magnitudes
        outlier_ratio: amax / typical
        step_ratio: largest over smallest of the denoising steps' largest magnitudes
    """

    component: str
    stem: str
    amax: float
    typical: float
    outlier_ratio: float
    step_ratio: float

    @property
    def severity(self) -> float:
        """The factor by which the worse ratio exceeds its limit."""
        return max(self.outlier_ratio / RISK_OUTLIER_RATIO, self.step_ratio / RISK_STEP_RATIO)

    def __str__(self) -> str:
        reasons = []
        if self.outlier_ratio > RISK_OUTLIER_RATIO:
            reasons.append(
                f"largest input {self.amax:.3g} is {self.outlier_ratio:.3g}x the {RISK_PERCENTILE}th percentile"
            )
        if self.step_ratio > RISK_STEP_RATIO:
            reasons.append(f"largest input moves {self.step_ratio:.3g}x over the denoising steps")
        return f"{self.component}.{self.stem}: {' and '.join(reasons)}"


@dataclass(frozen=True, eq=False)
class Statistics:
    """Statistics of the linear inputs of a pipeline, by `component.stem`.

    Attributes:
        sensitivity: how errors of the layers change the images; None if that was not recorded
    """

    identity: Identity
    layers: Mapping[str, LayerStatistics]
    sensitivity: PipelineSensitivity | None = None

    def for_group(self, component: str, members: Sequence[str]) -> LayerStatistics | None:
        """Statistics of the common input of a fused group, or None unless every member was recorded.

        Args:
            component: `transformer`, `text_encoder`, ...
            members: state-dict stems, without `.weight`
        """
        found = [self.layers.get(f"{component}.{stem}") for stem in members]
        recorded = [layer for layer in found if layer is not None]
        if len(recorded) < len(members) or not recorded:
            return None
        return recorded[0] if len(recorded) == 1 else LayerStatistics.merged(recorded)

    def inputs_of(self, component: str, members: Sequence[str]) -> LayerStatistics:
        """Does the same as `for_group`; raises CalibrationError if a member was not recorded."""
        inputs = self.for_group(component, members)
        if inputs is None:
            has_run = any(name.startswith(f"{component}.") for name in self.layers)
            if component in DENOISERS and not has_run:
                raise CalibrationError(
                    f"{members[0]}: the statistics hold no layer of '{component}', which never ran: its steps are "
                    f"others than those that were recorded; {MORE_STEPS}"
                )
            raise CalibrationError(
                f"{members[0]}: the statistics do not cover this layer of '{component or 'the model'}'; "
                f"calibrate with --component {component or 'transformer'}=METHOD, or ignore it"
            )
        return inputs

    def importance_inputs(self, component: str, members: Sequence[str]) -> LayerStatistics | None:
        """Statistics of the one input of layers that are joined to a weight: those of the first that was recorded.

        Raises:
            CalibrationError: an earlier version recorded them, without mean squares.
        """
        found = (self.layers.get(f"{component}.{stem}") for stem in members)
        inputs = next((layer for layer in found if layer is not None), None)
        if inputs is not None:
            inputs.mean_square()
        return inputs

    def merge(self, others: Iterable[Statistics]) -> Statistics:
        """Merges these statistics with others; the order does not matter.

        The result has the sensitivity of those that have it.

        Raises:
            CalibrationError: they belong to different models.
        """
        everything = [self, *others]
        identity = self.identity.merge(statistics.identity for statistics in everything[1:])
        layers: dict[str, LayerStatistics] = {}
        for name in sorted({name for statistics in everything for name in statistics.layers}):
            parts = [statistics.layers[name] for statistics in everything if name in statistics.layers]
            widths = {part.channels.shape[0] for part in parts}
            if len(widths) > 1:
                raise CalibrationError(
                    f"{name}: found statistics of inputs of different widths ({', '.join(map(str, sorted(widths)))}), "
                    f"expected those of one model; calibrate again"
                )
            layers[name] = parts[0] if len(parts) == 1 else LayerStatistics.merged(parts)
        sensitivities = [each.sensitivity for each in everything if each.sensitivity is not None]
        return Statistics(identity, layers, sensitivities[0].merge(sensitivities[1:]) if sensitivities else None)

    def risky_layers(self) -> list[RiskyLayer]:
        """Layers where a static scale is risky, the worst first.

        Either the largest input is far above the 99.99th percentile (a scale that covers it leaves few codes for the
        rest), or it moves over the denoising steps (a scale that fits one step does not fit another).
        """
        layers = (_risk(name, layer) for name, layer in self.layers.items())
        risky = [
            layer for layer in layers if layer.outlier_ratio > RISK_OUTLIER_RATIO or layer.step_ratio > RISK_STEP_RATIO
        ]
        return sorted(risky, key=lambda layer: (-layer.severity, layer.component, layer.stem))

    def risk_notes(self, component: str, stems: Collection[str], input_scale: str) -> list[str]:
        """Notes on layers of a component whose inputs have a range that one static scale fits badly.

        Args:
            stems: layers of the component that get a static scale
            input_scale: the rule by which the scale is chosen
        """
        risky = [layer for layer in self.risky_layers() if layer.component == component and layer.stem in stems]
        if not risky:
            return []
        worst = listed([str(layer) for layer in risky], RISKY_LAYERS_SHOWN, "; ")
        return [
            f"{len(risky)} of {len(stems)} layers have inputs that one static scale fits badly; they got "
            f"--input-scale {input_scale} like the others (--activation-scheme dynamic or --ignored-layers "
            f"avoids that): {worst}"
        ]

    def fingerprint(self) -> str:
        """SHA-256 of the content, equal for statistics in memory and for their file."""
        digest = hashlib.sha256(self._header.encode())
        for name, tensor in sorted(self._stored_tensors().items()):
            digest.update(name.encode())
            digest.update(_bytes(tensor))
        return digest.hexdigest()

    def save(self, path: str | Path) -> None:
        """Writes the statistics file, which appears only when it is complete.

        Raises:
            OutputError: the file cannot be written.
        """
        path = Path(path)
        partial = path.with_name(f"{path.name}.partial")
        try:
            # One metadata entry: safetensors writes several in random order.
            save_file(self._stored_tensors(), partial, metadata={METADATA_KEY: self._header})
            partial.chmod(0o644)  # safetensors makes it private, but this file is meant to be shared
            partial.replace(path)
        except (OSError, SafetensorError) as error:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise OutputError(f"{path}: statistics cannot be written ({error})") from None

    @classmethod
    def load(cls, path: str | Path) -> Statistics:
        """Reads a statistics file.

        Raises:
            CalibrationError: the file is missing, damaged, of a later version or no statistics file.
        """
        path = Path(path)
        if not path.is_file():
            raise CalibrationError(f"{path}: file missing, expected statistics made by `omni-convert calibrate`")
        try:
            with safe_open(path, framework="pt") as file:
                header = read_header(path, file.metadata() or {}, KIND)
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no mapping
        except (OSError, SafetensorError) as error:
            raise CalibrationError(f"{path}: cannot be read ({error}), expected a statistics file") from None
        stored = {owner: _layer(path, owner, tensors) for owner in sorted(set(header.owners.values()))}
        layers = {layer: stored[owner] for layer, owner in sorted(header.owners.items())}
        return cls(header.identity, layers, PipelineSensitivity.from_tensors(str(path), tensors))

    @classmethod
    def load_all(cls, paths: Sequence[str | Path]) -> Statistics:
        """Reads statistics files, at least one, and merges them; raises as `load` and `merge`."""
        first, *others = [cls.load(path) for path in paths]
        return first.merge(others)

    @cached_property
    def _owners(self) -> dict[str, str]:
        """Maps each layer to the layer under whose name its statistics are stored: the first with equal statistics."""
        first: dict[str, str] = {}
        owners = {}
        for name in sorted(self.layers):
            digest = hashlib.sha256()
            for tensor in self.layers[name].tensors().values():
                digest.update(f"{tuple(tensor.shape)}".encode())
                digest.update(_bytes(tensor))
            owners[name] = first.setdefault(digest.hexdigest(), name)
        return owners

    @cached_property
    def _header(self) -> str:
        return RecordingHeader(self.identity, self._owners).to_text(KIND)

    def _stored_tensors(self) -> dict[str, Tensor]:
        inputs = {
            f"{owner}.{suffix}": tensor.contiguous()
            for owner in sorted(set(self._owners.values()))
            for suffix, tensor in self.layers[owner].tensors().items()
        }
        return inputs | (self.sensitivity.tensors() if self.sensitivity is not None else {})


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def _risk(name: str, layer: LayerStatistics) -> RiskyLayer:
    component, _, stem = name.partition(".")
    amax, typical = layer.amax(), layer.percentile(RISK_PERCENTILE)
    steps = layer.step_amax[layer.step_amax > 0]
    step_ratio = float(steps.max() / steps.min()) if steps.numel() else 1.0
    outlier_ratio = amax / typical if typical else math.inf if amax else 1.0
    return RiskyLayer(component, stem, amax, typical, outlier_ratio, step_ratio)


def _layer(path: Path, name: str, tensors: Mapping[str, Tensor]) -> LayerStatistics:
    """Reads and checks one layer of a file.

    Raises:
        CalibrationError: a tensor is missing, has another dtype or shape, or holds impossible values.
    """
    rows = tensors.get(f"{name}.rows", torch.empty(0))
    width = rows.shape[-1] if rows.dim() == 2 else -1
    expected: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "step_amax": (torch.float32, (-1,)),
        "channel_amax": (torch.float32, (width,)),
        "histogram": (torch.int64, (BINS,)),
        "rows": (torch.bfloat16, (-1, width)),
    }
    if f"{name}.{SQUARES}" in tensors:
        expected[SQUARES] = (torch.int64, (2, width))
    if f"{name}.{RUNS}" in tensors:
        expected[RUNS] = (torch.int64, (-1, 2))
    found = {}
    for suffix, (dtype, shape) in expected.items():
        tensor = tensors.get(f"{name}.{suffix}")
        if tensor is None or tensor.dtype != dtype or not _fits(tensor, shape):
            described = "nothing" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
            raise CalibrationError(f"{path}: {name}.{suffix}: found {described}, expected {dtype}; calibrate again")
        if not bool(torch.isfinite(tensor).all()) or (suffix != "rows" and bool((tensor < 0).any())):
            raise CalibrationError(f"{path}: {name}.{suffix}: found NaN, Inf or negative values; calibrate again")
        found[suffix] = tensor
    if not 0 < rows.shape[0] <= SAMPLE_ROWS:
        raise CalibrationError(f"{path}: {name}.rows: found {rows.shape[0]} rows, expected 1 to {SAMPLE_ROWS}")
    if RUNS in found and len(found[RUNS]) != len(rows):
        raise CalibrationError(f"{path}: {name}.{RUNS}: found {len(found[RUNS])} runs for {len(rows)} rows")
    return LayerStatistics(
        found["step_amax"],
        found["channel_amax"],
        found["histogram"],
        found["rows"],
        found.get(SQUARES),
        found.get(RUNS),
    )


def _fits(tensor: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether the shapes agree; -1 stands for any size but 0."""
    return tensor.dim() == len(shape) and all(
        size > 0 and wanted in (-1, size) for size, wanted in zip(tensor.shape, shape, strict=True)
    )
