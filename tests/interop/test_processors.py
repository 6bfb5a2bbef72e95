"""Calibration on images and sounds, through the processors of transformers, which need torchvision and soundfile."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import wave
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from omni_convert.convert import Recipe, convert_checkpoint
from omni_convert.convert.source.location import resolve_source
from omni_convert.formats.checks.meaning import open_quantized
from omni_convert.formats.errors import CalibrationError
from omni_convert.formats.statistics.statistics import Statistics

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]  # warnings are their own affair

NAMES = ["qwen_3_omni", "qwen_2_5_omni"]
TEXT = {"prompt": "a red circle"}
#: Pixels of the image: 16 patches of 16, or of 14 after resizing to 56; four of them make one token.
SIZE, IMAGE_TOKENS = 64, 4
RATE = 16000


@pytest.fixture(scope="module")
def repository(peer: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function of a family: a tiny repository with a processor; read-only."""
    import tiny_stages  # after `peer`

    folder = tmp_path_factory.mktemp("repositories")

    def saved(name: str) -> Path:
        if not (folder / name).exists():
            tiny_stages.save_repository(name, folder / name)
        return folder / name

    return saved


@pytest.fixture
def media(tmp_path: Path) -> Path:
    """A folder with an image and half a second of a tone."""
    from PIL import Image

    gradient = torch.arange(SIZE * SIZE * 3, dtype=torch.float32).remainder(251).reshape(SIZE, SIZE, 3)
    Image.fromarray(gradient.byte().numpy()).save(tmp_path / "picture.png")
    tone = (torch.arange(RATE // 2) * 440 * 2 * torch.pi / RATE).sin() * 20000
    with wave.open(str(tmp_path / "tone.wav"), "wb") as file:
        file.setparams((1, 2, RATE, 0, "NONE", "none"))
        file.writeframes(tone.short().numpy().tobytes())
    return tmp_path


def prompts(folder: Path, *entries: dict[str, str]) -> Path:
    path = folder / "prompts.jsonl"
    path.write_text("".join(f"{json.dumps(entry)}\n" for entry in entries))
    return path


def recorded(source: Path, calib: Path, memory: str = "full") -> Statistics:
    from omni_convert.convert.calibration.recording import record_source  # after `peer`

    recipe = Recipe(calib=calib, device="cpu", memory=memory)
    return record_source(resolve_source(source), recipe, progress=False).statistics


@pytest.fixture
def language_model_inputs(peer: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What the first attention of each language model read, [1, tokens, hidden] for each prompt."""
    from omni_convert.convert.calibration import stage_recorder  # after `peer`

    seen: list[Tensor] = []
    load = stage_recorder._loaded_stage

    def watched(*arguments: Any) -> Any:
        model = load(*arguments)
        first = model.get_decoder().layers[0].self_attn.q_proj
        first.register_forward_pre_hook(lambda _module, args: seen.append(args[0].detach().float()))
        return model

    monkeypatch.setattr(stage_recorder, "_loaded_stage", watched)
    return seen


@pytest.mark.parametrize("kind", ["image", "audio"])
@pytest.mark.parametrize("name", NAMES)
def test_tokens_of_images_and_sounds_reach_the_language_model(
    name: str, kind: str, repository: Callable[[str], Path], media: Path, language_model_inputs: list[Tensor]
) -> None:
    file = {"image": "picture.png", "audio": "tone.wav"}[kind]
    text = recorded(repository(name), prompts(media, TEXT))
    with_file = recorded(repository(name), prompts(media, {**TEXT, kind: file}))
    plain, mixed = language_model_inputs
    count = mixed.shape[1] - plain.shape[1] - 2  # without the tokens around them
    assert count == IMAGE_TOKENS if kind == "image" else count > 0
    rows = mixed[0, 1 : 1 + count]
    assert rows.isfinite().all()
    assert len(rows.unique(dim=0)) > 1  # outputs of the tower, not the embedding of one placeholder
    assert text.layers.keys() <= with_file.layers.keys()
    changed = [stem for stem, layer in text.layers.items() if layer.amax() != with_file.layers[stem].amax()]
    assert changed


@pytest.mark.parametrize("name", NAMES)
def test_a_streamed_stage_gives_the_same_statistics_of_images_and_sounds(
    name: str, repository: Callable[[str], Path], media: Path
) -> None:
    calib = prompts(media, TEXT, {**TEXT, "image": "picture.png", "audio": "tone.wav"})
    full, streamed = (recorded(repository(name), calib, memory) for memory in ("full", "stream"))
    assert full.layers
    assert full.fingerprint() == streamed.fingerprint()


@pytest.mark.parametrize("name", NAMES)
def test_prompts_of_text_are_run_as_in_a_file_of_text_alone(
    name: str, repository: Callable[[str], Path], media: Path, language_model_inputs: list[Tensor]
) -> None:
    recorded(repository(name), prompts(media, TEXT))
    recorded(repository(name), prompts(media, TEXT, {**TEXT, "image": "picture.png"}))
    assert language_model_inputs[0].equal(language_model_inputs[1])


def test_conversions_take_their_scales_from_images_and_sounds(
    repository: Callable[[str], Path], media: Path, tmp_path: Path
) -> None:
    entry = {**TEXT, "image": "picture.png", "audio": "tone.wav"}
    calib = prompts(media, entry)
    convert_checkpoint(repository("qwen_2_5_omni"), tmp_path / "out", Recipe(calib=calib))
    layers = recorded(repository("qwen_2_5_omni"), calib).layers
    with open_quantized(tmp_path / "out") as quantized:
        assert quantized.layers
        for stem, layer in quantized.layers.items():
            if stem.endswith("o_proj"):
                scale = float(layer.read_tensor("input_scale", 0, 0))
                assert scale * 448 == pytest.approx(layers[f".{stem}"].amax(), rel=1e-3)


def test_a_sound_that_cannot_be_decoded_is_one_line(repository: Callable[[str], Path], media: Path) -> None:
    (media / "tone.wav").write_bytes(b"no sound")
    with pytest.raises(CalibrationError, match="cannot read its image or sound") as caught:
        recorded(repository("qwen_3_omni"), prompts(media, {**TEXT, "audio": "tone.wav"}))
    assert "\n" not in str(caught.value)


def test_a_repository_without_a_processor_is_one_line(
    repository: Callable[[str], Path], media: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "without"
    shutil.copytree(repository("qwen_3_omni"), folder)
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(CalibrationError, match="found no processor of images and sounds") as caught:
        recorded(folder, prompts(media, {**TEXT, "image": "picture.png"}))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("package", ["soundfile", "soxr", "torchvision"])
def test_a_package_that_is_not_installed_is_named_with_its_extra(
    package: str, repository: Callable[[str], Path], media: Path
) -> None:
    hidden = f"import sys; sys.modules[{package!r}] = None; sys.path.insert(0, 'scripts'); import vllm_omni_runtime; "
    started = "vllm_omni_runtime.declare_operators(); from omni_convert.convert.cli.main import main; main()"
    calib = prompts(media, {**TEXT, "audio": "tone.wav"})
    arguments = ("calibrate", repository("qwen_2_5_omni"), "--calib", calib, "-o", media / "statistics.safetensors")
    command = [sys.executable, "-W", "ignore", "-c", hidden + started, *map(str, arguments)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 1, run.stderr
    message = run.stderr.strip().splitlines()[-1]
    assert message.startswith("Error: ")
    assert message.endswith(f"found no package {package}, which it needs; pip install 'omni-convert[pipelines]'")
