"""The entrance to calibration: a source and a recipe become statistics, on this machine or on a cluster."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from omni_convert.convert.calibration.cluster_recorder import record_on_cluster
from omni_convert.convert.calibration.pipeline_recorder import PipelineRecorder, Recording
from omni_convert.convert.calibration.prompts import read_prompts
from omni_convert.convert.calibration.stage_recorder import StageRecorder
from omni_convert.convert.recipe import Recipe
from omni_convert.convert.source.component_folder import ComponentFolder
from omni_convert.convert.source.location import Source
from omni_convert.formats.containers.checkpoint import Checkpoint
from omni_convert.formats.errors import CalibrationError

__all__ = ["record_source"]

#: Prompts over which sensitivity is recorded, which takes several times as long as running them.
DIFFERENTIATED_PROMPTS = 16


def record_source(
    source: Source,
    recipe: Recipe,
    weights: Mapping[str, Checkpoint] | None = None,
    *,
    with_moments: bool = False,
    with_sensitivity: bool = False,
    progress: bool = True,
    keep: Path | None = None,
    scratch: Path | None = None,
) -> Recording:
    """Loads a pipeline and runs it over the recipe's prompts.

    Args:
        weights: component to its weights, if they are open already; machines of a cluster open them themselves
        with_sensitivity: record how errors of layers change the images, over the first of the prompts
        keep: a file for the statistics of finished prompts, see `PipelineRecorder.record`; one that exists is removed
            unless the recipe says to resume. A cluster and a language model by itself keep none.
        scratch: folder for the second moments of a model that is streamed; None keeps them in memory

    Raises:
        CalibrationError: the source is no pipeline; there are no prompts; the pipeline computes NaN.
        RecipeError: the pipeline does not take a setting.
        CheckpointError: the pipeline cannot be loaded.
        ClusterError: the cluster does not answer, or its machines are lost too often.
    """
    assert recipe.calib is not None, "the caller names the prompts"
    prompts = read_prompts(recipe.calib)[: recipe.calib_prompts]
    if ComponentFolder(source, "").stage is not None:
        if recipe.is_distributed:
            raise CalibrationError(
                f"{source.path}: found --engine {recipe.engine}, expected local for one language model"
            )
        if with_sensitivity:
            raise CalibrationError(
                f"{source.path}: found a language model, expected a pipeline that makes images for --sensitivity"
            )
        is_text = all(prompt.is_text for prompt in prompts)
        stage = StageRecorder.load(source, recipe, weights, is_text=is_text, with_moments=with_moments, scratch=scratch)
        return stage.record(prompts, progress=progress)
    if not source.is_pipeline:
        raise CalibrationError(
            f"{source.path}: found no pipeline (model_index.json), which calibrating has to run; give the whole "
            f"pipeline, or --calibration with its statistics"
        )
    differentiated = DIFFERENTIATED_PROMPTS if with_sensitivity else 0
    if recipe.is_distributed:
        return record_on_cluster(source, recipe, prompts, differentiated, with_moments=with_moments, progress=progress)
    if keep is not None and not recipe.resume:
        keep.unlink(missing_ok=True)
    recorder = PipelineRecorder.load(source, recipe, weights, with_moments=with_moments, scratch=scratch)
    return recorder.record(prompts, prompts[:differentiated], progress=progress, keep=keep)
