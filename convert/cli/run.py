"""Commands that run pipelines: calibrate, generate, compare."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from omni_convert.convert.cli.options import (
    calibration_options,
    engine_option,
    generation_options,
    given,
    json_option,
    memory_option,
    recipe_of,
    report_option,
    serving_options,
)
from omni_convert.convert.cli.output import announce_demo, command_line, silence_libraries
from omni_convert.formats.errors import CalibrationError, OutputError, RecipeError

if TYPE_CHECKING:
    from omni_convert.convert.comparison.comparison import Comparison, Offload, Variant
    from omni_convert.convert.recipe import Recipe

__all__ = ["calibrate_command", "compare_command", "generate_command"]

RISKY_LAYERS_SHOWN = 8
# The default prompt of vLLM-Omni's comparison tool.
DEFAULT_PROMPT = "a cup of coffee on the table"


@click.command("calibrate")
@click.argument("model", required=False)
@click.option(
    "--calib", type=click.Path(path_type=Path), help="Prompts: one per line, or JSON Lines with prompt and image."
)
@click.option("-o", "--output", type=click.Path(path_type=Path), default="stats.safetensors", show_default=True)
@click.option("--moments", type=click.Path(path_type=Path), help="Also record second moments, into this (large) file.")
@click.option(
    "--imatrix-output", type=click.Path(path_type=Path), help="Also write llama.cpp's importance matrix into this file."
)
@click.option(
    "--sensitivity",
    is_flag=True,
    help="Also record how errors of each layer change the images, which --target-* and analyze need.",
)
@calibration_options
@click.option(
    "--component", multiple=True, metavar="NAME=METHOD", help="Also record this component, e.g. text_encoder=fp8."
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@memory_option
@engine_option
@click.option("--revision", help="Branch, tag or commit on the Hub.")
@click.option("--resume", is_flag=True, help="Continue an interrupted run after the prompts that it has finished.")
@click.option("--overwrite", is_flag=True, help="Replace an earlier file.")
def calibrate_command(
    model: str | None,
    output: Path,
    moments: Path | None,
    imatrix_output: Path | None,
    sensitivity: bool,
    **options: Any,
) -> None:
    """Record the inputs of every linear layer of MODEL.

    The pipeline runs over the prompts. Any later conversion can use the statistics.
    """
    recipe = recipe_of(model, {"ignored_layers": (), **options})
    from omni_convert.convert.calibration.growth import growth_report
    from omni_convert.convert.calibration.recording import record_source
    from omni_convert.convert.plan.gguf_importance import GgufComponent
    from omni_convert.convert.source.location import DEMO_PROMPTS, resolve_source
    from omni_convert.formats.containers.imatrix import write_imatrix

    unfinished = output.with_name(f"{output.name}.unfinished")
    _check_unfinished(unfinished, recipe, moments)
    for option, path in (("output", output), ("moments", moments), ("imatrix-output", imatrix_output)):
        if path is not None and path.exists() and not recipe.overwrite:
            raise OutputError(f"{path}: file exists; use --overwrite, or name another --{option}")
    if recipe.calib is None and model is not None:
        raise CalibrationError("--calib: found no prompts, expected a file with one per line, or JSON Lines")
    prompts_file = recipe.calib or DEMO_PROMPTS
    recipe = replace(recipe, calib=prompts_file)
    silence_libraries()
    source = resolve_source(model, recipe.revision)
    weights = GgufComponent.of(source, recipe) if imatrix_output is not None else None
    recording = record_source(
        source,
        recipe,
        with_moments=moments is not None,
        with_sensitivity=sensitivity,
        keep=unfinished,
        scratch=None if moments is None else moments.absolute().parent,
    )
    statistics = recording.statistics
    statistics.save(output)
    unfinished.unlink(missing_ok=True)
    if imatrix_output is not None and weights is not None:
        entries = weights.importance(statistics)
        prompts = sum(len(run.prompts) for run in statistics.identity.runs)
        write_imatrix(imatrix_output, entries, prompts_file.name, prompts)
        click.echo(f"{imatrix_output}: importance of {len(entries)} weights")
    if moments is not None and recording.moments is not None:
        recording.moments.save(moments)
        click.echo(f"{moments}: {moments.stat().st_size / 1e6:.1f} MB")
    risky = statistics.risky_layers()
    for layer in risky[:RISKY_LAYERS_SHOWN]:
        click.echo(f"Note: {layer}", err=True)
    if len(risky) > RISKY_LAYERS_SHOWN:
        click.echo(f"Note: ... and {len(risky) - RISKY_LAYERS_SHOWN} more layers", err=True)
    for line in growth_report(recording.growth):
        click.echo(f"Note: {line}", err=True)
    click.echo(f"{output}: {len(statistics.layers)} layers, {output.stat().st_size / 1e6:.1f} MB")


def _check_unfinished(unfinished: Path, recipe: Recipe, moments: Path | None) -> None:
    """Refuses to lose what an interrupted run has finished, and to resume what cannot be."""
    if recipe.resume and moments is not None:
        raise RecipeError("--resume: found with --moments, which are not kept while prompts run; leave one of them out")
    if unfinished.exists() and not recipe.resume and not recipe.overwrite:
        raise OutputError(
            f"{unfinished}: an interrupted run left its finished prompts; use --resume to go on, or --overwrite to "
            "start afresh"
        )


@click.command("generate")
@click.argument("model", required=False)
@click.option("--prompt", required=True)
@click.option("--image", type=click.Path(path_type=Path), help="Input image, for pipelines that take one.")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default="out.png",
    show_default=True,
    help=".mp4, .gif or .webp for a video; with .png and others each frame gets a file.",
)
@click.option("--quantization", help="Method to quantize with while loading.")
@click.option("--strict", is_flag=True, help="Fail unless every quantized layer runs a scaled GEMM.")
@generation_options
def generate_command(
    model: str | None,
    prompt: str,
    image: Path | None,
    output: Path,
    quantization: str | None,
    strict: bool,
    seed: int,
    device: str,
    memory: str,
    fps: int,
    flow_shift: float | None,
    **options: Any,
) -> None:
    """Generate an image or a video with MODEL.

    Also prints which kernel each layer runs, and why not a faster one.
    """
    announce_demo(model, "running", quiet=False)
    from omni_convert.convert.calibration.frames import check_frames_path, write_frames

    check_frames_path(output)
    from omni_convert.convert.calibration.generation import GenerationSettings, run_pipeline, set_flow_shift
    from omni_convert.convert.calibration.prompts import Prompt, check_image
    from omni_convert.convert.device import resolve_device
    from omni_convert.convert.source.location import resolve_source
    from omni_convert.loaders import kernel_report, load_pipeline

    source = resolve_source(model)
    asked = GenerationSettings.for_pipeline(source.path, given(options))
    if image is not None:
        check_image("--image", image)
    silence_libraries()
    pipe = load_pipeline(
        source.path, device=resolve_device(device), quantization=quantization, strict=strict, memory=memory
    )
    if flow_shift is not None:
        set_flow_shift(pipe, flow_shift)
    settings = asked.completed(pipe)
    (frames,) = run_pipeline(pipe, [Prompt(prompt, image)], settings, seed)
    files = write_frames(frames, output, fps)
    report = kernel_report(pipe)
    click.echo(
        str(report) if report.layers else "no quantized layers: every layer ran in the dtype in which it is stored"
    )
    where = str(files[0]) if len(files) == 1 else f"{files[0]} to {files[-1].name}"
    what = f"{len(frames)} images of " if len(frames) > 1 else ""
    click.echo(f"{where}: {what}{frames[0].width}x{frames[0].height}, {settings.steps} steps, seed {seed}")


@click.command("compare")
@click.option("--task", type=click.Choice(("t2i", "t2v", "i2i", "i2v")), default="t2i", show_default=True)
@click.option("--model", help="Model for each side that names none of its own.")
@click.option("--reference-model")
@click.option("--candidate-model")
@click.option("--reference-quantization", help="Method to quantize the reference with while loading.")
@click.option("--candidate-quantization", help="Method to quantize the candidate with while loading.")
@click.option("--reference-quantization-config-json", help="JSON object or file; overrides --reference-quantization.")
@click.option("--candidate-quantization-config-json", help="JSON object or file; overrides --candidate-quantization.")
@click.option("--reference-ignored-layers", help="Comma-separated.")
@click.option("--candidate-ignored-layers", "--ignored-layers", help="Comma-separated.")
@click.option("--prompt", multiple=True, help="Repeatable.")
@click.option(
    "--prompts", "prompts_file", type=click.Path(path_type=Path), help="File of prompts in the format of --calib."
)
@click.option("--image", type=click.Path(path_type=Path), help="Input image of the tasks i2i and i2v.")
@click.option("--warmup-runs", type=click.IntRange(0), default=0, show_default=True)
@click.option("--measure-runs", type=click.IntRange(1), default=1, show_default=True)
@click.option("--output-json", type=click.Path(path_type=Path), required=True)
@click.option(
    "--save-output-dir", type=click.Path(path_type=Path), help="Folder for the images or videos, and comparison.png."
)
@serving_options
@click.option("--vae-use-slicing", is_flag=True, help="Decode images one by one.")
@click.option("--vae-use-tiling", is_flag=True, help="Decode images in tiles.")
@click.option("--enable-cpu-offload", is_flag=True, help="Keep models on the CPU until they run.")
@click.option("--enable-layerwise-offload", is_flag=True, help="Keep the blocks of models on the CPU until they run.")
@report_option
@click.option("--model-class-name", help="Class that the pipelines of both models must have.")
@click.option("--quiet", is_flag=True, help="Print only errors.")
@generation_options
def compare_command(
    task: str,
    prompt: tuple[str, ...],
    prompts_file: Path | None,
    image: Path | None,
    warmup_runs: int,
    measure_runs: int,
    output_json: Path,
    save_output_dir: Path | None,
    vae_use_slicing: bool,
    vae_use_tiling: bool,
    enable_cpu_offload: bool,
    enable_layerwise_offload: bool,
    report_file: Path | None,
    model_class_name: str | None,
    quiet: bool,
    seed: int,
    device: str,
    memory: str,
    fps: int,
    flow_shift: float | None,
    **options: Any,
) -> None:
    """Measure how much the images of two models differ.

    Both models run with the same prompts, seeds and settings. The report is written to --output-json, and its main
    figures are printed; null stands for the infinite PSNR of equal images.
    """
    from omni_convert.convert.calibration.prompts import Prompt, check_image, read_prompts
    from omni_convert.convert.comparison.comparison import RunOptions, compare, settings_of
    from omni_convert.convert.device import resolve_device
    from omni_convert.convert.output.manifest import write_json

    silence_libraries()
    reference, candidate = (_variant(label, options) for label in ("reference", "candidate"))
    if image is not None:
        check_image("--image", image)
    prompts = [Prompt(text, image) for text in prompt] + (read_prompts(prompts_file) if prompts_file else [])
    run_options = RunOptions(
        resolve_device(device),
        _offload(device, enable_cpu_offload, enable_layerwise_offload, quiet=quiet),
        flow_shift,
        vae_use_slicing,
        vae_use_tiling,
        memory,
        model_class_name,
    )
    comparison = compare(
        reference,
        candidate,
        prompts or [Prompt(DEFAULT_PROMPT, image)],
        settings_of(reference, given(options)),
        run_options,
        seed=seed,
        task=task,
        warmup_runs=warmup_runs,
        measure_runs=measure_runs,
        save_to=save_output_dir,
        fps=fps,
    )
    report = comparison.report
    write_json(output_json, report)
    if report_file is not None:
        _write_page(report_file, comparison)
    if not quiet:
        _print_summary(report, output_json)


def _write_page(file: Path, comparison: Comparison) -> None:
    from omni_convert.convert.page.document import write_page
    from omni_convert.convert.page.pages import comparison_page

    write_page(file, comparison_page(comparison.report, comparison.pairs(), command_line()))


def _print_summary(report: Mapping[str, Any], output_json: Path) -> None:
    from omni_convert.convert.comparison.metrics import summary_of

    summary = {
        "output_json": str(output_json),
        "reference_avg_generation_time_s": report["reference_generation"]["avg_generation_time_s"],
        "candidate_avg_generation_time_s": report["candidate_generation"]["avg_generation_time_s"],
        **summary_of(report["output_metrics"]),
    }
    click.echo(json.dumps(summary, indent=2, sort_keys=True, allow_nan=False))


def _offload(device: str, cpu: bool, layerwise: bool, *, quiet: bool) -> Offload | None:
    """Which offloading to use; on a CPU none, which a note says."""
    from omni_convert.convert.device import resolve_device

    if cpu and layerwise:
        raise RecipeError("--enable-layerwise-offload: found with --enable-cpu-offload, expected one of the two")
    if not cpu and not layerwise:
        return None
    if resolve_device(device).type == "cpu":
        if not quiet:
            option = "--enable-cpu-offload" if cpu else "--enable-layerwise-offload"
            click.echo(f"Note: {option} has no use here: the pipeline runs on the CPU", err=True)
        return None
    return "model" if cpu else "layerwise"


def _variant(label: str, options: dict[str, Any]) -> Variant:
    """One side of the comparison, from its options."""
    from omni_convert.convert.comparison.comparison import Variant

    quantization: str | dict[str, Any] | None = options[f"{label}_quantization"]
    ignored = options[f"{label}_ignored_layers"]
    if ignored:
        if quantization is None:
            raise RecipeError(f"--{label}-ignored-layers: found without --{label}-quantization, which it refines")
        quantization = {"method": quantization, "ignored_layers": ignored.split(",")}
    document = options[f"{label}_quantization_config_json"]
    if document is not None:
        quantization = json_option(f"--{label}-quantization-config-json", document)
    return Variant(label, options[f"{label}_model"] or options["model"], quantization)
