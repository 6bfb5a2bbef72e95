"""A calibration that was interrupted gives the bytes of one that was not."""

from pathlib import Path

import pytest

from omni_convert.convert.calibration import finished_prompts
from omni_convert.convert.calibration.generation import GenerationSettings
from omni_convert.convert.calibration.lockstep import Lockstep
from omni_convert.convert.calibration.pipeline_recorder import PipelineRecorder
from omni_convert.convert.calibration.prompts import Prompt
from omni_convert.formats.errors import CalibrationError, RecipeError
from omni_convert.formats.statistics.statistics import Statistics
from omni_convert.loaders import load_pipeline

SETTINGS = GenerationSettings(steps=2, width=32, height=32, guidance_scale=2.0)
PROMPTS = [Prompt("a red circle"), Prompt("a star"), Prompt("a star"), Prompt("a ring")]


def recorder(folder: Path, memory: str, *components: str, steps: int = 2) -> PipelineRecorder:
    settings = GenerationSettings(steps=steps, width=32, height=32, guidance_scale=2.0)
    return PipelineRecorder(load_pipeline(folder, memory=memory), settings, components=components)


@pytest.fixture
def always_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finished_prompts, "SECONDS", 0.0)


@pytest.fixture
def room_for_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Lockstep, "_room_for", lambda *_: 2)


@pytest.mark.usefixtures("always_written")
@pytest.mark.parametrize("memory", ["full", "stream"])
def test_an_interrupted_calibration_continues_after_the_finished_prompts(
    memory: str, tiny_pipeline_folder: Path, tmp_path: Path
) -> None:
    components = ("transformer", "text_encoder")
    keep = tmp_path / "unfinished"
    whole = recorder(tiny_pipeline_folder, memory, *components).record(PROMPTS).statistics
    first = recorder(tiny_pipeline_folder, memory, *components)
    first.record(PROMPTS[:2], keep=keep)
    assert [len(run.prompts) for run in Statistics.load(keep).identity.runs] == [2]
    resumed = recorder(tiny_pipeline_folder, memory, *components).record(PROMPTS, keep=keep)
    assert resumed.statistics.fingerprint() == whole.fingerprint()
    again = recorder(tiny_pipeline_folder, memory, *components).record(PROMPTS, keep=keep)
    assert again.statistics.fingerprint() == whole.fingerprint()


@pytest.mark.usefixtures("always_written")
def test_prompts_before_a_failure_are_kept(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    keep = tmp_path / "unfinished"
    (tmp_path / "a.png").write_bytes(b"an image, which this pipeline does not take")
    failing = Prompt("a ring", tmp_path / "a.png")
    with pytest.raises(RecipeError, match="found an image, but ZImagePipeline takes none"):
        recorder(tiny_pipeline_folder, "full", "transformer").record([*PROMPTS[:2], failing], keep=keep)
    assert [len(run.prompts) for run in Statistics.load(keep).identity.runs] == [2]


@pytest.mark.usefixtures("always_written", "room_for_two")
@pytest.mark.parametrize(("components", "kept"), [(("transformer",), 2), (("transformer", "text_encoder"), None)])
def test_a_group_that_has_finished_is_kept(
    components: tuple[str, ...],
    kept: int | None,
    tiny_pipeline_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    keep = tmp_path / "unfinished"
    written: list[int] = []
    save = Statistics.save
    monkeypatch.setattr(
        Statistics,
        "save",
        lambda self, path: (written.append(sum(len(run.prompts) for run in self.identity.runs)), save(self, path)),
    )
    recorder(tiny_pipeline_folder, "stream", *components).record(PROMPTS, keep=keep)
    assert written == [kept, 4] if kept else [4]


@pytest.mark.usefixtures("always_written")
def test_another_calibration_is_not_continued(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    keep = tmp_path / "unfinished"
    recorder(tiny_pipeline_folder, "full", "transformer").record(PROMPTS[:1], keep=keep)
    for prompts, steps in ((PROMPTS, 3), (PROMPTS[1:], 2)):
        with pytest.raises(CalibrationError, match="found finished prompts of another calibration"):
            recorder(tiny_pipeline_folder, "full", "transformer", steps=steps).record(prompts, keep=keep)
