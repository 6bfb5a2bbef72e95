"""Options that several commands share, and the parsing of their values."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import Field, fields
from pathlib import Path
from typing import Any, TypeVar

import click

from omni_convert.convert.recipe import LoraRequest, Recipe
from omni_convert.formats.errors import CalibrationError, RecipeError
from omni_convert.formats.options import FormatChoices, check_memory

__all__ = [
    "Pair",
    "budget_options",
    "calibration_options",
    "engine_option",
    "format_options",
    "formats_option",
    "generation_options",
    "given",
    "json_option",
    "memory_option",
    "recipe_of",
    "report_option",
    "serving_options",
]

Command = TypeVar("Command", bound=Callable[..., Any])

#: The file in the README's example, which runs without a model even if the file is missing.
EXAMPLE_PROMPTS = "prompts.txt"
#: Options of serving engines that split a model over devices.
PARALLEL_OPTIONS = (
    *("--tensor-parallel-size", "--ulysses-degree", "--ring-degree"),
    *("--cfg-parallel-size", "--vae-patch-parallel-size"),
)
SETTINGS = (
    *("steps", "width", "height", "frames", "guidance_scale", "guidance_scale_2"),
    *("negative_prompt", "images_per_prompt", "frame_rate", "system_prompt"),
)
#: Options of vLLM-Omni's comparison tool that no pipeline of diffusers has a parameter for: type, and the value that
#: changes nothing.
WITHOUT_PARAMETER: tuple[tuple[str, Any, Any], ...] = (
    ("--timesteps-shift", float, 1.0),
    ("--cfg-schedule", click.Choice(("constant", "linear")), "constant"),
    ("--use-system-prompt", str, "None"),
)
#: Reasons for those that need more words.
WITHOUT_PARAMETER_REASONS = {
    "--timesteps-shift": "no pipeline of diffusers has such a parameter; --flow-shift shifts the scheduler's noise "
    "levels",
    "--use-system-prompt": "it names a system prompt of HunyuanImage-3.0, for which diffusers has no pipeline; Cosmos "
    "3's uses its own system prompt unless its model_index.json says otherwise",
}


class Pair(click.ParamType):  # type: ignore[type-arg]  # generic only since click 8.5
    """Two whole numbers: `128,128` or `1024x768`."""

    def __init__(self, separator: str, name: str) -> None:
        self.separator = separator
        self.name = name

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        try:
            first, second = (int(part) for part in str(value).split(self.separator))
        except ValueError:
            self.fail(f"found '{value}', expected {self.name}", param, ctx)
        return first, second


def calibration_options(command: Command) -> Command:
    """Adds the options for running a pipeline while statistics are recorded."""
    for option in reversed(
        [
            click.option("--calib-steps", type=click.IntRange(1), help="Denoising steps per prompt."),
            click.option("--calib-size", type=Pair("x", "WxH"), metavar="WxH", help="Image size in pixels."),
            click.option("--calib-frames", type=click.IntRange(1), help="Frames per video."),
            click.option("--calib-prompts", type=click.IntRange(1), help="Use only the first N prompts."),
            click.option("--seed", type=int, default=0, show_default=True, help="Seed of the noise."),
        ]
    ):
        command = option(command)
    return command


def format_options(command: Command) -> Command:
    """The options of `FormatChoices`, which formats declare."""
    for choice in reversed(fields(FormatChoices)):
        command = _format_option(choice)(command)
    return command


def _format_option(choice: Field[Any]) -> Callable[[Command], Command]:
    name, declared = choice.name.replace("_", "-"), choice.metadata
    if choice.default is True:
        return click.option(f"--no-{name}", choice.name, flag_value=False, default=True, help=declared["help"])
    if choice.default is False:
        return click.option(f"--{name}", choice.name, is_flag=True, help=declared["help"])
    kinds = {"int | None": click.INT, "tuple[int, int] | None": Pair(",", "N,K")}
    return click.option(
        f"--{name}",
        type=click.Choice(declared["choices"]) if declared["choices"] else kinds.get(str(choice.type)),
        default=choice.default,
        show_default=choice.default is not None,
        metavar=declared["metavar"],
        help=declared["help"],
    )


def memory_option(command: Command) -> Command:
    """Adds `--memory`."""
    return click.option(
        "--memory",
        default="auto",
        show_default=True,
        callback=_check_memory,
        metavar="auto|full|stream[:GB]",
        help="stream: keep weights in their files and read each block when it runs, in about so many GB; "
        "auto: stream if they do not fit.",
    )(command)


def _check_memory(_context: click.Context, option: click.Parameter, value: str) -> str:
    check_memory(value, option.opts[0])
    return value


def formats_option(command: Command) -> Command:
    """Adds `--formats`."""
    return click.option(
        "--formats",
        metavar="NAME,...",
        default="",
        help="What a budget chooses from, as in nvfp4,fp8,bf16; with gguf its types. Default: what the dialect mixes.",
    )(command)


def budget_options(command: Command) -> Command:
    """Adds the options of `BudgetOptions`."""
    for option in reversed(
        [
            click.option(
                "--target-size",
                metavar="SIZE",
                help="Mix formats: files of weights have at most this size, as in 12GB.",
            ),
            click.option(
                "--target-noise", type=float, metavar="RATIO", help="Mix formats: images have at most this noise ratio."
            ),
            click.option(
                "--target-bits",
                type=float,
                metavar="N",
                help="Mix formats: weights have at most so many bits on average.",
            ),
            click.option(
                "--target-speed",
                type=float,
                metavar="X",
                help="Mix formats: linears take at most this part of BF16's time.",
            ),
            formats_option,
            click.option("--analysis", type=click.Path(path_type=Path), help="Table that analyze stored."),
            click.option(
                "--trial",
                type=click.Path(path_type=Path),
                metavar="FILE",
                help="Run these prompts with several choices of the budget; take the nearest to the images before.",
            ),
        ]
    ):
        command = option(command)
    return command


def report_option(command: Command) -> Command:
    """Adds `--report`."""
    return click.option(
        "--report",
        "report_file",
        type=click.Path(path_type=Path, dir_okay=False),
        metavar="FILE.html",
        help="Also write a report for a browser: one file that needs no network.",
    )(command)


def engine_option(command: Command) -> Command:
    """Adds `--engine`."""
    return click.option(
        "--engine",
        default="local",
        show_default=True,
        help="local, ray (the cluster of this machine, or its cores), ray://HOST:PORT or HOST:PORT.",
    )(command)


def generation_options(command: Command) -> Command:
    """Adds the options for generating images; the pipeline's own defaults replace missing ones."""
    for option in reversed(
        [
            click.option("--steps", "--num-inference-steps", "steps", type=click.IntRange(1), help="Denoising steps."),
            click.option("--width", type=click.IntRange(1)),
            click.option("--height", type=click.IntRange(1)),
            click.option("--num-frames", "frames", type=click.IntRange(1), help="Frames of a video."),
            click.option("--guidance-scale", "--cfg-scale", "guidance_scale", type=float),
            click.option("--guidance-scale-2", type=float, help="Of the second expert (Wan2.2)."),
            click.option("--flow-shift", type=float, help="Shift of the scheduler's noise levels."),
            click.option("--negative-prompt"),
            click.option("--system-prompt", help="Instruction to the text encoder, of pipelines that take one."),
            click.option("--frame-rate", type=float, help="Frames per second that the model makes a video for."),
            click.option("--num-images-per-prompt", "images_per_prompt", type=click.IntRange(1)),
            click.option(
                "--fps",
                type=click.IntRange(1),
                default=24,
                show_default=True,
                help="Frames per second of saved videos.",
            ),
            click.option("--seed", type=int, default=42, show_default=True),
            click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N."),
            memory_option,
        ]
    ):
        command = option(command)
    return command


def serving_options(command: Command) -> Command:
    """Adds options of serving engines that have one value here; commands do not get them."""
    for name in PARALLEL_OPTIONS:
        command = click.option(
            name, type=int, default=1, expose_value=False, callback=_require_one, help="1: one device runs each model."
        )(command)
    for name, kind, neutral in WITHOUT_PARAMETER:
        command = click.option(
            name, type=kind, default=neutral, expose_value=False, callback=_require_default, help=f"{neutral} alone."
        )(command)
    for name, help_text in (
        ("--use-norm", "Refused: no pipeline of diffusers has it."),
        ("--step-execution/--no-step-execution", "Accepted: how a server schedules steps, which changes no image."),
    ):
        callback = _require_default if name == "--use-norm" else None
        command = click.option(
            name, is_flag=True, default=False, expose_value=False, callback=callback, help=help_text
        )(command)
    for side in ("reference", "candidate"):
        command = click.option(
            f"--{side}-load-format", type=click.Choice(("default",)), default="default", expose_value=False
        )(command)
    help_text = "Accepted: pipelines always run eagerly here."
    return click.option("--enforce-eager", is_flag=True, expose_value=False, help=help_text)(command)


def _require_one(_context: click.Context, option: click.Parameter, value: int) -> None:
    if value != 1:
        raise RecipeError(f"{option.opts[0]}: found {value}, but one device runs each model, expected 1")


def _require_default(_context: click.Context, option: click.Parameter, value: Any) -> None:
    if value != option.default:
        name = option.opts[0]
        reason = WITHOUT_PARAMETER_REASONS.get(name, "no pipeline of diffusers has such a parameter")
        raise RecipeError(f"{name}: found {value}, but {reason}")


def given(options: dict[str, Any]) -> dict[str, Any]:
    """The generation settings that the user gave."""
    return {name: options[name] for name in SETTINGS if options.get(name) is not None}


def json_option(option: str, text: str) -> dict[str, Any]:
    """A JSON object from the command line, or from a file that is named there."""
    from omni_convert.formats.containers.json_file import read_json

    if not text.lstrip().startswith("{"):
        return read_json(Path(text))
    try:
        return dict(json.loads(text))
    except ValueError as error:
        raise RecipeError(f"{option}: found invalid JSON ({error}), expected an object or a file") from None


def recipe_of(model: str | None, options: dict[str, Any]) -> Recipe:
    """A `Recipe` from the options of a command, which have the names of its fields."""
    components = {}
    for item in options.pop("component"):
        name, equals, method = item.partition("=")
        if not equals:
            raise RecipeError(f"--component: found '{item}', expected NAME=METHOD or NAME=FILE")
        components[name] = method
    patterns = [pattern for text in options.pop("ignored_layers") for pattern in _patterns(text)]
    options["formats"] = tuple(filter(None, (options.get("formats") or "").split(",")))
    options["calib"] = _prompts_file(model, options["calib"])
    options["runtime"] = options.get("runtime") or ""
    options["lora"] = tuple(LoraRequest.parse(text) for text in options.get("lora", ()))
    return Recipe(component=components, ignored_layers=tuple(patterns), **options)


def _patterns(text: str) -> list[str]:
    """One pattern, or the patterns of a JSON list, which serving engines accept too."""
    if not text.startswith("["):
        return [text]
    try:
        patterns = json.loads(text)
    except ValueError as error:
        raise RecipeError(f"--ignored-layers: found {text!r}, expected a JSON list of strings ({error})") from None
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise RecipeError(f"--ignored-layers: found {text!r}, expected a JSON list of strings")
    return list(patterns)


def _prompts_file(model: str | None, calib: Path | None) -> Path | None:
    """The file of prompts; the bundled one if the README's example is run without the file."""
    from omni_convert.convert.source.location import DEMO_PROMPTS

    if calib is None or calib.exists():
        return calib
    if model is None and calib == Path(EXAMPLE_PROMPTS):
        click.echo(f"{calib} does not exist: using the demo's own calibration prompts", err=True)
        return DEMO_PROMPTS
    raise CalibrationError(f"{calib}: file missing, expected prompts, one per line or JSON Lines")
