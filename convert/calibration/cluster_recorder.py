"""Calibration on a Ray cluster: prompts are distributed over pipelines, one per GPU or machine; statistics are merged.

The noise of a prompt depends only on the prompt and the seed, and statistics merge exactly. So the result is that of
one process, provided that all use the same kind of device and number of threads. Second moments are sums, whose last
bits depend on the order of adding.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace

import torch

from omni_convert.convert.calibration.pipeline_recorder import PipelineRecorder, Recording
from omni_convert.convert.calibration.prompts import Prompt
from omni_convert.convert.cluster import check_versions, connect, versions
from omni_convert.convert.progress_bar import progress_bar
from omni_convert.convert.recipe import Recipe
from omni_convert.convert.source.location import Source
from omni_convert.formats.errors import OmniConvertError

__all__ = ["record_on_cluster"]

# Each pipeline gets several shares of the prompts, so that none waits long for the last, and a failure costs little.
SHARES_A_PIPELINE = 4


class _Pipeline:
    """A pipeline on one of the machines, loaded for the first prompts."""

    def __init__(
        self, source: Source, recipe: Recipe, threads: int, expected: dict[str, str], with_moments: bool
    ) -> None:
        self._arguments = (source, recipe)
        self._threads = threads
        self._versions = expected
        self._with_moments = with_moments
        self._recorder: PipelineRecorder | None = None

    def run(
        self, prompts: Sequence[Prompt], differentiated: Sequence[Prompt]
    ) -> tuple[int, Recording] | OmniConvertError:
        """The number of prompts and their recording, or the error that occurred."""
        try:
            if self._recorder is None:
                check_versions(self._versions, platform.node())
                torch.set_num_threads(self._threads)
                self._recorder = PipelineRecorder.load(*self._arguments, with_moments=self._with_moments)
            return len(prompts), self._recorder.record(prompts, differentiated)
        except OmniConvertError as error:
            return error


def record_on_cluster(
    source: Source,
    recipe: Recipe,
    prompts: Sequence[Prompt],
    differentiated: int = 0,
    *,
    with_moments: bool,
    progress: bool,
) -> Recording:
    """Records over prompts on the cluster that the recipe names; raises as `record_source`.

    Args:
        differentiated: number of prompts, from the first, over which sensitivity is recorded, too
    """
    source = replace(source, path=source.path.absolute())
    prompts = [prompt.absolute() for prompt in prompts]
    size = sum(file.stat().st_size for file in source.path.rglob("*.safetensors"))
    bar = progress_bar("calibrating", len(prompts), "prompt", hidden=not progress, stays=False)
    with connect(recipe.engine) as cluster, bar as advance:
        device = cluster.device(recipe.device)
        recipe = replace(recipe, device=str(device))
        slots = cluster.slots(recipe.workers, needs_gpu=device.type == "cuda")
        shares = min(len(prompts), SHARES_A_PIPELINE * slots.count)
        calls = [(prompts[share::shares], prompts[:differentiated][share::shares]) for share in range(shares)]
        arguments = (source, recipe, slots.cores, versions(), with_moments)
        merged: Recording | None = None
        with closing(cluster.on_actors(_Pipeline, arguments, calls, slots, size)) as results:
            for count, recording in results:
                merged = recording if merged is None else merged.merge(recording)
                advance(count)
    assert merged is not None, "there are prompts"
    return merged
