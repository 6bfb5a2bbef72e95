"""`verify`: checks every value and name of a model against its format, dialect and runtimes; reads each tile once.

headers ─► names, dtypes, shapes ─► config block and marks ─► layers against the family ─► tensors against the class
        ─► values ─► the reference

Meanwhile a thread hashes the files and compares them with the manifest, if there is one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Event
from typing import Any

import torch

from omni_convert.convert.inspection.lost_block import dialect_of_lost_block
from omni_convert.convert.inspection.name_check import check_converted_names, check_names, has_converted_names
from omni_convert.convert.inspection.reference_check import Comparison, bits_of
from omni_convert.convert.source.built_model import names_in_model
from omni_convert.convert.source.component import plain_weights
from omni_convert.convert.source.component_folder import ComponentFolder, folders_with_weights
from omni_convert.convert.source.file_check import check_files
from omni_convert.convert.source.location import Source
from omni_convert.formats.checks.block import check_block
from omni_convert.formats.checks.meaning import lost_scale
from omni_convert.formats.checks.reading import TolerantReading, read_tolerantly
from omni_convert.formats.checks.scale_exchange import ScaleTrace, exchanged_scales, trace_of
from omni_convert.formats.checks.scope import check_scope
from omni_convert.formats.checks.stage import check_stage
from omni_convert.formats.checks.values import check_finite, check_values
from omni_convert.formats.containers.checkpoint import Checkpoint
from omni_convert.formats.containers.component import DENOISERS
from omni_convert.formats.dialects.found import describe
from omni_convert.formats.dialects.table import DIALECTS
from omni_convert.formats.errors import CheckpointError
from omni_convert.formats.families.family import Family
from omni_convert.formats.finding import Finding
from omni_convert.formats.rows import tile_ranges
from omni_convert.formats.views.original_names import under_diffusers_names

__all__ = ["VerifiedComponent", "verify_source", "weight_bytes"]


@dataclass(frozen=True)
class VerifiedComponent:
    """The findings in a component.

    Attributes:
        name: its folder, or "" for a model that is a single component
        dialect: dialect of its quantized layers; None if there are none
        layers: number of quantized layers whose values were checked
        errors: layer → relative error against the reference, if there is one
        unchecked: properties that can be checked only with a reference
    """

    name: str
    dialect: str | None
    layers: int
    findings: tuple[Finding, ...]
    errors: dict[str, float] = field(default_factory=dict)
    unchecked: tuple[str, ...] = ()
    is_unreadable: bool = False

    @property
    def contents(self) -> str:
        """Its quantized layers, in a few words."""
        if self.dialect is not None:
            return f"{self.layers} layers spelled as {self.dialect} does"
        return "cannot be read" if self.is_unreadable else "not quantized"


def weight_bytes(source: Source) -> int:
    """Number of bytes that `verify_source` reads, for a progress bar."""
    return sum(file.stat().st_size for folder in folders_with_weights(source) for file in folder.weight_files())


def verify_source(
    source: Source, reference: Source | None = None, progress: Callable[[int], None] = lambda _: None
) -> list[VerifiedComponent]:
    """Checks every component that has weights; flaws become findings, not errors.

    Args:
        reference: the original model
        progress: called with the number of bytes that were checked since the last call

    Raises:
        CheckpointError: there are no weights; or the reference cannot be read, or is another model.
    """
    folders, stop = folders_with_weights(source), Event()
    with ThreadPoolExecutor(1) as beside:  # while the system has the bytes in memory that the checks of values read
        hashing = beside.submit(check_files, source.path, stop)
        try:
            components = [_verify(folder, reference, progress) for folder in folders]
            return _with_files(components, hashing.result())
        finally:
            stop.set()


def _with_files(
    components: Sequence[VerifiedComponent], found: Sequence[tuple[str, Finding]]
) -> list[VerifiedComponent]:
    """Adds findings about files to the components in whose folders they are, and all others to the first component."""
    folders = {component.name for component in components}
    first = components[0].name if components else ""

    def of(component: VerifiedComponent) -> tuple[Finding, ...]:
        homes = ((path.partition("/")[0] if "/" in path else "", finding) for path, finding in found)
        return tuple(finding for home, finding in homes if (home if home in folders else first) == component.name)

    return [replace(component, findings=(*component.findings, *of(component))) for component in components]


def _verify(component: ComponentFolder, reference: Source | None, progress: Callable[[int], None]) -> VerifiedComponent:
    try:
        checkpoint = component.checkpoint()
    except CheckpointError as error:
        return _unopened(component, error)
    with checkpoint:
        try:
            reading = read_tolerantly(describe(checkpoint, component.folder))
            config = component.config_if_any
        except CheckpointError as error:
            return _unopened(component, error)
        quantized = reading.quantized
        names = names_in_model(checkpoint, config) if quantized.layers else {}
        about_block = check_block(reading, config, names, has_stage=component.stage is not None)
        findings = [*reading.findings, *about_block, *_scope(component, reading)]
        findings += _names(component, reading, config)
        compared = reference if quantized.shown_dialect is not None else None
        with nullcontext() if compared is None else _open_reference(compared, component.name, config) as original:
            comparison = None if original is None else Comparison(quantized, original, config)
            values, untraced = _values(reading, progress, comparison)
        errors = comparison.errors if comparison is not None else {}
        if compared is not None and quantized.layers and not errors:
            raise CheckpointError(
                f"{compared.path}: found none of the {len(quantized.layers)} quantized layers of {checkpoint.path}, "
                "expected the model that it was made of"
            )
        is_damaged = bool(reading.shapes or reading.findings)
        return VerifiedComponent(
            component.name,
            dialect_of_lost_block(component, quantized)
            or (_shown_dialect(reading) if is_damaged else quantized.shown_dialect),
            len(quantized.layers),
            tuple(dict.fromkeys([*findings, *values])),
            errors,
            () if reference is not None else tuple(_unchecked(reading, untraced)),
        )


def _shown_dialect(reading: TolerantReading) -> str | None:
    dialect = reading.quantized.dialect
    return None if dialect is None else DIALECTS[dialect].shown_name(reading.found)


def _unchecked(reading: TolerantReading, untraced: int) -> Iterator[str]:
    """Swapped nibbles leave all statistics of blocks as they are; a common factor looks like another model.

    So does a scale of another layer, where a weight has one, or a few that are alike: codes are as large as they can be
    with any scale.

    Args:
        untraced: number of such layers
    """
    layers = reading.quantized.layers.values()
    if any(bits_of(layer.format) == 4 for layer in layers):
        yield "the order of nibbles"
    if any("mul_scale" in layer.tensors for layer in layers):
        yield "whether mul_scale or one over it is stored"
    if layers:
        yield "a factor that all scales have in common"
    if untraced > 1:
        yield "scales exchanged between layers that have one each"


def _unopened(component: ComponentFolder, error: CheckpointError) -> VerifiedComponent:
    what = str(error).removeprefix(f"{component.path}: ")
    found = Finding("error", "damaged-file", "", what, "every runtime", "")  # the error says which file, and what to do
    return VerifiedComponent(component.name, None, 0, (found,), is_unreadable=True)


def _scope(component: ComponentFolder, reading: TolerantReading) -> list[Finding]:
    """Findings about layers that vLLM-Omni would not build as they are stored, if the component is for it."""
    family, dialect = component.served_family, reading.quantized.dialect
    stage = component.stage
    is_for_vllm_omni = dialect is not None and (DIALECTS[dialect].fills_vllm_omni_parameters or stage is not None)
    if not is_for_vllm_omni or family is None or not reading.shapes:
        return []
    recipe, _ = component.manifest_entry
    is_other = family.is_generic and bool(component.name) and not component.is_denoiser  # such as a VAE
    if is_other or recipe.get("runtime") == "diffusers":  # chosen for our loader
        return []
    about_stage = check_stage(reading, stage, component.config) if stage is not None else ()
    return [*about_stage, *check_scope(reading, family, *_encoder_layers(component.source, family))]


def _names(component: ComponentFolder, reading: TolerantReading, config: dict[str, Any]) -> Iterator[Finding]:
    """Whether names and shapes are those of the model; a SHA-256 in the manifest says more than names do."""
    if component.stage is not None and component.stage.signature is not None:
        return  # the class in the config is not the model's
    if has_converted_names(reading, config):
        yield from check_converted_names(reading, config)
    elif not _is_in_manifest(component, reading.found.checkpoint):
        yield from check_names(reading, config)


def _is_in_manifest(component: ComponentFolder, checkpoint: Checkpoint) -> bool:
    """Whether the manifest has a SHA-256 of every file of the component, which makes a check of names unnecessary."""
    files = component.manifest.get("files")
    return isinstance(files, dict) and all(
        (Path(component.name) / file).as_posix() in files for file in checkpoint.files
    )


def _encoder_layers(source: Source, family: Family) -> tuple[list[str], list[str]]:
    """Linears of the text encoder that the runtime builds from the transformer's block: unquantized and quantized."""
    encoder = ComponentFolder(source, "text_encoder")
    try:
        if family.shared_encoder is None or not encoder.has_config:
            return [], []
        stored: Collection[str] = ()
        if "quantization_config" in encoder.config:
            with encoder.open() as opened:
                stored = opened.layers.keys()
        every = family.shared_encoder_layers(encoder.config)
        unquantized = list(family.shared_encoder_layers(encoder.config, stored))
        return unquantized, [name for name in every if name not in unquantized]
    except CheckpointError:  # the check of the text encoder reports it
        return [], []


def _values(
    reading: TolerantReading, progress: Callable[[int], None], comparison: Comparison | None
) -> tuple[list[Finding], int]:
    """Findings about values, followed by differences from the reference.

    Each tensor is compared right after its values were checked, while the system has its bytes in memory.

    Returns:
        findings; and the number of layers whose scales show no pattern, so that they could belong to another layer
    """
    quantized, checkpoint = reading.quantized, reading.quantized.checkpoint
    findings: list[Finding] = []
    traces: list[ScaleTrace] = []
    untraced = 0
    for layer in quantized.layers.values():
        assert quantized.dialect is not None
        try:
            flaws = check_values(layer, quantized.dialect, progress)
            findings += flaws
            trace = trace_of(layer) if not flaws else None
            traces += [] if trace is None else [trace]
            untraced += trace is None and not flaws
        except CheckpointError as error:
            findings.append(
                Finding("error", "damaged-file", layer.stem, str(error), "every runtime", "download it again")
            )
        if comparison is not None:
            comparison.compare(layer.stored.weight_name)
    findings += exchanged_scales(traces, quantized.dialect) if quantized.dialect is not None else ()
    for name, stored in quantized.kept.items():
        findings += _kept_values(checkpoint, stored)
        progress(checkpoint[stored].nbytes)
        if comparison is not None:
            comparison.compare(name)
    if comparison is not None:
        comparison.compare_rest()
        findings += comparison.findings
    return findings, untraced


def _kept_values(checkpoint: Checkpoint, name: str) -> list[Finding]:
    spec = checkpoint[name]
    if not spec.dtype.is_floating_point or spec.dtype is torch.float8_e8m0fnu:
        return []
    lost = lost_scale(checkpoint, name)
    if lost is not None:
        return [lost]
    if not spec.shape:
        return check_finite(name, iter([checkpoint.read(name)]))
    return check_finite(name, (checkpoint.read_rows(name, *rows) for rows in tile_ranges(spec.shape)))


def _open_reference(reference: Source, name: str, config: dict[str, Any]) -> Checkpoint:
    """The reference's component in plain numbers, under diffusers' names if the config names the model."""
    component = name
    if reference.is_pipeline and not name:
        component = next((each for each in DENOISERS if each in reference.components), "")
    opened = ComponentFolder(reference, component if reference.is_pipeline else "").open()
    return under_diffusers_names(plain_weights(opened), config, opened.dialect)[0]
