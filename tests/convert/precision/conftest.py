"""A fixture that tests of mixed precision share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from omni_convert.convert.calibration.recording import record_source
from omni_convert.convert.recipe import Recipe
from omni_convert.convert.source.location import resolve_source


@pytest.fixture(scope="session")
def record_sensitivity(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Path]:
    """A function of a pipeline's folder: statistics over two prompts, with sensitivity."""

    def record(pipeline: Path) -> Path:
        folder = tmp_path_factory.mktemp("statistics")
        (folder / "prompts.txt").write_text("a red circle\na star")
        recipe = Recipe(calib=folder / "prompts.txt")
        recording = record_source(resolve_source(pipeline), recipe, with_sensitivity=True, progress=False)
        recording.statistics.save(folder / "stats.safetensors")
        return folder / "stats.safetensors"

    return record
