"""The plan of one component: its steps, files and config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from omni_convert.convert.calibration.activation_scheme import ActivationScheme
from omni_convert.convert.plan.steps import KeptLayer, QuantizeStep, Step, outputs
from omni_convert.convert.recipe import Recipe
from omni_convert.convert.source.component_folder import ComponentFolder
from omni_convert.formats.containers.checkpoint import Checkpoint
from omni_convert.formats.containers.names import layer_of
from omni_convert.formats.containers.safetensors_header import FORMAT_PT
from omni_convert.formats.containers.safetensors_writer import Safetensors
from omni_convert.formats.containers.shards import Shards, plan_shards
from omni_convert.formats.dialects.table import DIALECTS
from omni_convert.formats.errors import CalibrationError, listed
from omni_convert.formats.families.layers import LayerGroup
from omni_convert.formats.families.stage import Stage, without_block

if TYPE_CHECKING:
    from omni_convert.formats.statistics.statistics import Statistics

__all__ = ["ComponentPlan", "plan_files", "replace_config"]


@dataclass(frozen=True)
class ComponentPlan:
    """How one component of the pipeline is converted.

    Attributes:
        name: the component's folder, or "" when the model is a single component
        dialect: name of the dialect that it is written in
        config: config.json as it will be written, with its `quantization_config`
        shards: output files and the tensors of each
        transcoded: layer → its format in the source, for layers that are re-encoded or dequantized
        sidecars: JSON files that the dialect has beside the weights: name → content
        notes: what the user should know about how the recipe was read
        scheme: how activations are quantized; None in a plan that knows no statistics
        is_mixed: a budget chose the format of each layer
    """

    name: str
    method: str
    dialect: str
    checkpoint: Checkpoint
    steps: tuple[Step, ...]
    kept: tuple[KeptLayer, ...]
    config: dict[str, Any]
    shards: Shards
    transcoded: Mapping[str, str] = field(default_factory=dict)
    sidecars: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    scheme: ActivationScheme | None = None
    is_mixed: bool = False

    @property
    def quantize_steps(self) -> list[QuantizeStep]:
        return [step for step in self.steps if isinstance(step, QuantizeStep)]

    @property
    def quantized_stems(self) -> list[str]:
        """Layers that are quantized in the output."""
        stems = [stem for step in self.quantize_steps for stem in step.group.members]
        return stems + (list(self.transcoded) if self.method == "keep" else [])

    @property
    def unproven(self) -> str | None:
        """What no reader of the result has shown yet; None if they have run such files."""
        return DIALECTS[self.dialect].unproven if self.quantized_stems else None

    def with_statistics(self, statistics: Statistics, input_scale: str) -> ComponentPlan:
        """This plan with the inputs of its layers, if it has a use for them; nothing else changes.

        Args:
            input_scale: the recipe's rule, for notes

        Raises:
            CalibrationError: a layer was not recorded, though its format cannot do without; or an earlier version
                recorded no mean squares, which are wanted.
        """
        if self.scheme is None or not self.scheme.uses_statistics:
            return self
        needs_all = self.scheme.needs_every_layer
        inputs_if_any = statistics.importance_inputs if self.scheme.is_importance else statistics.for_group
        inputs_of = statistics.inputs_of if needs_all else inputs_if_any
        unreached = self._unreached_experts(statistics) if needs_all else {}
        recorded = {step.group: step.recorded for step in self.quantize_steps} | unreached
        inputs = {stems: inputs_of(self.name, stems) for stems in dict.fromkeys(recorded.values())}
        steps = tuple(
            step.with_inputs(inputs[recorded[step.group]]) if isinstance(step, QuantizeStep) else step
            for step in self.steps
        )
        notes: list[str] = []
        if not needs_all:
            notes = _coverage_notes([step for step in steps if isinstance(step, QuantizeStep)], self.scheme)
        elif self.scheme.name == "static":
            notes = statistics.risk_notes(self.name, self.quantized_stems, input_scale)
        if unreached:
            names = listed([group.runtime_name for group in unreached], 3)
            notes = [
                *notes,
                f"no token reached {names}: the inputs of the other experts of their layers set the scales",
            ]
        return replace(self, steps=steps, notes=(*self.notes, *notes))

    def _unreached_experts(self, statistics: Statistics) -> dict[LayerGroup, tuple[str, ...]]:
        """Experts whose inputs were not recorded → stems of the same layer of the experts beside them that were."""
        reached: dict[tuple[str, str], list[str]] = {}
        unreached: dict[LayerGroup, tuple[str, str]] = {}
        for step in self.quantize_steps:
            if step.group.stack is None:
                continue
            kind = step.group.stack, step.group.runtime_name.rpartition(".")[2]
            if all(f"{self.name}.{stem}" in statistics.layers for stem in step.recorded):
                reached.setdefault(kind, []).append(step.recorded[0])
            else:
                unreached[step.group] = kind
        return {group: tuple(reached[kind]) for group, kind in unreached.items() if kind in reached}

    @property
    def bytes_before(self) -> int:
        return sum(spec.nbytes for file in self.checkpoint.files.values() for spec in file.specs.values())

    @property
    def bytes_to_do(self) -> int:
        """Size of the tensors that the steps read, in bytes; a quantized source counts as dequantized."""
        return sum(spec.nbytes for spec in self.checkpoint.values())

    @property
    def bytes_after(self) -> int:
        return sum(spec.nbytes for specs in self.shards.files.values() for spec in specs)

    @property
    def methods(self) -> set[str]:
        """The methods of its layers, or what is done to the component where it is not quantized here."""
        return {step.format.method for step in self.quantize_steps} or {self.method}

    @property
    def labels(self) -> dict[str, str]:
        """The label of the format of each layer that is quantized here."""
        return {stem: step.format.label for step in self.quantize_steps for stem in step.group.members}

    @property
    def file_bytes(self) -> int:
        """Size of the files of weights, headers included."""
        return sum(self.shards.container.size(specs) for specs in self.shards.files.values())


def _coverage_notes(steps: Sequence[QuantizeStep], scheme: ActivationScheme) -> list[str]:
    """Notes on layers whose inputs were not recorded.

    Raises:
        CalibrationError: there are no others, and the statistics were asked for.
    """
    missing = [step.group.runtime_name for step in steps if step.inputs is None]
    if not missing:
        return []
    if len(missing) == len(steps) and scheme.needs_some_layer:
        raise CalibrationError(f"{missing[0]}: the statistics do not cover any layer of its component; calibrate it")
    what = "whose columns weigh the same" if scheme.is_importance else "whose weights are rounded to nearest"
    return [f"the statistics do not cover {listed(missing, 3)}, {what}"]


def plan_files(
    steps: Sequence[Step], recipe: Recipe, metadata: Mapping[str, str], component: ComponentFolder
) -> Shards:
    """Distributes a component over files; some dialects and some stages have a single one."""
    specs = outputs(steps)
    dialect, is_written = DIALECTS[recipe.dialect], recipe.method != "dequantize"
    is_single = dialect.is_single_file and is_written
    has_others = component.stage is not None and bool(component.stage.other_weights)
    nbytes = sum(spec.nbytes for spec in specs)
    limit = nbytes + 1 if is_single or has_others else recipe.max_shard_size
    weights_name = "model.safetensors" if component.is_transformers else "diffusion_pytorch_model.safetensors"
    unit_of = layer_of if dialect.keeps_layers_whole and is_written else str
    shards = plan_shards(specs, limit, weights_name, unit_of)
    needs_index = component.stage is not None and component.stage.signature is not None
    if needs_index and shards.index is None:
        shards = plan_shards(specs, nbytes // 2, weights_name, unit_of)
    return replace(shards, container=Safetensors({**FORMAT_PT, **metadata}))


def replace_config(
    config: Mapping[str, Any], block: Mapping[str, Any] | None, stage: Stage | None = None
) -> dict[str, Any]:
    """A config.json with this block, or without one.

    Args:
        stage: whose block it is, if it does not stand at the top level
    """
    if stage is not None:
        return stage.with_block(config, block) if block is not None else without_block(config)
    rest = {key: value for key, value in config.items() if key != "quantization_config"}
    return {**rest, "quantization_config": dict(block)} if block is not None else rest
