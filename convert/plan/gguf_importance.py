"""The importance of a model's columns, as calibration found it, under the names of the GGUF file that we write."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from omni_convert.convert.plan.file_names import FileNames, gguf_names
from omni_convert.convert.recipe import Recipe
from omni_convert.convert.source.component import open_components
from omni_convert.convert.source.component_methods import component_methods
from omni_convert.convert.source.location import Source
from omni_convert.formats.containers.names import WEIGHT
from omni_convert.formats.errors import RecipeError
from omni_convert.formats.schemes.gguf import Gguf
from omni_convert.formats.statistics.statistics import Statistics

__all__ = ["GgufComponent"]


@dataclass(frozen=True)
class GgufComponent:
    """The denoising model of a pipeline, and the names that its GGUF file has."""

    component: str
    names: FileNames

    @classmethod
    def of(cls, source: Source, recipe: Recipe) -> GgufComponent:
        """Chooses the names.

        Raises:
            RecipeError: the recipe calibrates several denoising models, whose weights have equal names.
            CheckpointError: the model is damaged.
        """
        recipe = replace(recipe, method=Gguf.method)
        methods = {name: kind for name, kind in component_methods(source, recipe).items() if kind == Gguf.method}
        if len(methods) != 1:
            raise RecipeError(
                f"--imatrix-output: found {' and '.join(methods) or 'no denoising model'}, expected one: its file has "
                "no names of components; leave the others out with --component NAME=none"
            )
        ((name, component),) = open_components(source, methods, recipe).items()
        return cls(name, gguf_names(component.weights, component.config, recipe))

    def importance(self, statistics: Statistics) -> dict[str, tuple[Tensor, int]]:
        """Each weight whose inputs were recorded → their mean squares, float32 [in], and the number of tokens.

        Raises:
            CalibrationError: an earlier version recorded the statistics, without mean squares.
        """
        found = {
            f"{stem}{WEIGHT}": statistics.importance_inputs(self.component, parts)
            for stem, parts in self.names.layers.items()
        }
        return {name: (each.mean_square(), each.rows_seen) for name, each in found.items() if each is not None}
