"""The command line: parses, calls the library, prints. Every import of torch waits until a command needs it."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click_default_group import DefaultGroup

from omni_convert.convert.readahead import start_reading
from omni_convert.convert.recipe import (
    ACTIVATION_SCHEMES,
    DIALECT_NAMES,
    DTYPES,
    GGUF_TYPES,
    METHODS,
    ROUNDINGS,
    RUNTIMES,
    LoraRequest,
    Recipe,
)
from omni_convert.formats.errors import CalibrationError, OmniConvertError, OutputError, RecipeError

if TYPE_CHECKING:
    from omni_convert.convert.comparison import Variant

__all__ = ["main"]

Command = TypeVar("Command", bound=Callable[..., Any])

# A bar appears when the work has taken this many seconds.
PROGRESS_DELAY = 2.0
RISKY_LAYERS_SHOWN = 8
# What vLLM-Omni's tool of the same purpose draws when it is told nothing.
DEFAULT_PROMPT = "a cup of coffee on the table"


class _Group(DefaultGroup):  # type: ignore[misc]  # click-default-group has no types
    """Turns the user's errors into one line and exit status 1, an interruption into 130."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except OmniConvertError as error:
            click.echo(f"Error: {error}", err=True)
            ctx.exit(1)
        except KeyboardInterrupt:
            click.echo("Error: interrupted", err=True)
            ctx.exit(130)


class _Pair(click.ParamType):  # type: ignore[type-arg]  # generic only since click 8.5
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


@click.group(
    cls=_Group, default="convert", default_if_no_args=True, context_settings={"help_option_names": ["-h", "--help"]}
)
@click.version_option(package_name="omni-convert")
@click.option("-v", "--verbose", is_flag=True, help="Log what is done.")
def main(verbose: bool) -> None:
    """Quantize diffusion pipelines offline, and run the result.

    `omni-convert MODEL -m fp8` is short for `omni-convert convert MODEL -m fp8`. Without MODEL the bundled demo
    pipeline is converted.
    """
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(levelname)s: %(message)s")


def _calibration_options(command: Command) -> Command:
    """The options that say how the pipeline runs while statistics are recorded."""
    for option in reversed(
        [
            click.option("--calib-steps", type=click.IntRange(1), help="Denoising steps per prompt."),
            click.option("--calib-size", type=_Pair("x", "WxH"), metavar="WxH", help="Image size in pixels."),
            click.option("--calib-frames", type=click.IntRange(1), help="Frames per video."),
            click.option("--calib-prompts", type=click.IntRange(1), help="Use only the first N prompts."),
            click.option("--seed", type=int, default=0, show_default=True, help="Seed of the noise."),
        ]
    ):
        command = option(command)
    return command


def _engine_option(command: Command) -> Command:
    return click.option(
        "--engine",
        default="local",
        show_default=True,
        help="local, ray (the cluster of this machine, or its cores), ray://HOST:PORT or HOST:PORT.",
    )(command)


@main.command("convert")
@click.argument("model", required=False)
@click.option(
    "-m",
    "--method",
    default="fp8",
    show_default=True,
    help=f"One of {', '.join(METHODS)}; or keep: spell a quantized model in another --dialect.",
)
@click.option(
    "--dialect", type=click.Choice(DIALECT_NAMES), default="vllm-omni", show_default=True, help="On-disk spelling."
)
@click.option("-o", "--output", help="Folder, or a URL for fsspec. Default: ./<model name>-<method>.")
@click.option("--calib", type=click.Path(path_type=Path), help="Prompts to calibrate on: one a line, or JSON Lines.")
@click.option(
    "--calibration",
    type=click.Path(path_type=Path),
    multiple=True,
    help="Statistics file to reuse; several are merged.",
)
@_calibration_options
@click.option("--activation-scheme", type=click.Choice(ACTIVATION_SCHEMES), help="Default: static with statistics.")
@click.option("--input-scale", default="max", show_default=True, help="max, mse or percentile:P.")
@click.option("--weight-block-size", type=_Pair(",", "N,K"), metavar="N,K", help="Block-wise FP8, e.g. 128,128.")
@click.option(
    "--ignored-layers", multiple=True, metavar="PATTERN", help="Name, fnmatch pattern or dotted part; or a JSON list."
)
@click.option("--component", multiple=True, metavar="NAME=METHOD", help="e.g. text_encoder=fp8, transformer_2=none.")
@click.option("--recommended", is_flag=True, help="Apply the ignored layers recommended for this model family.")
@click.option(
    "--runtime", type=click.Choice(RUNTIMES), default="vllm-omni", show_default=True, help="Whose layer scope to obey."
)
@click.option("--int8-fused-scales", type=click.Choice(("shared", "per-row")), default="shared", show_default=True)
@click.option("--scale-rule", metavar="NAME", help="MX exponent rule: floor, ceil, rceil, even, uos, mse, msmodelslim.")
@click.option("--group-size", type=int, metavar="N", help="Columns that share a scale with w4a16: 32, 64 or 128.")
@click.option("--gguf-type", type=click.Choice(GGUF_TYPES), help="Of quantized tensors with gguf. Default: Q8_0.")
@click.option("--no-search", "search", flag_value=False, default=True, help="Take scales by rule, do not search them.")
@click.option("--moments", type=click.Path(path_type=Path), multiple=True, help="Second moments for --rounding.")
@click.option("--rounding", type=click.Choice(ROUNDINGS), help="Of weights. Default: auto with moments, else nearest.")
@click.option(
    "--bf16-blocks", type=click.IntRange(0), help="Leading blocks kept in BF16; Wan with dual-scale: 5, else 0."
)
@click.option("--force", is_flag=True, help="Override a refusal that names this option.")
@click.option(
    "--lora", multiple=True, metavar="[NAME=]FILE[:SCALE]", help="Bake this LoRA in, into component NAME; repeatable."
)
@click.option("--dtype", type=click.Choice(DTYPES), help="Recast unquantized floats; default: keep.")
@click.option("--max-shard-size", default="5GB", show_default=True)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@_engine_option
@click.option("--revision", help="Branch, tag or commit on the Hub.")
@click.option("--workers", type=int, metavar="N", help="Threads to use; default: one a core.")
@click.option("--resume", is_flag=True, help="Go on where an interrupted run stopped.")
@click.option("--overwrite", is_flag=True, help="Replace an earlier output.")
@click.option("--verify-source", is_flag=True, help="Put the full hashes of the source into the manifest.")
@click.option(
    "--keep-source",
    is_flag=True,
    help="Download a model on the Hub as a whole, and keep it; implied by --calib, --calibration and --engine ray.",
)
@click.option("--push-to-hub", metavar="REPO_ID", help="Upload the result to the Hub.")
@click.option("--private", is_flag=True, help="With --push-to-hub: only you see it.")
@click.option("--dry-run", is_flag=True, help="Print the plan and write nothing.")
@click.option("--quiet", is_flag=True, help="No progress, no table.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def convert_command(
    model: str | None, output: str | None, dry_run: bool, quiet: bool, as_json: bool, **options: Any
) -> None:
    """Convert MODEL: a diffusers folder, a Hub repo id, a component folder or a .safetensors file."""
    _convert(model, output, _recipe(model, options), dry_run=dry_run, quiet=quiet, as_json=as_json)


@main.command("dequantize")
@click.argument("model", metavar="PATH")
@click.option("-o", "--output", help="Folder, or a URL for fsspec. Default: ./<model name>-dequantized.")
@click.option("--component", multiple=True, metavar="NAME=none", help="A component to leave as it is.")
@click.option(
    "--lora", multiple=True, metavar="[NAME=]FILE[:SCALE]", help="Bake this LoRA in, into component NAME; repeatable."
)
@click.option("--dtype", type=click.Choice(DTYPES), help="Of the result; default: bfloat16, and the rest as it is.")
@click.option("--max-shard-size", default="5GB", show_default=True)
@click.option("--revision", help="Branch, tag or commit on the Hub.")
@click.option("--workers", type=int, metavar="N", help="Threads to use; default: one a core.")
@click.option("--resume", is_flag=True, help="Go on where an interrupted run stopped.")
@click.option("--overwrite", is_flag=True, help="Replace an earlier output.")
@click.option("--dry-run", is_flag=True, help="Print the plan and write nothing.")
@click.option("--quiet", is_flag=True, help="No progress, no table.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def dequantize_command(
    model: str, output: str | None, dry_run: bool, quiet: bool, as_json: bool, **options: Any
) -> None:
    """Give the quantized model at PATH back in BF16, whatever tool made it."""
    recipe = _recipe(model, {"method": "dequantize", "ignored_layers": (), "calib": None, **options})
    _convert(model, output, recipe, dry_run=dry_run, quiet=quiet, as_json=as_json)


def _convert(
    model: str | None, output: str | None, recipe: Recipe, *, dry_run: bool, quiet: bool, as_json: bool
) -> None:
    _announce_demo(model, "converting", quiet=quiet or as_json)
    if model is not None and not dry_run:
        start_reading(Path(model))
    from omni_convert.convert.source import resolve_source

    _quieten_hub(hide_bars=quiet or as_json)
    source = resolve_source(model, recipe.revision, stream=recipe.streams_source)
    from omni_convert.convert.conversion import (
        check_target,
        convert_plan,
        load_statistics,
        planned_without_running,
        prepare_push,
    )
    from omni_convert.convert.plan import plan_conversion
    from omni_convert.convert.remote_folder import output_of
    from omni_convert.convert.report import conversion_report, plan_report
    from omni_convert.convert.upload import push_output

    target = output_of(output or f"{source.short_name}-{recipe.outcome}")
    if dry_run:
        _print_lines(plan_report(planned_without_running(source, recipe), as_json=as_json))
        return
    check_target(target, recipe)
    if recipe.calib is not None:
        _silence_libraries()
    repository = prepare_push(source, recipe)
    recorded = load_statistics(source, recipe)
    plan = plan_conversion(source, recipe, recorded)
    for note in () if quiet or as_json else plan.notes:
        click.echo(f"Note: {note}", err=True)
    with _progress(plan.bytes_to_do, "converting", hidden=quiet) as advance:
        report = convert_plan(plan, target, recorded, advance)
    if as_json or not quiet:
        _print_lines(conversion_report(report, as_json=as_json))
    if repository is not None and isinstance(target, Path):
        address = push_output(target, repository)
        click.echo(address, err=quiet or as_json)


@main.command("inspect")
@click.argument("model", metavar="PATH")
@click.option("--revision", help="Branch, tag or commit on the Hub.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def inspect_command(model: str, revision: str | None, as_json: bool) -> None:
    """Show what is inside the model at PATH, and what runtimes would do with it; no weight is read."""
    _quieten_hub(hide_bars=True)
    from omni_convert.convert.inspection import inspect_source, inspection_report
    from omni_convert.convert.source import resolve_source

    source = resolve_source(model, revision, stream=True)
    _print_lines(inspection_report(source, inspect_source(source), as_json=as_json))


@main.command("verify")
@click.argument("model", metavar="PATH")
@click.option("--reference", metavar="MODEL", help="The model it was made of; every layer is compared with it.")
@click.option("--revision", help="Branch, tag or commit on the Hub, of PATH.")
@click.option("--quiet", is_flag=True, help="Only the exit status.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def verify_command(model: str, reference: str | None, revision: str | None, quiet: bool, as_json: bool) -> None:
    """Check every value and name of the quantized model at PATH, whatever tool made it.

    Exit status 1 if a runtime would fail with it or compute something else, 0 else.
    """
    _quieten_hub(hide_bars=quiet or as_json)
    from omni_convert.convert.source import resolve_source
    from omni_convert.convert.verification import verify_source, weight_bytes
    from omni_convert.convert.verification_report import count_of, verification_report

    source = resolve_source(model, revision)
    original = resolve_source(reference) if reference is not None else None
    with _progress(weight_bytes(source), "verifying", hidden=quiet) as advance:
        components = verify_source(source, original, advance)
    if as_json or not quiet:
        _print_lines(verification_report(source.path, components, as_json=as_json))
    if count_of(components, "error"):
        click.get_current_context().exit(1)


@main.command("push")
@click.argument("path", type=click.Path(path_type=Path))
@click.argument("repo_id")
@click.option("--private", is_flag=True, help="Only you see it.")
@click.option("--revision", help="Branch to upload to; default: main.")
@click.option("--quiet", is_flag=True, help="No progress.")
def push_command(path: Path, repo_id: str, private: bool, revision: str | None, quiet: bool) -> None:
    """Upload PATH, a finished conversion, to REPO_ID on the Hub.

    The repository is created if it is not there, and shows the model when all of it has arrived. After an interruption
    the same command sends what is missing.
    """
    from omni_convert.convert.upload import push_to_hub

    _quieten_hub(hide_bars=quiet)
    click.echo(push_to_hub(path, repo_id, private=private, revision=revision))


def _quieten_hub(*, hide_bars: bool) -> None:
    """The client's warnings about what it tries again hold URLs, which may be signed; ours say what is left to say."""
    from huggingface_hub.utils.logging import set_verbosity
    from huggingface_hub.utils.tqdm import disable_progress_bars

    set_verbosity(logging.ERROR)
    for requests in ("httpx", "httpx2"):
        logging.getLogger(requests).setLevel(logging.WARNING)
    if hide_bars or not sys.stderr.isatty():
        disable_progress_bars()


def _recipe(model: str | None, options: dict[str, Any]) -> Recipe:
    """The options as a `Recipe`; they have the same names."""
    components = {}
    for item in options.pop("component"):
        name, equals, method = item.partition("=")
        if not equals:
            raise RecipeError(f"--component: found '{item}', expected NAME=METHOD")
        components[name] = method
    patterns = [pattern for text in options.pop("ignored_layers") for pattern in _patterns(text)]
    options["calib"] = _prompts_file(model, options["calib"])
    options["lora"] = tuple(LoraRequest.parse(text) for text in options.get("lora", ()))
    return Recipe(component=components, ignored_layers=tuple(patterns), **options)


def _patterns(text: str) -> list[str]:
    """One pattern, or a JSON list of them as serving engines take it."""
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
    """The prompts to use; the bundled ones when neither a model nor an existing file is named."""
    from omni_convert.convert.source import DEMO_PROMPTS

    if calib is None or calib.exists():
        return calib
    if model is None:
        click.echo(f"{calib} does not exist: using the demo's own calibration prompts", err=True)
        return DEMO_PROMPTS
    raise CalibrationError(f"{calib}: file missing, expected prompts, one a line or JSON Lines")


def _announce_demo(model: str | None, what: str, *, quiet: bool) -> None:
    if model is None and not quiet:
        click.echo(f"No model named: {what} the bundled demo pipeline", err=True)


def _silence_libraries() -> None:
    """No bars of other libraries while a pipeline loads: ours tell what there is to tell."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()


@contextlib.contextmanager
def _progress(total: int, what: str, *, hidden: bool) -> Iterator[Callable[[int], None]]:
    """A bar on standard error, if that is a terminal and the work is not done in two seconds."""
    from tqdm import tqdm

    with tqdm(
        total=total,
        desc=what,
        unit="B",
        unit_scale=True,
        delay=PROGRESS_DELAY,
        disable=hidden or not sys.stderr.isatty(),
    ) as bar:
        yield bar.update


def _print_lines(lines: Iterable[str]) -> None:
    for line in lines:
        click.echo(line)


@main.command("calibrate")
@click.argument("model", required=False)
@click.option(
    "--calib", type=click.Path(path_type=Path), help="Prompts: one a line, or JSON Lines with prompt and image."
)
@click.option("-o", "--output", type=click.Path(path_type=Path), default="stats.safetensors", show_default=True)
@click.option("--moments", type=click.Path(path_type=Path), help="Record second moments, too, into this (large) file.")
@_calibration_options
@click.option(
    "--component", multiple=True, metavar="NAME=METHOD", help="Record another component too: text_encoder=fp8."
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@_engine_option
@click.option("--revision", help="Branch, tag or commit on the Hub.")
@click.option("--overwrite", is_flag=True, help="Replace an earlier file.")
def calibrate_command(model: str | None, output: Path, moments: Path | None, **options: Any) -> None:
    """Run MODEL over prompts and record the statistics of every linear layer's input."""
    recipe = _recipe(model, {"ignored_layers": (), **options})
    from omni_convert.convert.calibration import record_source
    from omni_convert.convert.source import DEMO_PROMPTS, resolve_source

    for option, path in (("output", output), ("moments", moments)):
        if path is not None and path.exists() and not recipe.overwrite:
            raise OutputError(f"{path}: file exists; use --overwrite, or name another --{option}")
    if recipe.calib is None:
        if model is not None:
            raise CalibrationError("--calib: found no prompts, expected a file with one a line or JSON Lines")
        recipe = replace(recipe, calib=DEMO_PROMPTS)
    _silence_libraries()
    recording = record_source(resolve_source(model, recipe.revision), recipe, with_moments=moments is not None)
    statistics = recording.statistics
    statistics.save(output)
    if moments is not None and recording.moments is not None:
        recording.moments.save(moments)
        click.echo(f"{moments}: {moments.stat().st_size / 1e6:.1f} MB")
    risky = statistics.risky_layers()
    for layer in risky[:RISKY_LAYERS_SHOWN]:
        click.echo(f"Note: {layer}", err=True)
    if len(risky) > RISKY_LAYERS_SHOWN:
        click.echo(f"Note: ... and {len(risky) - RISKY_LAYERS_SHOWN} more layers", err=True)
    click.echo(f"{output}: {len(statistics.layers)} layers, {output.stat().st_size / 1e6:.1f} MB")


def _generation_options(command: Command) -> Command:
    """The options that say how a pipeline runs; left out, the pipeline's own defaults hold."""
    for option in reversed(
        [
            click.option("--steps", "--num-inference-steps", "steps", type=click.IntRange(1), help="Denoising steps."),
            click.option("--width", type=click.IntRange(1)),
            click.option("--height", type=click.IntRange(1)),
            click.option("--num-frames", "frames", type=click.IntRange(1), help="Frames of a video."),
            click.option("--guidance-scale", "--cfg-scale", "guidance_scale", type=float),
            click.option("--negative-prompt"),
            click.option("--seed", type=int, default=42, show_default=True),
            click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N."),
        ]
    ):
        command = option(command)
    return command


SETTINGS = ("steps", "width", "height", "frames", "guidance_scale", "negative_prompt")


@main.command("generate")
@click.argument("model", required=False)
@click.option("--prompt", required=True)
@click.option("--image", type=click.Path(exists=True, path_type=Path), help="For pipelines that take an image.")
@click.option("-o", "--output", type=click.Path(path_type=Path), default="out.png", show_default=True)
@click.option("--quantization", help="Quantize while loading: a method.")
@click.option("--strict", is_flag=True, help="Fail unless every quantized layer runs a scaled GEMM.")
@_generation_options
def generate_command(
    model: str | None,
    prompt: str,
    image: Path | None,
    output: Path,
    quantization: str | None,
    strict: bool,
    seed: int,
    device: str,
    **options: Any,
) -> None:
    """Load MODEL, make an image of a prompt, and tell which kernels ran."""
    _announce_demo(model, "running", quiet=False)
    _check_picture_path(output)
    from omni_convert.convert.device import resolve_device
    from omni_convert.convert.generation import GenerationSettings, run_pipeline
    from omni_convert.convert.prompts import Prompt
    from omni_convert.convert.source import resolve_source
    from omni_convert.loaders import kernel_report, load_pipeline

    source = resolve_source(model)
    settings = GenerationSettings.for_pipeline(source.path, _given(options))
    _silence_libraries()
    pipe = load_pipeline(source.path, device=resolve_device(device), quantization=quantization, strict=strict)
    ((frame, *_),) = run_pipeline(pipe, [Prompt(prompt, image)], settings, seed)
    try:
        frame.save(output)
    except (OSError, ValueError) as error:
        raise OutputError(f"{output}: cannot be written ({error})") from None
    report = kernel_report(pipe)
    click.echo(str(report) if report.layers else "no quantized layers: everything ran as it is stored")
    click.echo(f"{output}: {frame.width}x{frame.height}, {settings.steps} steps, seed {seed}")


def _check_picture_path(path: Path) -> None:
    """What is wrong with it must show before minutes of work."""
    from PIL import Image

    if Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
        raise OutputError(f"{path}: found no ending of a picture, expected one like .png")
    if not path.absolute().parent.is_dir():
        raise OutputError(f"{path}: found no folder {path.parent}, expected an existing one; create it first")


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {name: options[name] for name in SETTINGS if options.get(name) is not None}


@main.command("compare")
@click.option("--task", type=click.Choice(("t2i", "t2v")), default="t2i", show_default=True)
@click.option("--model", help="Used for a side that names no model of its own.")
@click.option("--reference-model")
@click.option("--candidate-model")
@click.option("--reference-quantization", help="Quantize the reference while loading: a method.")
@click.option("--candidate-quantization", help="Quantize the candidate while loading: a method.")
@click.option("--reference-quantization-config-json", help="JSON object or file; overrides --reference-quantization.")
@click.option("--candidate-quantization-config-json", help="JSON object or file; overrides --candidate-quantization.")
@click.option("--reference-ignored-layers", help="Comma-separated.")
@click.option("--candidate-ignored-layers", "--ignored-layers", help="Comma-separated.")
@click.option("--prompt", multiple=True, help="Repeatable.")
@click.option("--prompts", "prompts_file", type=click.Path(path_type=Path), help="A file of prompts, as for --calib.")
@click.option("--warmup-runs", type=click.IntRange(0), default=0, show_default=True)
@click.option("--measure-runs", type=click.IntRange(1), default=1, show_default=True)
@click.option("--output-json", type=click.Path(path_type=Path), required=True)
@click.option("--save-output-dir", type=click.Path(path_type=Path), help="For the images and comparison.png.")
@_generation_options
def compare_command(
    task: str,
    prompt: tuple[str, ...],
    prompts_file: Path | None,
    warmup_runs: int,
    measure_runs: int,
    output_json: Path,
    save_output_dir: Path | None,
    seed: int,
    device: str,
    **options: Any,
) -> None:
    """Run the same prompts through two pipelines and measure how far apart the images are."""
    from omni_convert.convert.comparison import compare, settings_of
    from omni_convert.convert.device import resolve_device
    from omni_convert.convert.manifest import write_json
    from omni_convert.convert.prompts import Prompt, read_prompts

    _silence_libraries()
    reference, candidate = (_variant(label, options) for label in ("reference", "candidate"))
    prompts = [Prompt(text) for text in prompt] + (read_prompts(prompts_file) if prompts_file else [])
    comparison = compare(
        reference,
        candidate,
        prompts or [Prompt(DEFAULT_PROMPT)],
        settings_of(reference, _given(options)),
        seed=seed,
        task=task,
        device=resolve_device(device),
        warmup_runs=warmup_runs,
        measure_runs=measure_runs,
        save_to=save_output_dir,
    )
    report = comparison.report
    write_json(output_json, report)
    first = report["output_metrics"]["image0_metrics"]
    summary = {
        "output_json": str(output_json),
        "reference_avg_generation_time_s": report["reference_generation"]["avg_generation_time_s"],
        "candidate_avg_generation_time_s": report["candidate_generation"]["avg_generation_time_s"],
        "image0_psnr_db": first["psnr_db"],
        "image0_mae": first["mae"],
    }
    click.echo(json.dumps(summary, indent=2, sort_keys=True))


def _variant(label: str, options: dict[str, Any]) -> Variant:
    """One side of a comparison from its options."""
    from omni_convert.convert.comparison import Variant

    quantization: str | dict[str, Any] | None = options[f"{label}_quantization"]
    ignored = options[f"{label}_ignored_layers"]
    if ignored:
        if quantization is None:
            raise RecipeError(f"--{label}-ignored-layers: found without --{label}-quantization, which it refines")
        quantization = {"method": quantization, "ignored_layers": ignored.split(",")}
    document = options[f"{label}_quantization_config_json"]
    if document is not None:
        quantization = _json_option(f"--{label}-quantization-config-json", document)
    return Variant(label, options[f"{label}_model"] or options["model"], quantization)


def _json_option(option: str, text: str) -> dict[str, Any]:
    """A JSON object given on the command line, or a file that holds one."""
    from omni_convert.formats.json_file import read_json

    if not text.lstrip().startswith("{"):
        return read_json(Path(text))
    try:
        return dict(json.loads(text))
    except ValueError as error:
        raise RecipeError(f"{option}: found invalid JSON ({error}), expected an object or a file") from None


if __name__ == "__main__":
    main()
