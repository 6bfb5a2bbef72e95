"""Runs a diffusers pipeline over prompts, for calibration, comparison and generation alike.

Pipelines accept different arguments, which are found in their signatures. Each prompt has its own generator on the CPU,
so that an image depends neither on other prompts nor on the device.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omni_convert.convert.calibration.lockstep import run_jobs
from omni_convert.convert.calibration.prompts import Prompt
from omni_convert.formats.containers.json_file import read_json
from omni_convert.formats.errors import CheckpointError, RecipeError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from PIL.Image import Image
    from torch import Tensor

__all__ = [
    "DEFAULTS_FILE",
    "GenerationSettings",
    "differentiable_images",
    "has_step_callback",
    "run_pipeline",
    "run_prompts",
    "set_flow_shift",
]

DEFAULTS_FILE = "generation_defaults.json"
#: Names in that file, which are diffusers' names of the arguments, and our names of the settings.
DEFAULTS_KEYS = {
    "num_inference_steps": "steps",
    "width": "width",
    "height": "height",
    "num_frames": "frames",
    "guidance_scale": "guidance_scale",
    "guidance_scale_2": "guidance_scale_2",
    "negative_prompt": "negative_prompt",
    "num_images_per_prompt": "images_per_prompt",
    "max_sequence_length": "max_sequence_length",
    "frame_rate": "frame_rate",
    "system_prompt": "system_prompt",
}
#: Names of the scale of classifier-free guidance. Some pipelines also have `guidance_scale` as an input of distilled
#: models, which is None by default.
GUIDANCE_PARAMETERS = ("guidance_scale", "true_cfg_scale", "distilled_guidance_scale")
#: Parts of the names of pipeline classes that need an image even if their signature gives it a default.
IMAGE_CLASSES = ("Edit", "Img2Img", "ImageToVideo")


@dataclass(frozen=True)
class GenerationSettings:
    """Settings of a pipeline run; None leaves the choice to the pipeline.

    Attributes:
        width, height: size in pixels
        frames: number of frames of a video
        guidance_scale: scale of classifier-free guidance, by whatever name the pipeline has for it
        guidance_scale_2: that of the second expert (Wan2.2); None uses the first one's
        max_sequence_length: number of tokens to which a prompt is padded or cut
        frame_rate: frames per second that the model makes a video for (LTX)
        system_prompt: instruction to the text encoder (Lumina 2, LTX-2)

    Raises:
        RecipeError: a number is not positive.
    """

    steps: int | None = None
    width: int | None = None
    height: int | None = None
    frames: int | None = None
    guidance_scale: float | None = None
    negative_prompt: str | None = None
    guidance_scale_2: float | None = None
    images_per_prompt: int = 1
    max_sequence_length: int | None = None
    frame_rate: float | None = None
    system_prompt: str | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "width", "height", "frames", "images_per_prompt", "max_sequence_length", "frame_rate"):
            value = getattr(self, name)
            if value is not None and (value < 1 if name != "frame_rate" else not value > 0):
                raise RecipeError(f"{name}: found {value}, expected a positive number")

    @classmethod
    def for_pipeline(cls, folder: Path, overrides: Mapping[str, Any] | None = None) -> GenerationSettings:
        """The settings in the `generation_defaults.json` of a pipeline, if it has one.

        Args:
            folder: the folder of the pipeline
            overrides: settings by field name; None counts as absent

        Raises:
            CheckpointError: the file is damaged.
            RecipeError: an override is not positive.
        """
        declared = _declared(folder / DEFAULTS_FILE)
        return cls(**(declared | {name: value for name, value in (overrides or {}).items() if value is not None}))

    def completed(self, pipe: DiffusionPipeline) -> GenerationSettings:
        """These settings, with missing ones filled in from the defaults in the pipeline's signature."""
        parameters = _parameters(pipe)
        found: dict[str, Any] = {}
        for setting in fields(self):
            default = parameters[name].default if (name := _parameter_name(setting.name, parameters)) else None
            if getattr(self, setting.name) is None and isinstance(default, int | float | str):
                found[setting.name] = default
        return replace(self, **found)


def run_pipeline(
    pipe: DiffusionPipeline,
    prompts: Sequence[Prompt],
    settings: GenerationSettings,
    seed: int,
    *,
    on_step: Callable[[int], None] | None = None,
    decode: bool = True,
) -> list[list[Image]]:
    """Runs a pipeline over prompts, each with its own noise.

    Args:
        pipe: any text- or image-conditioned diffusers pipeline
        seed: seed of the first prompt's noise; each further prompt's is one higher
        on_step: called after each denoising step with its number, from 0 (see `has_step_callback`)
        decode: turn latents into images; otherwise every prompt gives an empty list

    Returns:
        for each prompt, the frames of its video or its images

    Raises:
        RecipeError: the pipeline does not accept a setting or its value; it accepts no image, or needs one; or it needs
            a package that is not installed.
    """
    runs = [(prompt, seed + offset) for offset, prompt in enumerate(prompts)]
    return run_prompts(pipe, runs, settings, on_step=on_step, decode=decode)


def run_prompts(
    pipe: DiffusionPipeline,
    runs: Sequence[tuple[Prompt, int]],
    settings: GenerationSettings,
    *,
    on_start: Callable[[Prompt], None] = lambda _: None,
    on_step: Callable[[int], None] | None = None,
    on_latents: Callable[[int, Tensor], None] | None = None,
    after_group: Callable[[Sequence[int]], None] = lambda _: None,
    decode: bool = True,
) -> list[list[Image]]:
    """Runs a pipeline over prompts: one at a time, or side by side if it is streamed.

    Callbacks are called in the thread that runs the prompt; only one thread runs at a time.

    Args:
        runs: each prompt and the seed of its noise
        on_start: called before each prompt
        on_step, decode: see `run_pipeline`
        on_latents: called with a prompt's seed and its latents after each denoising step (see `has_step_callback`)
        after_group: called with the positions of prompts that have finished

    Returns:
        see `run_pipeline`, which raises the same errors
    """
    from omni_convert.loaders.loading.streamed import streamer_of  # seconds of imports

    def run(own: DiffusionPipeline, prompt: Prompt, seed: int) -> list[Image]:
        on_start(prompt)
        latents = None if on_latents is None else partial(on_latents, seed)
        return _run(own, prompt, settings, seed, on_step, latents, decode)

    streamer = streamer_of(pipe)
    with _without_bars(pipe):
        own = [pipe if streamer is None else _with_own_state(pipe) for _ in runs]
        jobs = [partial(run, *each) for each in zip(own, *zip(*runs, strict=True), strict=True)]
        return run_jobs(streamer, jobs, after_group)


@contextmanager
def _without_bars(pipe: DiffusionPipeline) -> Iterator[None]:
    """Hides the pipeline's own progress bars."""
    progress = getattr(pipe, "_progress_bar_config", {})
    pipe.set_progress_bar_config(disable=True)
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**progress)


def _with_own_state(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """The same models under a pipeline of its own: pipelines and schedulers keep what belongs to one prompt."""
    own = copy.copy(pipe)
    own.scheduler = copy.deepcopy(pipe.scheduler)
    return own


def set_flow_shift(pipe: DiffusionPipeline, shift: float) -> None:
    """Gives the scheduler another shift of its noise levels.

    Raises:
        RecipeError: the scheduler has none, or computes it from the size of the image.
    """
    config = pipe.scheduler.config
    name = next((name for name in ("flow_shift", "shift") if name in config), None)
    name = None if config.get("use_flow_sigmas") is False else name  # then the shift is there, and not used
    if name is None or config.get("use_dynamic_shifting"):
        reason = "has no shift" if name is None else "computes its shift from the size of the image"
        raise RecipeError(f"flow_shift: found {shift:g}, but {type(pipe.scheduler).__name__} {reason}; leave it out")
    pipe.scheduler = type(pipe.scheduler).from_config(config, **{name: shift})


def has_step_callback(pipe: DiffusionPipeline) -> bool:
    """Whether the pipeline calls back at the end of each denoising step."""
    return "callback_on_step_end" in _parameters(pipe)


def _run(
    pipe: DiffusionPipeline,
    prompt: Prompt,
    settings: GenerationSettings,
    seed: int,
    on_step: Callable[[int], None] | None,
    on_latents: Callable[[Tensor], None] | None,
    decode: bool,
) -> list[Image]:
    arguments = _arguments(pipe, prompt, settings, seed, "pil" if decode else "latent")
    if (on_step is not None or on_latents is not None) and has_step_callback(pipe):
        arguments["callback_on_step_end"] = _step_callback(on_step, on_latents)
    output = _called(pipe, type(pipe).__call__, arguments)
    return list(_frames(output)) if decode else []


def differentiable_images(pipe: DiffusionPipeline, prompt: Prompt, settings: GenerationSettings, seed: int) -> Tensor:
    """The images or frames of one prompt from 0 to 1, with the graph of their computation where gradients are wanted.

    Raises:
        RecipeError: as `run_pipeline`
    """
    import torch

    undecorated = inspect.unwrap(type(pipe).__call__)  # pipelines turn gradients off around it
    with torch.enable_grad(), _without_bars(pipe):
        output = _called(pipe, undecorated, _arguments(pipe, prompt, settings, seed, "pt"))
    images: Tensor = output.frames if hasattr(output, "frames") else output.images
    return images


def _arguments(
    pipe: DiffusionPipeline, prompt: Prompt, settings: GenerationSettings, seed: int, output_type: str
) -> dict[str, Any]:
    import torch

    parameters = _parameters(pipe)
    arguments = _setting_arguments(pipe, parameters, settings) | _image_argument(pipe, parameters, prompt)
    # A new list, since ZImagePipeline writes the chat template into the list that it gets.
    arguments["prompt"] = [prompt.text]
    arguments["generator"] = torch.Generator("cpu").manual_seed(seed)
    arguments["output_type"] = output_type
    return arguments


def _called(pipe: DiffusionPipeline, call: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    """The output of a pipeline's call; raises RecipeError if it does not accept the arguments, or needs a package."""
    try:
        return call(pipe, **arguments)
    except ValueError as error:  # pipelines raise it for invalid arguments
        raise RecipeError(f"{type(pipe).__name__}: {str(error).partition(chr(10))[0]}") from error
    except (ImportError, NameError) as error:  # some use a package without having asked whether it is there
        from omni_convert.loaders.loading.packages import missing_package  # seconds of imports

        raise missing_package(type(pipe).__name__, error) from error


def _step_callback(
    on_step: Callable[[int], None] | None, on_latents: Callable[[Tensor], None] | None
) -> Callable[..., dict[str, Any]]:
    def callback(_pipe: object, step: int, _timestep: object, tensors: dict[str, Any]) -> dict[str, Any]:
        if on_step is not None:
            on_step(step)
        if on_latents is not None and "latents" in tensors:
            on_latents(tensors["latents"])
        return tensors

    return callback


def _parameters(pipe: DiffusionPipeline) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(type(pipe).__call__).parameters


def _parameter_name(setting: str, parameters: Mapping[str, inspect.Parameter]) -> str | None:
    """The pipeline's name of a setting, or None if it has no such setting."""
    if setting == "guidance_scale":
        present = [name for name in GUIDANCE_PARAMETERS if name in parameters]
        return next((name for name in present if parameters[name].default is not None), None)
    name = next(argument for argument, field in DEFAULTS_KEYS.items() if field == setting)
    return name if name in parameters else None


def _setting_arguments(
    pipe: DiffusionPipeline, parameters: Mapping[str, inspect.Parameter], settings: GenerationSettings
) -> dict[str, Any]:
    arguments: dict[str, Any] = {}
    for setting in fields(settings):
        value = getattr(settings, setting.name)
        if value is None or (setting.name == "images_per_prompt" and value == 1):
            continue
        name = _parameter_name(setting.name, parameters)
        if name is None:
            raise RecipeError(f"{setting.name}: found {value!r}, but {type(pipe).__name__} has no such setting")
        arguments[name] = value
    if arguments.get("true_cfg_scale", 0) > 1 and settings.negative_prompt is None:
        arguments["negative_prompt"] = " "  # without one these pipelines ignore the scale
    return arguments


def _image_argument(
    pipe: DiffusionPipeline, parameters: Mapping[str, inspect.Parameter], prompt: Prompt
) -> dict[str, Any]:
    name, parameter = type(pipe).__name__, parameters.get("image")
    if prompt.audio is not None:
        raise RecipeError(f"{prompt.audio}: found a sound, but {name} takes none; leave it out")
    if prompt.image is None:
        is_needed = parameter is not None and (
            parameter.default is inspect.Parameter.empty or any(part in name for part in IMAGE_CLASSES)
        )
        if is_needed:
            raise RecipeError(
                f"'{prompt.text:.40}': found no image, but {name} needs one; use JSON Lines with prompt and image"
            )
        return {}
    if parameter is None:
        raise RecipeError(f"{prompt.image}: found an image, but {name} takes none; leave it out")
    from diffusers.utils import load_image

    return {"image": load_image(str(prompt.image))}


def _frames(output: Any) -> Iterator[Image]:
    """The images of a pipeline's output for one prompt; videos and layered images are nested one level deeper."""
    for entry in output.frames if hasattr(output, "frames") else output.images:
        if isinstance(entry, list | tuple):
            yield from entry
        else:
            yield entry


def _declared(path: Path) -> dict[str, Any]:
    """Settings by field name from a pipeline's file; {} if there is no such file."""
    if not path.is_file():
        return {}
    content = read_json(path)
    declared = {field: content[key] for key, field in DEFAULTS_KEYS.items() if content.get(key) is not None}
    for name, value in declared.items():
        if not _is_sound(name, value):
            raise CheckpointError(f"{path}: found {name} = {value!r:.40}, expected a positive number")
    return declared


def _is_sound(name: str, value: object) -> bool:
    if name in ("negative_prompt", "system_prompt"):
        return isinstance(value, str)
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
        return False
    if name == "frame_rate":
        return value > 0
    return name.startswith("guidance_scale") or (isinstance(value, int) and value > 0)
